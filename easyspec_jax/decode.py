"""Generation from the host's side: check the request, size the buffers, run the loop, read the
answer.

`Decoder.generate` is one donated while_loop on the device; `Decoder.stream` drives the same step
one call at a time. Shapes come in buckets, so requests of similar length share a compilation.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from easyspec_jax import loop
from easyspec_jax.cache import KVCache, abstract_cache, zeros
from easyspec_jax.config import Sampling, is_integer
from easyspec_jax.drafters.base import Drafter, DraftOptions
from easyspec_jax.memory import check_memory, decode_budget
from easyspec_jax.model import Model
from easyspec_jax.profile import phase_seconds
from easyspec_jax.request import Request, check_pair, check_stop_strings, make_request
from easyspec_jax.sampling import make_filters
from easyspec_jax.sharding import replicate
from easyspec_jax.stats import Counters, Stats, count, make_stats
from easyspec_jax.text import TextStream

# A prompt is absorbed in pieces of the smallest that holds it, else of the largest.
PREFILL_CHUNKS = (16, 64, 256)


@dataclasses.dataclass(frozen=True)
class Generation:
    """What `Decoder.generate` returns."""

    tokens: list[list[int]]  # new tokens per prompt; a stop id that ended a row is its last token
    stats: Stats
    logprobs: list[list[float]] | None = None  # log p of the base at temperature 1, unfiltered
    drafter_report: dict[str, Any] = dataclasses.field(default_factory=dict)  # its own counters


class Piece(list):
    """The token ids of one step of `Decoder.stream`; the first `num_accepted` of them came from the
    draft.
    """

    def __init__(self, ids: Sequence[int], num_accepted: int):
        super().__init__(ids)
        self.num_accepted = num_accepted


class Session:
    """A row of decoding that outlives one `stream` call: caches stay, so a longer prompt costs only
    its new part.
    """

    def __init__(self, max_len: int | None = None):
        """Room for `max_len` tokens in all calls together; None sizes it by the first call."""
        self.max_len = max_len
        self.stats = make_stats(Counters.zeros(1, 0))  # of the last call
        self._tokens: list[int] = []  # what caches hold, prompt and answers
        self._absorbed = 0  # leading tokens that both caches hold
        self._state: loop.DecodeState | None = None  # None too while its buffers are in use
        self._owner: Decoder | None = None
        self._turn: object = None  # of the request it serves now

    @property
    def drafter_report(self) -> dict[str, Any]:
        """The drafter's own counters, as `Generation.drafter_report`; {} before a first request."""
        state = self._state
        if state is None or state.draft is None:
            return {}
        return self._owner.drafter.report(state.draft)


class Decoder:
    """Lossless decoding of `base`, alone or ahead of a drafter."""

    def __init__(
        self,
        base: Model,
        drafter: Drafter | None = None,
        *,
        num_draft_tokens: int = 5,
        tree_width: int = 1,
        min_draft_probability: float | None = None,
    ):
        """Pair a base with a drafter.

        Args:
          base: the model whose distribution is kept.
          drafter: None decodes autoregressively.
          num_draft_tokens: γ, depth of the draft: tokens a step may accept (at most, for drafters
            that choose).
          tree_width: w, draft tokens at each depth; 1 is a chain.
          min_draft_probability: drafting stops early once even the likeliest path has a smaller
            probability under the draft model (the product along it, after temperature and filters
            when sampling). The base is then compiled for a few depths, and on a GPU each of them
            costs a host synchronisation a step. None never stops.

        Raises:
          ValueError: a bad γ, w or probability, a base in groups, models on different meshes, or
            different tokenizers.
        """
        check_pair(base, drafter, num_draft_tokens, tree_width, min_draft_probability)
        self.base, self.drafter = base, drafter
        self.num_draft_tokens = int(num_draft_tokens) if drafter is not None else 0
        self.tree_width = int(tree_width) if drafter is not None else 1
        self.min_draft_probability = min_draft_probability or None

    @property
    def _num_nodes(self) -> int:
        """Nodes of one step's draft."""
        return self.num_draft_tokens * self.tree_width

    def generate(
        self,
        prompts: Sequence[Sequence[int]] | np.ndarray | jax.Array,
        *,
        max_new_tokens: int,
        sampling: Sampling = Sampling(),  # noqa: B008
        eos_ids: Sequence[int] = (),
        seed: int = 0,
        logprobs: bool = False,
    ) -> Generation:
        """Continue every prompt until a stop id, `max_new_tokens` or the end of the base's context.

        Args:
          prompts: lists of token ids of any lengths, or i32[B, T]. Rows draw independently, equal
            prompts too.
          max_new_tokens: at least 1.
          sampling: greedy by default.
          eos_ids: any of these ends its row and stays its last token.
          seed: same seed, same mesh, same result.
          logprobs: also return the base's log-probability of every new token.

        Raises:
          ValueError: a bad prompt or option, or a request the devices cannot hold; nothing is
            allocated then.
        """
        request = make_request(
            self.base.config, prompts, max_new_tokens, sampling, eos_ids, seed, logprobs
        )
        state, specs = self._prefilled(request)
        state = loop.run_loop(self.base, self.drafter, state, specs=specs)
        host = jax.device_get((state.tokens, state.length, state.logprobs))
        new = [slice(len(row), int(end)) for row, end in zip(request.rows, host[1], strict=True)]
        return Generation(
            tokens=[host[0][b, part].tolist() for b, part in enumerate(new)],
            stats=make_stats(state.counters),
            logprobs=[host[2][b, part].tolist() for b, part in enumerate(new)]
            if logprobs
            else None,
            drafter_report=self.drafter.report(state.draft) if self.drafter is not None else {},
        )

    def stream(
        self,
        prompt: Sequence[int],
        *,
        max_new_tokens: int,
        sampling: Sampling = Sampling(),  # noqa: B008
        eos_ids: Sequence[int] = (),
        seed: int = 0,
        stop_strings: Sequence[str] = (),
        tokenizer: Any = None,
        session: Session | None = None,
    ) -> Iterator[Piece]:
        """Yield the new tokens of each step as it ends: `generate` for one prompt, piece by piece.

        Args:
          stop_strings: the answer ends with the token that completes one of these in the decoded
            text.
          tokenizer: anything with `decode(ids) -> str`; needed for stop strings.
          session: keeps the caches for a later call whose prompt continues this conversation; holds
            the statistics.

        Raises:
          ValueError: as `generate`; stop strings without a tokenizer; a session that is too small.
            At the call, not at the first piece.
          RuntimeError: from the iterator, once its session serves a later request.
        """
        stops = check_stop_strings(stop_strings, tokenizer)
        request = make_request(self.base.config, [prompt], max_new_tokens, sampling, eos_ids, seed)
        session = session if session is not None else Session()
        self._open(session, request)
        return self._drive(session, session._turn, stops, tokenizer)

    def warmup(
        self,
        batch: int,
        prompt_len: int,
        max_new_tokens: int,
        *,
        sampling: Sampling = Sampling(),  # noqa: B008
        logprobs: bool = False,
        stream: bool = False,
    ) -> None:
        """Compile what `generate` (or `stream`) needs for requests of this size, so that the first
        one does not wait.
        """
        prompts = np.zeros((batch, prompt_len), np.int32)
        state, specs = self._prefilled(
            make_request(self.base.config, prompts, max_new_tokens, sampling, logprobs=logprobs)
        )
        state = state.replace(done=self._put(np.ones((batch,), bool)))
        run = loop.run_step if stream else loop.run_loop
        jax.block_until_ready(run(self.base, self.drafter, state, specs=specs))

    def profile(
        self,
        batch: int = 1,
        prompt_len: int = 64,
        *,
        max_new_tokens: int = 64,
        sampling: Sampling = Sampling(),  # noqa: B008
        repeats: int = 20,
    ) -> dict[str, float]:
        """Seconds of a prefill of prompt_len - 1 tokens and, per step, of each phase and the whole.

        Keys: prefill, step, calibrate, draft, verify, commit. Phases are timed by themselves, on
        tokens of no meaning. Their times depend on shapes alone where all γ levels are drafted;
        where drafting may stop early, verification is timed at full depth. Of drafters other than
        the layer-parallel one "calibrate" is what proposing a single token takes.
        """
        prompts = np.zeros((batch, prompt_len), np.int32)
        request = make_request(self.base.config, prompts, max_new_tokens, sampling)
        if not is_integer(repeats) or repeats < 1:
            raise ValueError(f"repeats must be a whole number above 0, got {repeats!r}")
        jax.block_until_ready(self._prefilled(request)[0])
        state = jax.block_until_ready(self._begin(request, self.capacity(request.total)))
        specs = loop.Specs.of((self.base, self.drafter, state))
        start = time.perf_counter()
        state = jax.block_until_ready(self._prefill(state, request, specs))
        times = {"prefill": time.perf_counter() - start}
        return times | phase_seconds(self.base, self.drafter, state, repeats=repeats)

    def memory(
        self,
        batch: int = 1,
        prompt_len: int = 64,
        *,
        max_new_tokens: int = 64,
        sampling: Sampling = Sampling(),  # noqa: B008
    ) -> dict[str, int]:
        """Bytes that a request of this size takes on each device: weights, caches and scratch, by
        name. Nothing is allocated, and `abstract_model`s serve as well as loaded ones.
        """
        prompts = np.zeros((batch, prompt_len), np.int32)
        request = make_request(self.base.config, prompts, max_new_tokens, sampling)
        return self._budget(self.planned(request))

    def capacity(self, total: int) -> int:
        """S: a bucket that holds `total` committed tokens and one step's drafts behind them."""
        total = min(total, self.base.config.max_len) + self._num_nodes + 1
        size = 64
        while size < min(total, 512):
            size *= 2
        return -(-total // size) * size

    def _prefilled(self, request: Request) -> tuple[loop.DecodeState, loop.Specs]:
        """A fresh state with the prompts absorbed, and the specs the loop needs."""
        state = self._begin(request, self.capacity(request.total))
        specs = loop.Specs.of((self.base, self.drafter, state))
        return self._prefill(state, request, specs), specs

    def _begin(
        self, request: Request, size: int, kept: loop.DecodeState | None = None
    ) -> loop.DecodeState:
        """A state with nothing absorbed yet, or with the caches of `kept`, an earlier state of the
        same size; after the memory it needs was checked.
        """
        if kept is None:
            budget = self._budget(self.planned(request, size))
            held = {name: budget.pop(name) for name in tuple(budget) if name.endswith("weights")}
            check_memory(self.base.layout.mesh, budget, held)
        values = jax.tree.map(self._put, self._host_values(request, size))
        options = self._options(request, self._put)
        return loop.DecodeState(
            cache=kept.cache if kept is not None else zeros(self._abstract_cache(request, size)),
            draft=self._draft_state(len(request.rows), size, options, kept),
            **values,
        )

    def planned(self, request: Request, size: int | None = None) -> loop.DecodeState:
        """The state of a checked request as shapes and shardings, with room for `size` tokens
        (None: as `generate` would choose).
        """
        size = self.capacity(request.total) if size is None else size
        everywhere = NamedSharding(self.base.layout.mesh, PartitionSpec())

        def shape(x):
            return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=everywhere)

        draft = None
        if self.drafter is not None:
            options = self._options(request, shape)
            draft = self.drafter.abstract_state(len(request.rows), size, options)
            draft = jax.tree.map(lambda x: x if _is_placed(x) else shape(x), draft)
        values = jax.tree.map(shape, self._host_values(request, size))
        return loop.DecodeState(cache=self._abstract_cache(request, size), draft=draft, **values)

    def _abstract_cache(self, request: Request, size: int) -> KVCache:
        m = self.base
        return abstract_cache(m.config, m.layout, m.partition, len(request.rows), size, m.dtype)

    def _options(self, request: Request, put: Callable) -> DraftOptions:
        least = self.min_draft_probability
        return DraftOptions(
            filters=jax.tree.map(put, make_filters(request.sampling)),
            num_draft_tokens=self.num_draft_tokens,
            tree_width=self.tree_width,
            vocab_size=self.base.config.vocab_size,
            min_probability=None if least is None else put(np.float32(least)),
            eos_ids=put(request.eos_ids.copy()),  # donated, like the loop's own
        )

    def _host_values(self, request: Request, size: int) -> dict[str, Any]:
        """Fields of a fresh `DecodeState` beside cache and drafter."""
        batch, max_len = len(request.rows), self.base.config.max_len
        lengths = np.array([row.size for row in request.rows], np.int32)
        tokens = np.zeros((batch, size), np.int32)
        for b, row in enumerate(request.rows):
            tokens[b, : row.size] = row
        ends = [row.size + request.max_new_tokens for row in request.rows]  # may exceed i32
        limit = np.array([min(end, max_len) for end in ends], np.int32)
        return {
            "tokens": tokens,
            "length": lengths,
            "limit": limit,
            "absorbed": lengths - 1,
            "done": lengths >= limit,
            "counters": self._no_counts(batch),
            "logprobs": np.zeros((batch, size), np.float32) if request.logprobs else None,
            "key": jax.random.key(request.seed),
            "step": np.int32(0),
            "eos_ids": request.eos_ids,
            "filters": make_filters(request.sampling),
        }

    def _no_counts(self, batch: int) -> Counters:
        return Counters.zeros(batch, self.num_draft_tokens, self.tree_width)

    def _draft_state(self, batch, size, options, kept) -> Any:
        if self.drafter is None:
            return None
        if kept is not None:
            state = self.drafter.resume(kept.draft, options)
        else:
            state = self.drafter.init(batch, size, options)
        return jax.tree.map(lambda x: x if _is_placed(x) else self._put(x), state)

    def _put(self, x):
        """x on every device of the mesh."""
        return replicate(x, self.base.layout.mesh)

    def _budget(self, planned: loop.DecodeState) -> dict[str, int]:
        """Bytes on each device, by name."""
        chunk = min(PREFILL_CHUNKS[-1], planned.tokens.shape[1])
        return decode_budget(
            self.base, self.drafter, planned, num_nodes=self._num_nodes, chunk=chunk
        )

    def _prefill(
        self, state: loop.DecodeState, request: Request, specs: loop.Specs, start: int = 0
    ) -> loop.DecodeState:
        """Absorb all prompt tokens from `start` on but each row's last."""
        end = request.longest - 1
        size = state.tokens.shape[1]
        chunk = next((c for c in PREFILL_CHUNKS if c >= end - start), PREFILL_CHUNKS[-1])
        chunk = min(chunk, size)
        for at in range(start, end, chunk):
            # The last piece moves back where it would not fit: absorbing again changes nothing.
            first = self._put(np.int32(min(at, size - chunk)))
            state = loop.prefill_chunk(
                self.base, self.drafter, state, first, chunk=chunk, specs=specs
            )
        return state

    def _open(self, session: Session, request: Request) -> None:
        """Make the session hold the prompt, absorbing only what its caches do not have."""
        if session._owner is not self:  # another pair's caches are of no use
            session._owner, session._state = self, None
        (row,), total, old = request.rows, request.total, session._state
        if old is None:
            size = self.capacity(max(total, session.max_len or 0))
        else:
            size = old.tokens.shape[1]
        room = size - self._num_nodes - 1
        if min(total, self.base.config.max_len) > room:
            raise ValueError(
                f"the session has room for {room} tokens, but prompt and max_new_tokens make "
                f"{total}: open one with a larger max_len"
            )
        session._state = None  # its buffers are about to be donated
        session._turn = object()
        state = self._begin(request, size, old)
        known = 0
        if old is not None:
            both = zip(session._tokens[: session._absorbed], row[:-1].tolist(), strict=False)
            known = next(
                (i for i, (a, b) in enumerate(both) if a != b), min(session._absorbed, row.size - 1)
            )
        specs = loop.Specs.of((self.base, self.drafter, state))
        session._state = self._prefill(state, request, specs, start=known)
        session._tokens, session._absorbed = row.tolist(), row.size - 1
        session.stats = make_stats(self._no_counts(1))

    def _drive(
        self, session: Session, turn: object, stop_strings: tuple[str, ...], tokenizer: Any
    ) -> Iterator[Piece]:
        """Step until the row is done; the session is consistent whenever this yields."""
        counters, done = self._no_counts(1), False
        text = TextStream(tokenizer, stop_strings)
        while not done:
            if session._turn is not turn:
                raise RuntimeError("this stream has ended: its session serves a later request")
            specs = loop.Specs.of((self.base, self.drafter, session._state))
            state, session._state = session._state, None  # donated: nobody may use it again
            state, out = loop.run_step(self.base, self.drafter, state, specs=specs)
            out, done = jax.device_get((out, state.done))
            done = bool(done[0])
            ids = out.tokens[0, : out.num_emitted[0]].tolist()
            if stop_strings:
                ids = text.until_stop(ids)
                done |= text.stopped
            emitted = np.array([len(ids)], np.int32)
            counters = count(counters, out.num_accepted, out.tries, out.num_drafted, emitted)
            session._state = state
            session._absorbed = len(session._tokens)  # the step calibrated up to its root
            session._tokens += ids
            session.stats = make_stats(counters)
            yield Piece(ids, min(int(out.num_accepted[0]), len(ids)))


def _is_placed(x: Any) -> bool:
    """Whether an array (or its shape) is on a mesh already."""
    return isinstance(getattr(x, "sharding", None), NamedSharding)

"""A base and a drafter, ready to run: the size of the buffers, an empty state, prompts absorbed.

Shapes come in buckets, so requests of similar length share a compilation; whatever does not fit is
refused before anything is allocated.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from easyspec_jax import loop, step_costs
from easyspec_jax.compile_options import CompileOptions
from easyspec_jax.config import Sampling
from easyspec_jax.depth import AUTO, DEPTHS, AutoDepth, Pace, Pacing, check_depths
from easyspec_jax.drafter import Autoregression, Drafter
from easyspec_jax.memory import check_memory, decode_budget
from easyspec_jax.model import Model
from easyspec_jax.request import Inputs, Request, check_pair, make_inputs
from easyspec_jax.sampling import make_filters
from easyspec_jax.sharding import replicate, zeros
from easyspec_jax.stats import Counters, begin_tallies
from easyspec_jax.step_costs import StepCosts

# A prompt is absorbed in pieces of the smallest that holds it, else of the largest.
PREFILL_CHUNKS = (16, 64, 256)


class Engine:
    """A base, a drafter and how far it drafts: what `Decoder` and sessions stand on."""

    def __init__(
        self,
        base: Model,
        drafter: Drafter | None = None,
        *,
        num_draft_tokens: int | str | AutoDepth | None = None,
        tree_width: int = 1,
        min_draft_probability: float | None = None,
        compile_options: CompileOptions = CompileOptions(),  # noqa: B008
    ):
        """Pair a base with a drafter.

        Args:
          base: the model whose distribution is kept.
          drafter: None decodes autoregressively.
          num_draft_tokens: γ, depth of the draft: tokens a step may accept (at most, for drafters
            that choose). None: as many as the drafter likes. "auto" or an `AutoDepth`: every step
            chooses, by what this text has accepted so far and what depths cost here.
          tree_width: w, draft tokens at each depth; 1 is a chain.
          min_draft_probability: drafting stops early once even the likeliest path has a smaller
            probability under the draft model (the product along it, after temperature and filters
            when sampling). The base is then compiled for a few depths, and on a GPU each of them
            costs a host synchronisation a step. None never stops.
          compile_options: how its programs are compiled.

        Raises:
          ValueError: a bad γ, w or probability, a base in groups, models on different meshes, or
            different tokenizers.
        """
        drafter = Autoregression() if drafter is None else drafter
        auto = AutoDepth() if num_draft_tokens == AUTO else num_draft_tokens
        gamma: Any = auto  # `check_pair` refuses what is neither None nor a number
        if isinstance(auto, AutoDepth):
            gamma = auto.most or max(getattr(drafter, "depth", 0), DEPTHS[-1])
        check_pair(base, drafter, gamma, tree_width, min_draft_probability)
        self.base, self.drafter = base, drafter
        self.num_draft_tokens = int(drafter.depth if gamma is None else gamma)
        self.depths: tuple[int, ...] = ()  # that a step may choose from
        self._given_costs: StepCosts | None = None
        self._costs: dict[Any, StepCosts] = {}  # those found, by what requests have in common
        if not drafter.depth:
            self.num_draft_tokens = 0
        elif isinstance(auto, AutoDepth):
            depths = check_depths(drafter.depths(self.num_draft_tokens), self.num_draft_tokens)
            table = auto.table(drafter.num_kinds, depths)
            if table is not None:
                self._given_costs = StepCosts(table, np.float32(auto.catch_up))
            self.depths = depths if len(depths) > 1 else ()  # or nothing is left to choose
        self.tree_width = int(tree_width) if drafter.depth else 1
        self.min_draft_probability = min_draft_probability or None
        if not isinstance(compile_options, CompileOptions):
            raise ValueError(f"compile_options must be CompileOptions, got {compile_options!r}")
        self.compile_options = compile_options

    def compiled(self, function: Any, rows: int | None = None) -> Callable:
        """A function of `loop` as this engine compiles it, for passes of so many tokens of a text;
        None: as many as a step verifies.
        """
        options = self.options(self.num_nodes + 1 if rows is None else rows)
        return function.using(options) if options else function

    def options(self, rows: int) -> tuple[tuple[str, Any], ...]:
        """What a function with passes of so many tokens of a text is compiled with."""
        models = (self.base, *self.drafter.models())
        if any(model.layout.bf16_matrices for model in models):
            rows = 1  # by the library that multiplies those
        return self.compile_options.on(self.base.layout.mesh, rows)

    @property
    def found_costs(self) -> dict[tuple[int, bool], StepCosts]:
        """What `AutoDepth` measured so far, by a request's rows and whether it is greedy."""
        return dict(self._costs)

    @property
    def num_nodes(self) -> int:
        """Nodes of one step's draft."""
        return self.num_draft_tokens * self.tree_width

    def capacity(self, total: int) -> int:
        """S: a bucket that holds `total` committed tokens and one step's drafts behind them."""
        total = min(total, self.base.config.max_len) + self.num_nodes + 1
        size = 64
        while size < min(total, 512):
            size *= 2
        return -(-total // size) * size

    def planned(self, inputs: Inputs, size: int | None = None) -> tuple[Request, loop.DecodeState]:
        """What `begin` allocates, as shapes and shardings; arguments as there."""
        everywhere = NamedSharding(self.base.layout.mesh, PartitionSpec())

        def shape(x):
            if _is_placed(x):
                return x
            return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=everywhere)

        size = self.capacity(inputs.total) if size is None else size
        batch = len(inputs.rows)
        request = jax.tree.map(shape, self._request(inputs))
        draft = self.drafter.abstract_state(batch, size, request)
        cache = self.base.abstract_cache(batch, size)
        state = loop.DecodeState(cache=cache, draft=draft, **self._fields(inputs, size))
        return request, jax.tree.map(shape, state)

    def begin(
        self,
        inputs: Inputs,
        size: int | None = None,
        kept: loop.DecodeState | None = None,
        run: Any = loop.run_loop,
    ) -> tuple[Request, loop.DecodeState]:
        """The request and a state with nothing absorbed yet, after the memory it needs was checked.

        Args:
          inputs: checked.
          size: tokens there is room for; None: `capacity` of what the inputs may come to.
          kept: an earlier state of this size, whose caches are taken over; not to be used again.
          run: of `loop`, what will decode: where depths are chosen, their costs are measured with
            it before the first request of a kind, unless one of another kind is kept. None: costs
            do not matter.

        Raises:
          ValueError: more than the devices hold, or nothing this drafter can draft for.
        """
        size = self.capacity(inputs.total) if size is None else size
        if kept is None:
            budget = self._budget(*self.planned(inputs, size))
            held = {name: budget.pop(name) for name in tuple(budget) if name.endswith("weights")}
            check_memory(self.base.layout.mesh, budget, held)
            if run is not None and self._unknown_costs(inputs):
                self._find_costs(inputs, size, run)
            request = self._put(self._request(inputs))
            return request, self._empty(inputs, size, request)
        request = self._put(self._request(inputs))
        cache, draft = kept.cache, begin_tallies(kept.draft)
        # What a conversation has accepted so far is the best guess at what it will.
        fields = self._put(self._fields(inputs, size)) | {"pace": kept.pace}
        return request, loop.DecodeState(cache=cache, draft=draft, **fields)

    def _empty(self, inputs: Inputs, size: int, request: Request) -> loop.DecodeState:
        """A state with nothing absorbed."""
        batch = len(inputs.rows)
        cache = zeros(self.base.abstract_cache(batch, size))
        draft = self._put(self.drafter.init(batch, size, request))
        fields = self._put(self._fields(inputs, size))
        return loop.DecodeState(cache=cache, draft=draft, **fields)

    def _find_costs(self, inputs: Inputs, size: int, run: Any) -> None:
        """What steps cost is known for requests like this one."""
        request = self._put(self._request(inputs))
        fields = self._put(self._fields(inputs, size))

        def take(asked: Request, state: loop.DecodeState) -> loop.DecodeState:
            asked = asked.replace(pacing=self._put(asked.pacing))
            out = self.compiled(run)(self.base, self.drafter, asked, state)
            return out[0] if isinstance(out, tuple) else out  # of `loop.run_step`

        def fresh(state: loop.DecodeState, **changes: Any) -> loop.DecodeState:
            # Copies: they are donated.
            again = jax.tree.map(jnp.copy, fields) | self._put(changes)
            return state.replace(**again)

        def find() -> StepCosts:
            state = self._empty(inputs, size, request)
            return step_costs.measured(take, request, state, fresh)

        shapes = [(x.shape, str(x.dtype)) for x in jax.tree.leaves((self.base, self.drafter))]
        what = (jax.tree.structure((self.base, self.drafter, request)), shapes, len(inputs.rows))
        what = (*what, self.tree_width, str(self.compile_options))
        costs = step_costs.kept(what, (self.drafter.num_kinds, len(self.depths)), find)
        self._costs[_likeness(inputs)] = costs

    def _unknown_costs(self, inputs: Inputs) -> bool:
        """Whether costs have to be found before this request."""
        known = self._given_costs is not None or _likeness(inputs) in self._costs
        return bool(self.depths) and not known

    def absorb(
        self, request: Request, state: loop.DecodeState, longest: int, start: int = 0
    ) -> loop.DecodeState:
        """The state with all prompt tokens absorbed, from `start` on, but each row's last.

        Args:
          state: donated.
          longest: tokens of the longest prompt.
        """
        end, size = longest - 1, state.tokens.shape[1]
        chunk = next((c for c in PREFILL_CHUNKS if c >= end - start), PREFILL_CHUNKS[-1])
        chunk = min(chunk, size)
        for at in range(start, end, chunk):
            # The last piece moves back where it would not fit: absorbing again changes nothing.
            first = self._put(np.int32(min(at, size - chunk)))
            arguments = (self.base, self.drafter, request, state, first)
            state = self.compiled(loop.prefill_chunk, chunk)(*arguments, chunk=chunk)
        return state

    def prefill(self, inputs: Inputs, run: Any = loop.run_loop) -> tuple[Request, loop.DecodeState]:
        """The request and a fresh state that has absorbed the prompts; arguments and errors as for
        `begin`.
        """
        request, state = self.begin(inputs, run=run)
        return request, self.absorb(request, state, inputs.longest)

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
        inputs = make_inputs(self.base.config, prompts, max_new_tokens, sampling)
        return self._budget(*self.planned(inputs))

    def _budget(self, request: Request, state: loop.DecodeState) -> dict[str, int]:
        chunk = min(PREFILL_CHUNKS[-1], state.tokens.shape[1])
        return decode_budget(self.base, self.drafter, request, state, chunk=chunk)

    def _request(self, inputs: Inputs) -> Request:
        """The request of checked inputs, on the host."""
        least = self.min_draft_probability
        eos_ids: Any = inputs.eos_ids
        min_probability: Any = None if least is None else np.float32(least)
        pacing = None
        if self.depths:
            costs = self._given_costs
            if costs is None:
                alike = [x for (rows, _), x in self._costs.items() if rows == len(inputs.rows)]
                none = np.ones((self.drafter.num_kinds, len(self.depths)), np.float32)
                unknown = StepCosts(none, np.float32(0))
                costs = self._costs.get(_likeness(inputs), (*alike, unknown)[0])
            pacing = Pacing(costs=costs.seconds, catch_up=costs.catch_up, depths=self.depths)
        return Request(
            filters=make_filters(inputs.sampling),
            eos_ids=eos_ids,
            key=jax.random.key(inputs.seed),
            min_probability=min_probability,
            num_draft_tokens=self.num_draft_tokens,
            tree_width=self.tree_width,
            vocab_size=self.base.config.vocab_size,
            pacing=pacing,
        )

    def _fields(self, inputs: Inputs, size: int) -> dict[str, Any]:
        """Fields of a fresh `DecodeState` beside cache and drafter, on the host."""
        batch, max_len = len(inputs.rows), self.base.config.max_len
        lengths = np.array([row.size for row in inputs.rows], np.int32)
        tokens = np.zeros((batch, size), np.int32)
        for b, row in enumerate(inputs.rows):
            tokens[b, : row.size] = row
        ends = [row.size + inputs.max_new_tokens for row in inputs.rows]  # may exceed i32
        limit = np.array([min(end, max_len) for end in ends], np.int32)
        return {
            "tokens": tokens,
            "length": lengths,
            "limit": limit,
            "absorbed": lengths - 1,
            "done": lengths >= limit,
            "counters": self.no_counts(batch),
            "logprobs": np.zeros((batch, size), np.float32) if inputs.logprobs else None,
            "step": np.int32(0),
            "pace": Pace.begin(batch, self.drafter.num_kinds, self.num_draft_tokens)
            if self.depths
            else None,
        }

    def no_counts(self, batch: int) -> Counters:
        """Counters before the first step, on the host."""
        chosen = bool(self.depths)
        return Counters.zeros(batch, self.num_draft_tokens, self.tree_width, chosen=chosen)

    def _put(self, tree: Any) -> Any:
        """Every array that is not on the mesh yet, on all its devices."""
        put: Callable = lambda x: x if _is_placed(x) else replicate(x, self.base.layout.mesh)  # noqa: E731
        return jax.tree.map(put, tree)


def _likeness(inputs: Inputs) -> tuple[int, bool]:
    """What requests have in common whose steps cost the same."""
    return len(inputs.rows), make_filters(inputs.sampling).greedy


def _is_placed(x: Any) -> bool:
    """Whether an array (or its shape) is on a mesh already."""
    return isinstance(getattr(x, "sharding", None), NamedSharding)

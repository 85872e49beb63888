"""Generation from the host's side: check the request, run the loop, read the answer.

`Decoder.generate` is one donated while_loop on the device; `Decoder.stream` drives the same step
one call at a time.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from easyspec_jax import loop
from easyspec_jax.config import Sampling, is_integer
from easyspec_jax.engine import Engine
from easyspec_jax.profile import phase_seconds
from easyspec_jax.request import check_stop_strings, make_inputs
from easyspec_jax.session import Piece, Session
from easyspec_jax.stats import Stats, make_stats


@dataclasses.dataclass(frozen=True)
class Generation:
    """What `Decoder.generate` returns."""

    tokens: list[list[int]]  # new tokens per prompt; a stop id that ended a row is its last token
    stats: Stats
    logprobs: list[list[float]] | None = None  # log p of the base at temperature 1, unfiltered
    drafter_report: dict[str, Any] = dataclasses.field(default_factory=dict)  # its own counters


class Decoder(Engine):
    """Lossless decoding of `base`, alone or ahead of a drafter."""

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
          seed: same seed, same mesh, same result; with automatic depth where costs are given, too.
          logprobs: also return the base's log-probability of every new token.

        Raises:
          ValueError: a bad prompt or option, or a request the devices cannot hold; nothing is
            allocated then.
        """
        inputs = make_inputs(
            self.base.config, prompts, max_new_tokens, sampling, eos_ids, seed, logprobs
        )
        request, state = self.prefill(inputs)
        state = self.compiled(loop.run_loop)(self.base, self.drafter, request, state)
        tokens, ends, scores = jax.device_get((state.tokens, state.length, state.logprobs))

        def new(values):
            rows = zip(values, inputs.rows, ends.tolist(), strict=True)
            return [row[len(prompt) : end].tolist() for row, prompt, end in rows]

        return Generation(
            tokens=new(tokens),
            stats=make_stats(state.counters),
            logprobs=new(scores) if logprobs else None,
            drafter_report=self.drafter.report(state.draft),
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
        if session is not None and not isinstance(session, Session):
            raise ValueError(f"session must be a Session, got {session!r}")
        stops = check_stop_strings(stop_strings, tokenizer)
        inputs = make_inputs(self.base.config, [prompt], max_new_tokens, sampling, eos_ids, seed)
        session = session if session is not None else Session()
        return session.stream(self, inputs, stops, tokenizer)

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
        inputs = make_inputs(self.base.config, prompts, max_new_tokens, sampling, logprobs=logprobs)
        run = loop.run_step if stream else loop.run_loop
        request, state = self.prefill(inputs, run)
        state = state.replace(done=jnp.ones_like(state.done))
        jax.block_until_ready(self.compiled(run)(self.base, self.drafter, request, state))

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
        inputs = make_inputs(self.base.config, prompts, max_new_tokens, sampling)
        if not is_integer(repeats) or repeats < 1:
            raise ValueError(f"repeats must be a whole number above 0, got {repeats!r}")
        jax.block_until_ready(self.prefill(inputs, None))
        request, state = jax.block_until_ready(self.begin(inputs, run=None))
        start = time.perf_counter()
        state = jax.block_until_ready(self.absorb(request, state, inputs.longest))
        times = {"prefill": time.perf_counter() - start}
        return times | phase_seconds(self, request, state, repeats=repeats)

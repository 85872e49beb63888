"""Decoding a step at a time, and what is kept of it for a longer prompt to come."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np

from easyspec_jax import loop
from easyspec_jax.config import is_integer
from easyspec_jax.engine import Engine
from easyspec_jax.request import Inputs, Request
from easyspec_jax.stats import Counters, count, make_stats
from easyspec_jax.text import TextStream


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

    Threads may share one: a request that opens ends the stream of the one before it.
    """

    def __init__(self, max_len: int | None = None):
        """Room for `max_len` tokens in all calls together; None sizes it by the first call.

        Raises:
          ValueError: `max_len` is neither None nor a whole number above 0.
        """
        if max_len is not None and (not is_integer(max_len) or max_len < 1):
            raise ValueError(f"max_len must be None or a whole number above 0, got {max_len!r}")
        self.max_len = max_len
        self._lock = threading.Lock()  # held while a turn opens and in each of its steps
        self.stats = make_stats(Counters.zeros(1, 0))  # of the last call
        self._tokens: list[int] = []  # what caches hold, prompt and answers
        self._absorbed = 0  # leading tokens that both caches hold
        self._state: loop.DecodeState | None = None  # None too while its buffers are in use
        self._owner: Engine | None = None
        self._turn: Request | None = None  # the request that it serves now

    @property
    def drafter_report(self) -> dict[str, Any]:
        """The drafter's own counters, as `Generation.drafter_report`; {} before a first request."""
        with self._lock:
            if self._owner is None or self._state is None:
                return {}
            return self._owner.drafter.report(self._state.draft)

    def stream(
        self, engine: Engine, inputs: Inputs, stop_strings: tuple[str, ...], tokenizer: Any
    ) -> Iterator[Piece]:
        """The new tokens of each step as it ends, for the one prompt of `inputs`, of which only
        what the caches do not have is absorbed, now.

        Raises:
          ValueError: too little room; errors as for `Engine.begin`.
          RuntimeError: from the iterator, once a later request is served.
        """
        with self._lock:
            request = self._open(engine, inputs)
        return self._steps(engine, request, stop_strings, tokenizer)

    def _open(self, engine: Engine, inputs: Inputs) -> Request:
        """The request of a new turn, its prompt absorbed; the turn before it has ended."""
        if self._owner is not engine:  # another pair's caches are of no use
            self._owner, self._state = engine, None
        (row,), old = inputs.rows, self._state
        size = old.tokens.shape[1] if old is not None else None
        if size is None:
            size = engine.capacity(max(inputs.total, self.max_len or 0))
        room = size - engine.num_nodes - 1
        if min(inputs.total, engine.base.config.max_len) > room:
            raise ValueError(
                f"the session has room for {room} tokens, but prompt and max_new_tokens make "
                f"{inputs.total}: open one with a larger max_len"
            )
        self._state, self._turn = None, None  # its buffers are about to be donated
        request, state = engine.begin(inputs, size, old, loop.run_step)
        known = self._known(row) if old is not None else 0
        self._state, self._turn = engine.absorb(request, state, row.size, start=known), request
        self._tokens, self._absorbed = row.tolist(), row.size - 1
        self.stats = make_stats(engine.no_counts(1))
        return request

    def _known(self, row: np.ndarray) -> int:
        """Leading tokens of a prompt, but its last, that both caches hold."""
        both = zip(self._tokens[: self._absorbed], row[:-1].tolist(), strict=False)
        different = (i for i, (a, b) in enumerate(both) if a != b)
        return next(different, min(self._absorbed, row.size - 1))

    def _steps(
        self,
        engine: Engine,
        request: Request,
        stop_strings: tuple[str, ...],
        tokenizer: Any,
    ) -> Iterator[Piece]:
        """Step until the row is done; the session is consistent whenever this yields."""
        done, text, counters = False, TextStream(tokenizer, stop_strings), engine.no_counts(1)
        while not done:
            with self._lock:
                if self._turn is not request:
                    raise RuntimeError("this stream has ended: its session serves a later request")
                out, done = self._step(engine, request)
                ids = out.tokens[0, : out.num_emitted[0]].tolist()
                if stop_strings:
                    ids = text.until_stop(ids)
                    done |= text.stopped
                emitted = np.array([len(ids)], np.int32)
                drafts = out.num_accepted, out.tries, out.num_drafted
                counters = count(counters, *drafts, emitted, out.depth)
                self._tokens += ids
                self.stats = make_stats(counters)
            yield Piece(ids, min(int(out.num_accepted[0]), len(ids)))

    def _step(self, engine: Engine, request: Request) -> tuple[loop.Emission, bool]:
        """What one step emitted, on the host, and whether the row is done; under the lock."""
        state, self._state = self._state, None  # donated: nobody may use it again
        state, out = engine.compiled(loop.run_step)(engine.base, engine.drafter, request, state)
        out, done, absorbed = jax.device_get((out, state.done, state.absorbed))
        self._state, self._absorbed = state, int(absorbed[0])
        return out, bool(done[0])

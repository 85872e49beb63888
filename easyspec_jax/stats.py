"""How well speculation went: counted on the device inside the loop, turned into rates on the host.

A step that is cut short (by a stop token or the length limit) counts with what it emitted: draft
tokens behind the cut were not tried, accepted or emitted.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct


@struct.dataclass(kw_only=True)
class Counters:
    """Running counts of every row of a batch."""

    steps: jax.Array  # i32[B], steps in which the row was active
    emitted: jax.Array  # i32[B], new tokens
    histogram: jax.Array  # i32[B, γ + 1], steps by number of accepted draft tokens
    tried: jax.Array  # i32[B, γ], steps that tried the draft token at this depth
    accepted: jax.Array  # i32[B, γ], steps that accepted it

    @classmethod
    def zeros(cls, batch: int, num_draft_tokens: int, xp=np) -> Counters:
        """No steps yet."""
        row, depth = xp.zeros((batch,), xp.int32), xp.zeros((batch, num_draft_tokens), xp.int32)
        histogram = xp.zeros((batch, num_draft_tokens + 1), xp.int32)
        return cls(steps=row, emitted=row + 0, histogram=histogram, tried=depth, accepted=depth + 0)


def count(counters: Counters, num_accepted, num_valid, num_emitted):
    """Counters after one more step; works on jax and on numpy arrays.

    Args:
      num_accepted, num_valid: i32[B], accepted draft tokens, and draft tokens that there were to
        try.
      num_emitted: i32[B], tokens emitted after every cut; 0 = the row was not active.
    """
    xp = jnp if isinstance(num_emitted, jax.Array) else np
    active = (num_emitted > 0).astype(xp.int32)
    accepted = xp.minimum(num_accepted, num_emitted)
    tried = xp.minimum(xp.minimum(num_accepted + 1, num_valid), num_emitted)
    depth = xp.arange(counters.tried.shape[1], dtype=xp.int32)[None]
    bins = xp.arange(counters.histogram.shape[1], dtype=xp.int32)[None]
    hit = (bins == accepted[:, None]).astype(xp.int32) * active[:, None]
    return Counters(
        steps=counters.steps + active,
        emitted=counters.emitted + num_emitted,
        histogram=counters.histogram + hit,
        tried=counters.tried + (depth < tried[:, None]).astype(xp.int32),
        accepted=counters.accepted + (depth < accepted[:, None]).astype(xp.int32),
    )


@dataclasses.dataclass(frozen=True)
class Stats:
    """What speculation gave, for one row or summed over all."""

    steps: int  # active row-steps: base passes that a row took part in
    emitted: int  # new tokens
    accepted_histogram: tuple[int, ...]  # [γ + 1], steps by number of accepted draft tokens
    tried_per_depth: tuple[int, ...]  # [γ]
    accepted_per_depth: tuple[int, ...]  # [γ]
    rows: tuple[Stats, ...] = ()  # the same, row by row; empty in a row's own statistics

    @property
    def tokens_per_step(self) -> float:
        """New tokens per step; exactly 1.0 for autoregression."""
        return self.emitted / self.steps if self.steps else 0.0

    @property
    def acceptance_rate(self) -> float:
        """α: accepted / tried draft tokens; tried are those up to and including the first
        rejection.
        """
        tried = sum(self.tried_per_depth)
        return sum(self.accepted_per_depth) / tried if tried else 0.0

    @property
    def acceptance_per_depth(self) -> tuple[float, ...]:
        """Accepted / tried at each depth of the draft; 0.0 where nothing was tried."""
        pairs = zip(self.accepted_per_depth, self.tried_per_depth, strict=True)
        return tuple(a / t if t else 0.0 for a, t in pairs)


def make_stats(counters: Counters) -> Stats:
    """Totals, with one entry per row."""
    host = jax.tree.map(np.asarray, counters)

    def one(pick, rows=()):
        return Stats(
            steps=int(pick(host.steps)),
            emitted=int(pick(host.emitted)),
            accepted_histogram=tuple(int(n) for n in pick(host.histogram)),
            tried_per_depth=tuple(int(n) for n in pick(host.tried)),
            accepted_per_depth=tuple(int(n) for n in pick(host.accepted)),
            rows=rows,
        )

    rows = tuple(one(lambda x, i=i: x[i]) for i in range(host.steps.shape[0]))
    return one(lambda x: x.sum(axis=0), rows)

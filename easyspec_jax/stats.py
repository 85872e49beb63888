"""How well speculation went: counted on the device inside the loop, turned into rates on the host.

A step that is cut short (by a stop token or the length limit) counts with what it emitted: draft
tokens behind the cut were not tried, accepted or emitted.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct


class Tally:
    """A pytree of counts of one request: where a state is kept, the next one begins at zero."""


def begin_tallies(state: Any) -> Any:
    """A state with every `Tally` in it at zero."""
    zero = lambda x: jax.tree.map(jnp.zeros_like, x) if isinstance(x, Tally) else x  # noqa: E731
    return jax.tree.map(zero, state, is_leaf=lambda x: isinstance(x, Tally))


class Counters(Tally, struct.PyTreeNode, kw_only=True):
    """Running counts of every row of a batch, in one array, so that a step adds to them at once."""

    counts: jax.Array  # i32[B, 3 + (γ + 1) + 2 γ + 2 w], what the properties say, in their order
    # i32[B, γ + 1], steps by levels that were asked for; None: always γ
    by_depth: jax.Array | None
    num_draft_tokens: int = struct.field(pytree_node=False)
    tree_width: int = struct.field(pytree_node=False)

    @classmethod
    def zeros(
        cls, batch: int, num_draft_tokens: int, tree_width: int = 1, *, chosen: bool = False
    ) -> Counters:
        """No steps yet, on the host; of steps whose depths are `chosen` one by one."""
        counts: Any = np.zeros((batch, 4 + 3 * num_draft_tokens + 2 * tree_width), np.int32)
        by_depth: Any = np.zeros((batch, num_draft_tokens + 1), np.int32)
        return cls(
            counts=counts,
            by_depth=by_depth if chosen else None,
            num_draft_tokens=num_draft_tokens,
            tree_width=tree_width,
        )

    @property
    def steps(self) -> jax.Array:
        """i32[B], steps in which the row was active."""
        return self.counts[:, 0]

    @property
    def emitted(self) -> jax.Array:
        """i32[B], new tokens."""
        return self.counts[:, 1]

    @property
    def drafted(self) -> jax.Array:
        """i32[B], nodes that were drafted."""
        return self.counts[:, 2]

    @property
    def histogram(self) -> jax.Array:
        """i32[B, γ + 1], steps by number of accepted draft tokens."""
        return self._part(0, self.num_draft_tokens + 1)

    @property
    def tried(self) -> jax.Array:
        """i32[B, γ], steps that tried draft tokens at this depth."""
        return self._part(self.num_draft_tokens + 1, self.num_draft_tokens)

    @property
    def accepted(self) -> jax.Array:
        """i32[B, γ], steps that accepted one there."""
        return self._part(2 * self.num_draft_tokens + 1, self.num_draft_tokens)

    @property
    def tried_by_rank(self) -> jax.Array:
        """i32[B, w], how often the r-th sibling of a node was tried."""
        return self._part(3 * self.num_draft_tokens + 1, self.tree_width)

    @property
    def accepted_by_rank(self) -> jax.Array:
        """i32[B, w], how often it was accepted."""
        return self._part(3 * self.num_draft_tokens + 1 + self.tree_width, self.tree_width)

    def _part(self, first: int, size: int) -> jax.Array:
        return self.counts[:, 3 + first : 3 + first + size]


def count(counters: Counters, num_accepted, tries, num_drafted, num_emitted, depth):
    """Counters after one more step; works on jax and on numpy arrays.

    Args:
      num_accepted: i32[B], accepted draft tokens.
      tries: i32[B, γ], nodes tried at each depth, the last of which was accepted where one was.
      num_drafted: i32[B], nodes that there were.
      num_emitted: i32[B], tokens emitted after every cut; 0 = the row was not active.
      depth: i32[], levels that were asked for.
    """
    xp = jnp if isinstance(num_emitted, jax.Array) else np
    active = (num_emitted > 0).astype(xp.int32)
    accepted = xp.minimum(num_accepted, num_emitted)
    level = xp.arange(counters.num_draft_tokens, dtype=xp.int32)[None]
    bins = xp.arange(counters.num_draft_tokens + 1, dtype=xp.int32)[None]
    ranks = xp.arange(counters.tree_width, dtype=xp.int32)[None, None]
    hit = (bins == accepted[:, None]).astype(xp.int32) * active[:, None]
    tries = xp.where(level < num_emitted[:, None], tries, 0)
    is_accepted = level < accepted[:, None]
    tried_rank = ranks < tries[..., None]
    by_depth = counters.by_depth
    if by_depth is not None:
        by_depth = by_depth + (bins == depth).astype(xp.int32) * active[:, None]
    accepted_rank = (ranks == tries[..., None] - 1) & is_accepted[..., None]
    one = xp.stack((active, num_emitted, num_drafted * active), axis=1)
    tried_by_rank = tried_rank.sum(axis=1, dtype=xp.int32)
    accepted_by_rank = accepted_rank.sum(axis=1, dtype=xp.int32)
    each = (one, hit, tries > 0, is_accepted, tried_by_rank, accepted_by_rank)
    new = xp.concatenate([x.astype(xp.int32) for x in each], axis=1)
    return counters.replace(counts=counters.counts + new, by_depth=by_depth)


@dataclasses.dataclass(frozen=True)
class Stats:
    """What speculation gave, for one row or summed over all."""

    steps: int  # active row-steps: base passes that a row took part in
    emitted: int  # new tokens
    accepted_histogram: tuple[int, ...]  # [γ + 1], steps by number of accepted draft tokens
    tried_per_depth: tuple[int, ...]  # [γ]
    accepted_per_depth: tuple[int, ...]  # [γ]
    tried_per_rank: tuple[int, ...]  # [w], siblings in the order they are tried
    accepted_per_rank: tuple[int, ...]  # [w]
    nodes_drafted: int
    steps_per_depth: tuple[int, ...] = ()  # [γ + 1], steps by levels that were asked for
    rows: tuple[Stats, ...] = ()  # the same, row by row; empty in a row's own statistics

    @property
    def tokens_per_step(self) -> float:
        """New tokens per step; exactly 1.0 for autoregression."""
        return self.emitted / self.steps if self.steps else 0.0

    @property
    def nodes_accepted(self) -> int:
        """Draft tokens that were emitted."""
        return sum(self.accepted_per_depth)

    @property
    def acceptance_rate(self) -> float:
        """α: accepted / tried draft tokens; tried are the accepted ones and, where the draft goes
        on, the one behind them. In a tree a depth counts once, however many were tried there.
        """
        tried = sum(self.tried_per_depth)
        return sum(self.accepted_per_depth) / tried if tried else 0.0

    @property
    def acceptance_per_depth(self) -> tuple[float, ...]:
        """Accepted / tried at each depth of the draft; 0.0 where nothing was tried."""
        return _rates(self.accepted_per_depth, self.tried_per_depth)

    @property
    def acceptance_per_rank(self) -> tuple[float, ...]:
        """Accepted / tried of the first, second, ... of siblings, each tried when those before it
        were rejected.
        """
        return _rates(self.accepted_per_rank, self.tried_per_rank)


def _rates(accepted, tried):
    return tuple(a / t if t else 0.0 for a, t in zip(accepted, tried, strict=True))


def make_stats(counters: Counters) -> Stats:
    """Totals, with one entry per row."""
    host = jax.tree.map(np.asarray, counters)
    by_depth = host.by_depth
    if by_depth is None:
        by_depth = np.zeros_like(host.histogram)
        by_depth[:, -1] = host.steps

    def one(pick, rows=()):
        return Stats(
            steps=int(pick(host.steps)),
            emitted=int(pick(host.emitted)),
            accepted_histogram=tuple(int(n) for n in pick(host.histogram)),
            tried_per_depth=tuple(int(n) for n in pick(host.tried)),
            accepted_per_depth=tuple(int(n) for n in pick(host.accepted)),
            tried_per_rank=tuple(int(n) for n in pick(host.tried_by_rank)),
            accepted_per_rank=tuple(int(n) for n in pick(host.accepted_by_rank)),
            nodes_drafted=int(pick(host.drafted)),
            steps_per_depth=tuple(int(n) for n in pick(by_depth)),
            rows=rows,
        )

    rows = tuple(one(lambda x, i=i: x[i]) for i in range(host.steps.shape[0]))
    return one(lambda x: x.sum(axis=0), rows)

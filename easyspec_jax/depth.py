"""How deep to draft, chosen anew in every step: what a text has accepted against what depths cost.

A step of depth d brings 1 + a + a a' + ... tokens for its seconds. Which tokens of drafts the base
has accepted is counted on the device, so the depth with most tokens a second is known before each
step. Depth 0 is a step of the base alone; from time to time one shallow draft asks whether it still
is the best.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from easyspec_jax.config import is_integer, is_number

AUTO = "auto"  # `AutoDepth()` in a word
DEPTHS = (0, 1, 2, 3, 5, 8)  # that are compiled, up to the deepest
DECAY = 0.92  # what counts of a level are worth once it has been tried again
FIRST, HOPE = 3.0, 0.6  # tries of the first level that a text begins with, and what came of them
BELIEF = 6.0  # tries that the share of the level above counts for
PROBING = 0.008  # share of the time that may be lost by drafts which only ask whether to draft
CATCHING_UP = 0.015  # share that absorbing what was left out may take, else none asks
CATCH_UP = 32  # tokens that a drafter which fell behind absorbs in one pass
SOONER = 8  # steps that need not be waited for where such a draft was accepted


@dataclasses.dataclass(frozen=True)
class AutoDepth:
    """`num_draft_tokens` of a decoder that chooses the depth of each step itself.

    Args:
      most: the deepest; compiled are 0, 1, 2, 3, 5, 8 up to here, and this one (what else a
        drafter says: `Drafter.depths`). None: 8, or what the drafter likes if that is more.
      costs: what a step of each of them takes, in any unit (for a drafter of several kinds of
        drafts one such row for each); None: seconds, measured before the first request of its kind
        (batch, greedy or not) and kept beside jax's compilation cache, where there is one and one
        process. Where draws have to be the same again, give them: with other costs a seed draws
        another text.

      catch_up: beside `costs`, what it takes to absorb one token later that was left out.

    Raises:
      ValueError: `most` is no whole number above 0, costs are no positive numbers, or `catch_up` is
        no number from 0.
    """

    most: int | None = None
    costs: Sequence[float] | Sequence[Sequence[float]] | None = None
    catch_up: float = 0.0

    def __post_init__(self):
        if not is_number(self.catch_up) or self.catch_up < 0:
            raise ValueError(f"catch_up must be a number from 0, got {self.catch_up!r}")
        if self.most is not None and (not is_integer(self.most) or self.most < 1):
            raise ValueError(f"most must be a whole number above 0, got {self.most!r}")
        if self.costs is None:
            return
        rows: Any = self.costs if isinstance(self.costs, Sequence | np.ndarray) else [None]
        rows = [row if isinstance(row, Sequence | np.ndarray) else [row] for row in rows]
        if len(rows) == 0 or not all(is_number(x) and x > 0 for row in rows for x in row):
            raise ValueError(f"costs must be positive numbers, one a depth, got {self.costs!r}")

    def table(self, num_kinds: int, depths: tuple[int, ...]) -> np.ndarray | None:
        """The costs as f32[K, D], if given.

        Raises:
          ValueError: another number of them.
        """
        if self.costs is None:
            return None
        try:
            found = np.asarray(self.costs, np.float32)
        except ValueError:  # rows of several lengths
            found = np.zeros((0,))
        if found.ndim == 1:
            found = np.broadcast_to(found, (num_kinds, *found.shape))
        if found.shape != (num_kinds, len(depths)):
            rows = f"{num_kinds} rows of " if num_kinds > 1 else ""
            raise ValueError(
                f"costs must be {rows}{len(depths)} numbers, one for each depth of "
                f"{', '.join(map(str, depths))}, got {self.costs!r}"
            )
        return found


def usual_depths(most: int) -> tuple[int, ...]:
    """DEPTHS below `most`, and it."""
    return (*(depth for depth in DEPTHS if depth < most), most)


def check_depths(depths: tuple[int, ...], most: int) -> tuple[int, ...]:
    """The depths that a drafter can be asked for.

    Raises:
      ValueError: they do not rise from 0 to `most`, and are not that alone.
    """
    rising = all(a < b for a, b in itertools.pairwise(depths))
    if not depths or not rising or depths[-1] != most or (len(depths) > 1 and depths[0] != 0):
        raise ValueError(f"a drafter's depths must rise from 0 to {most}, got {depths}")
    return depths


class Pacing(struct.PyTreeNode, kw_only=True):
    """What a request fixes: the depths to choose from, and what they cost. K kinds of drafts."""

    costs: jax.Array  # f32[K, D]
    catch_up: jax.Array  # f32[], for each token of a step without a draft, before one is made again
    depths: tuple[int, ...] = struct.field(pytree_node=False)  # D of them, rising from 0


class Pace(struct.PyTreeNode, kw_only=True):
    """What is known before a step, of every row of a batch."""

    # f32[B, K, γ], decayed: drafts of a kind whose first i tokens were accepted and that could have
    # had one more, and those where it was accepted too
    tried: jax.Array
    accepted: jax.Array
    kind: jax.Array  # i32[B], of the draft that the next step would make
    levels: jax.Array  # i32[B], how deep that could be
    waited: jax.Array  # i32[B, K], steps of this kind without a draft since the last with one
    choice: jax.Array  # i32[], number of the next step's depth

    @classmethod
    def begin(cls, batch: int, num_kinds: int, most: int) -> Pace:
        """Nothing known but hope, on the host."""
        tried: Any = np.zeros((batch, num_kinds, most), np.float32)
        tried[..., 0] = FIRST
        row: Any = np.zeros((batch,), np.int32)
        zero: Any = np.int32(0)
        return cls(
            tried=tried,
            accepted=HOPE * tried,
            waited=tried[..., 0].astype(np.int32) * 0,
            kind=row,
            levels=row,
            choice=zero,
        )

    def learn(self, depth: int, num_accepted: jax.Array, active: jax.Array) -> Pace:
        """What is known after a step of `depth` levels.

        Args:
          num_accepted: i32[B], accepted draft tokens before any cut.
          active: bool[B], rows that took part.
        """
        num_kinds, most = self.tried.shape[1:]
        mine = jnp.arange(num_kinds, dtype=jnp.int32)[None] == self.kind[:, None]
        mine = mine & active[:, None]
        if not depth:
            return self.replace(waited=self.waited + mine.astype(jnp.int32))
        level = jnp.arange(most, dtype=jnp.int32)[None, None]
        num, there = num_accepted[:, None, None], jnp.minimum(self.levels, depth)[:, None, None]
        tried = mine[..., None] & (level < there) & (level <= num)
        hit = (level < num).astype(jnp.float32)
        waited = jnp.where(num_accepted > 0, jnp.int32(SOONER), jnp.int32(0))[:, None]
        return self.replace(
            tried=jnp.where(tried, DECAY * self.tried + 1.0, self.tried),
            accepted=jnp.where(tried, DECAY * self.accepted + hit, self.accepted),
            waited=jnp.where(mine, waited, self.waited),
        )

    def choose(self, pacing: Pacing, kind: jax.Array, levels: jax.Array, active: jax.Array) -> Pace:
        """The same with a choice for the next step.

        Args:
          kind: i32[B], of the draft that it would make.
          levels: i32[B], how deep that could be.
          active: bool[B].
        """
        rows = jnp.arange(kind.shape[0], dtype=jnp.int32)
        costs = jnp.where(active[:, None], pacing.costs[kind], 0.0).max(axis=0)
        tokens = expected_tokens(self.tried[rows, kind], self.accepted[rows, kind], levels)
        tokens = jnp.where(active[:, None], tokens[:, np.array(pacing.depths)], 0.0).sum(axis=0)
        choice = jnp.argmax(tokens / jnp.maximum(costs, 1e-30)).astype(jnp.int32)
        loss = costs[1] / jnp.maximum(costs[0], 1e-30) - tokens[1] / tokens[0]
        waited = self.waited[rows, kind].astype(jnp.float32)
        asks = (active & (levels > 0) & (waited * PROBING >= loss)).any()
        asks = asks & (pacing.catch_up < CATCHING_UP * costs[0])
        choice = jnp.where((choice == 0) & asks, jnp.int32(1), choice)
        choice = jnp.where(active.any(), choice, jnp.int32(-1))
        return self.replace(kind=kind, levels=levels, choice=choice)


def expected_tokens(tried: jax.Array, accepted: jax.Array, levels: jax.Array) -> jax.Array:
    """Tokens that a step of each depth is expected to bring, f32[B, γ + 1].

    A level's share of accepted tokens is drawn to that of the level above, as if that had been seen
    BELIEF times.

    Args:
      tried: f32[B, γ], with `accepted` as in `Pace`, of one kind.
      levels: i32[B], levels that there can be.
    """
    share, shares = accepted[:, 0] / tried[:, 0], []
    for i in range(tried.shape[1]):
        if i:
            share = (accepted[:, i] + BELIEF * share) / (tried[:, i] + BELIEF)
        shares.append(jnp.where(i < levels, share, 0.0))
    return chain_tokens(shares)


def chain_tokens(shares: Sequence[jax.Array]) -> jax.Array:
    """Tokens that a step with 0, 1, .., n levels is expected to bring, f32[B, n + 1], where each
    level is accepted with its share (f32[B]) if all above it are: 1 + a + a a' + ...
    """
    path = jnp.ones_like(shares[0])
    tokens = [path]
    for share in shares:  # and no `cumprod`, which GPUs launch by itself
        path = path * share
        tokens.append(tokens[-1] + path)
    return jnp.stack(tokens, axis=1)

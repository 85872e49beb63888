"""Trees of draft tokens: how they grow level by level, and who is whose ancestor.

Level d holds the w best children of level d - 1, so a tree of γ levels has γ·w nodes, whatever it
looks like; node d·w + r is the r-th of its level. A chain is the tree of width 1. Nodes are either
*chosen* (the w best by cumulative log q) or *drawn* without replacement by stochastic beam search
(Kool et al. 2019, arXiv 1903.06059). Siblings never share a token, and drawn ones stand in the
order they were drawn: ranking them by q afterwards would bias what verification emits.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax

from easyspec_jax.model import Placement
from easyspec_jax.request import Request
from easyspec_jax.sampling import Filters, Scores, largest, perturbed, probabilities
from easyspec_jax.verify import Proposal


class Tree(struct.PyTreeNode, kw_only=True):
    """A tree that grows; the newest level is what the next one hangs on."""

    # i32[B, 3, γ·w]: tokens, parents (-1 = root) and whether they are valid; in one array, so that
    # one update writes a level
    nodes: jax.Array
    # f32[B, 1 + (γ - 1)·w, V], q behind the root and each node but the last level's; None: chosen
    probs: jax.Array | None
    # f32[B, w], log q of the path to each node of the newest level; zeros in a chain that nothing
    # stops
    logprob: jax.Array
    score: jax.Array  # f32[B, w], what decides who stays: logprob, perturbed where nodes are drawn
    ancestors: jax.Array | None  # bool[B, w, γ·w], themselves included; None: a chain
    stopped: jax.Array  # bool[B], rows that grow no more

    @property
    def width(self) -> int:
        """w."""
        return self.logprob.shape[1]

    @property
    def tokens(self) -> jax.Array:
        """i32[B, γ·w]."""
        return self.nodes[:, 0]

    @property
    def parents(self) -> jax.Array:
        """i32[B, γ·w], -1 = root."""
        return self.nodes[:, 1] if self.width > 1 else _chain(*self.tokens.shape)

    @property
    def valid(self) -> jax.Array:
        """bool[B, γ·w]; nothing behind an invalid node is."""
        valid = self.nodes[:, 2] > 0
        if self.width > 1:
            return valid
        node = jnp.arange(valid.shape[1], dtype=jnp.int32)
        return (valid[:, None] | (node[None] > node[:, None])[None]).all(axis=-1)

    def level(self, depth: jax.Array | int) -> jax.Array:
        """Tokens of a level (0 = children of the root), i32[B, w]."""
        return _level(self.tokens, depth, self.width)

    def proposal(self, levels: jax.Array | None = None) -> Proposal:
        """What there is to verify; `levels` (i32[]) of it, where growing may have stopped early."""
        depth = self.tokens.shape[1] // self.width
        return Proposal(
            tokens=self.tokens,
            parents=self.parents,
            valid=lax.optimization_barrier(self.valid),  # else each kernel that asks finds it again
            probs=self.probs,
            depth=depth,
            levels=levels,
        )

    def placement(self, origin: jax.Array, depth: jax.Array | int) -> Placement | None:
        """Where the newest level, of this depth (0 = children of the root), stands for the model:
        node i has cache entry origin[b] + i and position origin[b] + depth. None for a chain, which
        needs no telling.
        """
        if self.ancestors is None:
            return None
        positions = jnp.broadcast_to((origin + depth)[:, None], self.logprob.shape)
        return Placement(origin=origin, positions=positions, ancestors=self.ancestors)


def plant(active: jax.Array, depth: int, width: int, vocab_size: int, *, drawn: bool) -> Tree:
    """A tree with nothing but its root, with room for `depth` levels; it grows in rows that are
    active (bool[B]).
    """
    batch, n = active.shape[0], depth * width
    row = jnp.zeros((batch, width), jnp.float32)
    none = jnp.array([0, -1, 0], jnp.int32)[None, :, None]
    expanded = 1 + n - width
    return Tree(
        nodes=jnp.broadcast_to(none, (batch, 3, n)),
        probs=jnp.zeros((batch, expanded, vocab_size), jnp.float32) if drawn else None,
        logprob=row,
        score=row,
        ancestors=jnp.zeros((batch, width, n), bool) if width > 1 else None,
        stopped=~active,
    )


def grow(
    tree: Tree,
    depth: jax.Array | int,
    scores: jax.Array | Scores,
    filters: Filters,
    key: jax.Array,
    min_probability: jax.Array | None = None,
) -> Tree:
    """The tree with level `depth` (0 = children of the root).

    Args:
      scores: draft logits [B, m, V] behind the newest level (m = w), or behind the root (m = 1).
      filters: as the base's; chosen nodes are ranked after them too.
      key: for drawn nodes.
      min_probability: f32[]; a row whose best path falls below it keeps this level and stops.
    """
    scores, w = Scores.of(scores), tree.width
    batch, m, _ = scores.share.shape
    # In a chain that nothing stops nobody asks how likely it is.
    weighed = w > 1 or min_probability is not None
    k = min(w, scores.vocab_size)
    best, tokens, log_q, q = _best(
        scores, filters, key, k, drawn=tree.probs is not None, weighed=weighed
    )
    logprob = tree.logprob[:, :m, None] + log_q
    score = logprob
    if q is not None and weighed:
        perturbed = tree.logprob[:, :m, None] + best
        score = _condition(perturbed, tree.score[:, :m, None])
    alive = best > -jnp.inf
    if w > 1:  # of rows that have stopped nothing is asked any more
        before = _level(tree.valid, depth - 1, w) | (jnp.asarray(depth) == 0)
        alive = alive & before[:, :m, None]
    size = max(m * k, w)  # more than m * k where the vocabulary is smaller than w
    spare = ((0, 0), (0, size - m * k))
    tokens, alive, logprob, score = (
        jnp.pad(x.reshape(batch, m * k), spare) for x in (tokens, alive, logprob, score)
    )
    parent = jnp.minimum(jnp.arange(size, dtype=jnp.int32) // k, m - 1)
    parent = jnp.broadcast_to(parent[None], (batch, size))
    if size > w:
        _, kept = lax.top_k(jnp.where(alive, score, -jnp.inf), w)
        tokens, alive, logprob, score, parent = (
            jnp.take_along_axis(x, kept, axis=1) for x in (tokens, alive, logprob, score, parent)
        )
    tree = tree.replace(logprob=logprob, score=score)
    return _append(tree, depth, tokens, alive, parent, q, min_probability)


def draft(
    request: Request,
    active: jax.Array,
    keys: jax.Array,
    scores: Scores,
    run: Callable[[Tree, jax.Array, Any], tuple[Scores, Any]],
    carry: Any,
    *,
    drawn: bool,
) -> tuple[Proposal, Any]:
    """A whole draft: the first level from `scores` behind the root, each further one from a run
    over the level before; in rows that are active (bool[B]).

    Args:
      keys: one for each level.
      run: the newest level of a tree, its depth (0 = children of the root) and the carry to the
        logits behind it and the carry.
    """
    gamma, least = request.num_draft_tokens, request.min_probability

    def grown(tree, depth, scores):
        scores = scores.fit(request.vocab_size)
        return grow(tree, depth, scores, request.filters, keys[depth], least)

    def level(depth, state):
        tree, carry = state
        scores, carry = run(tree, depth - 1, carry)
        return grown(tree, depth, scores), carry

    def more(state):
        depth, (tree, _) = state
        return (depth < gamma) & ~tree.stopped.all()

    tree = plant(active, gamma, request.tree_width, request.vocab_size, drawn=drawn)
    levels, state = jnp.int32(1), (grown(tree, 0, scores), carry)
    if gamma > 1 and least is None:
        state = lax.fori_loop(1, gamma, level, state)
    elif gamma > 1:
        levels, state = lax.while_loop(more, lambda s: (s[0] + 1, level(*s)), (levels, state))
    tree, carry = state
    return tree.proposal(None if least is None else levels), carry


def _chain(batch, n):
    """Parents of the nodes of chains, i32[B, n]."""
    return jnp.broadcast_to(jnp.arange(-1, n - 1, dtype=jnp.int32)[None], (batch, n))


def _level(x, depth, width):
    """Entries of x ([B, γ·w]) of a level; of the root's, -1, any."""
    return lax.dynamic_slice_in_dim(x, jnp.asarray(depth * width, jnp.int32), width, axis=1)


def _append(tree, depth, tokens, alive, parent, q, min_probability):
    """The tree with one more level written in: its tokens, which of them are nodes at all, and
    their parents within the level before, [B, w] each.
    """
    w = tree.width
    at = jnp.asarray(depth * w, jnp.int32)
    put = lax.dynamic_update_slice_in_dim
    valid = (alive & ~tree.stopped[:, None]).astype(jnp.int32)
    level = jnp.stack((tokens, jnp.where(at == 0, -1, at - w + parent), valid), axis=1)
    ancestors, stopped = tree.ancestors, tree.stopped
    if ancestors is not None:
        node = at + jnp.arange(w, dtype=jnp.int32)
        itself = node[:, None] == jnp.arange(ancestors.shape[2], dtype=jnp.int32)[None]
        ancestors = jnp.take_along_axis(ancestors, parent[..., None], axis=1) | itself[None]
    if min_probability is not None:
        likeliest = jnp.where(alive, tree.logprob, -jnp.inf).max(axis=1)
        stopped = stopped | (jnp.exp(likeliest) < min_probability)
    return tree.replace(
        nodes=put(tree.nodes, level, at, 2),
        probs=put(tree.probs, q, jnp.maximum(at - w + 1, 0), 1) if q is not None else None,
        ancestors=ancestors,
        stopped=stopped,
    )


def _best(scores, filters, key, k, *, drawn, weighed):
    """What the k best children are ranked by, their tokens and log q (zero where nobody asks),
    [B, m, k] each; and q [B, m, V] where it must be kept.
    """
    if filters.greedy:
        if weighed:
            return *scores.likeliest(k), None
        best, tokens = scores.largest(k)
        return best, tokens, jnp.zeros(best.shape, jnp.float32), None
    q = probabilities(scores.whole(), filters)
    log_q = jnp.log(q)
    order = perturbed(key, log_q) if drawn else log_q
    best, tokens = largest(order, k)
    log_q = jnp.take_along_axis(log_q, tokens, axis=-1) if weighed else jnp.zeros_like(best)
    return best, tokens, log_q, q if drawn else None


def _condition(perturbed: jax.Array, bound: jax.Array) -> jax.Array:
    """Gumbel-perturbed log-probabilities of siblings (f32[..., k], falling) given that their
    largest is their parent's, `bound` (Kool et al. 2019, section 4.1 and appendix B.3).
    """
    largest_one = perturbed[..., :1]
    v = bound - perturbed + _log1mexp(perturbed - largest_one)
    score = bound - jnp.maximum(v, 0.0) - jnp.log1p(jnp.exp(-jnp.abs(v)))
    score = jnp.where(jnp.isfinite(perturbed) & jnp.isfinite(bound), score, -jnp.inf)
    return lax.cummin(score, axis=score.ndim - 1)  # rounding never swaps siblings


def _log1mexp(x: jax.Array) -> jax.Array:
    """log(1 - exp(x)) for x <= 0."""
    near = x > -0.6931472
    return jnp.where(
        near, jnp.log(-jnp.expm1(x)), jnp.log1p(-jnp.exp(jnp.where(near, -jnp.inf, x)))
    )

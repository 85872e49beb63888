"""Verification: what a drafter proposes, the base's pass over it, and the rule that keeps decoding
lossless.

Chains, trees of chosen and trees of drawn tokens are one kind of proposal. Drafters and the loop
both stand on this.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax

from easyspec_jax.cache import KVCache, run_if
from easyspec_jax.model import Model, Placement, forward_tapped, score
from easyspec_jax.quantized import wide_type
from easyspec_jax.sampling import Filters, Scores, probabilities, sample


class Proposal(struct.PyTreeNode, kw_only=True):
    """What a drafter proposes for one step: n nodes, each hanging on the root (the current token)
    or on an earlier node. Siblings have different tokens and are tried in order.
    """

    tokens: jax.Array  # i32[B, n]
    parents: jax.Array  # i32[B, n], index of the parent node, -1 = root
    valid: jax.Array  # bool[B, n]; an invalid node is never accepted and never counted
    # f32[B, m, V], m <= n: row i + 1 is the q that the children of node i were drawn from without
    # replacement, row 0 that of the root's children; None: nodes were chosen, not drawn
    probs: jax.Array | None = None
    # i32[], of a draft that may stop early, its nodes in level order: only the first `levels` of
    # `depth` equal parts hold valid nodes; None: all may
    levels: jax.Array | None = None
    depth: int = struct.field(pytree_node=False)  # nodes on the longest path

    @property
    def is_chain(self) -> bool:
        """Whether every node hangs on the one before: the longest path is all of them."""
        return self.depth == self.tokens.shape[1]

    def first(self, levels: int) -> Proposal:
        """The same without what lies behind this many levels."""
        n = self.tokens.shape[1] // self.depth * levels
        nodes = {name: getattr(self, name)[:, :n] for name in ("tokens", "parents", "valid")}
        return self.replace(**nodes, depth=levels, levels=None)


class Verdict(struct.PyTreeNode, kw_only=True):
    """What the base model decided about one proposal."""

    num_accepted: jax.Array  # i32[B], in [0, depth]
    # i32[B, depth], the accepted nodes; what lies beyond num_accepted means nothing
    path: jax.Array
    next_token: jax.Array  # i32[B], the residual sample, or the bonus token behind a leaf
    # i32[B, depth], nodes tried at each depth, counted along the path: those on it, siblings before
    # them, and the children of the last
    tries: jax.Array
    # For drafters that observe: i32[B], committed tokens before the step, the root the last of
    # them; bool[B], rows that took part
    length: jax.Array | None = None
    active: jax.Array | None = None


def verification_placement(start: jax.Array, proposal: Proposal) -> Placement | None:
    """Where root and nodes stand in the base's pass: entry start[b] + i, position by depth; None
    for a chain.
    """
    if proposal.is_chain:
        return None
    related = ancestry(proposal)
    depths = related.sum(axis=-1, dtype=jnp.int32)
    positions = start[:, None] + jnp.pad(depths, ((0, 0), (1, 0)))
    ancestors = jnp.pad(related, ((0, 0), (1, 0), (0, 0)))
    ancestors = jnp.pad(ancestors, ((0, 0), (0, 0), (1, 0)), constant_values=True)
    return Placement(origin=start, positions=positions, ancestors=ancestors)


def verify_in_one_pass(
    base: Model,
    base_cache: KVCache,
    root: jax.Array,
    proposal: Proposal,
    taps: tuple[int, ...] = (),
) -> tuple[Scores, KVCache, jax.Array | None]:
    """Base logits [B, n + 1, V] at the root (i32[B]) and behind each node; the written cache; and
    the base's residual stream there at the taps, [B, n + 1, taps, D], or None.

    Of a draft that may stop early, the smallest of a few compiled sizes that holds its levels is
    run; logits and features behind nodes that were left out are zero.
    """

    def run(proposal, cache):
        tokens = jnp.concatenate((root[:, None], proposal.tokens), axis=1)
        placement = verification_placement(cache.length, proposal)
        hidden, cache, features = forward_tapped(base, tokens, cache, taps, placement=placement)
        return score(base, hidden), cache, features

    def run_first(levels, share, features, cache):
        some, cache, new = run(proposal.first(levels), cache)
        put = lambda old, new: lax.dynamic_update_slice(old, new, (0,) * old.ndim)  # noqa: E731
        return put(share, some.share), jax.tree.map(put, features, new), cache

    if proposal.levels is None:
        return run(proposal, base_cache)
    batch, n = proposal.tokens.shape
    c, axes, smaller = base.config, base.layout.vocab, -1
    shape = (batch, n + 1, c.vocab_size // base.layout.devices_along(axes))
    share = jnp.zeros(shape, wide_type(base.dtype))
    if axes:
        share = lax.pcast(share, axes, to="varying")
    features = None
    if taps:
        features = jnp.zeros((batch, n + 1, len(taps), c.embed_dim), base.dtype)
    for levels in verification_sizes(proposal.depth):
        fits = (proposal.levels <= levels) & (proposal.levels > smaller)
        body = functools.partial(run_first, levels)
        share, features, base_cache = run_if(fits, body, share, features, base_cache)
        smaller = levels
    return Scores(share=share, axes=axes, vocab_size=c.vocab_size), base_cache, features


def verification_sizes(depth: int) -> tuple[int, ...]:
    """Numbers of levels that verification is compiled for: `depth`, halved down to 1; rising."""
    sizes = {depth}
    while depth > 1:
        depth = -(-depth // 2)
        sizes.add(depth)
    return tuple(sorted(sizes))


def accept_path(
    scores: jax.Array | Scores, proposal: Proposal, filters: Filters, key: jax.Array
) -> Verdict:
    """Accept a path that begins at the root so that the base model's distribution is kept.

    Chosen children are tried in order, on the way down, each accepted with p(x) over the mass its
    siblings left; where all are rejected (or there are none) the step's last token is drawn from
    what is left of p. A drawn chain is decided as a block (`_accept_block`), a drawn tree from the
    leaves up (`_traverse`). Greedily, a child is accepted if it is the base's argmax.

    Args:
      scores: logits [B, n + 1, V] of the base model at the root and behind each node.
      proposal: a chain or a tree.
      filters: applied to the base's logits; the draft's q had the same.
      key: consumed.
    """
    scores = Scores.of(scores)
    if filters.greedy:
        target = scores.argmax()
        passes = proposal.tokens == jnp.take_along_axis(target, proposal.parents + 1, axis=1)
        verdict, last = _follow(proposal, passes)
        return verdict.replace(next_token=_at(target, last))
    p = probabilities(scores.whole(), filters)
    accept_key, sample_key = jax.random.split(key)
    u = jax.random.uniform(accept_key, proposal.tokens.shape, jnp.float32)
    if proposal.probs is None:
        passes = _pass_chosen(p, proposal, u)
        verdict, last = _follow(proposal, passes)
        rest = _without_children(_at(p, last), proposal, last)
    elif proposal.is_chain:
        verdict, rest = _accept_block(p, proposal, u)
    else:
        weights, left = _traverse(p, proposal)
        accepted = (u < weights) & proposal.valid
        passes = (ancestry(proposal) & accepted[..., None]).any(axis=1)
        verdict, last = _follow(proposal, passes)
        rest = _at_level(left, last)
    return verdict.replace(next_token=sample(sample_key, rest))


def ancestry(proposal: Proposal) -> jax.Array:
    """bool[B, n, n]: entry [i, j] says whether node j is node i or one of its ancestors."""
    batch, n = proposal.tokens.shape
    node = jnp.arange(n, dtype=jnp.int32)
    if proposal.is_chain:
        return jnp.broadcast_to((node[:, None] >= node[None])[None], (batch, n, n))
    up = (proposal.parents[..., None] == node[None, None]) | (node[:, None] == node[None])[None]
    for _ in range((proposal.depth - 1).bit_length()):  # each product doubles the generations
        up = jnp.matmul(up.astype(jnp.float32), up.astype(jnp.float32)) > 0
    return up


def _siblings_before(proposal: Proposal) -> jax.Array:
    """bool[B, n, n]: entry [i, j] says whether j is a valid sibling tried before node i."""
    node = jnp.arange(proposal.tokens.shape[1], dtype=jnp.int32)
    same = proposal.parents[..., None] == proposal.parents[:, None]
    return same & (node[:, None] > node[None])[None] & proposal.valid[:, None]


def _follow(proposal: Proposal, passes: jax.Array) -> tuple[Verdict, jax.Array]:
    """The verdict (without its last token) when the nodes that would be accepted, once tried, are
    bool[B, n] `passes`; and where the path ends: 0 the root, i + 1 node i.
    """
    n, depth = proposal.tokens.shape[1], proposal.depth
    count = lambda x: x.sum(axis=1, dtype=jnp.int32)  # noqa: E731
    related, before = ancestry(proposal), _siblings_before(proposal)
    passes = passes & proposal.valid
    beaten = (before & passes[:, None]).any(axis=-1)
    accepted = (~related | (passes & ~beaten)[:, None]).all(axis=-1)
    visited = jnp.pad(accepted, ((0, 0), (1, 0)), constant_values=True)
    reached = jnp.take_along_axis(visited, proposal.parents + 1, axis=1)
    tried = proposal.valid & reached & ~beaten
    level = jnp.arange(depth, dtype=jnp.int32)[None, None]
    depths = related.sum(axis=-1, dtype=jnp.int32)[..., None] - 1
    index = jnp.arange(n, dtype=jnp.int32)[None, :, None]
    path = count(jnp.where(accepted[..., None] & (depths == level), index, 0))
    last = jnp.where(accepted, index[..., 0] + 1, 0).max(axis=1, initial=0)
    tries = count(tried[..., None] & (depths == level))
    num = count(accepted)
    return Verdict(num_accepted=num, path=path, next_token=num, tries=tries), last


def _pass_chosen(p: jax.Array, proposal: Proposal, u: jax.Array) -> jax.Array:
    """Which chosen nodes would be accepted, bool[B, n], for uniforms f32[B, n]."""
    p_x = _at_node(p, proposal.parents + 1, proposal.tokens)
    removed = jnp.where(_siblings_before(proposal), p_x[:, None], 0.0).sum(axis=-1)
    return u * jnp.maximum(1.0 - removed, 0.0) < p_x


def _without_children(p: jax.Array, proposal: Proposal, last: jax.Array) -> jax.Array:
    """p (f32[B, V]) at the end of a path (as `_follow` says) without the tokens rejected there."""
    rejected = proposal.valid & (proposal.parents == last[:, None] - 1)
    nowhere = jnp.where(rejected, proposal.tokens, p.shape[-1])
    rest = jax.vmap(lambda row, x: row.at[x].set(0.0, mode="drop"))(p, nowhere)
    # The children had all of p up to rounding: then every draw from p is right.
    return jnp.where(rest.sum(axis=-1, keepdims=True) > 0, rest, p)


def _accept_block(p: jax.Array, proposal: Proposal, u: jax.Array) -> tuple[Verdict, jax.Array]:
    """Accept the longest prefix of a drawn chain that its own draw (f32[B, n]) allows: block
    verification (Sun et al. 2024, arXiv 2403.10444), which accepts as many tokens as any rule can.

    Returns:
      the verdict, without its last token, and what is left of p where the chain ends, f32[B, V].
    """
    node = jnp.arange(proposal.tokens.shape[1], dtype=jnp.int32)[None]
    length = jnp.where(proposal.valid, node.shape[1], node).min(axis=1, keepdims=True)
    drafted = node < length
    weight, q = _block_weights(p, proposal), _q_ahead(proposal, drafted)
    left = jnp.maximum(weight[..., None] * p - q, 0.0).sum(axis=-1)
    # u < left / (left + 1 - weight), without a division of nothing by nothing.
    stops = u * (left + (1.0 - weight))[:, 1:] < left[:, 1:]
    num = jnp.where(drafted & stops, node + 1, 0).max(axis=1)
    p, rest = _at(p, num), jnp.maximum(_at(weight, num)[:, None] * _at(p, num) - _at(q, num), 0.0)
    # p = q up to rounding leaves nothing: then every draw from p is right.
    rest = jnp.where(rest.sum(axis=-1, keepdims=True) > 0, rest, p)
    tries = (drafted & (node <= num[:, None])).astype(jnp.int32)
    path = jnp.broadcast_to(node, tries.shape)
    return Verdict(num_accepted=num, path=path, next_token=num, tries=tries), rest


def _block_weights(p: jax.Array, proposal: Proposal) -> jax.Array:
    """How likely at least i tokens of a chain are accepted, given the first i: f32[B, n + 1]."""
    assert proposal.probs is not None  # drawn nodes come with what they were drawn from
    p_x, q_x = (_at_node(x, proposal.parents + 1, proposal.tokens) for x in (p, proposal.probs))
    ratio = p_x / jnp.maximum(q_x, jnp.finfo(q_x.dtype).tiny)
    weights = [jnp.ones_like(ratio[:, 0])]
    for i in range(ratio.shape[1]):
        weights.append(jnp.minimum(weights[-1] * ratio[:, i], 1.0))
    return jnp.stack(weights, axis=1)


def _q_ahead(proposal: Proposal, drafted: jax.Array) -> jax.Array:
    """q of the token behind the first i of a chain, f32[B, n + 1, V]; zero where none follows, and
    all of p is left.
    """
    assert proposal.probs is not None
    return jnp.pad(jnp.where(drafted[..., None], proposal.probs, 0.0), ((0, 0), (0, 1), (0, 0)))


def _traverse(p: jax.Array, proposal: Proposal) -> tuple[jax.Array, list[jax.Array]]:
    """How likely each node of a drawn tree is accepted when all below it were rejected, f32[B, n]:
    traversal verification (Weng et al. 2025, arXiv 2505.12398).

    Nodes are asked from the leaves up, siblings in order, and the first one accepted ends the path;
    but none of this hangs on an answer, so all are asked at once.

    Returns:
      these, and what is left of p where every child is rejected, level by level: f32[B, 1, V] at
      the root, then f32[B, w, V].
    """
    assert proposal.probs is not None
    depth, width = proposal.depth, proposal.tokens.shape[1] // proposal.depth
    rank = jnp.where(proposal.valid, _siblings_before(proposal).sum(axis=-1, dtype=jnp.int32), -1)
    ranks = jnp.arange(width, dtype=jnp.int32)[None, None, None]
    weight, weights, left = jnp.ones_like(p[:, :1, 0]), [], []
    for d in range(depth):
        nodes = slice(d * width, (d + 1) * width)
        first, end = (0, 1) if d == 0 else (1 + (d - 1) * width, 1 + d * width)
        row = jnp.arange(first, end, dtype=jnp.int32)[None, None]
        below = (proposal.parents[:, nodes, None] + 1 == row)[..., None]
        below = below & (rank[:, nodes, None, None] == ranks)
        parents = p[:, first:end], proposal.probs[:, first:end]
        rest, own, weight = _reject_children(*parents, weight, below, proposal.tokens[:, nodes])
        weights.append(own)
        left.append(rest)
    left.append(p[:, -width:])  # of leaves
    return jnp.concatenate([*weights[1:], weight], axis=1), left


def _reject_children(p, q, weight, below, tokens):
    """p (f32[B, m, V]) and weights (f32[B, m]) of a level when all children are rejected, each of
    which leaves max(weight p - q, 0) and q without it; and the weights of the children.

    Args:
      below: bool[B, w, m, w], entry [b, i, j, r] says whether node i is the r-th child of parent j.
      tokens: i32[B, w], of the children.
    """
    ids, tiny = jnp.arange(p.shape[-1], dtype=jnp.int32)[None, None], jnp.finfo(p.dtype).tiny
    left, q_sum = weight[..., None] * p, jnp.ones_like(weight)
    weights = jnp.zeros_like(tokens, p.dtype)
    for r in range(below.shape[-1]):
        child = below[..., r]
        there = child.any(axis=1)
        x = jnp.where(child, tokens[..., None], 0).sum(axis=1, dtype=jnp.int32)[..., None]
        share = q / jnp.maximum(q_sum, tiny)[..., None]  # at first: both may be next to nothing
        left_x, share_x = (jnp.take_along_axis(rows, x, axis=-1)[..., 0] for rows in (left, share))
        weight_x = jnp.minimum(left_x / jnp.maximum(share_x, tiny), 1.0)
        weights += jnp.where(child, weight_x[:, None], 0.0).sum(axis=-1)
        rest = jnp.maximum(left - share, 0.0)
        mass = rest.sum(axis=-1)
        total = mass + (1.0 - weight)
        reject = there & (total > 0)  # p = q leaves nothing: it is accepted
        left = jnp.where(reject[..., None], rest / total[..., None], left)
        weight = jnp.where(reject, mass / total, weight)
        q = jnp.where(there[..., None] & (ids == x), 0.0, q)
        q_sum = jnp.where(there, q.sum(axis=-1), q_sum)
    return left, weight, weights


def _at_level(levels: list[jax.Array], index: jax.Array) -> jax.Array:
    """`_at` of levels [B, m, ...] behind one another, without an array of all of them."""
    found, first = _at(levels[0], jnp.zeros_like(index)), levels[0].shape[1]
    for level in levels[1:]:
        m = level.shape[1]
        one = _at(level, jnp.clip(index - first, 0, m - 1))
        found, first = jnp.where((index >= first)[:, None], one, found), first + m
    return found


def _at(x: jax.Array, index: jax.Array) -> jax.Array:
    """x[b, index[b]] for every row b."""
    index = index.reshape(index.shape + (1,) * (x.ndim - 1))
    return jnp.take_along_axis(x, index, axis=1).squeeze(1)


def _at_node(p: jax.Array, node: jax.Array, token: jax.Array) -> jax.Array:
    """p[b, node[b, i], token[b, i]] of f32[B, m, V], without a copy of its rows: f32[B, n]."""
    return jax.vmap(lambda row, i, x: row[i, x])(p, node, token)

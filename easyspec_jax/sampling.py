"""From logits to tokens: filters, draws, and the verification that keeps speculative decoding
lossless.

Nothing here sorts the vocabulary: thresholds of top-k and top-p are found exactly by bisection on
the bits of the probabilities, which stays cheap and capturable inside a GPU's decode loop.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax

from easyspec_jax.config import Sampling


@struct.dataclass(kw_only=True)
class Filters:
    """A `Sampling` inside jit: values are leaves, so changing them compiles nothing; which ones are
    on is static.
    """

    temperature: jax.Array  # f32[]
    top_k: jax.Array  # i32[]
    top_p: jax.Array  # f32[]
    min_p: jax.Array  # f32[]
    greedy: bool = struct.field(pytree_node=False)
    use_top_k: bool = struct.field(pytree_node=False)
    use_top_p: bool = struct.field(pytree_node=False)
    use_min_p: bool = struct.field(pytree_node=False)


def make_filters(sampling: Sampling) -> Filters:
    """The run-time form of `sampling`; filters that change nothing are off."""
    greedy = sampling.temperature == 0
    return Filters(
        temperature=jnp.float32(sampling.temperature),
        top_k=jnp.int32(min(sampling.top_k, 2**31 - 1)),
        top_p=jnp.float32(sampling.top_p),
        min_p=jnp.float32(sampling.min_p),
        greedy=greedy,
        use_top_k=not greedy and sampling.top_k > 0,
        use_top_p=not greedy and sampling.top_p < 1,
        use_min_p=not greedy and sampling.min_p > 0,
    )


@struct.dataclass(kw_only=True)
class Proposal:
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


@struct.dataclass(kw_only=True)
class Verdict:
    """What the base model decided about one proposal."""

    num_accepted: jax.Array  # i32[B], in [0, depth]
    # i32[B, depth], the accepted nodes; what lies beyond num_accepted means nothing
    path: jax.Array
    next_token: jax.Array  # i32[B], the residual sample, or the bonus token behind a leaf
    tries: jax.Array  # i32[B, depth], nodes tried at each depth; the last of them was accepted


def probabilities(logits: jax.Array, filters: Filters) -> jax.Array:
    """The distribution tokens are drawn from: temperature, then top-k, top-p, min-p, each on the
    renormalised rest.

    Args:
      logits: [..., V], any float type.
      filters: not greedy. Ties at a threshold are all kept.

    Returns:
      f32[..., V].
    """
    p = jax.nn.softmax(logits.astype(jnp.float32) / filters.temperature, axis=-1)
    if filters.use_top_k:
        count = lambda at: (p >= at).sum(axis=-1, keepdims=True, dtype=jnp.int32)  # noqa: E731
        p = _keep(p, _largest_threshold(p, lambda at: count(at) >= filters.top_k))
    if filters.use_top_p:
        mass = lambda at: jnp.where(p >= at, p, 0.0).sum(axis=-1, keepdims=True)  # noqa: E731
        p = _keep(p, _largest_threshold(p, lambda at: mass(at) >= filters.top_p))
    if filters.use_min_p:
        p = _keep(p, filters.min_p * p.max(axis=-1, keepdims=True))
    return p


def _keep(p: jax.Array, threshold: jax.Array) -> jax.Array:
    kept = jnp.where(p >= threshold, p, 0.0)
    return kept / kept.sum(axis=-1, keepdims=True)


def _largest_threshold(p: jax.Array, holds: Callable[[jax.Array], jax.Array]) -> jax.Array:
    """The largest t >= 0 (f32[..., 1]) with holds(t), for a predicate that turns false as t grows;
    0 if none holds.

    Floats that are not negative order as their bits do, so 31 halvings are exact.
    """

    def try_bit(i, bits):
        higher = bits | (jnp.int32(1) << (30 - i))
        return jnp.where(holds(lax.bitcast_convert_type(higher, jnp.float32)), higher, bits)

    none = jnp.zeros_like(p[..., :1], dtype=jnp.int32)
    return lax.bitcast_convert_type(lax.fori_loop(0, 31, try_bit, none), jnp.float32)


def sample(key: jax.Array, probs: jax.Array) -> jax.Array:
    """One draw per row: i32[...] from f32[..., V], which need not be normalised; a zero is never
    drawn.
    """
    return jax.random.categorical(key, jnp.log(probs), axis=-1).astype(jnp.int32)


def fit_vocab(scores: jax.Array, vocab_size: int) -> jax.Array:
    """Logits [B, m, V'] of a model of another vocabulary over V ids: cut, or padded with -inf; ids
    that the model lacks are never drawn.
    """
    missing = vocab_size - scores.shape[-1]
    if missing <= 0:
        return scores[..., :vocab_size]
    return jnp.pad(scores, ((0, 0), (0, 0), (0, missing)), constant_values=-jnp.inf)


def argmax(logits: jax.Array) -> jax.Array:
    """The greedy token, i32[...]; the first of equals."""
    return jnp.argmax(logits, axis=-1).astype(jnp.int32)


def verify(logits: jax.Array, proposal: Proposal, filters: Filters, key: jax.Array) -> Verdict:
    """Accept a path from the root down so that the base model's distribution is kept.

    At every node its children are tried in order; the first accepted one is the next node, and
    where all are rejected (or there are none) the step's last token is drawn from what is left of
    p. A chosen child x is accepted with p(x) over the mass its siblings left; a drawn one with
    min(1, p(x) / q(x)), a rejection leaving p = norm(max(p - q, 0)) and q without x (Leviathan et
    al. 2023, Algorithm 1, for a chain; Jeon et al. 2024, recursive rejection sampling without
    replacement, for a tree). Greedily, a child is accepted if it is the base's argmax.

    Args:
      logits: [B, n + 1, V] of the base model at the root and behind each node.
      proposal: a chain or a tree.
      filters: applied to the base's logits; the draft's q had the same.
      key: consumed.
    """
    if filters.greedy:
        target = argmax(logits)
        passes = proposal.tokens == jnp.take_along_axis(target, proposal.parents + 1, axis=1)
        verdict, last = _follow(proposal, passes)
        return verdict.replace(next_token=_at(target, last))
    p = probabilities(logits, filters)
    accept_key, sample_key = jax.random.split(key)
    u = jax.random.uniform(accept_key, proposal.tokens.shape, jnp.float32)
    if proposal.probs is None:
        passes = _pass_chosen(p, proposal, u)
        verdict, last = _follow(proposal, passes)
        rest = _without_children(_at(p, last), proposal, last)
    else:
        passes, rest = _try_drawn(p, proposal, u)
        verdict, _ = _follow(proposal, passes)
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


def _try_drawn(p: jax.Array, proposal: Proposal, u: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Try drawn nodes (p: f32[B, n + 1, V], uniforms f32[B, n]) on the way down from the root.

    Returns:
      bool[B, n], the accepted nodes, and what is left of p where the path ends, f32[B, V].
    """
    n, vocab = proposal.tokens.shape[1], p.shape[-1]
    ids = jnp.arange(vocab, dtype=jnp.int32)[None]

    def try_node(i, state):
        last, rest, p_sum, q, q_sum, passes = state
        x = proposal.tokens[:, i]
        tried = proposal.valid[:, i] & (proposal.parents[:, i] == last - 1)
        # u < p / q, each normalised, and neither product so small that it vanishes.
        accept = tried & (u[:, i] * (_at(q, x) / q_sum) < _at(rest, x) / p_sum)
        left = jnp.maximum(rest / p_sum[:, None] - q / q_sum[:, None], 0.0)
        # p = q up to rounding leaves nothing: then every draw from p is right.
        left = jnp.where(left.sum(axis=-1, keepdims=True) > 0, left, rest)
        reject = (tried & ~accept)[:, None]
        last = jnp.where(accept, i + 1, last)
        rest = jnp.where(accept[:, None], p[:, i + 1], jnp.where(reject, left, rest))
        below = proposal.probs[:, jnp.minimum(i + 1, proposal.probs.shape[1] - 1)]
        without = jnp.where(ids == x[:, None], 0.0, q)
        q = jnp.where(accept[:, None], below, jnp.where(reject, without, q))
        p_sum = jnp.where(accept, 1.0, jnp.where(tried, rest.sum(axis=-1), p_sum))
        q_sum = jnp.where(accept, 1.0, jnp.where(tried, q.sum(axis=-1), q_sum))
        return last, rest, p_sum, q, q_sum, passes.at[:, i].set(accept)

    one = jnp.ones_like(p[:, 0, 0])
    root = jnp.zeros_like(proposal.tokens[:, 0])
    state = (root, p[:, 0], one, proposal.probs[:, 0], one, jnp.zeros_like(proposal.valid))
    _, rest, _, _, _, passes = lax.fori_loop(0, n, try_node, state)
    return passes, rest


def _at(x: jax.Array, index: jax.Array) -> jax.Array:
    """x[b, index[b]] for every row b."""
    index = index.reshape(index.shape + (1,) * (x.ndim - 1))
    return jnp.take_along_axis(x, index, axis=1).squeeze(1)


def _at_node(p: jax.Array, node: jax.Array, token: jax.Array) -> jax.Array:
    """p[b, node[b, i], token[b, i]] of f32[B, m, V], without a copy of its rows: f32[B, n]."""
    return jax.vmap(lambda row, i, x: row[i, x])(p, node, token)

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
    or on an earlier node.
    """

    tokens: jax.Array  # i32[B, n]
    parents: jax.Array  # i32[B, n], index of the parent node, -1 = root
    valid: jax.Array  # bool[B, n]; an invalid node is never accepted and never counted
    probs: jax.Array | None = (
        None  # f32[B, n, V], q that each token was drawn from; None: chosen, not drawn
    )


@struct.dataclass(kw_only=True)
class Verdict:
    """What the base model decided about one proposal."""

    num_accepted: jax.Array  # i32[B], in [0, n]
    next_token: jax.Array  # i32[B], the residual sample, or the bonus token if all n were accepted


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


def argmax(logits: jax.Array) -> jax.Array:
    """The greedy token, i32[...]; the first of equals."""
    return jnp.argmax(logits, axis=-1).astype(jnp.int32)


def verify(logits: jax.Array, proposal: Proposal, filters: Filters, key: jax.Array) -> Verdict:
    """Accept the longest prefix of a chain that keeps the base model's distribution (Leviathan et
    al. 2023, Algorithm 1).

    A drawn token x is accepted with min(1, p(x) / q(x)), a chosen one (`proposal.probs` is None)
    with p(x). At the first rejection the token is drawn from what p has left over q; with no draft
    token there, from p.

    Args:
      logits: [B, n + 1, V] of the base model at the root and behind each draft token.
      proposal: a chain: node i hangs on node i - 1.
      filters: applied to the base's logits; the draft's q had the same.
      key: consumed.
    """
    if filters.greedy:
        target = argmax(logits)
        count = _leading(proposal.valid & (proposal.tokens == target[:, :-1]))
        return Verdict(num_accepted=count, next_token=_at(target, count))
    p = probabilities(logits, filters)
    accept_key, sample_key = jax.random.split(key)
    x = proposal.tokens[..., None]
    p_x = jnp.take_along_axis(p[:, :-1], x, axis=-1)[..., 0]
    q_x = 1.0 if proposal.probs is None else jnp.take_along_axis(proposal.probs, x, axis=-1)[..., 0]
    # u < p / q without the division: q(x) may be tiny.
    u = jax.random.uniform(accept_key, p_x.shape, jnp.float32)
    count = _leading(proposal.valid & (u * q_x < p_x))
    rest = _residual(_at(p, count), proposal, count)
    return Verdict(num_accepted=count, next_token=sample(sample_key, rest))


def _residual(p: jax.Array, proposal: Proposal, count: jax.Array) -> jax.Array:
    """What is left of p (f32[B, V]) after draft token `count` was rejected; all of it where there
    was none.
    """
    n = proposal.tokens.shape[1]
    if n == 0:
        return p
    at = jnp.minimum(count, n - 1)
    rejected = (count < n) & _at(proposal.valid, at)
    if proposal.probs is None:
        q = jax.nn.one_hot(_at(proposal.tokens, at), p.shape[-1], dtype=p.dtype)
    else:
        q = _at(proposal.probs, at)
    rest = jnp.maximum(p - jnp.where(rejected[:, None], q, 0.0), 0.0)
    # p = q up to rounding leaves nothing: then every draw from p is right.
    return jnp.where(rest.sum(axis=-1, keepdims=True) > 0, rest, p)


def _leading(accepted: jax.Array) -> jax.Array:
    """How many entries of bool[B, n] are true before the first false one."""
    return jnp.cumprod(accepted.astype(jnp.int32), axis=1, dtype=jnp.int32).sum(
        axis=1, dtype=jnp.int32
    )


def _at(x: jax.Array, index: jax.Array) -> jax.Array:
    """x[b, index[b]] for every row b."""
    index = index.reshape(index.shape + (1,) * (x.ndim - 1))
    return jnp.take_along_axis(x, index, axis=1).squeeze(1)

"""From logits to tokens: filters and draws.

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


class Filters(struct.PyTreeNode, kw_only=True):
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

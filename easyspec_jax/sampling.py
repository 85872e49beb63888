"""From logits to tokens: the likeliest, filters and draws.

Nothing here sorts the vocabulary: thresholds of top-k and top-p are found exactly by bisection on
the bits of the probabilities, which stays cheap and capturable inside a GPU's decode loop.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax

from easyspec_jax.config import Sampling

BLOCK = 128  # of the vocabulary, for the best of it


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
    x = logits.astype(jnp.float32)
    # Not normalised before the end: the largest is 1, and a filter compares with what it is given.
    # Divided behind the difference: compilers may round x / temperature in one of its places only.
    p = jnp.exp((x - x.max(axis=-1, keepdims=True)) / filters.temperature)
    if filters.use_top_k:
        count = lambda p, at: (p >= at).sum(axis=-1, dtype=jnp.int32)  # noqa: E731
        p = _keep(p, _largest_threshold(p, count, lambda all_of_them: filters.top_k))
    if filters.use_top_p:
        mass = lambda p, at: jnp.where(p >= at, p, 0.0).sum(axis=-1)  # noqa: E731
        p = _keep(p, _largest_threshold(p, mass, lambda total: filters.top_p * total))
    if filters.use_min_p:
        p = _keep(p, filters.min_p)
    return p / p.sum(axis=-1, keepdims=True)


def _keep(p: jax.Array, threshold: jax.Array) -> jax.Array:
    return jnp.where(p >= threshold, p, 0.0)


def _largest_threshold(
    p: jax.Array,
    measure: Callable[[jax.Array, jax.Array], jax.Array],
    least: Callable[[jax.Array], jax.Array],
) -> jax.Array:
    """The largest t in [0, 2) (f32[..., 1]) of which the measure, which falls as t grows, is at
    least `least`; 0 if none.

    Floats that are not negative order as their bits do, so deciding 30 bits from the highest down
    is exact: one at a time where passes over p cost what they compute, five at a time where they
    cost a few launches, as on GPUs.

    Args:
      p: f32[..., V].
      measure: of p [..., 1, V] and thresholds [..., n, 1], [..., n].
      least: of the measure at 0, [..., 1], what is wanted.
    """
    one, five = (functools.partial(by, measure=measure, least=least) for by in (_by_bit, _by_five))
    return lax.platform_dependent(p, cpu=one, default=five)


def _by_bit(p: jax.Array, *, measure: Callable, least: Callable) -> jax.Array:
    """`_largest_threshold`, bit by bit."""
    wanted = least(measure(p[..., None, :], jnp.zeros((1,) * (p.ndim + 1), p.dtype)))

    def decide(i, found):
        tried = found | (1 << (29 - i))
        at = lax.bitcast_convert_type(tried, jnp.float32)[..., None]
        return jnp.where(measure(p[..., None, :], at) >= wanted, tried, found)

    none = jnp.zeros_like(p[..., :1], dtype=jnp.int32)
    return lax.bitcast_convert_type(lax.fori_loop(0, 30, decide, none), jnp.float32)


def _by_five(p: jax.Array, *, measure: Callable, least: Callable) -> jax.Array:
    """The same by five bits; the first pass measures at 0, too."""
    found = jnp.zeros_like(p[..., :1], dtype=jnp.int32)
    for shift in range(25, -1, -5):
        codes = jnp.arange(0 if shift == 25 else 1, 32, dtype=jnp.int32)
        tried = found | (codes << shift).reshape((1,) * (p.ndim - 1) + (-1,))
        at = lax.bitcast_convert_type(tried, jnp.float32)[..., None]
        measured = measure(p[..., None, :], at)
        if shift == 25:
            wanted, measured = least(measured[..., :1]), measured[..., 1:]
        digit = (measured >= wanted).sum(axis=-1, keepdims=True, dtype=jnp.int32)
        found = found | (digit << shift)
    return lax.bitcast_convert_type(found, jnp.float32)


def sample(key: jax.Array, probs: jax.Array) -> jax.Array:
    """One draw per row: i32[...] from f32[..., V], which need not be normalised; a zero is never
    drawn.
    """
    order = perturbed(key, jnp.log(probs))
    return largest(order, 1)[1][..., 0]


def perturbed(key: jax.Array, log_p: jax.Array) -> jax.Array:
    """Log-probabilities f32[..., V] with Gumbel noise: the largest is a draw, the k largest are k
    without replacement.
    """
    return log_p + jax.random.gumbel(key, log_p.shape, jnp.float32)


class Scores(struct.PyTreeNode, kw_only=True):
    """Logits [B, m, V] of which each device has its share of the vocabulary until somebody needs
    all of them: to find the likeliest, only every device's own likeliest travel.
    """

    share: jax.Array  # f[B, m, V' / devices], V' ids of the model they are from
    # i32[V'], which of V ids each of those is, none twice; None: they are the same
    ids: jax.Array | None = None
    # of the mesh, that split V'
    axes: tuple[str, ...] = struct.field(pytree_node=False, default=())
    # V: ids at or beyond it are cut, those that the model lacks are never drawn
    vocab_size: int = struct.field(pytree_node=False)

    @classmethod
    def of(cls, scores: jax.Array | Scores) -> Scores:
        """Logits [B, m, V], the same on every device, as such."""
        if isinstance(scores, Scores):
            return scores
        return cls(share=scores, vocab_size=scores.shape[-1])

    def fit(self, vocab_size: int) -> Scores:
        """Over V ids: cut, or with -inf for those that the model lacks."""
        return self.replace(vocab_size=vocab_size)

    def whole(self) -> jax.Array:
        """All of them, [B, m, V], the same on every device."""
        scores = self.share
        if self.axes:
            with jax.named_scope("logits"):
                scores = lax.all_gather(scores, self.axes, axis=2, tiled=True, to="invarying")
        if self.ids is not None:
            nothing = jnp.full((*scores.shape[:-1], self.vocab_size), -jnp.inf, scores.dtype)
            return nothing.at[..., self.ids].set(scores)
        missing = self.vocab_size - scores.shape[-1]
        if missing <= 0:
            return scores[..., : self.vocab_size]
        return jnp.pad(scores, ((0, 0), (0, 0), (0, missing)), constant_values=-jnp.inf)

    def largest(self, k: int) -> tuple[jax.Array, jax.Array]:
        """The k largest of each row, falling, and their ids: [B, m, k] each; k at most V."""
        return self._winners(k)[:2]

    def likeliest(self, k: int) -> tuple[jax.Array, jax.Array, jax.Array]:
        """The same, and their log-probabilities, f32[B, m, k]."""
        top, ids, total = self._winners(k, total=True)
        return top, ids, top.astype(jnp.float32) - total[..., None]

    def argmax(self) -> jax.Array:
        """The likeliest id of each row, i32[B, m]; the first of equals."""
        return self.largest(1)[1][..., 0]

    def _winners(self, k: int, *, total: bool = False) -> tuple[jax.Array, jax.Array, Any]:
        """The k largest, their ids and, if asked for, the logsumexp of each row, f32[B, m]."""
        if self.ids is not None:
            share = jnp.where(self._below(self.ids)[None, None], self.share, -jnp.inf)
            own = self.replace(share=share, ids=None, vocab_size=len(self.ids))
            top, ids, sums = own._winners(k, total=total)
            return top, self.ids[ids], sums
        if not self.axes:
            scores = self.whole()
            sums = jax.nn.logsumexp(scores.astype(jnp.float32), axis=-1) if total else None
            return *largest(scores, k), sums
        own, wide = self._own(), self.share.dtype
        top, index = largest(own, min(k, own.shape[-1]))
        first = lax.axis_index(self.axes) * own.shape[-1]
        # One sum of a few numbers; ids are exact in float32 up to 2^24.
        found = [top, (first + index).astype(wide)]
        if total:
            sums = jax.nn.logsumexp(own.astype(jnp.float32), axis=-1, keepdims=True)
            found.append(sums.astype(wide))
        with jax.named_scope("logits"):
            found = _of_all_devices(jnp.concatenate(found, axis=-1), self.axes)
        found, sums = found[..., : 2 * top.shape[-1]], found[..., -1]
        sums = jax.nn.logsumexp(sums.astype(jnp.float32), axis=0) if total else None
        if k == 1:
            top, ids = _first_largest(found[..., :1], found[..., 1:], 0)
            return top, ids.astype(jnp.int32), sums
        tops, ids = (
            jnp.moveaxis(x, 0, -2).reshape(*own.shape[:-1], -1)
            for x in jnp.split(found, 2, axis=-1)
        )
        spare = [(0, 0)] * (tops.ndim - 1) + [(0, max(k - tops.shape[-1], 0))]  # ids it lacks
        tops, ids = jnp.pad(tops, spare, constant_values=-jnp.inf), jnp.pad(ids, spare)
        top, at = lax.top_k(tops, k)
        ids = jnp.take_along_axis(ids, at, axis=-1).astype(jnp.int32)
        return top, ids, sums

    def _below(self, ids: jax.Array) -> jax.Array:
        """Which of i32[V'] ids are below V, of this device's share: bool[V' / devices]."""
        size = self.share.shape[-1]
        if self.axes:
            ids = lax.dynamic_slice_in_dim(ids, lax.axis_index(self.axes) * size, size)
        return ids < self.vocab_size

    def _own(self) -> jax.Array:
        """This device's share, -inf where ids are cut."""
        size = self.share.shape[-1]
        if self.vocab_size >= size * lax.psum(1, self.axes):
            return self.share
        ids = lax.axis_index(self.axes) * size + jnp.arange(size, dtype=jnp.int32)[None, None]
        return jnp.where(ids < self.vocab_size, self.share, -jnp.inf)


def _of_all_devices(x: jax.Array, axes: tuple[str, ...]) -> jax.Array:
    """x of each device, [n, ...]: as a sum, which for few numbers is faster than a gather."""
    n = lax.psum(1, axes)
    own = jnp.arange(n, dtype=jnp.int32) == lax.axis_index(axes)
    return lax.psum(jnp.where(own.reshape(-1, *[1] * x.ndim), x[None], 0), axes)


def largest(x: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
    """The k largest entries of the last axis, falling, and their indices: [..., k] each.

    Blocks first: the k largest lie in the k blocks with the largest maxima, so that nothing as long
    as a vocabulary is ever sorted.
    """
    if k == 1:
        return lax.platform_dependent(x, cpu=_largest_in_two, default=_largest_in_one)
    size = x.shape[-1]
    if size <= 2 * BLOCK:
        top, index = lax.top_k(x, k)
        return top, index
    pad = [(0, 0)] * (x.ndim - 1) + [(0, -size % BLOCK)]
    blocks = jnp.pad(x, pad, constant_values=-jnp.inf).reshape(*x.shape[:-1], -1, BLOCK)
    _, where = lax.top_k(blocks.max(axis=-1), min(k, blocks.shape[-2]))
    few = jnp.take_along_axis(blocks, where[..., None], axis=-2)
    top, at = lax.top_k(few.reshape(*x.shape[:-1], -1), k)
    index = jnp.take_along_axis(where, at // BLOCK, axis=-1) * BLOCK + at % BLOCK
    return top, jnp.minimum(index, size - 1)


def _largest_in_one(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The largest of the last axis and its index, [..., 1] each, by one pass."""
    index = lax.broadcasted_iota(jnp.int32, x.shape, x.ndim - 1)
    top, index = _first_largest(x, index, x.ndim - 1)
    return top[..., None], index[..., None]


def _largest_in_two(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The same by two passes that a CPU makes several numbers at once. In one that keeps an index
    it takes them one by one, and so does whatever makes x there: random numbers, say.
    """
    index = lax.broadcasted_iota(jnp.int32, x.shape, x.ndim - 1)
    top = x.max(axis=-1, keepdims=True)
    index = jnp.where((x == top) | (x != x), index, x.shape[-1])
    return top, index.min(axis=-1, keepdims=True)


def _first_largest(x: jax.Array, ids: jax.Array, axis: int) -> tuple[jax.Array, jax.Array]:
    """The largest x along an axis and its id, of equals that of the smallest id: one pass, where an
    argmax and a look-up would keep x.
    """

    def better(a, b):
        (x, i), (y, j) = a, b
        wins = (x > y) | (x != x)  # as of `argmax`
        return lax.select(wins, x, y), lax.select(wins | ((x == y) & (i < j)), i, j)

    start = (jnp.array(-jnp.inf, x.dtype), jnp.zeros((), ids.dtype))
    return lax.reduce((x, ids), start, better, (axis,))


def argmax(logits: jax.Array) -> jax.Array:
    """The greedy token, i32[...]; the first of equals."""
    return largest(logits, 1)[1][..., 0]

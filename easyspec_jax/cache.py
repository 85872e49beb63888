"""The functional KV cache: written in place when donated, rolled back by resetting a length.

An entry is [K * B, S, H] (kv heads major, so that a split over kv heads is a split of the first
axis): the layout in which XLA updates and reads it without copies or transposes. Entries at or
beyond `length` are scratch: attention masks by position, so they are never read before they are
written again.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax

from easyspec_jax.config import ModelConfig
from easyspec_jax.sharding import Layout


@struct.dataclass(kw_only=True)
class LayerKV:
    """Keys (rotated) and values of one layer, or of one slot: the layers of a group stacked over
    the mesh axis "layer".
    """

    k: jax.Array  # [K * B, S, H], or [n, K * B, S, H] with the first axis over "layer"; `own_slots`
    v: jax.Array  # the same shape

    def write(self, k: jax.Array, v: jax.Array, start: jax.Array) -> LayerKV:
        """Entries start[b] .. start[b] + T - 1 of row b hold k and v ([K * B, T, H]); start is
        i32[B].
        """
        return LayerKV(k=_write(self.k, k, start), v=_write(self.v, v, start))

    def read(self, start: jax.Array, num: int) -> LayerKV:
        """Entries start[b] .. start[b] + num - 1 of row b ([K * B, num, H])."""
        return LayerKV(k=_read(self.k, start, num), v=_read(self.v, start, num))

    def keep(self, start: jax.Array, index: jax.Array) -> LayerKV:
        """Entries start[b] + index[b, j] of row b are copied to start[b] + j (index: i32[B, J]);
        not for a stacked slot.
        """
        return LayerKV(k=_keep(self.k, start, index), v=_keep(self.v, start, index))


def _write(cache, new, start):
    if start.shape[0] == 1:
        zero = jnp.zeros_like(start[0])
        return lax.dynamic_update_slice(cache, new, (zero, start[0], zero))
    starts = jnp.tile(start, cache.shape[0] // start.shape[0])
    return jax.vmap(lambda c, n, s: lax.dynamic_update_slice(c, n, (s, jnp.zeros_like(s))))(
        cache, new, starts
    )


def _read(cache, start, num):
    starts = jnp.tile(start, cache.shape[0] // start.shape[0])
    return jax.vmap(lambda c, s: lax.dynamic_slice_in_dim(c, s, num))(cache, starts)


def _keep(cache, start, index):
    source = start[:, None] + index
    if start.shape[0] == 1:
        kept = jnp.take(cache, source[0], axis=1, mode="clip")
    else:
        source = jnp.tile(source, (cache.shape[0] // start.shape[0], 1))
        kept = jnp.take_along_axis(cache, source[..., None], axis=1, mode="clip")
    return _write(cache, kept, start)


def own_slots(tree: Any) -> Any:
    """`tree` inside `shard_map`, with this device's layer of every stacked slot, [K * B, S, H].

    To be done before a loop and undone by `stacked_like` behind it: in a loop that writes entries
    with a leading axis of 1, XLA:CPU copies them.
    """

    def own(x):
        if not (isinstance(x, LayerKV) and x.k.ndim == 4):
            return x
        return jax.tree.map(lambda leaf: leaf.reshape(leaf.shape[1:]), x)

    return jax.tree.map(own, tree, is_leaf=lambda x: isinstance(x, LayerKV))


def stacked_like(before: Any, tree: Any) -> Any:
    """`own_slots` undone: `tree` with the shapes that it had `before`."""

    def stack(old, new):
        if not isinstance(old, LayerKV):
            return new
        return jax.tree.map(lambda a, b: b.reshape(a.shape), old, new)

    return jax.tree.map(stack, before, tree, is_leaf=lambda x: isinstance(x, LayerKV))


@struct.dataclass(kw_only=True)
class KVCache:
    """All layers' keys and values; the first `length[b]` entries of row b belong to committed
    tokens.
    """

    # As Params.blocks: one LayerKV per slot of each block, then one per layer that has a copy.
    blocks: tuple[tuple[LayerKV, ...], ...]
    length: jax.Array  # i32[B]

    @property
    def max_len(self) -> int:
        """S, the capacity in tokens."""
        return self.blocks[0][0].k.shape[-2]

    def rollback(self, length: jax.Array) -> KVCache:
        """Forget every entry at or beyond `length` (i32[B]); nothing is copied."""
        return self.replace(length=length)

    def keep(self, start: jax.Array, index: jax.Array) -> KVCache:
        """Entries start[b] + index[b, j] are copied to start[b] + j in every layer: the accepted
        path of a tree (index: i32[B, J]). `length` stays. Not for models in groups.
        """
        blocks = tuple(tuple(kv.keep(start, index) for kv in block) for block in self.blocks)
        return self.replace(blocks=blocks)


def abstract_cache(
    config: ModelConfig,
    layout: Layout,
    partition: tuple[int, ...],
    batch: int,
    max_len: int,
    dtype: Any,
) -> KVCache:
    """Shapes and shardings of an empty cache, as ShapeDtypeStructs."""
    shape = (config.num_kv_heads * batch, max_len, config.head_dim)
    n = layout.group_devices

    def entry(layout, shape, letters):
        one = jax.ShapeDtypeStruct(shape, dtype, sharding=layout.named(letters))
        return LayerKV(k=one, v=one)

    def slots(size):
        if not layout.stacks(size):
            return (entry(layout, shape, "KSH"),) * size
        copies = (entry(layout.copy, shape, "KSH"),) * size if layout.copy else ()
        return (entry(layout, (n, *shape), "LKSH"),) * -(-size // n) + copies

    length = jax.ShapeDtypeStruct((batch,), jnp.int32, sharding=layout.named("B"))
    return KVCache(blocks=tuple(slots(size) for size in partition), length=length)


def zeros(abstract: KVCache) -> KVCache:
    """An empty cache, allocated straight onto its devices."""
    return jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype, device=a.sharding), abstract)

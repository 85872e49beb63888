"""The functional KV cache: written in place when donated, rolled back by resetting a length.

Keys and values are [K * B, S, H] (kv heads major, so that a split over kv heads is a split of the
first axis), on CPUs keys [K * B, H, S]: the layouts in which XLA updates and reads them without
copies or transposes, and in which Eigen multiplies scores of several rows. Entries at or beyond
`length` are scratch: attention masks by position, so they are never read before they are written
again. Stored as codes they have a scale for each head and entry, [K * B, S, 1].
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax

from easyspec_jax.config import ModelConfig
from easyspec_jax.quantized import KINDS, Form, quantise, wide_type
from easyspec_jax.sharding import Layout, Placed, shape_of

# Keys and values of a layer for GPUs are one array where one update then writes both, as programs
# of jax 0.10.2 say; those of 0.12.0.1 first copy both out of it.
ONE_ARRAY = jax.__version_info__ < (0, 11)


class LayerKV(struct.PyTreeNode):
    """Keys (rotated) and values of one layer, or of one slot: the layers of a group stacked over
    the mesh axis "layer", which is then the first axis of every array.
    """

    # Keys and values, or one array of both; the first axis holds kv heads and rows, K * B. Then the
    # scales of either, where these are codes
    arrays: tuple[Any, ...]
    # Dimension letters of each: E keys and values; 1, what a scale is for
    letters: tuple[str, ...] = struct.field(pytree_node=False)

    @property
    def keys(self) -> tuple[Any, Any | None]:
        """What is stored of keys, [K * B, S, H] (or [K * B, H, S], as the letters say), and their
        scales, [K * B, S], or None; not of a stacked slot for GPUs.
        """
        return self._stored(0)

    @property
    def values(self) -> tuple[Any, Any | None]:
        """The same of values."""
        return self._stored(1)

    @property
    def k(self) -> Any:
        """Keys as numbers, [K * B, S, H]; not of a stacked slot for GPUs."""
        keys, scales = self.keys
        keys = keys.swapaxes(-1, -2) if self.letters[0] == "KHS" else keys
        return keys if scales is None else keys.astype(scales.dtype) * scales[..., None]

    @property
    def v(self) -> Any:
        """Values, the same shape."""
        values, scales = self.values
        return values if scales is None else values.astype(scales.dtype) * scales[..., None]

    @property
    def numbers(self) -> tuple[Any, ...]:
        """The arrays without those of scales."""
        return self.arrays[:-2] if self._scaled else self.arrays

    @property
    def _scaled(self) -> bool:
        """Whether keys and values are codes."""
        return self.letters[-1].endswith("1")

    @property
    def _in_one(self) -> bool:
        """Whether keys and values are one array."""
        return self.letters[0].startswith("E")

    def _stored(self, index: int) -> tuple[Any, Any | None]:
        """What is stored of keys (0) or values (1), and their scales."""
        scales = self.arrays[index - 2][..., 0] if self._scaled else None
        if not self._in_one:
            return self.arrays[index], scales
        if self._scaled:  # of codes a slice takes more kernels than it saves
            return self.arrays[0][index], scales
        # Not array[index]: XLA:GPU copies values that are one of two in an array of four axes.
        heads = self.arrays[0].shape[1]
        flat = self.arrays[0].reshape(-1, *self.arrays[0].shape[2:])
        return lax.slice_in_dim(flat, index * heads, (index + 1) * heads), scales

    def write(
        self, k: jax.Array, v: jax.Array, start: jax.Array, keep: jax.Array | None = None
    ) -> LayerKV:
        """Entries start[b] .. start[b] + T - 1 of row b hold k and v ([K * B, T, H]), or what they
        held where `keep` (bool[]); start is i32[B].
        """
        new = (k, v)
        scales: tuple[jax.Array, ...] = ()
        if self._scaled:
            new, scales = zip(*(_rounded(x, self.arrays[0].dtype) for x in new), strict=True)
        new = ((jnp.concatenate(new),) if self._in_one else new) + scales
        return self._each(lambda x, axis, i: _write(x, new[i].swapaxes(1, axis), start, axis, keep))

    def keep(self, start: jax.Array, index: jax.Array) -> LayerKV:
        """Entries start[b] + index[b, j] of row b are copied to start[b] + j (index: i32[B, J]);
        not for a stacked slot.
        """
        return self._each(lambda x, axis, _: _keep(x, start, index, axis))

    def _each(self, fn: Callable[[jax.Array, int, int], jax.Array]) -> LayerKV:
        """With `fn` of every array as [heads, S, H] or [heads, H, S], its axis of S, its index."""
        arrays = []
        for i, (x, letters) in enumerate(zip(self.arrays, self.letters, strict=True)):
            flat = x.reshape(-1, *x.shape[-2:])
            arrays.append(fn(flat, 2 if letters.endswith("S") else 1, i).reshape(x.shape))
        return self.replace(arrays=tuple(arrays))


def run_if(wanted: jax.Array, fn: Callable[..., tuple], *carry: Any) -> tuple:
    """fn(*carry), which is a tuple like `carry`, where `wanted` (bool[]), else `carry`.

    A loop of at most one turn writes caches in place; a `cond` or `switch` copies them.
    """

    def body(state):
        return jnp.bool_(False), *fn(*state[1:])

    return lax.while_loop(lambda state: state[0], body, (wanted, *carry))[1:]


def _rounded(x: jax.Array, dtype: Any) -> tuple[jax.Array, jax.Array]:
    """Codes of this type and scales [.., 1] of the last axis."""
    form = Form(next(kind for kind, (codes, _) in KINDS.items() if codes == dtype), None)
    found = quantise(x, (x.ndim - 1,), form)
    return found.codes, found.scales


def _write(cache, new, start, axis, keep=None):
    """`new` in place of as many entries of each row, or, where `keep`, these again: a select of the
    whole cache would copy it.
    """

    def put(c, n, s, axis):
        if keep is not None:
            n = jnp.where(keep, lax.dynamic_slice_in_dim(c, s, n.shape[axis], axis), n)
        return lax.dynamic_update_slice_in_dim(c, n, s, axis)

    if start.shape[0] == 1:
        return put(cache, new, start[0], axis)
    starts = jnp.tile(start, cache.shape[0] // start.shape[0])
    return jax.vmap(lambda c, n, s: put(c, n, s, axis - 1))(cache, new, starts)


def _keep(cache, start, index, axis):
    source = start[:, None] + index
    if start.shape[0] == 1:
        kept = jnp.take(cache, source[0], axis=axis, mode="clip")
    else:
        source = jnp.tile(source, (cache.shape[0] // start.shape[0], 1))
        source = jnp.expand_dims(source, 3 - axis)
        kept = jnp.take_along_axis(cache, source, axis=axis, mode="clip")
    return _write(cache, kept, start, axis)


class KVCache(Placed, struct.PyTreeNode, kw_only=True):
    """All layers' keys and values; the first `length[b]` entries of row b belong to committed
    tokens.
    """

    blocks: tuple[tuple[LayerKV, ...], ...]  # as Params.blocks: one LayerKV per slot of each block
    length: jax.Array  # i32[B]
    layout: Layout = struct.field(pytree_node=False)
    partition: tuple[int, ...] = struct.field(pytree_node=False)  # layers per block

    @property
    def max_len(self) -> int:
        """S, the capacity in tokens."""
        return self.blocks[0][0].arrays[-1].shape[-2]

    def rollback(self, length: jax.Array) -> KVCache:
        """Forget every entry at or beyond `length` (i32[B]); nothing is copied."""
        return self.replace(length=length)

    def keep(self, start: jax.Array, index: jax.Array) -> KVCache:
        """Entries start[b] + index[b, j] are copied to start[b] + j in every layer: the accepted
        path of a tree (index: i32[B, J]). `length` stays.
        """
        blocks = tuple(tuple(kv.keep(start, index) for kv in block) for block in self.blocks)
        return self.replace(blocks=blocks)

    def specs(self) -> KVCache:
        """The PartitionSpec of every array."""

        def entry(size: int) -> LayerKV:
            return _entry(self.layout, size, self.layout.spec)

        blocks = tuple((entry(n),) * self.layout.num_slots(n) for n in self.partition)
        return self.replace(blocks=blocks, length=self.layout.spec("B"))

    def own(self) -> KVCache:
        """This device's layer of every stacked slot, [K * B, S, H].

        A loop that writes entries with a leading axis of 1 would copy them (XLA:CPU).
        """
        return self._reshaped(lambda x: x.reshape(x.shape[1:]))

    def stacked(self) -> KVCache:
        """`own` undone."""
        return self._reshaped(lambda x: x[None])

    def _reshaped(self, fn: Callable[[jax.Array], jax.Array]) -> KVCache:
        """With `fn` of the entries of every stacked slot."""
        pairs = zip(self.partition, self.blocks, strict=True)
        blocks = (jax.tree.map(fn, b) if self.layout.stacks(n) else b for n, b in pairs)
        return self.replace(blocks=tuple(blocks))


def _entry(layout: Layout, size: int, array: Callable[[str], Any]) -> LayerKV:
    """What `array` makes of the dimension letters of each array of a block's slot."""
    letters: tuple[str, ...] = ("KHS", "KSH")
    if layout.for_gpu:
        letters = ("EKSH",) if ONE_ARRAY and layout.attention == "xla" else ("KSH", "KSH")
    if layout.kv_codes is not None:
        letters += ("KS1", "KS1")
    lead = "L" if layout.stacks(size) else ""
    return LayerKV(tuple(array(lead + one) for one in letters), letters=letters)


def abstract_cache(
    config: ModelConfig,
    layout: Layout,
    partition: tuple[int, ...],
    batch: int,
    max_len: int,
    dtype: Any,
) -> KVCache:
    """Shapes and shardings of an empty cache, as ShapeDtypeStructs."""
    sizes = {"L": layout.group_devices, "E": 2, "S": max_len, "H": config.head_dim}
    sizes |= {"K": config.num_kv_heads * batch, "1": 1}
    codes = None if layout.kv_codes is None else KINDS[layout.kv_codes][0]

    def slots(size: int) -> tuple[LayerKV, ...]:
        def array(letters: str) -> Any:
            shape = tuple(sizes[letter] for letter in letters)
            kind = dtype if codes is None else wide_type(dtype) if letters[-1] == "1" else codes
            return shape_of(shape, kind, sharding=layout.named(letters))

        return (_entry(layout, size, array),) * layout.num_slots(size)

    length = shape_of((batch,), jnp.int32, sharding=layout.named("B"))
    blocks = tuple(slots(size) for size in partition)
    return KVCache(blocks=blocks, length=length, layout=layout, partition=partition)

"""Matrices that are stored as codes and scales, and the one function that multiplies by a matrix.

A code is a number of 4 or 8 bits; an output of the matrix has one scale, or one for each group of
inputs that lie side by side, and where zero points are not in the middle the weight of the smallest
code as well. Codes are multiplied as they are read, so a step reads no more than what is stored:
scales of outputs behind the sum, those of groups inside of it. Few rows are a multiply and a sum
each, which XLA:GPU makes one kernel that reads the codes once for every eight rows; where there
are many, the matrix is dequantised first.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax

from easyspec_jax.bfloat16 import parts_product, widened
from easyspec_jax.config import is_integer

# Codes of each kind, and the largest.
KINDS = {"int8": (jnp.int8, 127), "int4": (jnp.int4, 7), "fp8": (jnp.float8_e4m3fn, 448)}
INT4_GROUP = 128  # inputs, or the largest divisor of a matrix's inputs below
SCALE_DTYPES = ("float32", "bfloat16", "float16")
PER_OUTPUT = -1  # as a group size: all inputs
# Rows that are multiplied by groups one by one: the codes are read once for each eight of them, and
# of a matrix that is dequantised first, nine times as many bytes are moved.
FEW_ROWS = 32
ROWS_AT_ONCE = 8


class Form(NamedTuple):
    """How one matrix is stored."""

    kind: str  # of KINDS
    group: int | None  # inputs that share a scale; None: all of an output
    scale_dtype: str | None = None  # None: that of the matrix, at least float32; of groups bfloat16
    minimum_dtype: str | None = None  # of the weights of the smallest code; None: code 0 is 0


@dataclasses.dataclass(frozen=True)
class Quantization:
    """How the matrices of a model are stored: those of attention and MLPs, embedding and head.

    Norms and biases stay floats. A group never leaves its head in attention's output projection.

    Args:
      kind: "int8" and "fp8" (e4m3) have a scale for each output, "int4" one for each group;
        embedding and head of "int4" are int8, a scale for each token.
      group_size: inputs of a group, which must divide those of every matrix; -1: all. None: as
        `kind` says; for int4 128, or the largest divisor below.
      keep_codes: whether devices hold codes. None: GPUs do. On CPUs, where XLA multiplies integers
        20 times slower than floats, weights are rounded and kept in the model's own type.
      embed, lm_head: "layers" where it is stored as the matrices of layers are, "float" where as
        floats. None: as `kind` says. A tied head is the embedding.
      scale_dtype: "float32", "bfloat16" or "float16". None: float32, or float64 where the model is;
        of groups bfloat16.
      minimum_dtype: one of these, where what shares a scale has a minimum, too: codes of "int4" and
        "int8" go from its least weight to its largest. None: 0 is a code, as many are on each side.

    Raises:
      ValueError: no such kind, type or place, or a group size that is no whole number above 0.
    """

    kind: str
    group_size: int | None = None
    keep_codes: bool | None = None
    embed: str | None = None
    lm_head: str | None = None
    scale_dtype: str | None = None
    minimum_dtype: str | None = None

    def __post_init__(self):
        if self.kind not in KINDS:
            known = " or ".join(f'"{kind}"' for kind in KINDS)
            raise ValueError(f"quantization must be {known}, got {self.kind!r}")
        size = self.group_size
        if size is not None and (not is_integer(size) or (size < 1 and size != PER_OUTPUT)):
            raise ValueError(f"group_size must be a whole number of inputs above 0, got {size!r}")
        for name in ("embed", "lm_head"):
            if getattr(self, name) not in (None, "layers", "float"):
                found = getattr(self, name)
                raise ValueError(f'{name} must be "layers" or "float", got {found!r}')
        for name in ("scale_dtype", "minimum_dtype"):
            found = getattr(self, name)
            if found not in (None, *SCALE_DTYPES):
                known = " or ".join(f'"{name}"' for name in SCALE_DTYPES)
                raise ValueError(f"{name} must be {known}, got {found!r}")
        if self.kind == "fp8" and self.minimum_dtype is not None:
            raise ValueError("fp8 has no minimum_dtype: its codes have a sign")

    @staticmethod
    def of(wanted: Quantization | str | None) -> Quantization | None:
        """What an argument `quantization` means: a kind, or all of it."""
        return wanted if isinstance(wanted, Quantization | None) else Quantization(wanted)

    def __str__(self) -> str:
        grouped = self.group_size not in (None, PER_OUTPUT)
        groups = f" in groups of {self.group_size} inputs" if grouped else ""
        return self.kind + groups + (" with minima" if self.minimum_dtype is not None else "")

    @property
    def stored(self) -> dict[str, Any]:
        """What tells it from others, as metadata of a checkpoint has it."""
        found = dataclasses.asdict(self)
        del found["keep_codes"]
        if self.minimum_dtype is None:  # what was written before there were minima reads the same
            del found["minimum_dtype"]
        return found

    def form(self, size: int, *, in_head: bool = False, top: str = "") -> Form | None:
        """Of a matrix; None: as floats.

        Args:
          size: its inputs, those of one head where a group lies in one (`in_head`).
          top: "embed" or "lm_head", which it is.

        Raises:
          ValueError: groups do not divide the inputs.
        """
        place = getattr(self, top) if top else "layers"
        if place == "float":
            return None
        if place is None:
            return Form("int8" if self.kind == "int4" else self.kind, None, self.scale_dtype)
        group = self.group_size
        if group is None and self.kind == "int4":
            most = min(INT4_GROUP, size)
            group = max(n for n in range(1, most + 1) if size % n == 0)
        if group in (None, PER_OUTPUT):
            return Form(self.kind, None, self.scale_dtype, self.minimum_dtype)
        if in_head:
            group = math.gcd(size, group)
        if size % group:
            raise ValueError(f"group_size {group} does not divide the {size} inputs of a matrix")
        return Form(self.kind, group, self.scale_dtype, self.minimum_dtype)


class Quantized(struct.PyTreeNode):
    """A matrix of codes, in the place of an array.

    Its scales have the same axes: along an input axis as many as there are groups, or one for all;
    along any other as many as there are codes. So have minima, where there are any.
    """

    codes: Any
    scales: Any
    minima: Any = None  # weights of the smallest code; None: code 0 is 0
    group: int | None = struct.field(pytree_node=False, default=None)  # inputs, in a checkpoint

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the matrix."""
        return self.codes.shape

    def times_read(self, rows: int, dense: int) -> float:
        """Bytes that a product with so many rows moves on a GPU, over those of the matrix, as
        compiled programs have it; `dense`: bytes of a weight that is dequantised.
        """
        if self.group is None and self.minima is None:
            return 1.0
        if rows <= FEW_ROWS:
            return float(-(-rows // ROWS_AT_ONCE))
        return 1.0 + 2 * dense / self.weight_bytes  # written and read

    @property
    def weight_bytes(self) -> float:
        """Bytes of one weight, its share of scales and minima included."""
        code = 0.5 if self.codes.dtype == jnp.int4 else 1.0
        shared = jax.tree.leaves((self.scales, self.minima))
        return code + sum(x.size * x.dtype.itemsize for x in shared) / self.codes.size


def wide_type(dtype: Any) -> jnp.dtype:
    """The type for norms, softmax, angles and logits: float32, or float64 where the model is."""
    return jnp.dtype(dtype) if jnp.dtype(dtype).itemsize >= 4 else jnp.dtype(jnp.float32)


def smallest_code(dtype: Any) -> int:
    """Of a type of whole numbers."""
    return int(jnp.iinfo(dtype).min)


@functools.partial(jax.jit, static_argnames=("inputs", "form"))
def quantise(w: jax.Array, inputs: tuple[int, ...], form: Form) -> Quantized:
    """A matrix rounded to the nearest codes: the largest magnitude that shares a scale has the
    largest code; or the least weight the smallest and the largest weight the largest.

    Args:
      w: floats, of any axes.
      inputs: the axes that a product sums over; groups lie along the last of them.
    """
    dtype, largest_code = KINDS[form.kind]
    wide = w.astype(wide_type(w.dtype))
    blocks, axes, kind = wide, inputs, wide.dtype
    if form.group is not None:
        axis = inputs[-1]
        count = w.shape[axis] // form.group
        blocks = wide.reshape(*w.shape[:axis], count, form.group, *w.shape[axis + 1 :])
        axes, kind = (axis + 1,), jnp.dtype(jnp.bfloat16)
    kind = kind if form.scale_dtype is None else jnp.dtype(form.scale_dtype)
    minima, smallest, steps = None, -largest_code, largest_code
    sizes = jnp.max(jnp.abs(blocks), axis=axes, keepdims=True)
    if form.minimum_dtype is not None:
        smallest, steps = smallest_code(dtype), largest_code - smallest_code(dtype)
        minima = jnp.min(blocks, axis=axes, keepdims=True)
        sizes = jnp.max(blocks, axis=axes, keepdims=True) - minima
        minima = minima.astype(form.minimum_dtype)
        blocks = blocks - minima.astype(wide.dtype)
    scales = (sizes / steps).astype(kind)
    wide_scales = scales.astype(wide.dtype)
    codes = blocks / jnp.where(wide_scales > 0, wide_scales, 1)
    codes = codes if form.kind == "fp8" else jnp.round(codes)
    codes = jnp.clip(codes if minima is None else codes + smallest, smallest, largest_code)
    if form.group is not None:
        scales, minima = (jax.tree.map(lambda x: jnp.squeeze(x, axes), x) for x in (scales, minima))
    return Quantized(codes.astype(dtype).reshape(w.shape), scales, minima, form.group)


@jax.jit
def dequantise(w: Quantized) -> jax.Array:
    """The weights, in at least float32: `_weights` of scales and minima for every one of them."""
    sizes = w.codes.shape

    def spread(x: jax.Array) -> jax.Array:
        for axis, (all_of_it, groups) in enumerate(zip(sizes, x.shape, strict=True)):
            if 1 < groups < all_of_it:
                x = jnp.repeat(x, all_of_it // groups, axis)
        return x

    minima = None if w.minima is None else spread(w.minima)
    return _weights(w.codes, spread(w.scales), minima, wide_type(w.scales.dtype))


def _weights(codes: jax.Array, scales: jax.Array, minima: jax.Array | None, wide: Any) -> jax.Array:
    """code * scale; or, counted from the smallest code, code * scale + minimum.

    Of scales in 16 bits the product is exact in float32, so the sum is rounded once: that is what
    (code - zero point) * scale is where the minimum is that of code 0, and GGUF's d * q + m.
    """
    if minima is None:
        return codes.astype(wide) * scales.astype(wide)
    counted = codes.astype(wide) - smallest_code(codes.dtype)
    return counted * scales.astype(wide) + minima.astype(wide)


def product(
    x: jax.Array, w: jax.Array | Quantized, *, outputs_first: bool, explicit_gemv: bool = False
) -> jax.Array:
    """x [B, T, I] times a matrix, plain or of codes, in at least float32: [B, T, O].

    Args:
      w: axes of inputs, which come to I, and of outputs, which come to O.
      outputs_first: whether these come first.
      explicit_gemv: one row is multiplied and summed.
    """
    wide = wide_type(x.dtype)
    if isinstance(w, Quantized):
        if not outputs_first:
            return product(x.astype(wide), dequantise(w).astype(wide), outputs_first=False)
        outputs = math.prod(w.shape) // x.shape[-1]
        scales, minima = (
            jax.tree.map(lambda a: a.reshape(outputs, -1), a) for a in (w.scales, w.minima)
        )
        if scales.shape[1] == 1 and minima is None:
            codes = w.codes.astype(x.dtype)
            out = product(x, codes, outputs_first=True, explicit_gemv=explicit_gemv)
            return out * scales[None, None, :, 0].astype(wide)
        if x.shape[0] * x.shape[1] > FEW_ROWS:
            return product(x, dequantise(w).astype(x.dtype), outputs_first=True)
        return _by_groups(x, w.codes.reshape(*scales.shape, -1), scales, minima)
    inputs = x.shape[-1]
    if not outputs_first:
        return jnp.einsum("bti,io->bto", x, w.reshape(inputs, -1), preferred_element_type=wide)
    w = w.reshape(-1, inputs)
    if w.dtype == jnp.bfloat16 and x.dtype == jnp.float32:
        return parts_product(x, w)
    if x.shape[:2] == (1, 1) and explicit_gemv:
        return jnp.sum(x[0].astype(wide) * w.astype(wide), axis=-1)[None, None]
    return jnp.einsum("bti,oi->bto", x, w, preferred_element_type=wide)


def _by_groups(
    x: jax.Array, codes: jax.Array, scales: jax.Array, minima: jax.Array | None
) -> jax.Array:
    """x [B, T, I] times codes [O, groups, inputs of one] with scales, and minima, [O, groups]: a
    sum for every row, which the compiler fuses.
    """
    wide = wide_type(x.dtype)
    scales, minima = (jax.tree.map(lambda a: a[..., None], a) for a in (scales, minima))
    w = _weights(codes, scales, minima, wide_type(scales.dtype)).astype(wide)
    if x.shape[:2] != (1, 1):  # else it is made again for each of several rows
        # Float32 beside minima: in its own type it would be converted by one more kernel a layer.
        x = lax.optimization_barrier(x if minima is None else x.astype(wide))
    rows = x.astype(wide).reshape(-1, 1, *codes.shape[1:])
    found = [(rows[i] * w).sum(axis=(1, 2)) for i in range(len(rows))]
    return jnp.stack(found).reshape(*x.shape[:2], -1)


def look_up(table: jax.Array | Quantized, index: jax.Array, axis: int, dtype: Any) -> jax.Array:
    """Rows i32[B, T] of a table whose rows lie along `axis` (0 or 1), as [B, T, D] of `dtype`."""

    def take(x: jax.Array, index: jax.Array) -> jax.Array:
        return x[index] if axis == 0 else jnp.moveaxis(x[:, index], 0, -1)

    if isinstance(table, Quantized):
        return dequantise(jax.tree.map(lambda x: take(x, index), table)).astype(dtype)
    if table.dtype == jnp.bfloat16 and dtype == jnp.float32:
        return widened(take, table, index)
    return take(table, index)

"""Weights rounded to 4 or 8 bits: what a middle model in a chain of models would compute.

A group of consecutive inputs shares one scale per output, its largest magnitude over the largest
code. Only scales of groups that lie on several devices are exchanged, never weights.
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax

from easyspec_jax.config import is_integer
from easyspec_jax.model import Model, wide_type
from easyspec_jax.sharding import Layout
from easyspec_jax.weights import arranged_dims, pad_mlp

BITS = (4, 8)
# Letter of a matrix's inputs: a group never leaves its head in `wo`.
INPUTS = {"wqkv": "D", "wkv": "D", "wo": "H", "w_gate_up": "D", "w_down": "F", "lm_head": "D"}


def quantize_weights(model: Model, *, bits: int = 4, group_size: int = 128) -> Model:
    """The model with each matrix rounded to `bits` bits, symmetrically, in groups along its inputs.

    Attention, MLP and head are rounded; norms, biases and the embedding are not, nor a tied head,
    which is the embedding. Codes are integers from -(2^(bits - 1) - 1) to 2^(bits - 1) - 1. The
    weights are then kept dequantised, in the type and layout they had, so this saves no memory and
    no time: it shows what such a model would say. Storing integers and multiplying with them, which
    would make it fast on GPUs, is not done here.

    Args:
      model: loaded, on any mesh and in any partition; not changed, and norms, biases and embedding
        are shared with the result.
      bits: 4 or 8.
      group_size: inputs of a group; where it does not divide their number, the largest divisor
        below is taken. The inputs of attention's output projection are those of one head.

    Raises:
      ValueError: other bits, or a group size that is no whole number above 0.
    """
    if not is_integer(bits) or bits not in BITS:
        raise ValueError(f"bits must be 4 or 8, got {bits!r}")
    if not is_integer(group_size) or group_size < 1:
        raise ValueError(f"group_size must be a whole number above 0, got {group_size!r}")

    def rounded(part):
        dims = {name: arranged_dims(name, model.layout) for name in INPUTS if hasattr(part, name)}
        # From the end, as a stacked slot has one more axis.
        present = {name: of.index(INPUTS[name]) - len(of) for name, of in dims.items()}
        matrices = {name: getattr(part, name) for name in present}
        layout = model.layout if hasattr(part, "w_down") else None
        return part.replace(
            **{
                name: _rounded(w, present[name], bits, group_size, layout)
                for name, w in matrices.items()
                if w is not None
            }
        )

    params = model.params
    blocks = tuple(
        block.replace(
            attention=tuple(map(rounded, block.attention)),
            mlp=tuple(map(rounded, block.mlp)),
        )
        for block in params.blocks
    )
    params = params.replace(blocks=blocks)
    return model.replace(params=params if params.embed is None else rounded(params))


def _rounded(
    w: jax.Array, axis: int, bits: int, group_size: int, layout: Layout | None
) -> jax.Array:
    """w rounded; `layout`: of an MLP, whose inputs may be padded."""
    if layout is not None and layout.mlp_padding and w.ndim == 2:  # w_down: groups of true inputs
        pad = functools.partial(pad_mlp, axis=axis % 2, layout=layout)
        strip = jax.jit(functools.partial(pad, back=True), out_shardings=w.sharding)
        rounded = _rounded(strip(w), axis, bits, group_size, None)
        return jax.jit(pad, out_shardings=w.sharding)(rounded)
    size = w.shape[axis]
    group = max(d for d in range(1, min(group_size, size) + 1) if size % d == 0)
    return _run(w, axis, bits, group, w.sharding)


@functools.partial(jax.jit, static_argnums=(1, 2, 3, 4))
def _run(w, axis, bits, group, sharding):
    """w rounded in groups of `group` along `axis` (negative); `sharding` is its own."""
    spec, mesh, axis, size = sharding.spec, sharding.mesh, axis % w.ndim, w.shape[axis]
    split = spec[axis] if axis < len(spec) else None
    largest_code = 2 ** (bits - 1) - 1

    def run(w):
        wide = jnp.moveaxis(w.astype(wide_type(w.dtype)), axis, 0)
        rows, whole = wide.shape[0], (size // group, *wide.shape[1:])
        first = lax.axis_index(split) * rows if split else 0
        index = (first + jnp.arange(rows, dtype=jnp.int32)) // group
        part = math.gcd(rows, group)  # a device may hold the end of one group, the start of another
        parts = jnp.abs(wide).reshape(rows // part, part, *whole[1:]).max(axis=1)
        largest = jnp.zeros(whole, wide.dtype).at[index[::part]].max(parts)
        if split:
            largest = lax.pmax(largest, split)
        scale = largest[index] / largest_code
        codes = jnp.round(wide / jnp.where(scale > 0, scale, 1))
        return jnp.moveaxis((codes * scale).astype(w.dtype), 0, axis)

    if mesh.size > 1:
        run = jax.shard_map(run, mesh=mesh, in_specs=(spec,), out_specs=spec)
    return lax.with_sharding_constraint(run(w), sharding)

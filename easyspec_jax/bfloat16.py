"""Matrices in bfloat16 under activations in float32, on CPUs that multiply bfloat16 quickly.

Checkpoints are mostly stored in bfloat16, of which float32 holds nothing more but twice the bytes.
A row of float32 is the sum of three of bfloat16 (8 bits of its 24 each), so three rows times the
matrix, added up in float32, are the same product, each of its terms exact. Tiles of such a CPU
(AMX) take 16 rows in the time of one: verifying a few tokens costs little more than one.
"""

from __future__ import annotations

import contextlib
import functools
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AbstractMesh, Mesh

from easyspec_jax.sharding import platform_of

PARTS = 3  # of 8 bits of a float32: all of them
HALF = 16  # bits of one that are those of a bfloat16
INSTRUCTIONS = "amx_bf16"  # as Linux calls them; with avx512_bf16 alone longer prompts take longer


def matrix_type(
    mesh: Mesh | AbstractMesh, wanted: Any, dtype: Any, stored: Any = None
) -> jnp.dtype:
    """The type that a model's matrices of floats are kept in.

    Args:
      wanted: "bfloat16", or the model's own type; None: bfloat16 where that is how they are stored,
        the model is one of float32 in one process, and its CPU has `fast_products`.
      dtype: of the model.
      stored: of the checkpoint; None: unknown.

    Raises:
      ValueError: another type, or bfloat16 elsewhere.
    """
    dtype, half = jnp.dtype(dtype), jnp.dtype(jnp.bfloat16)
    fits = platform_of(mesh) == "cpu" and dtype == jnp.float32
    if wanted is None:
        several = isinstance(mesh, AbstractMesh) or mesh.is_multi_process  # CPUs may differ
        as_stored = stored is not None and jnp.dtype(stored) == half
        return half if as_stored and fits and not several and fast_products() else dtype
    found = None
    with contextlib.suppress(TypeError):
        found = jnp.dtype(wanted)
    if found is not None and (found == dtype or (found == half and fits)):
        return found
    if found == half:
        raise ValueError(
            f"matrix_dtype bfloat16 is for models of float32 on CPUs, not of {dtype.name} on "
            f"{platform_of(mesh)}"
        )
    either = f"{half.name} or " if fits else ""
    raise ValueError(f"matrix_dtype must be {either}{dtype.name}, got {wanted!r}")


@functools.cache
def fast_products(cpuinfo: pathlib.Path = pathlib.Path("/proc/cpuinfo")) -> bool:
    """Whether this CPU has instructions for tiles of bfloat16, and the compiler a library (YNNPACK)
    that uses them.
    """
    try:
        lines = cpuinfo.read_text().splitlines()
    except OSError:
        return False
    flags = next((line for line in lines if line.startswith("flags")), "")
    if INSTRUCTIONS not in flags.split():
        return False
    x, w = (jax.ShapeDtypeStruct((n, 256), jnp.bfloat16) for n in (2 * PARTS, 512))
    where = jax.sharding.SingleDeviceSharding(jax.local_devices(backend="cpu")[0])
    with jax.ensure_compile_time_eval():  # whatever is traced around it
        compiled = jax.jit(_product, in_shardings=where).lower(x, w).compile()
    return "ynn_fusion" in (compiled.as_text() or "")


def parts_product(x: jax.Array, w: jax.Array) -> jax.Array:
    """x [B, T, I] of float32 times w [O, I] of bfloat16, in float32: [B, T, O]."""
    batch, t, inputs = x.shape
    found = _product(_parts(x.reshape(-1, inputs)), w).reshape(PARTS, batch, t, -1)
    return found[0] + (found[1] + found[2])  # the smallest first


def widened(
    take: Callable[[jax.Array, jax.Array], jax.Array], table: jax.Array, index: jax.Array
) -> jax.Array:
    """What `take` finds in a table of bfloat16 at an index, in float32. As whole numbers: XLA:CPU
    gathers no bfloat16, and would make the whole table float32 first.
    """
    # Or it would be made numbers, all of it, in front of a loop.
    table, index = lax.optimization_barrier((table, index))
    bits = take(lax.bitcast_convert_type(table, jnp.uint16), index).astype(jnp.uint32)
    return lax.bitcast_convert_type(bits << HALF, jnp.float32)


def _parts(x: jax.Array) -> jax.Array:
    """Rows of float32, [N, I] and finite, as 3 N of bfloat16 that add up to them, the largest
    first: the first half of the bits, that of what is left, and what is left then.
    """
    bits = lambda x: lax.bitcast_convert_type(x, jnp.uint32)  # noqa: E731
    part = lax.broadcasted_iota(jnp.int32, (PARTS, 1, 1), 0)
    left = x[None]
    for i in range(1, PARTS):
        first = lax.bitcast_convert_type(bits(left) >> HALF << HALF, jnp.float32)
        left = jnp.where(part < i, left, left - first)
    found = lax.bitcast_convert_type((bits(left) >> HALF).astype(jnp.uint16), jnp.bfloat16)
    return found.reshape(-1, x.shape[-1])


def _product(x: jax.Array, w: jax.Array) -> jax.Array:
    exact = lax.Precision.DEFAULT  # whatever is asked for products of float32
    return jnp.einsum("ni,oi->no", x, w, precision=exact, preferred_element_type=jnp.float32)

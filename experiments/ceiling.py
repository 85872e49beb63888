"""What a decoder is held against: the memory bandwidth of a device, and the margin of an argmax."""

from __future__ import annotations

import re
import time

import jax
import jax.numpy as jnp
import numpy as np

import easyspec_jax as es
from easyspec_jax.memory import device_bytes
from easyspec_jax.model import forward, logits
from easyspec_jax.planner.measure import product_seconds
from easyspec_jax.sharding import mesh_jit, replicate, zeros

BANDWIDTH = {"H100": 3.35e12, "H200": 4.8e12, "A100": 2.04e12}  # bytes a second, SXM, A100 80 GB


def streamed_bytes(base: es.Model) -> int:
    """Bytes that a device reads for every new token of one row: its weights, but of an embedding
    of its own only a row.
    """
    embed = base.params.embed
    return device_bytes(base.params) - (device_bytes(embed) if embed is not None else 0)


def bandwidth(kind: str) -> float | None:
    """Bytes a second that a device of this kind is sold with; None: not in the table."""
    if re.search(r"PCIe|NVL|40GB|GH", kind):  # other memory than the variants in the table
        return None
    return next((rate for name, rate in BANDWIDTH.items() if re.search(rf"\b{name}\b", kind)), None)


def copy_bandwidth(num_bytes: int, repeats: int) -> float:
    """Bytes read and written per second by adding to an array in place; the best of `repeats`."""

    def add(x):
        return jax.lax.fori_loop(0, 10, lambda _, x: x + 1, x)

    run = jax.jit(add, donate_argnums=0)
    x = jnp.zeros((num_bytes // 4,), jnp.int32)
    best = float("inf")
    for i in range(3 + repeats):
        start = time.perf_counter()
        x = jax.block_until_ready(run(x))
        best = min(best, time.perf_counter() - start) if i >= 3 else best
    return 20 * num_bytes / best


def device_bandwidth() -> float:
    """Bytes a second of the first device: as sold where that is known, else as weights are streamed
    in products of one row.
    """
    first = jax.devices()[0]
    if known := bandwidth(first.device_kind):
        return known
    dtype = jnp.dtype(jnp.float32 if first.platform == "cpu" else jnp.bfloat16)
    inner, outer = 2048, 5632
    size = inner * outer * dtype.itemsize
    return size / product_seconds(1, inner, outer, dtype, 2**28)


def top_gap(base: es.Model, ids: list[int]) -> float:
    """How far the likeliest token behind `ids` is above the second for the base, in logits."""
    tokens = np.asarray([ids + [0] * (-len(ids) % 128)], np.int32)
    tokens = replicate(tokens, base.layout.mesh)
    cache = zeros(base.abstract_cache(*tokens.shape))
    at = replicate(np.int32(len(ids) - 1), base.layout.mesh)
    scores = _logits_at(base, tokens, cache, at)
    best, second = np.sort(np.asarray(scores))[-1:-3:-1]
    return float(best) - float(second)


@mesh_jit()
def _logits_at(base, tokens, cache, at):
    hidden, _ = forward(base, tokens, cache)
    return logits(base, jax.lax.dynamic_slice_in_dim(hidden, at, 1, axis=1))[0, 0]

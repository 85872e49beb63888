"""What a decoder is held against: the memory bandwidth of a device, and the margin of an argmax."""

from __future__ import annotations

import functools
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np

import easyspec_jax as es
from easyspec_jax import loop
from easyspec_jax.cache import abstract_cache, own_slots, zeros
from easyspec_jax.memory import device_bytes
from easyspec_jax.model import forward, logits
from easyspec_jax.sharding import on_mesh, replicate

P = jax.sharding.PartitionSpec


def streamed_bytes(base: es.Model) -> int:
    """Bytes that a device reads for every new token of one row: its weights, but of an embedding
    of its own only a row.
    """
    embed = base.params.embed
    return device_bytes(base.params) - (device_bytes(embed) if embed is not None else 0)


def measure_bandwidth(num_bytes: int = 2**28, repeats: int = 7) -> float:
    """Bytes per second that the first device reads, the median of sums over `num_bytes`."""
    x = jax.device_put(np.ones(num_bytes // 4, np.float32), jax.local_devices()[0])
    total = jax.jit(jnp.sum)
    total(x).block_until_ready()
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        total(x).block_until_ready()
        seconds.append(time.perf_counter() - start)
    return num_bytes / statistics.median(seconds)


def top_gap(base: es.Model, ids: list[int]) -> float:
    """How far the likeliest token behind `ids` is above the second for the base, in logits."""
    tokens = np.asarray([ids + [0] * (-len(ids) % 128)], np.int32)
    tokens = replicate(tokens, base.layout.mesh)
    shape = (*tokens.shape, base.dtype)
    cache = zeros(abstract_cache(base.config, base.layout, base.partition, *shape))
    at = replicate(np.int32(len(ids) - 1), base.layout.mesh)
    scores = _logits_at(base, tokens, cache, at, specs=loop.Specs.of((base, cache)))
    best, second = np.sort(np.asarray(scores))[-1:-3:-1]
    return float(best) - float(second)


@functools.partial(jax.jit, static_argnames="specs")
def _logits_at(base, tokens, cache, at, *, specs):
    base_specs, cache_specs = specs.tree

    def run(base, tokens, cache, at):
        hidden, _ = forward(base, tokens, own_slots(cache))
        return logits(base, jax.lax.dynamic_slice_in_dim(hidden, at, 1, axis=1))[0, 0]

    specs = (base_specs, P(), cache_specs, P())
    return on_mesh(run, base.layout.mesh, specs, P())(base, tokens, cache, at)

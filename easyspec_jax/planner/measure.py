"""A `Device` filled in by micro-benchmarks of the machine at hand, in some ten seconds.

Products are timed in compiled loops over more weights than any cache holds: of one row with the
compiler's default library, as autoregression has it; of several with what a loop that verifies so
many asks for (`CompileOptions`), which then multiplies its draft's single rows too, untimed. What a
layer costs beside them is seen by decoding with a small model of few and of many layers, so that it
is the program's own kernels that are counted. Collectives are timed in a chain.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec as P

from easyspec_jax.compile_options import CompileOptions
from easyspec_jax.config import ModelConfig
from easyspec_jax.decode import Decoder
from easyspec_jax.loading import random_model
from easyspec_jax.planner.cost import step_costs
from easyspec_jax.planner.device import Device
from easyspec_jax.sharding import LAYER, TENSOR, make_mesh

ROWS = (1, 2, 4, 8, 16, 32, 64, 128)
# Inner and outer dimension, of models of 100 million and a billion weights.
_SMALL, _LARGE = (512, 1536), (2048, 5632)
_ENTRIES, _HEADS, _HEAD_DIM = 256, 16, 64


def measure_device(dtype: Any = None) -> Device:
    """The first device, and how devices like it exchange sums.

    Args:
      dtype: of weights; None: float32 on CPU, else bfloat16, as `load_model`.
    """
    first = jax.devices()[0]
    on_cpu = first.platform == "cpu"
    dtype = jnp.dtype(dtype or (jnp.float32 if on_cpu else jnp.bfloat16))
    size = 2**28 if on_cpu else 2**30  # more than any cache
    products = tuple((rows, *product_costs(rows, dtype, size)) for rows in ROWS)
    rows, slowest, _ = products[-1]
    stats = first.memory_stats() or {}
    collective, hop, link = collective_costs() if jax.device_count() > 1 else (0.0, 0.0, math.inf)
    device = Device(
        name=first.device_kind,
        dtype=dtype.name,
        bandwidth=1 / products[0][1],
        flops=2 * rows / dtype.itemsize / slowest,
        memory=float(stats.get("bytes_limit", math.inf)),
        products=products,
        score=score_seconds(dtype),
        logit=logit_seconds(),
        collective=collective,
        hop=hop,
        link=link,
    )
    kernel, step = kernel_costs(device, dtype)
    return dataclasses.replace(device, kernel=kernel, step=step)


def _best(run: Callable[..., Any], *args: Any, repeats: int = 3) -> float:
    """Seconds of the fastest of `repeats` calls, after one that compiles and warms."""
    jax.block_until_ready(run(*args))
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(run(*args))
        times.append(time.perf_counter() - start)
    return min(times)


def _jitted(rows: int) -> Callable[[Callable], Callable]:
    """`jax.jit`, compiled as a program on one device that multiplies so many rows."""
    options = dict(CompileOptions().on(make_mesh(1, 1), rows))
    return functools.partial(jax.jit, compiler_options=options or None)


def product_costs(rows: int, dtype: Any, num_bytes: int) -> tuple[float, float]:
    """Seconds per weight byte of multiplying `rows` rows, and seconds of a product beside them:
    from large and small matrices of `num_bytes` in all.
    """
    sizes = [inner * outer * dtype.itemsize for inner, outer in (_SMALL, _LARGE)]
    small, large = (product_seconds(rows, *shape, dtype, num_bytes) for shape in (_SMALL, _LARGE))
    per_byte = min((large - small) / (sizes[1] - sizes[0]), large / sizes[1])
    return per_byte, max(large - per_byte * sizes[1], 0.0)


def product_seconds(rows: int, inner: int, outer: int, dtype: Any, num_bytes: int) -> float:
    """Seconds of a product of `rows` rows with one of many matrices, `num_bytes` in all, as a step
    that verifies so many compiles it.
    """
    count = max(num_bytes // (2 * inner * outer * dtype.itemsize), 1)
    weights = [
        (jnp.full((inner, outer), 1e-3, dtype), jnp.full((outer, inner), 1e-3, dtype))
        for _ in range(count)
    ]

    @_jitted(rows)
    def run(weights, x):
        def turn(_, x):
            for up, down in weights:
                x = (x @ up) @ down
            return x

        return lax.fori_loop(0, 2, turn, x)

    return _best(run, weights, jnp.ones((rows, inner), dtype)) / (4 * count)


def kernel_costs(device: Device, dtype: Any) -> tuple[float, float]:
    """Seconds of a kernel, and of a step beside its kernels: what steps of small models take longer
    than the device's other costs say.
    """
    (few, predicted_few), (many, predicted_many) = (_small_step(device, n, dtype) for n in (2, 10))
    kernels = Device.attention_kernels + Device.mlp_kernels
    kernel = max(many - few - (predicted_many - predicted_few), 0.0) / (8 * kernels)
    rest = few - predicted_few - (2 * kernels + Device.pass_kernels) * kernel
    return kernel, max(rest, 0.0)


def _small_step(device: Device, layers: int, dtype: Any) -> tuple[float, float]:
    """Seconds of a step of a model of so many layers, measured and as `device` predicts."""
    inner, outer = _SMALL
    config = ModelConfig(
        vocab_size=64, embed_dim=inner, mlp_dim=outer, num_layers=layers, num_heads=8,
        num_kv_heads=4, head_dim=64, max_len=256,
    )  # fmt: skip
    decoder = Decoder(random_model(config, make_mesh(1, 1), seed=0, dtype=dtype))
    measured = min(decoder.profile(1, 8, max_new_tokens=8)["step"] for _ in range(4))
    costs = step_costs(decoder, device, entries=decoder.capacity(8 + 8))
    return measured, sum(cost.seconds for cost in costs.values())


def score_seconds(dtype: Any) -> float:
    """Seconds per attention score: the products on both sides of the softmax and itself."""
    values = jnp.full((_HEADS, _ENTRIES, _HEAD_DIM), 0.1, dtype)
    on_cpu = jax.devices()[0].platform == "cpu"  # where keys are cached transposed
    keys, order = (values.swapaxes(1, 2), "hs") if on_cpu else (values, "sh")
    scored = f"xmh,x{order}->xms"

    @_jitted(4)
    def run(queries):
        def turn(_, queries):
            scores = jnp.einsum(scored, queries, keys, preferred_element_type=jnp.float32)
            weights = jax.nn.softmax(scores, axis=-1).astype(dtype)
            return jnp.einsum("xms,xsh->xmh", weights, values)

        return lax.fori_loop(0, 100, turn, queries)

    few, many = (_best(run, jnp.ones((_HEADS, n, _HEAD_DIM), dtype)) / 100 for n in (8, 64))
    return max(many - few, 0.0) / (56 * _HEADS * _ENTRIES)


def logit_seconds() -> float:
    """Seconds per number of choosing the likeliest of a vocabulary."""
    size = 2**15

    @jax.jit
    def run(scores):
        def turn(_, scores):
            best = jnp.argmax(scores, axis=-1).astype(scores.dtype)
            return scores + 1e-9 * best[:, None]

        return lax.fori_loop(0, 20, turn, scores)

    few, many = (_best(run, jnp.ones((n, size), jnp.float32)) / 20 for n in (2, 18))
    return max(many - few, 0.0) / (16 * size)


def collective_costs() -> tuple[float, float, float]:
    """Seconds of a small all-reduce between two devices, of each further device, and bytes a second
    of a large one; with two devices nothing is known of a third.
    """
    every = jax.device_count()
    two = _all_reduce_seconds(2, 16)
    most = two if every == 2 else _all_reduce_seconds(every, 16)
    large = 2**22
    sent = 2 * (every - 1) / every * large
    link = sent / max(_all_reduce_seconds(every, large // 4) - most, 1e-9)
    return two, max(most - two, 0.0) / max(every - 2, 1), link


def _all_reduce_seconds(devices: int, numbers: int) -> float:
    mesh = make_mesh(1, devices)
    turns = 50

    @functools.partial(jax.shard_map, mesh=mesh, in_specs=P(), out_specs=P())
    def run(x):
        def turn(_, x):
            mine = lax.pcast(x, (LAYER, TENSOR), to="varying")
            return lax.psum(mine, (LAYER, TENSOR)) / devices

        return lax.fori_loop(0, turns, turn, x)

    return _best(jax.jit(run), jnp.ones((numbers,), jnp.float32)) / turns

"""GPUs to compile for that need not be there: a mesh of devices that only a compiler can use.

jaxlib compiles for a GPU from a description of it. The CUDA plugin, which has the compiler, must be
installed and be told (`SETTING` in the environment) not to look for a driver; the platform "cpu"
runs the rest. Autotuning needs a device and is off, so the choice of kernels may differ on one.
Options are given to each compilation: nothing is exported to XLA_FLAGS.
"""

from __future__ import annotations

import importlib.util
import os
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh

from easyspec_jax import sharding
from easyspec_jax.sharding import LAYER, TENSOR

SETTING = "JAX_SKIP_CUDA_CONSTRAINTS_CHECK"  # "1" before anything touches a device
HERE = "here"  # in place of a target's name: the devices of this machine
# bandwidth in bytes a second, memory in bytes, cores, L2 in bytes, clock in GHz, shared memory of a
# core and of a block in bytes, units for float32 of a core, compute capability
TARGETS = {
    "a100": (2_039_000_000_000, 85_000_000_000, 108, 41_943_040, 1.41, 167_936, 166_912, 64, 8),
    "h100": (3_352_000_000_000, 85_000_000_000, 132, 52_428_800, 1.98, 233_472, 232_448, 128, 9),
    "h200": (4_800_000_000_000, 150_000_000_000, 132, 52_428_800, 1.98, 233_472, 232_448, 128, 9),
}
_PLUGINS = ("xla_cuda12", "xla_cuda13")
_CONFIG = """
gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
  shared_memory_per_block: 49152 shared_memory_per_core: {per_core}
  shared_memory_per_block_optin: {per_block} core_count: {cores} fpus_per_core: {units}
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: {bandwidth} l2_cache_size: {l2} clock_rate_ghz: {clock}
  device_memory_size: {memory} registers_per_core_limit: 65536 registers_per_block_limit: 65536
  cuda_compute_capability {{ major: {major} }}
  driver_version: "13.0.0" runtime_version: "12.9.0" compile_time_toolkit_version: "12.9.0"
}}
platform_name: "CUDA" dnn_version_info {{ major: 9 minor: 7 }}
runtime_version {{ major: 12 minor: 9 patch: 0 }}
device_description_str: "NVIDIA {name}"
"""
_FIELDS = (
    "bandwidth", "memory", "cores", "l2", "clock", "per_core", "per_block", "units", "major",
)  # fmt: skip


def make_mesh(device: str, layer: int = 1, tensor: int = 1) -> Mesh:
    """A ("layer", "tensor") mesh of devices to compile for.

    Args:
      device: one of TARGETS, or HERE: devices of this machine, as `easyspec_jax.make_mesh` takes
        them.

    Raises:
      ValueError: another name, or nothing installed that compiles for it.
    """
    if device == HERE:
        return sharding.make_mesh(layer, tensor)
    if device not in TARGETS:
        raise ValueError(f"unknown device {device!r}: use {', '.join((*TARGETS, HERE))}")
    values = dict(zip(_FIELDS, TARGETS[device], strict=True))
    config = _CONFIG.format(name=device.upper(), **values)
    devices = _topology(config, layer * tensor)
    grid = np.asarray(devices).reshape(layer, tensor)
    return Mesh(grid, (LAYER, TENSOR), axis_types=(AxisType.Auto, AxisType.Auto))


def _topology(config: str, number: int) -> list[Any]:
    from jax.experimental import topologies

    try:
        found = topologies.get_topology_desc(
            platform="cuda", target_config=config, topology=f"1x1x{number}"
        )
    except NotImplementedError:
        reason = "compiling for GPUs needs jax's CUDA plugin: pip install jax-cuda12-plugin"
        if is_installed():
            reason = f"the CUDA plugin of jax has not begun: set {SETTING}=1 before jax is used"
        raise ValueError(reason) from None
    return list(found.devices)


def is_installed() -> bool:
    """Whether the CUDA plugin of jax is."""
    try:
        return any(importlib.util.find_spec(f"jax_plugins.{name}") for name in _PLUGINS)
    except ModuleNotFoundError:  # no plugin at all
        return False


def compile_options(mesh: Mesh, dump: str | os.PathLike | None = None) -> dict[str, Any]:
    """Options of `Lowered.compile` for this mesh.

    Args:
      dump: a folder for the sequence of thunks, among much else.
    """
    first = mesh.devices.flat[0]
    options: dict[str, Any] = {}
    if first.platform == "cpu":
        options["xla_backend_optimization_level"] = 0  # half the time; the program is not run
    elif first not in jax.devices():
        options["xla_gpu_autotune_level"] = 0
    if dump is not None:
        options |= {"xla_dump_to": os.fspath(dump), "xla_dump_hlo_pass_re": "NONE"}
    return options

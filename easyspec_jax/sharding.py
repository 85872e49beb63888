"""Where every array lives: the mesh, and which mesh axes split which dimension of a model.

A `Layout` is a frozen value. Model code runs on local shards inside one `shard_map` and asks the
layout only for the axes to sum over, so one device (no axes at all) and any mesh share every line.
"""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax import lax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from easyspec_jax.config import ModelConfig, is_integer

logger = logging.getLogger("easyspec_jax")

LAYER, TENSOR = "layer", "tensor"


def make_mesh(layer: int = 1, tensor: int | None = None) -> Mesh:
    """A ("layer", "tensor") mesh over the first layer x tensor devices; `tensor=None` takes all
    that `layer` leaves.

    Raises:
      ValueError: an axis that is no whole number above 0, or more devices asked for than there are.
    """
    devices = jax.devices()
    for name, size in (("layer", layer), ("tensor", tensor)):
        if size is not None and not is_integer(size):
            raise ValueError(f"mesh axis {name} must be a whole number of devices, got {size!r}")
    if layer < 1 or (tensor is not None and tensor < 1):
        raise ValueError(f"mesh axes must be at least 1, got layer={layer}, tensor={tensor}")
    if tensor is None:
        tensor = max(len(devices) // layer, 1)
    if layer * tensor > len(devices):
        raise ValueError(
            f"a mesh of layer={layer} x tensor={tensor} "
            f"needs {layer * tensor} devices, but there are {len(devices)}"
        )
    grid = np.asarray(devices[: layer * tensor]).reshape(layer, tensor)
    return Mesh(grid, (LAYER, TENSOR), axis_types=(AxisType.Auto, AxisType.Auto))


@dataclasses.dataclass(frozen=True)
class Layout:
    """Logical dimensions -> mesh axes for one model. An axis of size 1 is never named, so it costs
    no collective.
    """

    mesh: Mesh
    kv: tuple[str, ...] = ()  # splits the kv heads, and with them the KV cache
    query: tuple[str, ...] = ()  # splits the query heads of each kv head
    mlp: tuple[str, ...] = ()
    vocab: tuple[str, ...] = ()
    group: str | None = (
        None  # carries the layers of a group; None: the layers of a group share the devices
    )

    @property
    def heads(self) -> tuple[str, ...]:
        """Axes over which an attention output is a partial sum."""
        return self.kv + self.query

    @property
    def num_head_shards(self) -> int:
        """Devices that the attention heads of one layer are split over."""
        return math.prod(self.mesh.shape[a] for a in self.heads)

    @property
    def group_devices(self) -> int:
        """Devices that the layers of one group are spread over."""
        return self.mesh.shape[self.group] if self.group else 1

    def spec(self, letters: str) -> P:
        """PartitionSpec for an array with these dimension letters: L stacked layers, K, J split
        query heads, F, V.
        """
        axes = {"L": (self.group,), "K": self.kv, "J": self.query, "F": self.mlp, "V": self.vocab}
        named = [axes.get(letter) or None for letter in letters]
        while named and named[-1] in (None, (None,)):
            named.pop()  # jit compares specs as written: one form for each
        return P(*named)

    def named(self, letters: str) -> NamedSharding:
        """`spec` on this layout's mesh."""
        return NamedSharding(self.mesh, self.spec(letters))


def make_layout(config: ModelConfig, mesh: Mesh, *, layer_parallel: bool) -> Layout:
    """The layout of a base model (heads over all devices), or of a layer-parallel draft (heads over
    "tensor" only).

    MLPs and vocabulary go over all devices in both. What does not divide is replicated on that
    axis, and one log line says so.
    """
    real = tuple(a for a in (LAYER, TENSOR) if mesh.shape[a] > 1)
    head_axes = tuple(a for a in real if a == TENSOR or not layer_parallel)
    kv, query, whole = _split_heads(config, mesh, head_axes)
    mlp = _dividing(config.mlp_dim, mesh, real)
    vocab = _dividing(config.vocab_size, mesh, real)
    replicated = {"heads": whole, "mlp_dim": _minus(real, mlp), "vocab_size": _minus(real, vocab)}
    notes = [f"{name} over {'/'.join(axes)}" for name, axes in replicated.items() if axes]
    if notes:
        logger.info(
            "replicated, since the mesh %s does not divide it: %s",
            dict(mesh.shape),
            ", ".join(notes),
        )
    group = LAYER if layer_parallel and LAYER in real else None
    return Layout(mesh, kv, query, mlp, vocab, group)


def _split_heads(config: ModelConfig, mesh: Mesh, axes: tuple[str, ...]):
    """Kv heads over all axes if they divide, else axis by axis: kv heads, else the query heads of
    each, else nothing.
    """
    if config.num_kv_heads % math.prod(mesh.shape[a] for a in axes) == 0:
        return axes, (), ()
    kv, query, whole = (), (), ()
    kv_left, query_left = config.num_kv_heads, config.num_groups
    for axis in reversed(axes):  # "tensor" first
        n = mesh.shape[axis]
        if kv_left % n == 0:
            kv, kv_left = (axis, *kv), kv_left // n
        elif query_left % n == 0:
            query, query_left = (axis, *query), query_left // n
        else:
            whole = (axis, *whole)
    return kv, query, whole


def _dividing(size: int, mesh: Mesh, axes: tuple[str, ...]) -> tuple[str, ...]:
    """The most of `axes` that divide `size`: all, else "tensor", else "layer", else none."""
    for tried in (axes, *((a,) for a in reversed(axes))):
        if size % math.prod(mesh.shape[a] for a in tried) == 0:
            return tried
    return ()


def _minus(axes: tuple[str, ...], used: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(a for a in axes if a not in used)


def psum(x: jax.Array, axes: tuple[str, ...]) -> jax.Array:
    """`lax.psum` over `axes`; x itself when there are none."""
    return lax.psum(x, axes) if axes else x


def specs_of(tree: Any) -> Any:
    """The PartitionSpec of every array of a pytree; P() for what carries none."""

    def spec(x):
        sharding = getattr(x, "sharding", None)
        return sharding.spec if isinstance(sharding, NamedSharding) else P()

    return jax.tree.map(spec, tree)


def on_mesh(fn: Callable, mesh: Mesh, in_specs: Any, out_specs: Any) -> Callable:
    """`fn` over local shards on every device of `mesh`; `fn` itself on one device."""
    if mesh.size == 1:
        return fn
    return jax.shard_map(fn, mesh=mesh, in_specs=in_specs, out_specs=out_specs)


def device_bytes(tree: Any) -> int:
    """Bytes that one device holds of a pytree of sharded arrays (or ShapeDtypeStructs with
    shardings).
    """

    def local(x):
        shape = (
            x.sharding.shard_shape(x.shape) if getattr(x, "sharding", None) is not None else x.shape
        )
        return math.prod(shape) * x.dtype.itemsize

    return sum(local(x) for x in jax.tree.leaves(tree))


def device_memory(mesh: Mesh) -> int | None:
    """Bytes still free on one device of the mesh, or None where the platform does not say (CPU)."""
    stats = mesh.devices.flat[0].memory_stats()
    if not stats or "bytes_limit" not in stats:
        return None
    return stats["bytes_limit"] - stats.get("bytes_in_use", 0)


def check_memory(mesh: Mesh, needed: dict[str, int], held: dict[str, int] | None = None) -> None:
    """Refuse what the devices of the mesh cannot hold any more.

    Args:
      needed: bytes per device about to be allocated, by name.
      held: bytes per device that are there already, by name; only for the message.

    Raises:
      ValueError: with every entry of the budget.
    """

    def listed(budget):
        return ", ".join(f"{name} {n / 2**30:.2f}" for name, n in budget.items())

    free, total = device_memory(mesh), sum(needed.values())
    if free is not None and total > free:
        beside = f" beside {listed(held)}" if held else ""
        raise ValueError(
            f"needs {total / 2**30:.2f} GiB on each device ({listed(needed)}){beside}, "
            f"but a device has {free / 2**30:.2f} GiB free: "
            "use more devices, a smaller batch or fewer tokens"
        )

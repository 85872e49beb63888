"""What a model and its caches take on each device, computed from shapes, and whether it fits.

Everything here works on ShapeDtypeStructs as well as on arrays, so a pair can be refused before
anything is allocated.
"""

from __future__ import annotations

import contextlib
import math
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh


def device_bytes(tree: Any) -> int:
    """Bytes that one device holds of a pytree of sharded arrays (or ShapeDtypeStructs with
    shardings).
    """

    def local(x):
        shape = (
            x.sharding.shard_shape(x.shape) if getattr(x, "sharding", None) is not None else x.shape
        )
        if x.dtype == jnp.int4:  # two to a byte on devices, one on a host
            return -(-math.prod(shape) // 2)
        return math.prod(shape) * x.dtype.itemsize

    return sum(local(x) for x in jax.tree.leaves(tree))


def device_memory(mesh: Mesh) -> int | None:
    """Bytes still free on the fullest device of the mesh in this process, or None where the
    platform does not say. Devices of the CPU share what the host has.
    """
    local = mesh.local_devices
    if local and all(device.platform == "cpu" for device in local):
        free = host_memory()
        return None if free is None else free // len(local)
    stats = [device.memory_stats() for device in local]
    if not stats or not all(s and "bytes_limit" in s for s in stats):
        return None
    return min(s["bytes_limit"] - s.get("bytes_in_use", 0) for s in stats)


def host_memory(root: pathlib.Path = pathlib.Path("/")) -> int | None:
    """Bytes that programs may still take of the host's memory, files that are only kept in it not
    counted, within the limit of a container (a control group, version 2); None where the system
    does not say.
    """
    try:
        free = 1024 * _entries(root / "proc/meminfo")["MemAvailable:"]
    except (OSError, ValueError, KeyError):
        return None
    group = root / "sys/fs/cgroup"
    with contextlib.suppress(OSError, ValueError, KeyError):  # none, or "max"
        most = int((group / "memory.max").read_text())
        stat = _entries(group / "memory.stat")
        kept = stat["inactive_file"] + stat["active_file"]
        free = min(free, most - int((group / "memory.current").read_text()) + kept)
    return free


def _entries(file: pathlib.Path) -> dict[str, int]:
    """Names and numbers, one pair a line."""
    lines = (line.split() for line in file.read_text().splitlines())
    return {line[0]: int(line[1]) for line in lines if len(line) > 1}


def listed(budget: dict[str, int]) -> str:
    """A budget in words, in GiB."""
    return ", ".join(f"{name} {n / 2**30:.2f}" for name, n in budget.items())


def check_memory(
    mesh: Mesh,
    needed: dict[str, int],
    held: dict[str, int] | None = None,
    *,
    free: int | None = None,
) -> None:
    """Refuse what the devices of the mesh cannot hold any more.

    Args:
      needed: bytes per device about to be allocated, by name.
      held: bytes per device that are there already, by name; only for the message.
      free: bytes of each device; default: what it says is free, or no check where it does not say.

    Raises:
      ValueError: with every entry of the budget.
    """

    free = device_memory(mesh) if free is None else free
    total = sum(needed.values())
    if free is not None and total > free:
        beside = f" beside {listed(held)}" if held else ""
        raise ValueError(
            f"needs {total / 2**30:.2f} GiB on each device ({listed(needed)}){beside}, "
            f"but a device has {free / 2**30:.2f} GiB free: "
            "use more devices, a smaller batch or fewer tokens"
        )


def decode_budget(
    base: Any, drafter: Any, request: Any, state: Any, *, chunk: int
) -> dict[str, int]:
    """Bytes on each device while `state` (a `DecodeState`, or its shapes) is decoded, by name.

    Args:
      base: the `Model`; with `drafter`, arrays or shapes.
      request: the `Request`.
      chunk: prompt tokens that one prefill absorbs.
    """
    batch, size = state.tokens.shape
    num_nodes = request.num_draft_tokens * request.tree_width
    weights = {"base weights": base.params, "draft weights": _models_beside(base, drafter)}
    caches = {"base cache": state.cache, "draft cache": state.draft}
    budget = {name: device_bytes(tree) for name, tree in (weights | caches).items()}
    if not num_nodes:
        del budget["draft weights"], budget["draft cache"]
    copies = 2 if request.filters.greedy else 5  # logits, p, q and what is left of them
    logits = 4 * batch * (num_nodes + 1) * base.config.vocab_size * copies
    heads = max(m.config.num_heads // m.layout.num_head_shards for m in (base, *drafter.models()))
    scores = 2 * 4 * batch * max(chunk, num_nodes + 1) * heads * size
    return budget | {"scratch": max(logits, scores)}


def _models_beside(base: Any, drafter: Any) -> list[Any]:
    """The models (and arrays) of a drafter, each once and without the base or parts of it."""
    kind = type(base)  # as a whole: shapes of equal layers may be one object
    parts = jax.tree.leaves(drafter, is_leaf=lambda x: isinstance(x, kind))
    own = {tuple(map(id, jax.tree.leaves(part))): part for part in parts}
    shared = set(map(id, jax.tree.leaves(base)))
    return [part for key, part in own.items() if not shared.issuperset(key)]

"""EasySpec's idea (arXiv 2502.02493, section 3): consecutive layers of the draft run at once, one
per device.

In a group of layers every attention reads the residual stream as it was before the group ("fuzzy"),
so the attentions are independent of each other and run at the same time on the devices of the mesh
axis "layer"; the MLPs follow one after another, each split over all devices. The same stacked
weights also give the exact model: the devices take turns, so that only activations travel, never
weights or cache entries.

    exact   h - A1 - M1 - A2 - M2 - A3 - M3 -        fuzzy   h - A1 -+- M1 - M2 - M3 -
                                                             |-- A2 -|
                                                             |-- A3 -|
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax

from easyspec_jax.cache import LayerKV
from easyspec_jax.config import is_integer
from easyspec_jax.model import Model, RunBlock, Step, attention, attentions, mlp, run_layer
from easyspec_jax.sharding import psum
from easyspec_jax.weights import Block

PARALLEL = ("attention", "indirect", "layer")


def make_partition(num_layers: int, group_size: int | Sequence[int]) -> tuple[int, ...]:
    """Layers per block, in order.

    An int groups as published: the first and the last layer stay alone, the layers between are cut
    into groups of `group_size`, the last of which may be shorter. A sequence is taken as it is.

    Raises:
      ValueError: group_size below 1, or a partition that does not sum to `num_layers`.
    """
    sizes = group_size if isinstance(group_size, Sequence) else (group_size,)
    if isinstance(sizes, str) or not all(is_integer(size) for size in sizes):
        raise ValueError(
            f"group_size must be a whole number or a partition of whole numbers, got {group_size!r}"
        )
    if not isinstance(group_size, Sequence):
        if group_size < 1:
            raise ValueError(f"group_size must be at least 1, got {group_size}")
        between = max(num_layers - 2, 0)
        full, rest = divmod(between, int(group_size))
        groups = (int(group_size),) * full + ((rest,) if rest else ())
        return (1, *groups, 1) if num_layers > 1 else (1,)
    partition = tuple(int(size) for size in group_size)
    if any(size < 1 for size in partition) or sum(partition) != num_layers:
        raise ValueError(
            f"a partition needs sizes of at least 1 that sum to the "
            f"{num_layers} layers of the model, "
            f"got {partition}, which sums to {sum(partition)}"
        )
    return partition


def run_exact(
    model: Model, block: Block, x: jax.Array, kv: tuple[LayerKV, ...], step: Step
) -> tuple[jax.Array, tuple[LayerKV, ...]]:
    """One block layer after layer: the ordinary model, whatever the grouping.

    Over the mesh axis "layer" the devices take turns.
    """
    if len(block.mlp) == 1:
        return run_layer(model, block, x, kv, step)
    slots = list(kv)
    for j, weights in enumerate(block.mlp):
        slot = j // model.layout.group_devices
        delta, slots[slot] = _turn(model, block, x, slots[slot], step, j)
        x = x + psum(delta, _attention_axes(model))
        x = x + psum(mlp(model, weights, x), model.layout.mlp)
    return x, tuple(slots)


def _turn(model, block, x, kv, step, j):
    """Attention of layer j of a group on the device that owns it, zeros elsewhere; and the cache
    `kv` of its slot, written.

    All devices attend in every turn, since the others would only wait: a conditional would leave
    every CUDA graph and copy whole caches in its other branch. What a device writes before its own
    turn is overwritten in it; after it, its entries stay.
    """
    group, n = model.layout.group, model.layout.group_devices
    if group is None:
        return attention(model, block.attention[j], x, kv, step)
    mine, turn = lax.axis_index(group), j % n
    keep = mine < turn if turn else None
    delta, kv = attention(model, block.attention[j // n], x, kv, step, keep)
    return jnp.where(mine == turn, delta, jnp.zeros((), delta.dtype)), kv


def run_fuzzy(
    model: Model, block: Block, x: jax.Array, kv: tuple[LayerKV, ...], step: Step
) -> tuple[jax.Array, tuple[LayerKV, ...]]:
    """One block with all its attentions at once on the same input, then its MLPs in order.

    One collective carries all attention outputs of the group to every device.
    """
    if len(block.mlp) == 1:
        return run_layer(model, block, x, kv, step)
    deltas, kv = _attend_at_once(model, block, x, kv, step)
    for weights, delta in zip(block.mlp, deltas, strict=False):  # slots may be padded
        x = x + delta
        x = x + psum(mlp(model, weights, x), model.layout.mlp)
    return x, kv


def run_indirect(
    model: Model, block: Block, x: jax.Array, kv: tuple[LayerKV, ...], step: Step
) -> tuple[jax.Array, tuple[LayerKV, ...]]:
    """One block with its attentions at once and then its MLPs at once, each reading x plus the
    attentions up to its own: two collectives, whatever the size.
    """
    if len(block.mlp) == 1:
        return run_layer(model, block, x, kv, step)
    deltas, kv = _attend_at_once(model, block, x, kv, step)
    read = list(itertools.accumulate(deltas[: len(block.mlp)], initial=x))[1:]
    return read[-1] + _mlps_at_once(model, block, read), kv


def run_whole_layers(
    model: Model, block: Block, x: jax.Array, kv: tuple[LayerKV, ...], step: Step
) -> tuple[jax.Array, tuple[LayerKV, ...]]:
    """The paper's ablation: MLPs at once too. Every MLP reads x plus its own attention; all that
    was added is summed.
    """
    if len(block.mlp) == 1:
        return run_layer(model, block, x, kv, step)
    deltas, kv = _attend_at_once(model, block, x, kv, step)
    deltas = deltas[: len(block.mlp)]
    return x + sum(deltas) + _mlps_at_once(model, block, [x + delta for delta in deltas]), kv


def _mlps_at_once(model, block, read):
    """What all MLPs of a group add together, each to the input it reads ([B, T, D])."""
    pairs = zip(block.mlp, read, strict=True)
    added = sum((mlp(model, w, x) for w, x in pairs), jnp.zeros_like(read[0]))
    return psum(added, model.layout.mlp)


def _attend_at_once(model, block, x, kv, step):
    """Every attention output of a group ([B, T, D] each, in layer order, whole on every device),
    and the written cache.
    """
    group, n = model.layout.group, model.layout.group_devices
    deltas, written = attentions(model, block.attention, x, kv, step)
    if group is None and not model.layout.heads:
        return deltas, tuple(written)
    deltas = [delta[None] for delta in deltas]
    if group is not None:
        mine = (jnp.arange(n, dtype=jnp.int32) == lax.axis_index(group))[:, None, None, None]
        deltas = [jnp.where(mine, delta, jnp.zeros((), delta.dtype)) for delta in deltas]
    together = psum(jnp.concatenate(deltas), _attention_axes(model))
    return [together[j] for j in range(len(together))], tuple(written)


def draft_runner(parallel: str) -> RunBlock:
    """How a layer-parallel draft runs its blocks: "attention" (EasySpec), "indirect" (MLPs at once
    too, behind the attentions) or "layer" (EasySpec's ablation).

    Raises:
      ValueError: any other word.
    """
    runners = dict(zip(PARALLEL, (run_fuzzy, run_indirect, run_whole_layers), strict=True))
    if parallel not in runners:
        raise ValueError(
            f"parallel must be one of {', '.join(map(repr, PARALLEL))}, got {parallel!r}"
        )
    return runners[parallel]


def _attention_axes(model: Model) -> tuple[str, ...]:
    """Axes over which the attention outputs of a group are partial sums."""
    group = (model.layout.group,) if model.layout.group else ()
    return group + model.layout.heads

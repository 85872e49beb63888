"""What one step of a compiled decoding loop launches, counted by kinds of operations."""

from __future__ import annotations

import collections
from typing import Any

from easyspec_jax.program import hlo


def step_launches(text: str, entries: tuple[int, ...]) -> dict[str, Any]:
    """What one trip of the largest loop of an optimised HLO module launches.

    Args:
      entries: elements of one cache entry (a layer's keys) of each model.

    Returns:
      launches, those of each kind and of each custom call; inner loops, in all their trips;
      `large_copies`, copies and transposes of at least the smallest entry; `cache_copies`, how many
      operations copy, rearrange or convert just as many elements as an entry has.

    Raises:
      ValueError: the module runs no loop.
    """
    module = hlo.parse(text)
    kinds, targets, large, loops = (collections.Counter() for _ in range(4))
    cache_copies = 0
    trips = {}
    for one in hlo.step(module):
        if not one.counts:
            continue
        kinds[one.op.kind] += one.times
        if one.op.target:
            targets[one.op.target] += one.times
        for inner in one.loops:
            loops[inner.name] += one.times
            trips[inner.name] = inner.trips
        for kind, shape in hlo.copied(module, one.op):
            cache_copies += one.times * (shape.elements in entries)
            # scores and logits are converted anyway
            if kind in hlo.MOVES and shape.elements >= min(entries):
                large[f"{kind} of {shape.elements}"] += one.times
    return {
        "launches": kinds.total(),
        "kinds": dict(kinds.most_common()),
        "custom_calls": dict(targets.most_common()),
        "inner_loops": [{"trips": trips[name], "launches": n} for name, n in loops.items()],
        "large_copies": dict(large),
        "cache_copies": cache_copies,
    }

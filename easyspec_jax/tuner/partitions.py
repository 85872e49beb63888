"""Which partitions of L layers are worth trying: those that a table of costs calls cheap, their
neighbours, and the uniform ones. Numbers alone; no model is run.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Iterator

import numpy as np

from easyspec_jax.layer_parallel import make_partition

Partition = tuple[int, ...]


def cheapest_partitions(
    costs: np.ndarray, max_blocks: int, keep: int = 1
) -> dict[int, list[tuple[float, Partition]]]:
    """For every possible number of blocks up to `max_blocks` its `keep` cheapest partitions, the
    cheapest first, by dynamic programming over the end of the last block.

    Args:
      costs: f[L, S], costs[j, s] for layer j at place s of its block; a block has at most S layers.
        A partition costs the sum over its layers.
    """
    num_layers, largest = costs.shape
    # blocks[first][size - 1]: the cost of the block of `size` layers that begins with layer `first`
    blocks = [
        np.cumsum(
            [costs[first + place, place] for place in range(min(largest, num_layers - first))]
        )
        for first in range(num_layers)
    ]
    # best[end]: (cost, partition) of the first `end` layers in the number of blocks so far
    best: list[list[tuple[float, Partition]]] = [[(0.0, ())]] + [[] for _ in range(num_layers)]
    found = {}
    for num in range(1, min(max_blocks, num_layers) + 1):
        longer: list[list[tuple[float, Partition]]] = [[]]
        for end in range(1, num_layers + 1):
            ways = []
            for size in range(1, min(largest, end) + 1):
                first = end - size
                block = float(blocks[first][size - 1])
                ways += [(cost + block, (*sizes, size)) for cost, sizes in best[first]]
            longer.append(heapq.nsmallest(keep, ways))
        best = longer
        if best[num_layers]:
            found[num] = best[num_layers]
    return found


def fastest_partitions(
    costs: np.ndarray, max_blocks: int, seconds: Callable[[Partition], float]
) -> list[Partition]:
    """Cheap partitions that no other one beats in both cost and time, the fastest first; of those
    that are cheapest for some number of blocks and some largest size.

    Args:
      costs: as for `cheapest_partitions`.
      seconds: predicted for a partition.
    """
    cost_of = {
        partition: cost
        for largest in range(1, costs.shape[1] + 1)
        for ways in cheapest_partitions(costs[:, :largest], max_blocks).values()
        for cost, partition in ways
    }
    front: list[Partition] = []
    for partition in sorted(cost_of, key=lambda p: (seconds(p), cost_of[p])):
        if not front or cost_of[partition] < cost_of[front[-1]]:
            front.append(partition)
    return front


def neighbours(partition: Partition, max_group_size: int) -> Iterator[Partition]:
    """The partitions with as many blocks in which one boundary lies one layer earlier or later."""
    for i in range(len(partition) - 1):
        for move in (-1, 1):
            sizes = list(partition)
            sizes[i] += move
            sizes[i + 1] -= move
            if min(sizes) >= 1 and max(sizes) <= max_group_size:
                yield tuple(sizes)


def uniform_partitions(num_layers: int, max_blocks: int, max_group_size: int) -> list[Partition]:
    """The published groupings of at most `max_blocks` blocks, for each number of blocks that with
    the smallest groups; that of the most blocks first.
    """
    found: dict[int, Partition] = {}
    for size in range(1, max_group_size + 1):
        partition = make_partition(num_layers, size)
        if len(partition) <= max_blocks:
            found.setdefault(len(partition), partition)
    return [found[num] for num in sorted(found, reverse=True)]


def interpolate(measured: dict[int, float], num: int) -> np.ndarray:
    """f[num], values at 0 .. num - 1: straight lines through what was measured, 0 at 0, and on
    beyond the last two points; never below 0.
    """
    places = [0, *sorted(measured)]
    values = [0.0, *(measured[place] for place in places[1:])]
    at = np.arange(num, dtype=np.float64)
    line = np.interp(at, places, values)
    if len(places) > 1:
        slope = (values[-1] - values[-2]) / (places[-1] - places[-2])
        line = np.where(at > places[-1], values[-1] + slope * (at - places[-1]), line)
    return np.maximum(line, 0.0)


def expected_tokens(first: np.ndarray, later: np.ndarray, num_draft_tokens: int) -> float:
    """Tokens per step that acceptances along an answer of n tokens promise, the mean over all
    places k where a step may begin.

    A step drafts token k by an exact pass and the next ones by parallel passes, so it gives
    1 + first[k] (1 + later[k + 1] (1 + later[k + 2] (...))) tokens, with γ factors at most; equal
    acceptances a and b give 1 + a (1 + b + ... + b^(γ - 1)) of Leviathan et al. 2023. Steps that
    the end of the answer would cut are left out where there are others.

    Args:
      first: f[n], probability that the exact draft of token k is accepted.
      later: f[n], the same for a draft by a parallel pass.
    """
    n = len(first)
    starts = range(max(n - num_draft_tokens + 1, 1))
    total = 0.0
    for k in starts:
        chances = np.cumprod([first[k], *later[k + 1 : k + num_draft_tokens]])
        total += 1.0 + math.fsum(chances)
    return total / len(starts)

"""What the GPU runtime makes of a program: CUDA graphs, what it launches outside of them, and where
the host waits for the device; read from the sequence of thunks that the compiler dumps.
"""

from __future__ import annotations

import collections
import dataclasses
import pathlib
import re
from collections.abc import Iterator, Sequence

_LINE = re.compile(r"^(?P<indent> *)\d+: k(?P<kind>\w+)")
# An empty part shares its line with the next label.
_LABEL = re.compile(r"^ *(No thunks\. *)?(?P<label>condition|body|\w*branch\w*):")
GRAPH = "CommandBuffer"
_WAITING = ("AsyncDone", "PartitionId", "ReplicaId")  # nothing that a device executes
_CONTROL = ("While", "Conditional", "Sequential", "AsyncStart", *_WAITING)


@dataclasses.dataclass
class Thunk:
    """One of the runtime's actions, with those that it holds."""

    kind: str  # "CommandBuffer", "CustomKernel", ...
    # behind the labels "condition", "body", "true_branch", ...; "" for what a graph holds
    parts: dict[str, list[Thunk]] = dataclasses.field(default_factory=dict)

    def all(self) -> Iterator[Thunk]:
        """All that it holds, however deep."""
        for thunks in self.parts.values():
            for one in thunks:
                yield one
                yield from one.all()


@dataclasses.dataclass(frozen=True)
class Graphs:
    """How a step is launched; all numbers are per step, inner loops by their trips."""

    graphs: int  # CUDA graphs that are launched; 0 where the whole loop is in one
    inside: int  # kernels, copies and collectives in them
    outside: dict[str, int]  # those outside, by kind
    conditionals: int  # outside
    host_syncs: int  # places where the host reads a value of the device's before it goes on

    @property
    def launched_outside(self) -> int:
        """Kernels, copies and collectives that the host launches one by one."""
        return sum(self.outside.values())


def parse(text: str) -> list[Thunk]:
    """The thunks of a dumped sequence, nested as they stand."""
    top = Thunk("Sequential")
    levels = [(-1, top, "")]  # indent, thunk, the part that is open
    for line in text.splitlines():
        if label := _LABEL.match(line):
            # The label of a condition stands at no indent of its own: it belongs to the last thunk.
            indent = len(line) - len(line.lstrip())
            while label["label"] != "condition" and levels[-1][0] > indent - 2:
                levels.pop()
            levels[-1] = (*levels[-1][:2], label["label"])
            levels[-1][1].parts.setdefault(label["label"], [])
        elif found := _LINE.match(line):
            indent = len(found["indent"])
            while levels[-1][0] >= indent:
                levels.pop()
            thunk = Thunk(found["kind"])
            levels[-1][1].parts.setdefault(levels[-1][2], []).append(thunk)
            levels.append((indent, thunk, ""))
    return top.parts.get("", [])


def count(thunks: Sequence[Thunk], turns: Sequence[tuple[int, bool]] = ()) -> Graphs:
    """How a step is launched: one turn of the largest loop.

    Args:
      thunks: of `parse`.
      turns: of each loop in the step, in the program's order, how many, and whether only the data
        say so: then the host asks before each turn and behind the last. Beyond the end: one, asked.

    Raises:
      ValueError: there is no loop.
    """
    loops = [(one, False) for one in thunks if one.kind == "While"]
    for graph in (one for one in thunks if one.kind == GRAPH):
        loops += [(one, True) for one in graph.all() if one.kind == "While"]
    if not loops:
        raise ValueError("the sequence of thunks has no loop")
    loop, captured = max(loops, key=lambda pair: sum(1 for _ in pair[0].all()))
    if captured:
        inside = sum(one.kind not in _CONTROL for one in loop.all())
        return Graphs(graphs=0, inside=inside, outside={}, conditionals=0, host_syncs=0)
    numbers: collections.Counter[str] = collections.Counter()
    kinds: collections.Counter[str] = collections.Counter()
    _count(loop.parts.get("condition", []), 1, iter(()), numbers, kinds)
    _count(loop.parts.get("body", []), 1, iter(turns), numbers, kinds)
    return Graphs(
        graphs=numbers["graphs"],
        inside=numbers["inside"],
        outside=dict(kinds.most_common()),
        conditionals=numbers["conditionals"],
        host_syncs=numbers["syncs"] + 1,  # whether there is another step
    )


def _count(
    thunks: Sequence[Thunk],
    times: int,
    turns: Iterator[tuple[int, bool]],
    numbers: collections.Counter[str],
    kinds: collections.Counter[str],
) -> None:
    """Add what so many runs of these thunks launch; of a conditional its largest branch."""
    for one in thunks:
        if one.kind == GRAPH:
            numbers["graphs"] += times
            numbers["inside"] += times * sum(t.kind not in _CONTROL for t in one.all())
            for _ in (t for t in one.all() if t.kind == "While"):
                next(turns, None)
        elif one.kind == "While":
            number, asked = next(turns, (1, True))
            number *= times
            if asked:
                numbers["syncs"] += times + number
            _count(one.parts.get("condition", []), number, iter(()), numbers, kinds)
            _count(one.parts.get("body", []), number, turns, numbers, kinds)
        elif one.kind == "Conditional":
            numbers["conditionals"] += times
            numbers["syncs"] += times
            branches = one.parts.values()
            largest = max(branches, key=lambda ts: sum(1 + sum(1 for _ in t.all()) for t in ts))
            _count(largest, times, turns, numbers, kinds)
        elif one.kind in ("AsyncStart", "Sequential"):
            _count([t for ts in one.parts.values() for t in ts], times, turns, numbers, kinds)
        elif one.kind not in _WAITING:
            kinds[one.kind] += times


def dumped(folder: pathlib.Path) -> str:
    """The last sequence of thunks in a folder of dumps, as it is run; "" where there is none."""
    for name in ("*thunk_sequence_after_thunk_passes.txt", "*thunk_sequence.txt"):
        files = sorted(folder.glob(name), key=lambda file: file.stat().st_mtime_ns)
        if files:
            return files[-1].read_text()
    return ""

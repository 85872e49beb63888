"""What one step of a compiled decoding loop launches, read from its optimised HLO text.

Every operation of the loop's body that is no mere view or control flow counts as one launch, those
of an inner loop once per trip; what a fusion holds is one launch. Library calls may launch more,
and captured graphs launch many at once: the figure compares programs, it is no trace.
"""

from __future__ import annotations

import collections
import dataclasses
import math
import re
from typing import Any

_HEAD = re.compile(r"^(ENTRY )?%?([\w.\-]+) .*\{$")
_OP = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (.*?) ([a-z][\w\-]*)\((.*)$")
_SHAPE = re.compile(r"\b([a-z]+\d*\w*)\[([\d,]*)\]")
_TRIPS = re.compile(r'known_trip_count[^\d}]*"?(\d+)')
_TARGET = re.compile(r'custom_call_target="([^"]+)"')
_VIEWS = frozenset(
    "parameter constant tuple get-tuple-element bitcast after-all opt-barrier domain "
    "partition-id replica-id add-dependency".split()
)
_COPIES = frozenset("copy copy-start transpose convert select concatenate".split())
_LARGE = frozenset("copy copy-start transpose".split())  # scores and logits are converted anyway


@dataclasses.dataclass(frozen=True)
class Op:
    """One instruction of a computation."""

    name: str
    kind: str  # its opcode
    shapes: tuple[tuple[str, int], ...]  # type and number of elements of each result
    rest: str  # operands and attributes
    is_root: bool

    def called(self, attribute: str) -> list[str]:
        """Computations that an attribute names."""
        found = re.search(rf"\b{attribute}=(\{{[^}}]*\}}|%?[\w.\-]+)", self.rest)
        return re.findall(r"[\w.\-]+", found[1]) if found else []


@dataclasses.dataclass
class Tally:
    """Launches of a computation and of all that it runs, inner loops by their trips."""

    kinds: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    targets: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    copies: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    loops: list[dict[str, int | None]] = dataclasses.field(default_factory=list)

    @property
    def launches(self) -> int:
        """All of them."""
        return self.kinds.total()

    def add(self, other: Tally, times: int = 1) -> None:
        """Count what another computation launches, so many times."""
        for name in ("kinds", "targets", "copies"):
            for key, n in getattr(other, name).items():
                getattr(self, name)[key] += n * times
        self.loops += other.loops


def parse(hlo: str) -> tuple[dict[str, list[Op]], str]:
    """The instructions of every computation of a module, and the name of its entry."""
    computations: dict[str, list[Op]] = {}
    entry, current = "", None
    for line in hlo.splitlines():
        if current is None:
            head = _HEAD.match(line)
            if head:
                current = computations.setdefault(head[2], [])
                entry = head[2] if head[1] else entry
        elif line.startswith("}"):
            current = None
        elif op := _OP.match(line):
            shapes = tuple(
                (kind, math.prod(int(n) for n in dims.split(",") if n))
                for kind, dims in _SHAPE.findall(op[3])
            )
            current.append(Op(op[2], op[4], shapes, op[5], bool(op[1])))
    return computations, entry


def tally(computations: dict[str, list[Op]], name: str, least: int) -> Tally:
    """What a computation launches; copies of at least `least` elements are listed."""
    total = Tally()
    for op in computations.get(name, ()):
        if op.kind in _VIEWS or op.kind.endswith(("-done", "-update")):
            continue
        if op.kind == "while":
            trips = _TRIPS.search(op.rest)
            inner = tally(computations, op.called("body")[0], least)
            number = int(trips[1]) if trips else None
            total.add(inner, 1 if number is None else number)
            total.loops.append({"trips": number, "launches": inner.launches})
        elif op.kind == "call":
            total.add(tally(computations, op.called("to_apply")[0], least))
        elif op.kind == "conditional":
            branches = op.called("branch_computations")
            branches = branches or op.called("true_computation") + op.called("false_computation")
            tallies = [tally(computations, branch, least) for branch in branches]
            total.add(max(tallies, key=lambda t: t.launches))
        else:
            total.kinds[op.kind] += 1
            target = _TARGET.search(op.rest) if op.kind == "custom-call" else None
            if target:
                total.targets[target[1]] += 1
            for kind, size in _copied(computations, op):
                if size >= least:
                    total.copies[f"{kind} of {size}"] += 1
    return total


def _copied(computations: dict[str, list[Op]], op: Op) -> list[tuple[str, int]]:
    """Kind and number of elements of each result that an operation merely copies or rearranges."""
    if op.kind in _COPIES:
        return [(op.kind, op.shapes[0][1])] if op.shapes else []
    if op.kind != "fusion":
        return []
    inside = {
        inner.name: inner for inner in computations.get(next(iter(op.called("calls")), ""), ())
    }
    pending, found = [inner for inner in inside.values() if inner.is_root], []
    while pending:
        root = pending.pop()
        if root.kind in ("tuple", "bitcast"):
            operands = re.findall(r"%([\w.\-]+)", root.rest.partition(")")[0])
            pending += [inside[name] for name in operands if name in inside]
        elif root.kind in _COPIES and root.shapes:
            found.append((root.kind, root.shapes[0][1]))
    return found


def step_launches(hlo: str, entries: tuple[int, ...]) -> dict[str, Any]:
    """What one trip of the module's largest loop launches.

    Args:
      entries: elements of one cache entry (a layer's keys) of each model.

    Returns:
      launches, those of each kind and of each custom call; inner loops; `large_copies`, copies and
      transposes of at least the smallest entry; `cache_copies`, how many operations copy, rearrange
      or convert just as many elements as an entry has.

    Raises:
      ValueError: the entry computation runs no loop.
    """
    computations, entry = parse(hlo)
    loops, pending = [], [entry]
    while pending:
        for op in computations.get(pending.pop(), ()):
            if op.kind == "call":
                pending += op.called("to_apply")
            elif op.kind == "while":
                loops.append(tally(computations, op.called("body")[0], min(entries)))
    if not loops:
        raise ValueError("the module has no loop at its top")
    body = max(loops, key=lambda t: t.launches)
    sizes = {str(size) for size in entries}
    return {
        "launches": body.launches,
        "kinds": dict(body.kinds.most_common()),
        "custom_calls": dict(body.targets.most_common()),
        "inner_loops": body.loops,
        "large_copies": {what: n for what, n in body.copies.items() if what.split()[0] in _LARGE},
        "cache_copies": sum(n for what, n in body.copies.items() if what.split()[-1] in sizes),
    }

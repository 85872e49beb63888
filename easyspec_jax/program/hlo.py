"""An optimised HLO module as values: its operations, what a step launches, and what each launch
reads and writes.

A launch is an operation that is neither a view nor control flow; a fusion is one. Those of an inner
loop count once per trip, and of a conditional's branches the one that launches most is taken. Bytes
are those that an operation touches: of a slice the slice, of an update in place the update. What a
program is called with is followed into its loops, so every launch knows the weights and the cache
entries that it reads.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import math
import re
from collections.abc import Iterator
from typing import Any

_HEAD = re.compile(r"^(ENTRY )?%?([\w.\-]+) .*\{$")
_OP = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (.*?) ([a-z][\w\-]*)\((.*)$")
_SHAPE = re.compile(r"\b([a-z]+\d*\w*)\[([\d,]*)\]")
_NAME = re.compile(r'op_name="([^"]*)"')
_TRIPS = re.compile(r'known_trip_count[^\d}]*"?(\d+)')
_TARGET = re.compile(r'custom_call_target="([^"]+)"')
_ATTRIBUTE = r"\b%s=(\{[^}]*\}|%%?[\w.\-]+)"
_BITS = re.compile(r"[a-z]+(\d+)")
COLLECTIVES = (
    "all-reduce", "all-gather", "all-to-all", "reduce-scatter", "collective-permute",
    "collective-broadcast",
)  # fmt: skip
CONTROL = ("while", "conditional", "call")
_VIEWS = frozenset(
    "parameter constant tuple get-tuple-element bitcast after-all opt-barrier domain "
    "partition-id replica-id add-dependency".split()
)
_SAME = frozenset("bitcast copy reshape transpose convert opt-barrier copy-done".split())
# Read whole, however little of their result is: their elements are not those of their operands.
_WHOLE = frozenset(
    "dot convolution concatenate pad sort scatter reduce-window custom-call "
    "dynamic-update-slice".split()
)
_SLICES = frozenset("slice dynamic-slice gather".split())
MOVES = frozenset("copy copy-start transpose pad".split())
_COPIES = MOVES | frozenset("convert select concatenate".split())


@dataclasses.dataclass(frozen=True)
class Shape:
    """One array that an operation results in."""

    dtype: str
    dims: tuple[int, ...]

    @property
    def elements(self) -> int:
        """How many there are."""
        return math.prod(self.dims)

    @property
    def bytes(self) -> int:
        """What they take; two of four bits share a byte, and a pred takes one."""
        bits = _BITS.match(self.dtype)
        return math.ceil(self.elements * int(bits[1]) / 8) if bits else self.elements


@dataclasses.dataclass(frozen=True)
class Op:
    """One instruction of a computation."""

    name: str
    kind: str  # its opcode
    shapes: tuple[Shape, ...]  # of its results
    rest: str  # operands and attributes
    is_root: bool

    @functools.cached_property
    def operands(self) -> tuple[str, ...]:
        """Names of what it reads."""
        return tuple(re.findall(r"%([\w.\-]+)", self.rest.partition(")")[0]))

    @property
    def bytes(self) -> int:
        """Of all results."""
        return sum(shape.bytes for shape in self.shapes)

    @functools.cached_property
    def scope(self) -> str:
        """The path of named scopes that it was traced in; "" where the compiler made it."""
        found = _NAME.search(self.rest)
        return found[1] if found else ""

    @property
    def index(self) -> int:
        """Of a parameter its number, of a get-tuple-element the place in the tuple."""
        found = re.match(r"(\d+)", self.rest) or re.search(r"index=(\d+)", self.rest)
        return int(found[1]) if found else 0

    @property
    def trips(self) -> int | None:
        """How often a loop runs, where that is known."""
        found = _TRIPS.search(self.rest)
        return int(found[1]) if found else None

    @property
    def target(self) -> str:
        """What a custom call calls."""
        found = _TARGET.search(self.rest)
        return found[1] if found else ""

    @property
    def collective(self) -> str:
        """Which kind of collective it is; "": none."""
        kind = self.kind.removesuffix("-start")
        return kind if kind in COLLECTIVES else ""

    def called(self, *attributes: str) -> list[str]:
        """Computations that attributes name."""
        names = []
        for attribute in attributes:
            found = re.search(_ATTRIBUTE % attribute, self.rest)
            names += re.findall(r"[\w.\-]+", found[1]) if found else []
        return names

    @property
    def branches(self) -> list[str]:
        """Computations of a conditional."""
        one = self.called("branch_computations")
        return one or self.called("true_computation", "false_computation")


@dataclasses.dataclass(frozen=True)
class Module:
    """The instructions of every computation of a program, in the order in which they run."""

    computations: dict[str, tuple[Op, ...]]
    entry: str

    def table(self, name: str) -> dict[str, Op]:
        """The instructions of a computation by name; nothing of one that is not there."""
        return {op.name: op for op in self.computations.get(name, ())}

    def ops(self) -> Iterator[Op]:
        """All instructions."""
        for computation in self.computations.values():
            yield from computation

    def fused(self, op: Op) -> str:
        """The computation that a fusion holds."""
        return next(iter(op.called("calls")), "") if op.kind == "fusion" else ""


def parse(hlo: str) -> Module:
    """The module of an optimised HLO text."""
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
                Shape(dtype, tuple(int(n) for n in dims.split(",") if n))
                for dtype, dims in _SHAPE.findall(op[3])
            )
            current.append(Op(op[2], op[4], shapes, op[5], bool(op[1])))
    return Module({name: tuple(ops) for name, ops in computations.items()}, entry)


@dataclasses.dataclass(frozen=True)
class Loop:
    """A loop inside of a step."""

    name: str
    scope: str
    trips: int | None  # None: as many as the data say; its launches count once


@dataclasses.dataclass(frozen=True)
class Launch:
    """An operation that a program launches, or control flow that it runs through."""

    op: Op
    times: int  # in a step
    read: int  # bytes of one time
    written: int
    scope: str  # the path of named scopes, or that of what it is made for
    arguments: tuple[str, ...]  # of the program, that it reads or updates
    producers: tuple[str, ...]  # launches of the same computation whose results it reads
    loops: tuple[Loop, ...]  # of the step that it stands in, outermost first
    taken: bool  # False: in a branch that is not the largest

    @property
    def counts(self) -> bool:
        """Whether it is one of the launches, and no control flow."""
        return self.taken and self.op.kind not in CONTROL


def step(module: Module) -> list[Launch]:
    """What one trip of the module's largest loop launches, in order.

    Raises:
      ValueError: the program runs no loop.
    """
    found = whole(module)
    tops: dict[str, int] = collections.Counter()
    for one in found:
        if one.counts and one.loops:
            tops[one.loops[0].name] += one.times
    if not tops:
        raise ValueError("the module has no loop at its top")
    top = max(tops, key=lambda name: tops[name])
    inside = [one for one in found if one.loops and one.loops[0].name == top]
    once = inside[0].loops[0].trips or 1
    return [
        dataclasses.replace(one, loops=one.loops[1:], times=one.times // once) for one in inside
    ]


def whole(module: Module) -> list[Launch]:
    """What the whole program launches, in order; the loops of unknown length once."""
    entry = module.computations[module.entry]
    names = {op.index: op.scope for op in entry if op.kind == "parameter"}
    arguments = [names.get(i) for i in range(max(names, default=-1) + 1)]
    return _walk(module, module.entry, arguments, 1, (), True, "")


def _walk(
    module: Module, name: str, arguments: Any, times: int, loops: Any, taken: bool, scope: str
) -> list[Launch]:
    """The launches of a computation and of all that it runs.

    Args:
      arguments: of the program's, what each parameter holds: a name, a tuple of them, or None.
    """
    held, _ = _origins(module, name, arguments)
    table, found = module.table(name), []
    users = collections.defaultdict(list)
    for op in table.values():
        for operand in op.operands:
            users[operand].append(op)
    for op in table.values():
        if op.kind in _VIEWS or op.kind.endswith(("-done", "-update")):
            continue
        within = _scope(module, table, users, op) or scope
        read, written = (0, 0) if op.kind in CONTROL else _traffic(module, table, op)
        names = tuple(_names([held.get(operand) for operand in op.operands]))
        made = tuple(_producers(table, op))
        launch = Launch(op, times, read, written, within, names, made, loops, taken)
        found.append(launch)
        given = [held.get(operand) for operand in op.operands]
        if op.kind == "while":
            inner = Loop(op.name, within, op.trips)
            n = times * (1 if op.trips is None else op.trips)
            body = op.called("body")[0]
            found += _walk(module, body, given, n, (*loops, inner), taken, within)
        elif op.kind == "call":
            found += _walk(module, op.called("to_apply")[0], given, times, loops, taken, within)
        elif op.kind == "conditional":
            found += _branches(module, op, given, launch)
    return found


def _branches(module: Module, op: Op, given: list, launch: Launch) -> list[Launch]:
    """The launches of all branches of a conditional; only those of the largest are taken."""
    same = (launch.times, launch.loops, launch.taken, launch.scope)
    walks = [_walk(module, name, given[i : i + 1], *same) for i, name in enumerate(op.branches, 1)]
    sizes = [sum(one.times for one in walk if one.counts) for walk in walks]
    largest = sizes.index(max(sizes)) if sizes else None
    return [
        one if i == largest else dataclasses.replace(one, taken=False)
        for i, walk in enumerate(walks)
        for one in walk
    ]


def _origins(module: Module, name: str, arguments: Any) -> tuple[dict[str, Any], Any]:
    """Of a computation's values those that are arguments of the program, or parts of them, and
    what its root is of them.
    """
    held: dict[str, Any] = {}
    root = None
    for op in module.computations.get(name, ()):
        first = held.get(op.operands[0]) if op.operands else None
        value = None
        if op.kind == "parameter":
            value = arguments[op.index] if op.index < len(arguments) else None
        elif op.kind == "get-tuple-element":
            if isinstance(first, tuple) and op.index < len(first):
                value = first[op.index]
        elif op.kind == "tuple":
            value = tuple(held.get(operand) for operand in op.operands)
        elif op.kind in _SAME or op.kind in ("while", "dynamic-update-slice"):
            value = first
        elif op.kind == "fusion":
            given = [held.get(operand) for operand in op.operands]
            value = _kept(module, module.fused(op), given)
        elif op.kind == "conditional" and len(op.operands) > 1:
            value = _origins(module, op.branches[0], [held.get(op.operands[1])])[1]
        held[op.name] = value
        root = value if op.is_root else root
    return held, root


def _kept(module: Module, name: str, given: list) -> Any:
    """Which of the arguments that a fusion gets it updates in place, or merely rearranges."""
    inside = module.table(name)
    root = next((op for op in inside.values() if op.is_root), None)

    def of(op: Op) -> Any:
        if op.kind == "tuple":
            return tuple(of(inside[operand]) for operand in op.operands if operand in inside)
        while op.kind in (*_SAME, "dynamic-update-slice") and op.operands[0] in inside:
            op = inside[op.operands[0]]
        return given[op.index] if op.kind == "parameter" and op.index < len(given) else None

    return of(root) if root is not None else None


def _names(values: Any) -> Iterator[str]:
    """All names in nested tuples of them."""
    for value in values:
        if isinstance(value, str):
            yield value
        elif isinstance(value, tuple):
            yield from _names(value)


def _producers(table: dict[str, Op], op: Op) -> Iterator[str]:
    """Launches of the computation that an operation's operands come from, through views."""
    pending = list(op.operands)
    while pending:
        source = table.get(pending.pop(0))
        if source is None or source.kind in ("parameter", "constant"):
            continue
        if source.kind in _VIEWS or source.kind.endswith("-done"):
            pending += source.operands
        else:
            yield source.name


def _scope(module: Module, table: dict[str, Op], users: Any, op: Op) -> str:
    """An operation's scope; of what the compiler made that of what reads it, of a view that it
    reads (which other phases may share), or of what it holds.
    """
    if op.scope:
        return op.scope
    sources = [table[name] for name in op.operands if name in table]
    views = [one.scope for one in sources if one.kind == "bitcast"]
    after = [one.scope for one in users[op.name] if one.kind not in ("tuple", *CONTROL)]
    inside = [one.scope for one in module.table(module.fused(op)).values()]
    return next((scope for scope in (*after, *views, *inside) if scope), "")


def _traffic(module: Module, table: dict[str, Op], op: Op) -> tuple[int, int]:
    """Bytes that a launch reads and writes."""
    shapes = op.shapes
    if op.kind in ("all-gather-start", "collective-permute-start"):
        shapes = shapes[1:]  # their operand is among what they result in
    elif op.kind == "copy-start":
        shapes = shapes[:1]
    elif op.target.startswith("__cublas"):
        shapes = tuple(s for s in shapes if s.dtype != "s8" or len(shapes) == 1)  # workspace
    written = sum(shape.bytes for shape in shapes)
    sizes = [table[name].bytes if name in table else 0 for name in op.operands]
    if op.kind in _SLICES:
        return written + sum(sizes[1:]), written
    if op.kind == "dynamic-update-slice":
        return sum(sizes[1:]), sizes[1]
    if op.kind != "fusion":
        return sum(sizes), written
    name = module.fused(op)
    shares = _shares(module, name)
    touched = sum(round(min(shares.get(i, 1.0), 1.0) * n) for i, n in enumerate(sizes))
    return touched, min(written, _written(module, name, written))


def _shares(module: Module, fusion: str, share: float = 1.0) -> dict[int, float]:
    """What of each of its parameters, by index, a fusion reads of whose result so much is asked.

    Kernels of fusions work from their results back: of a sum of which a slice is taken only that
    slice is summed. Parts that are asked for twice count twice, up to the whole.
    """
    inside = module.table(fusion)
    asked: dict[str, float] = collections.defaultdict(float)
    results = {op.name for op in inside.values() if op.is_root}  # and what they are views of
    for op in reversed(inside.values()):
        part = asked[op.name] = share if op.is_root else min(asked[op.name], 1.0)
        if op.name in results and op.kind in ("tuple", "bitcast"):
            results.update(op.operands)
        nested = _shares(module, module.fused(op), part) if op.kind == "fusion" else {}
        for place, operand in enumerate(op.operands):
            if operand not in inside or not part:
                continue
            if op.kind == "fusion":
                asked[operand] += nested.get(place, 0.0)
            elif op.kind == "dynamic-update-slice" and place == 0:
                asked[operand] += 0.0 if op.name in results else part  # in place
            elif op.kind in _WHOLE:
                asked[operand] += 1.0
            elif op.kind in _SLICES or op.kind == "broadcast":
                less = op.shapes[0].elements / inside[operand].shapes[0].elements
                asked[operand] += part * less if place == 0 else 1.0
            else:
                asked[operand] += part
    return {op.index: asked[op.name] for op in inside.values() if op.kind == "parameter"}


def _written(module: Module, name: str, size: int) -> int:
    """Bytes that a fusion writes: of an update in place the update."""
    inside = module.table(name)

    def of(op: Op) -> int:
        if op.kind == "bitcast" and op.operands[0] in inside:
            return of(inside[op.operands[0]])
        if op.kind == "tuple":
            return sum(of(inside[operand]) for operand in op.operands if operand in inside)
        if op.kind == "dynamic-update-slice":
            return inside[op.operands[1]].bytes
        return op.bytes

    root = next((op for op in inside.values() if op.is_root), None)
    return size if root is None else of(root)


def copied(module: Module, op: Op) -> list[tuple[str, Shape]]:
    """Kind and shape of each result that an operation merely copies or rearranges."""
    if op.kind in _COPIES:
        return [(op.kind, op.shapes[0])] if op.shapes else []
    inside = module.table(module.fused(op))
    pending, found = [one for one in inside.values() if one.is_root], []
    while pending:
        root = pending.pop()
        if root.kind in ("tuple", "bitcast"):
            pending += [inside[name] for name in root.operands if name in inside]
        elif root.kind in _COPIES and root.shapes:
            found.append((root.kind, root.shapes[0]))
    return found

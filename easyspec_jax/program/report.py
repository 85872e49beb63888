"""The program of a decoding step, as the compiler made it: what each phase launches, moves and
exchanges, against what it must move; CUDA graphs, memory, and what all of it may take.

Nothing is run and no clock is read. Seconds are an estimate from counts and the published constants
of `planner.device`.
"""

from __future__ import annotations

import collections
import dataclasses
import math
import pathlib
import re
import tempfile
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from easyspec_jax import loop
from easyspec_jax.config import Sampling
from easyspec_jax.decode import Decoder
from easyspec_jax.drafters.eagle import EagleDrafter
from easyspec_jax.drafters.layer_parallel import LayerParallelDrafter
from easyspec_jax.engine import PREFILL_CHUNKS
from easyspec_jax.loop import PHASES
from easyspec_jax.memory import decode_budget
from easyspec_jax.planner.device import Device
from easyspec_jax.program import floor, hlo, phases, thunks
from easyspec_jax.program.target import compile_options
from easyspec_jax.request import make_inputs
from easyspec_jax.sharding import platform_of

_ROUNDS = {"all-reduce": 2}  # of a ring; all others go around once
_STRATEGY = re.compile(r'"kernel_strategy":"KERNEL_STRATEGY_(\w+)"')
# Lists of devices, or numbers of groups and of devices in each; by names of axes since jax 0.11.
_GROUP = re.compile(r"replica_groups=(?:\{\{([\d,]*)\}|\[\d+,(\d+)\])")
_AXES = re.compile(r"replica_groups=mesh\[([^\]]*)\] *\{([^}]*)\}")


@dataclasses.dataclass(frozen=True)
class Traffic:
    """What some launches do: those of a phase, or of a part of one."""

    launches: int = 0
    read: int = 0  # bytes on a device
    written: int = 0
    seconds: float = 0.0  # estimated, kernels and collectives; 0 without a device's constants

    def __add__(self, other: Traffic) -> Traffic:
        pairs = zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)
        return Traffic(*(a + b for a, b in pairs))

    def __mul__(self, times: int) -> Traffic:
        return Traffic(*(times * n for n in dataclasses.astuple(self)))


@dataclasses.dataclass(frozen=True)
class Exchange:
    """Collectives of one kind."""

    kind: str  # "all-reduce", ...
    kernel: str  # as XLA calls its strategy, "TRITON_ONE_SHOT" say; "DEFAULT": the library's
    bytes: int  # of the result on one device
    devices: int  # that take part
    count: int


@dataclasses.dataclass(frozen=True)
class Phase:
    """One run of a phase of a step: for the draft one level behind the first."""

    runs: int  # in a step
    traffic: Traffic
    in_layers: int  # launches that stand in a layer
    layers: int  # that the pass goes through; 0: there is no pass
    floor: int | None  # bytes that it must move; None: not known
    exchanges: tuple[Exchange, ...]
    conditionals: int
    copies: int  # of as many bytes as the smallest cache entry of a layer, in all branches
    parts: dict[str, Traffic]

    @property
    def per_layer(self) -> float | None:
        """Launches a layer."""
        return self.in_layers / self.layers if self.layers else None

    @property
    def ratio(self) -> float | None:
        """Bytes moved for each that must be."""
        moved = self.traffic.read + self.traffic.written
        return moved / self.floor if self.floor else None

    @property
    def collectives(self) -> int:
        """How many there are."""
        return sum(one.count for one in self.exchanges)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        derived = {"per_layer": self.per_layer, "ratio": self.ratio}
        values = dataclasses.asdict(self)
        return values.pop("traffic") | values | derived | {"collectives": self.collectives}


@dataclasses.dataclass(frozen=True)
class StepProgram:
    """One compiled step; all bytes are those of one device."""

    device: str
    mesh: dict[str, int]
    attention: str  # whose kernels the base attends with: "cudnn" or "xla"
    entries: int  # S, that each row's caches hold
    num_draft_tokens: int
    tree_width: int
    phases: dict[str, Phase]  # of loop.PHASES, and "rest"; those that launch nothing are left out
    graphs: thunks.Graphs | None  # None: there are none on this platform
    memory: dict[str, int]  # by kind, as compiled
    budget: dict[str, int]  # by name, as `Decoder.memory` counts
    estimate: dict[str, float]  # seconds of a step by what takes them; {}: the device is not known
    prefill: dict[int, Phase]  # by prompt tokens that are absorbed at once

    @property
    def step(self) -> Traffic:
        """All of it."""
        return sum((p.traffic * p.runs for p in self.phases.values()), Traffic())

    @property
    def floor(self) -> int | None:
        """Bytes that a step must move; None where that is not known of a phase with a pass."""
        known = [(p.floor, p.runs) for p in self.phases.values() if p.layers]
        if any(size is None for size, _ in known):
            return None
        return sum(size * runs for size, runs in known if size is not None)

    def total(self, name: str) -> int:
        """Of all phases: "collectives", "conditionals" or "copies"."""
        return sum(getattr(phase, name) * phase.runs for phase in self.phases.values())

    def as_dict(self) -> dict[str, Any]:
        """All of it, for JSON."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        step = dataclasses.asdict(self.step) | {"floor": self.floor}
        step |= {name: self.total(name) for name in ("collectives", "conditionals", "copies")}
        graphs = None if self.graphs is None else dataclasses.asdict(self.graphs)
        return values | {
            "phases": {name: phase.as_dict() for name, phase in self.phases.items()},
            "prefill": {n: phase.as_dict() for n, phase in self.prefill.items()},
            "graphs": graphs,
            "step": step,
        }


@dataclasses.dataclass(frozen=True)
class Compiled:
    """The texts of a compiled program."""

    hlo: str
    thunks: str  # as the runtime runs them; "" where there are none
    memory: dict[str, int]


def read_program(
    decoder: Decoder,
    constants: Device | None = None,
    *,
    batch: int = 1,
    max_len: int = 2048,
    sampling: Sampling = Sampling(),  # noqa: B008
    prefill: Sequence[int] = (),
    texts: dict[str, str] | None = None,
) -> StepProgram:
    """The decoding loop of a decoder, compiled for the devices of its mesh, and what it says.

    Args:
      decoder: its models may be `abstract_model`s, on a mesh of `target.make_mesh`; nothing is
        allocated. No draft is stopped early here: of a `min_draft_probability` what it adds to a
        step that drafts every level is counted.
      constants: what is known of the device; None: no seconds are estimated.
      batch: rows.
      max_len: S, tokens of each row that the caches hold, a step's draft among them.
      prefill: chunks of prompt tokens whose programs are read, too.
      texts: gets the "hlo" and "thunks" of the loop.

    Raises:
      ValueError: caches that hold no more than a step's draft, or less than a chunk.
    """
    base, least = decoder.base, decoder.num_nodes + 3
    if max_len < least:
        raise ValueError(f"caches must hold at least {least} tokens here, got max_len {max_len}")
    if any(chunk > max_len for chunk in prefill):
        raise ValueError(f"prefill must be at most max_len {max_len}, got {max(prefill)}")
    inputs = make_inputs(base.config, np.zeros((batch, 1), np.int32), 1, sampling)
    request, state = decoder.planned(inputs, max_len)
    chunk = min(PREFILL_CHUNKS[-1], max_len)
    budget = decode_budget(base, decoder.drafter, request, state, chunk=chunk)
    lowered = loop.run_loop.lower(base, decoder.drafter, request, state)
    compiled = compile_program(lowered, decoder, decoder.num_nodes + 1)
    if texts is not None:
        texts |= {"hlo": compiled.hlo, "thunks": compiled.thunks}
    module = hlo.parse(compiled.hlo)
    reader = _Reader(module, decoder, constants, batch, max_len)
    launches, levels = hlo.step(module), decoder.num_draft_tokens - 1
    program = StepProgram(
        device=base.layout.mesh.devices.flat[0].device_kind,
        mesh=dict(base.layout.mesh.shape),
        attention=base.layout.attention,
        entries=max_len,
        num_draft_tokens=decoder.num_draft_tokens,
        tree_width=decoder.tree_width,
        phases=reader.phases(launches),
        graphs=_graphs(compiled.thunks, phases.turns(launches, levels)),
        memory=compiled.memory,
        budget=budget,
        estimate={},
        prefill={chunk: _prefill(decoder, request, state, chunk, constants) for chunk in prefill},
    )
    return dataclasses.replace(program, estimate=estimate(program, constants))


def _graphs(sequence: str, turns: Sequence[tuple[int, bool]]) -> thunks.Graphs | None:
    """How a step whose loops take so many turns is launched; None without a sequence of thunks."""
    return thunks.count(thunks.parse(sequence), turns) if sequence else None


def compile_program(lowered: Any, decoder: Decoder, rows: int) -> Compiled:
    """What the compiler makes of a lowered function of a decoder, for the devices of its mesh and
    passes of so many tokens of a text.
    """
    mesh = decoder.base.layout.mesh
    more = dict(decoder.options(rows))
    with tempfile.TemporaryDirectory(prefix="easyspec-program-") as folder:
        options = compile_options(mesh, folder if platform_of(mesh) != "cpu" else None)
        compiled = lowered.compile(compiler_options=options | more)
        sequence = thunks.dumped(pathlib.Path(folder))
    sizes = compiled.memory_analysis()
    memory = {
        "arguments": sizes.argument_size_in_bytes,
        "temporaries": sizes.temp_size_in_bytes,
        "outputs": sizes.output_size_in_bytes,
        "shared with arguments": sizes.alias_size_in_bytes,
    }
    return Compiled(hlo=compiled.as_text(), thunks=sequence, memory=memory)


def _prefill(
    decoder: Decoder,
    request: Any,
    state: Any,
    chunk: int,
    constants: Device | None,
) -> Phase:
    """One chunk of prompt tokens, absorbed by base and draft."""
    mesh = decoder.base.layout.mesh
    batch, entries = state.tokens.shape
    start = jax.ShapeDtypeStruct((), np.int32, sharding=NamedSharding(mesh, PartitionSpec()))
    arguments = (decoder.base, decoder.drafter, request, state, start)
    lowered = loop.prefill_chunk.lower(*arguments, chunk=chunk)
    module = hlo.parse(compile_program(lowered, decoder, chunk).hlo)
    reader = _Reader(module, decoder, constants, batch, entries)
    layers = sum(m.config.num_layers for m in (decoder.base, *decoder.drafter.models()))
    least = floor.prefill_floor(decoder, batch, entries, chunk)
    return reader.phase(hlo.whole(module), 1, layers, None if least is None else least.bytes)


@dataclasses.dataclass(frozen=True)
class _Reader:
    """Sums over the launches of one program."""

    module: hlo.Module
    decoder: Decoder
    constants: Device | None
    batch: int
    entries: int

    def phases(self, launches: Sequence[hlo.Launch]) -> dict[str, Phase]:
        """All phases of a step."""
        levels = max(self.decoder.num_draft_tokens - 1, 0)
        found = phases.by_phase(launches, levels)
        floors = floor.step_floors(self.decoder, self.batch, self.entries)
        result = {}
        for name in (*PHASES, ""):
            mine = found.get(name, [])
            runs = max(levels, 1) if name == "draft" else 1
            least = floors[name].bytes if name in floors else None
            if any(one.counts for one in mine):
                layers = self._layers(name, mine)
                result[name or "rest"] = self.phase(mine, runs, layers, least)
        return result

    def phase(
        self, launches: Sequence[hlo.Launch], runs: int, layers: int, least: int | None
    ) -> Phase:
        """So many runs of a phase as one of them."""
        exchanges: dict[Any, int] = collections.Counter()
        for one in launches:
            if one.op.collective and one.counts:
                exchanges[self._exchange(one)] += one.times
        size = floor.smallest_entry(self.decoder, self.batch, self.entries)
        copies = [
            one.times
            for one in launches
            for kind, shape in hlo.copied(self.module, one.op)
            if kind in hlo.MOVES and shape.bytes >= size
        ]
        counted = [one for one in launches if one.counts]
        parts = phases.parts(self.module, launches, self.entries)
        return Phase(
            runs=runs,
            traffic=self._traffic(counted, runs),
            in_layers=sum(o.times for o in counted if phases.BLOCK.search(o.scope)) // runs,
            layers=layers,
            floor=least,
            exchanges=tuple(
                dataclasses.replace(one, count=n // runs) for one, n in exchanges.items()
            ),
            conditionals=sum(o.times for o in launches if o.op.kind == "conditional") // runs,
            copies=sum(copies) // runs,
            parts={name: self._traffic(some, runs) for name, some in parts.items()},
        )

    def _layers(self, name: str, launches: Iterable[hlo.Launch]) -> int:
        """Layers of the model that a phase runs; 0 where it runs none, or that is not known."""
        if not any(phases.BLOCK.search(one.scope) for one in launches):
            return 0
        if name == "verify":
            return self.decoder.base.config.num_layers
        drafter = self.decoder.drafter
        known = isinstance(drafter, LayerParallelDrafter | EagleDrafter)
        return drafter.models()[0].config.num_layers if known else 0

    def _traffic(self, launches: Iterable[hlo.Launch], runs: int) -> Traffic:
        total = Traffic()
        for one in launches:
            seconds = 0.0 if self.constants is None else self._seconds(one, self.constants)
            total += Traffic(1, one.read, one.written, seconds) * one.times
        return Traffic(
            total.launches // runs, total.read // runs, total.written // runs, total.seconds / runs
        )

    def _seconds(self, one: hlo.Launch, device: Device) -> float:
        """Of one launch in a CUDA graph, beside what a collective waits for."""
        if one.op.collective:
            found = self._exchange(one)
            rounds = _ROUNDS.get(found.kind, 1)
            return device.exchange(found.bytes, found.devices, rounds=rounds)
        return max((one.read + one.written) / device.bandwidth, device.least)

    def _exchange(self, one: hlo.Launch) -> Exchange:
        strategy = _STRATEGY.search(one.op.rest)
        return Exchange(
            kind=one.op.collective,
            kernel=strategy[1] if strategy else "DEFAULT",
            bytes=one.written,
            devices=participants(one.op.rest, self.decoder.base.layout.mesh.size),
            count=1,
        )


def participants(attributes: str, every: int) -> int:
    """Devices that a collective with these attributes sums or gathers over, of `every` one."""
    if (axes := _AXES.search(attributes)) is not None:
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", axes[1]))
        return math.prod(int(sizes[name]) for name in re.findall(r"\w+", axes[2]))
    groups = _GROUP.search(attributes)
    if groups is None:
        return every
    return len(groups[1].split(",")) if groups[1] else int(groups[2] or every)


def estimate(program: StepProgram, device: Device | None) -> dict[str, float]:
    """Seconds of a step by what takes them, and "limit", what its floor alone would take; {}
    without a device, or for one whose launches nothing is known of.
    """
    if device is None or not device.least:
        return {}
    exchanged = sum(p.runs * p.parts[name].seconds for p in program.phases.values()
                    for name in ("collective", "logits") if name in p.parts)  # fmt: skip
    found = {
        "kernels": program.step.seconds - exchanged,
        "collectives": exchanged,
        "launches": 0.0,
        "host": device.sync,
    }
    if program.graphs is not None:
        alone = program.graphs.launched_outside + program.graphs.graphs
        found["launches"] = device.launch * alone
        found["host"] = device.sync * program.graphs.host_syncs
    found["step"] = sum(found.values())
    if program.floor is not None:
        found["limit"] = program.floor / device.bandwidth
    return found

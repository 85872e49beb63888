"""`easyspec program`: what the compiler makes of a pair's decoding step for GPUs that need not be
there: launches, bytes against what must move, collectives, graphs, memory.
"""

from __future__ import annotations

import argparse
import json
import pathlib
from typing import TYPE_CHECKING, Any

import jax

import easyspec_jax as es
from easyspec_jax.cli import drafting
from easyspec_jax.cli.options import (
    COUNTS,
    MODEL_HELP,
    PROBABILITY,
    add_attention,
    add_batch,
    add_dtype,
    add_max_len,
    add_mesh,
    add_quantization,
    max_len,
)
from easyspec_jax.compile_options import LEVELS
from easyspec_jax.memory import listed
from easyspec_jax.planner.device import PRESETS, Device
from easyspec_jax.program import target
from easyspec_jax.sources import read_config

if TYPE_CHECKING:  # takes a while to import: only the command itself does
    from easyspec_jax.program.report import Phase, StepProgram, Traffic

HELP = "what the compiler makes of a step for GPUs that need not be there"
_COLUMNS = {  # and their widths
    "phase": 12, "runs": 5, "launches": 9, "a layer": 8, "read MB": 10, "written MB": 11,
    "floor MB": 10, "ratio": 6, "collect.": 9, "cond.": 6, "copies": 7, "ms": 8, "limit": 7,
}  # fmt: skip
_ATTENTION = {"cudnn": "one kernel of cuDNN", "xla": "XLA's kernels"}
_PARTS = {"part": 14, "launches": 9, "read MB": 10, "written MB": 11, "ms": 8}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The pair, the devices, how it drafts, what is decoded, what is shown."""
    add = parser.add_argument
    add("base", help=f"{MODEL_HELP}, or a config.json, of the base")
    kinds = (*target.TARGETS, target.HERE)
    add("--device", choices=kinds, default="h200", help="to compile for (default h200)")
    add_mesh(add, tensor="heads (default: 1)")
    drafting.add_arguments(add, without=("show_draft", "other_tokenizer", "num_draft_tokens"))
    drafting.add_option(add, "num_draft_tokens", **drafting.FIXED_DEPTH)
    parser.set_defaults(other_tokenizer=None)  # it costs no kernel worth counting
    add_batch(add)
    add_max_len(add, "tokens of each that caches hold, a step's draft among them")
    add_dtype(add)
    add_attention(add)
    add_quantization(add)
    add("--temperature", type=float, default=0.0, metavar="T", help="0 is greedy (default)")
    add("--top-k", type=int, default=0, metavar="K", help="of the likeliest (default: all)")
    add("--top-p", **PROBABILITY, default=1.0, help="of the likeliest, so much mass (default: all)")
    add("--prefill", **COUNTS, default=(), help="read the program that absorbs so many tokens, too")
    add("--graphs", choices=LEVELS, default="default", help="what stands in CUDA graphs")
    more = "an option of XLA's, as often as wanted"
    add("--compile-option", type=_option, action="append", metavar="NAME=VALUE", help=more)
    add("--parts", action="store_true", help="launches and bytes by part of a layer")
    add("--json", action="store_true", help="all of it as one JSON document")
    for name, what in (("hlo", "optimised program"), ("thunks", "sequence of thunks")):
        add(f"--{name}", type=pathlib.Path, metavar="FILE", help=f"write the {what} there")


def _option(text: str) -> tuple[str, str | int | bool]:
    name, equals, value = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"{text!r} is not like NAME=VALUE")
    known: dict[str, bool] = {"true": True, "false": False}
    return name, known.get(value.lower(), int(value) if value.isdecimal() else value)


def run(args: argparse.Namespace) -> int:
    """Compile the pair's loop as the arguments say and print what is in it."""
    from easyspec_jax.program.report import read_program

    decoder = _decoder(args)
    more = dict(args.compile_option or ())
    decoder.compile_options = es.CompileOptions(args.graphs, more)
    taken = dict(decoder.compile_options.on(decoder.base.layout.mesh))
    if left_out := sorted(more.keys() - taken.keys()):
        raise ValueError(f"this jaxlib has no such option, or not of that value: {left_out[0]}")
    kind = decoder.base.layout.mesh.devices.flat[0].device_kind
    constants = next((d for name, d in PRESETS.items() if name in kind.lower().split()), None)
    texts: dict[str, str] = {}
    program = read_program(
        decoder,
        constants,
        batch=args.batch,
        max_len=max_len(args, decoder.base.config),
        sampling=es.Sampling(temperature=args.temperature, top_k=args.top_k, top_p=args.top_p),
        prefill=args.prefill,
        texts=texts,
    )
    for name, text in texts.items():
        if (path := getattr(args, name)) is not None:
            path.write_text(text)
    if args.json:
        options = {name: v for name, v in vars(args).items() if not isinstance(v, pathlib.Path)}
        print(json.dumps({"options": options, "jax": jax.__version__, **program.as_dict()}))
        return 0
    print("\n".join(report(program, constants)))
    if args.parts:
        for name, phase in program.phases.items():
            print("\n".join(["", f"{name}, each of {phase.runs}", *_parts_table(phase.parts)]))
    return 0


def _decoder(args: argparse.Namespace) -> es.Decoder:
    """The base and what drafts for it, as shapes on the mesh."""
    drafting.check_options(args)
    mesh = target.make_mesh(args.device, args.layer, args.tensor or 1)
    if args.group_size is None:
        args.group_size = args.layer

    def load(path: str, *, group_size: Any = 1, **options: Any) -> es.Model:
        config, about = read_config(path)
        partition = drafting.partition_of(group_size, path, config, about)
        model = drafting.planned_model(path, config, about, mesh, group_size=partition, **options)
        return model.replace(tokenizer=about.get("tokenizer"))

    return drafting.make_decoder(args, load)


def report(program: StepProgram, constants: Device | None) -> list[str]:
    """The program in words, line by line."""
    bandwidth = None if constants is None else constants.bandwidth
    mesh = " x ".join(f"{axis} {n}" for axis, n in program.mesh.items())
    lines = [
        f"device     {program.device}, {mesh}; jax {jax.__version__}; compiled, not run: "
        "no clock was read",
        f"caches     {program.entries} entries of each row",
        f"attention  of the base by {_ATTENTION[program.attention]}",
        "",
        _row(_COLUMNS, *_COLUMNS),
    ]
    lines += [_phase_row(name, p, bandwidth) for name, p in program.phases.items()]
    step, least = program.step, program.floor
    totals = [str(program.total(name)) for name in ("collectives", "conditionals", "copies")]
    seconds = program.estimate.get("step")
    times = (_ms(seconds), _ms(program.estimate.get("limit")))
    moved = _moved(step.read, step.written, least)
    lines += [_row(_COLUMNS, "step", "1", str(step.launches), "", *moved, *totals, *times), ""]
    lines[-1:] = [_phase_row(f"prefill {n}", p, bandwidth) for n, p in program.prefill.items()]
    return [*lines, "", *_notes(program)]


def _notes(program: StepProgram) -> list[str]:
    """Graphs, memory, collectives and the estimate, in words."""
    lines = []
    if program.graphs is not None:
        g = program.graphs
        kinds = ", ".join(f"{n} {kind}" for kind, n in g.outside.items()) or "nothing"
        lines += [
            f"graphs     {g.graphs} CUDA graphs a step with {g.inside} launches; outside: {kinds}"
            + ("" if g.host_syncs else "; the whole loop is one graph"),
            f"host       waits for the device {g.host_syncs} times a step, {g.conditionals} of "
            "them for conditionals",
        ]
    lines.append(f"memory     {listed(program.memory)} GiB as compiled")
    budget = sum(program.budget.values()) / 2**30
    lines.append(f"budget     {budget:.2f} GiB: {listed(program.budget)}")
    for name, phase in program.phases.items():
        for one in phase.exchanges:
            lines.append(
                f"{name:<10} {one.count} {one.kind} of {one.bytes:,} bytes over {one.devices}, "
                f"{one.kernel.lower().replace('_', ' ')}"
            )
    if program.estimate:
        terms = ", ".join(
            f"{name} {1e3 * s:.2f}" for name, s in program.estimate.items() if name != "limit"
        )
        lines.append(f"estimate   ms of a step: {terms}; not measured")
    return lines


def _phase_row(name: str, phase: Phase, bandwidth: float | None) -> str:
    per_layer = "" if phase.per_layer is None else f"{phase.per_layer:.1f}"
    t = phase.traffic
    numbers = (phase.collectives, phase.conditionals, phase.copies)
    limit = phase.floor / bandwidth if phase.floor and bandwidth else None
    return _row(
        _COLUMNS,
        name,
        str(phase.runs),
        str(t.launches),
        per_layer,
        *_moved(t.read, t.written, phase.floor),
        *map(str, numbers),
        _ms(t.seconds or None),
        _ms(limit),
    )


def _moved(read: int, written: int, least: int | None) -> tuple[str, str, str, str]:
    """Bytes in MB, and how many times the floor they are."""
    floor = "" if least is None else f"{least / 1e6:.1f}"
    ratio = f"{(read + written) / least:.3f}" if least else ""
    return f"{read / 1e6:.1f}", f"{written / 1e6:.1f}", floor, ratio


def _parts_table(parts: dict[str, Traffic]) -> list[str]:
    rows = [
        _row(
            _PARTS,
            name,
            str(t.launches),
            f"{t.read / 1e6:.1f}",
            f"{t.written / 1e6:.1f}",
            _ms(t.seconds or None),
        )
        for name, t in parts.items()
    ]
    return [_row(_PARTS, *_PARTS), *rows]


def _ms(seconds: float | None) -> str:
    return "" if seconds is None else f"{1e3 * seconds:.2f}"


def _row(columns: dict[str, int], *cells: str) -> str:
    first, *widths = columns.values()
    rest = "".join(f"{cell:>{n}}" for cell, n in zip(cells[1:], widths, strict=True))
    return f"{cells[0]:<{first}}{rest}"

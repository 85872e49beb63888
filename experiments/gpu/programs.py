"""The programs of whole pairs, compiled for GPUs that need not be there, kept as records.

    python experiments/gpu/programs.py --program NAME --out experiments/results/gpu_programs.jsonl

Every case is one JSON line: the versions, the case, and all that `easyspec program --json` says of
it. `--program` names the engine that is compiled, so that records of several stand beside each
other. It needs jax's CUDA plugin and no GPU; nothing is run. The largest cases take minutes.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import pathlib
import sys
import time
from typing import Any

import jax

import easyspec_jax as es
from easyspec_jax.planner.device import PRESETS
from easyspec_jax.program import target
from easyspec_jax.program.report import read_program
from easyspec_jax.sources import read_config

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))  # scripts, no package
from records import append, commit, versions

CONFIGS = pathlib.Path(__file__).parents[1] / "configs"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """A pair on a mesh, or a base alone."""

    base: str  # a file of configs/
    draft: str | None = None
    layer: int = 1
    tensor: int = 1
    group_size: int = 1
    layout: str = "grouped"  # of the draft
    num_draft_tokens: int = 5
    tree_width: int = 1
    prefill: tuple[int, ...] = ()


LLAMA: dict[str, Any] = {"base": "llama3-70b", "draft": "llama3-8b", "group_size": 4}
QWEN: dict[str, Any] = {"base": "qwen2-72b", "draft": "qwen2-7b", "group_size": 4}
SMALL: dict[str, Any] = {"base": "llama3-8b", "draft": "llama3.2-1b", "group_size": 4}
CASES = {
    "8B": Case(base="llama3-8b", prefill=(64, 256)),
    "8B + 1B": Case(**SMALL),
    "70B + 8B, 4 x 2": Case(**LLAMA, layer=4, tensor=2),
    "70B + 8B, 2 x 4": Case(**LLAMA, layer=2, tensor=4),
    "70B + 8B, 8 x 1": Case(**LLAMA, layer=8, tensor=1),
    "72B + 7B, 4 x 2": Case(**QWEN, layer=4, tensor=2),
    # what else the planner's counts are held against
    "8B + 1B, groups of 2": Case(**SMALL | {"group_size": 2}),
    "8B + 1B, no groups": Case(**SMALL | {"group_size": 1}),
    "8B + 1B, w 4": Case(**SMALL, tree_width=4),
    "8B + 1B, 2 x 1, groups of 2": Case(**SMALL | {"group_size": 2}, layer=2),
    "70B + 8B, 2 x 4, groups of 2": Case(**LLAMA | {"group_size": 2}, layer=2, tensor=4),
    "70B + 8B, 4 x 2, w 4": Case(**LLAMA, layer=4, tensor=2, tree_width=4),
    "70B + 8B, tensor parallel": Case(**LLAMA | {"group_size": 1}, tensor=8, layout="tensor"),
    "70B + 8B, draft on one": Case(**LLAMA | {"group_size": 1}, tensor=8, layout="replicated"),
    "72B + 7B, 2 x 4": Case(**QWEN, layer=2, tensor=4),
}


def decoder(case: Case, mesh: Any, attention: str = "xla") -> es.Decoder:
    """The case as shapes on a mesh of layer x tensor devices."""
    every = {"dtype": "bfloat16", "attention": attention}
    config = lambda name: read_config(CONFIGS / f"{name}.json")[0]  # noqa: E731
    base = es.abstract_model(config(case.base), mesh, **every)
    if case.draft is None:
        return es.Decoder(base)
    options = {"group_size": case.group_size, "layout": case.layout, **every}
    drafter = es.LayerParallelDrafter(es.abstract_model(config(case.draft), mesh, **options))
    shape = {"num_draft_tokens": case.num_draft_tokens, "tree_width": case.tree_width}
    return es.Decoder(base, drafter, **shape)


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--program", required=True, help="name of the engine that is compiled")
    p.add_argument("--device", choices=target.TARGETS, default="h200")
    p.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES), metavar="CASE")
    p.add_argument("--max-len", type=int, default=2048)
    p.add_argument("--attention", choices=("cudnn", "xla"), default="xla")
    p.add_argument("--out", type=pathlib.Path, help="JSONL file to append the records to")
    return p.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Compile every case, print and append its record."""
    args, code = parse(argv), commit()
    for name in args.cases:
        case, start = CASES[name], time.perf_counter()
        program = read_program(
            decoder(case, target.make_mesh(args.device, case.layer, case.tensor), args.attention),
            PRESETS[args.device],
            max_len=args.max_len,
            prefill=case.prefill,
        )
        seconds = time.perf_counter() - start
        print(f"{name}: {program.step.launches} launches, {seconds:.0f} s", file=sys.stderr)
        head = {
            "program": args.program,
            "case": name,
            "commit": code,
            "versions": versions("jax", "jaxlib", "jax-cuda12-plugin"),
            "options": {
                "max_len": args.max_len,
                "attention": args.attention,
                **dataclasses.asdict(case),
            },
            "compile_seconds": round(seconds, 1),
        }
        line = append(args.out, head | program.as_dict())
        if args.out is None:
            print(line)


if __name__ == "__main__":
    os.environ.setdefault(target.SETTING, "1")
    jax.config.update("jax_platforms", "cpu")
    main()

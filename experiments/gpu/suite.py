"""All that matters on one GPU, checked and measured by one command, without network or checkpoints.

    python experiments/gpu/suite.py --out FILE

It needs jax, flax and numpy alone. Models are random, of the shapes of Llama 3.2 1B, 3.2 3B and 3
8B; the rate at which the base agrees with its draft is set (`AgreeingDrafter`), so speeds are those
of a pair with that acceptance, and the text means nothing. Parts (`parts.py`): correctness,
autoregression, loop, compile, kernels, draft, verification, host_gap, questions.

A part that fails is recorded with its message and the others still run; what the budget leaves no
time for is named under "skipped". Each part is printed as JSON when it ends, and the last line of
stdout is one JSON document with all of it. The exit status is 1 if a part failed or found something
wrong. `--preset tiny` runs everything on a CPU in half a minute, for the tests.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import pathlib
import sys
import traceback
from typing import Any

import jax

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))  # scripts, no package
from gpu.parts import PARTS
from gpu.setup import PRESETS, Suite
from records import append, commit, machine, versions

PACKAGES = (
    *("jax", "jaxlib", "flax", "numpy"),
    *("jax-cuda12-plugin", "jax-cuda13-plugin", "nvidia-cublas-cu12", "nvidia-cublas"),
)


def run_parts(suite: Suite, names: list[str]) -> dict[str, Any]:
    """What the named parts found, and what failed or was skipped."""
    parts, errors = {}, {}
    for name in (name for name in PARTS if name in names):
        if not suite.time_for(name):
            continue
        start = suite.elapsed
        suite.say(f"-- {name}")
        try:
            found = PARTS[name](suite)
        except Exception as error:  # time on the device is dear: the other parts still run
            traceback.print_exc()
            errors[name] = one_line(error)
            suite.say(f"{name} failed: {errors[name]}")
            continue
        finally:
            gc.collect()  # models are in cycles of closures
        if "problem" in found:
            errors[name] = found["problem"]
            suite.say(f"{name}: {errors[name]}")
        parts[name] = found | {"seconds": suite.elapsed - start}
        print(json.dumps({name: parts[name]}), flush=True)
    return {"parts": parts, "errors": errors, "skipped": suite.skipped, "seconds": suite.elapsed}


def one_line(error: BaseException) -> str:
    """Kind and first line of an error."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:300] if lines else 'no message'}"


def device() -> dict[str, Any]:
    """The device that everything runs on."""
    first = jax.devices()[0]
    memory = first.memory_stats() or {}
    limit = memory.get("bytes_limit")
    return {"kind": first.device_kind, "platform": first.platform, "memory_bytes": limit}


def chosen(text: str) -> list[str]:
    """Names of parts, from a list with commas."""
    names = text.split(",")
    unknown = [name for name in names if name not in PARTS]
    if unknown:
        raise argparse.ArgumentTypeError(
            f"unknown part {unknown[0]!r}: choose of {', '.join(PARTS)}"
        )
    return names


def positive(text: str) -> int:
    """A whole number above 0."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number above 0, got {text!r}")
    return int(text)


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--preset", choices=PRESETS, default="gpu")
    p.add_argument("--parts", type=chosen, default=list(PARTS), help="some of them, with commas")
    p.add_argument(
        "--repeats", type=positive, help="timed calls of everything; default: the preset's"
    )
    p.add_argument(
        "--budget-seconds", type=float, default=400, help="nothing is begun after so long"
    )
    p.add_argument("--out", type=pathlib.Path, help="JSONL file to append the document to")
    return p.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Run the parts, print and append the document; the exit status."""
    args = parse(argv)
    preset = PRESETS[args.preset]
    preset = dataclasses.replace(preset, repeats=args.repeats or preset.repeats)
    suite = Suite(preset, args.budget_seconds)
    head = {
        "machine": machine(),
        "commit": commit(),
        "versions": versions(*PACKAGES),
        "device": device(),
        "options": {name: value for name, value in vars(args).items() if name != "out"},
        "preset": dataclasses.asdict(preset),
    }
    document = head | run_parts(suite, args.parts)
    print(append(args.out, document))
    return 1 if document["errors"] else 0


if __name__ == "__main__":
    jax.config.update("jax_enable_compilation_cache", False)  # compile times are of a cold cache
    sys.exit(main())

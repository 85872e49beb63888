"""Options that several commands share, each declared once, and the kinds of values options have."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable
from typing import Any, TextIO

from easyspec_jax.attend import ATTENTION
from easyspec_jax.config import ModelConfig
from easyspec_jax.planner.device import PRESETS
from easyspec_jax.quantized import KINDS
from easyspec_jax.sharding import KV_CODES

DEFAULT_MAX_LEN = 2048  # tokens there is room for, where the base's context is longer

MODEL_HELP = "checkpoint, Hugging Face folder, GGUF file or hub id"  # what --base takes, and others

Add = Callable[..., Any]  # add_argument, of a parser or of a group of its options


class Checked(argparse.Action):
    """Stores a number, or several; one that does not fit is refused like any other bad input."""

    def __init__(self, *args: Any, must: str, fits: Callable[[float], bool], **options: Any):
        super().__init__(*args, **options)
        self.must, self.fits = must, fits

    def __call__(self, parser, namespace, values: Any, option_string=None) -> None:
        for value in values if isinstance(values, tuple) else (values,):
            if not self.fits(value):
                raise ValueError(f"{self.option_strings[0]} must be {self.must}, got {value}")
        setattr(namespace, self.dest, values)


def numbers(text: str) -> tuple[int, ...]:
    """Whole numbers that are written as 1,2,4."""
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no list of numbers like 1,2,4") from None


def _checked(must: str, fits: Callable[[float], bool], **options: Any) -> dict[str, Any]:
    return {"action": Checked, "must": must, "fits": fits} | options


# Kinds of options: what argparse has to know of one beside its name and its help.
COUNT = _checked("at least 1", lambda n: n >= 1, type=int, metavar="N")
COUNTS = COUNT | {"type": numbers, "metavar": "N,N,.."}
PROBABILITY = _checked("between 0 and 1", lambda p: 0 <= p <= 1, type=float, metavar="P")
MAX_DEVICES = 1024  # of one process
_DEVICES = _checked(
    f"in 1 .. {MAX_DEVICES}", lambda n: 1 <= n <= MAX_DEVICES, type=int, metavar="N"
)
_BATCH = _checked("in 1 .. 1024", lambda n: 1 <= n <= 1024, type=int, metavar="N")
_SIZE = _checked("a size above 0", lambda x: 0 < x < math.inf, type=float, metavar="GIB")


def add_mesh(
    add: Add, *, layer: int | None = 1, tensor: str = "heads (default: all others)"
) -> None:
    """--layer and --tensor: the default of the first, what the second's devices are for."""
    add("--layer", **_DEVICES, default=layer, help="devices for the layers of a group")
    add("--tensor", **_DEVICES, help=f"devices for {tensor}")


def add_dtype(add: Add, when: str = "") -> None:
    """--dtype, of weights and caches."""
    choices = ("float32", "bfloat16", "float16")
    stored = "" if when else ", matrices as stored where that is faster"
    default = f"{when}default: float32 on CPU{stored}; else bfloat16"
    add("--dtype", choices=choices, help=default)


def add_quantization(add: Add) -> None:
    """--quantization, of the base, and --kv-dtype, of every model."""
    what = "store the base's matrices so, and multiply them so (default: as its checkpoint does)"
    add("--quantization", choices=tuple(KINDS), help=what)
    caches = "store keys and values so (default: as activations)"
    add("--kv-dtype", choices=KV_CODES, help=caches)


def add_attention(add: Add) -> None:
    """--attention."""
    what = "of GPUs: XLA's kernels, or one of cuDNN (default: where it has one that works)"
    add("--attention", choices=ATTENTION, help=what)


def add_machine(add: Add) -> None:
    """--cpu-devices and --no-compile-cache, which `main.configure` follows."""
    add("--cpu-devices", **_DEVICES, help="run on the CPU as N devices, to try meshes")
    keep = "keep no compiled programs on disk (as JAX_ENABLE_COMPILATION_CACHE=0)"
    add("--no-compile-cache", dest="compile_cache", action="store_false", help=keep)


def add_processes(add: Add) -> None:
    """The options of a command that several processes run together, which `main` joins."""
    where = "address of process 0, which prints; auto: all three as the cluster says"
    add("--coordinator", metavar="HOST:PORT", help=where)
    add("--num-processes", type=int, metavar="N", help="how many there are")
    add("--process-id", type=int, metavar="I", help="which of them this is, from 0")
    late = "seconds after which one that is silent counts as dead (default 100)"
    add("--timeout", type=int, metavar="S", help=late)


def add_device(add: Add, purpose: str, num_devices: str) -> None:
    """--device and --num-devices: what to predict times for."""
    kinds = ", ".join(PRESETS)
    add("--device", metavar="NAME|FILE", help=f"{purpose}: {kinds}, or a JSON file of one")
    add("--num-devices", **_DEVICES, help=num_devices)


def add_requests(add: Add, memory: str) -> None:
    """--batch, --max-len and --device-memory: which requests should fit, and into what."""
    add_batch(add)
    add_max_len(add, "tokens of each, prompt and answer")
    add("--device-memory", **_SIZE, help=f"GiB of each device{memory}")


def add_batch(add: Add) -> None:
    """--batch."""
    add("--batch", **_BATCH, default=1, help="prompts at once (default 1)")


def add_max_len(add: Add, what: str) -> None:
    """--max-len, which `max_len` reads."""
    most = f"(default: the context, at most {DEFAULT_MAX_LEN})"
    add("--max-len", **COUNT, help=f"{what} {most}")


def standard_input() -> TextIO:
    """What text is read from.

    Raises:
      ValueError: it is closed.
    """
    if sys.stdin is None:
        raise ValueError("standard input is closed")
    return sys.stdin


def max_len(args: argparse.Namespace, base: ModelConfig) -> int:
    """Tokens that there is to be room for: as --max-len says, or the default.

    Raises:
      ValueError: more than the base's context, or too few for a prompt and an answer.
    """
    if args.max_len is None:
        return min(base.context, DEFAULT_MAX_LEN)
    if not 2 <= args.max_len <= base.context:
        limit = f"2 .. {base.context}, the base's context"
        raise ValueError(f"--max-len must be in {limit}, got {args.max_len}")
    return args.max_len


def flag(name: str) -> str:
    """An option as it is typed."""
    return f"--{name.replace('_', '-')}"


def given(args: argparse.Namespace, *names: str) -> dict[str, Any]:
    """The options of these names that were given: the library has defaults of its own."""
    return {name: getattr(args, name) for name in names if getattr(args, name) is not None}

"""`easyspec convert`, which `python -m convert` is too: any model to a checkpoint."""

from __future__ import annotations

import argparse

from easyspec_jax.cli.options import COUNT
from easyspec_jax.quantized import INT4_GROUP, KINDS, Quantization

HELP = "turn a Hugging Face model or a GGUF file into a checkpoint"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Where from, where to, stored how."""
    add = parser.add_argument
    add("src", help="model folder (safetensors), GGUF file, or hub id owner/name[@revision]")
    add("dst", help="folder to write; must not exist, or be empty")
    stored = "type of what is stored as floats (default: that of the source)"
    add("--dtype", choices=("float32", "bfloat16", "float16"), help=stored)
    codes = (
        "round matrices to codes, int4 in groups of inputs that share a scale "
        "(default: as the source has them)"
    )
    add("--quantization", choices=tuple(KINDS), help=codes)
    most = f"default: one scale for all, of int4 {INT4_GROUP} or the largest divisor below"
    add("--group-size", **COUNT, help=f"inputs of a group ({most})")
    floats = (
        "make floats of quantised weights, whose codes are kept where a checkpoint can hold them"
    )
    add("--dequantize", action="store_true", help=floats)
    add("--revision", help="branch, tag or commit of a hub id")
    add("--quiet", action="store_true", help="no progress bar")


def run(args: argparse.Namespace) -> int:
    """Convert as the arguments say, and print where it lies."""
    from convert import convert

    options = {"dtype": args.dtype, "revision": args.revision, "progress": not args.quiet}
    options["dequantize"] = args.dequantize
    if args.quantization is not None:
        options["quantization"] = Quantization(args.quantization, args.group_size)
    elif args.group_size is not None:
        raise ValueError("--group-size needs --quantization")
    print(convert(args.src, args.dst, **options))
    return 0

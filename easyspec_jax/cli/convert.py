"""`easyspec convert`, which `python -m convert` is too: any model to a checkpoint."""

from __future__ import annotations

import argparse

HELP = "turn a Hugging Face model or a GGUF file into a checkpoint"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Where from, where to, stored how."""
    add = parser.add_argument
    add("src", help="model folder (safetensors), GGUF file, or hub id owner/name[@revision]")
    add("dst", help="folder to write; must not exist, or be empty")
    stored = "type of the stored weights (default: that of the source)"
    add("--dtype", choices=("float32", "bfloat16", "float16"), help=stored)
    add("--revision", help="branch, tag or commit of a hub id")
    add("--quiet", action="store_true", help="no progress bar")


def run(args: argparse.Namespace) -> int:
    """Convert as the arguments say, and print where it lies."""
    from convert import convert

    progress = not args.quiet
    print(convert(args.src, args.dst, dtype=args.dtype, revision=args.revision, progress=progress))
    return 0

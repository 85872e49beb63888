"""The command line of `convert`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import jax

from convert.write import convert


def main(argv: Sequence[str] | None = None) -> int:
    """Convert as the arguments say; return the exit status, 1 after an error of one sentence."""
    parser = argparse.ArgumentParser(
        prog="python -m convert", description="Turn a Hugging Face model into a checkpoint folder."
    )
    parser.add_argument("src", help="model folder (safetensors), GGUF file, or hub id owner/name")
    parser.add_argument("dst", help="folder to write; must not exist, or be empty")
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        help="type of the stored weights (default: that of the source)",
    )
    parser.add_argument("--revision", help="branch, tag or commit of a hub id")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    args = parser.parse_args(argv)
    # Writing needs no accelerator, and must not reserve the memory of one.
    jax.config.update("jax_platforms", "cpu")
    try:
        dst = convert(
            args.src, args.dst, dtype=args.dtype, revision=args.revision, progress=not args.quiet
        )
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(dst)
    return 0


if __name__ == "__main__":
    sys.exit(main())

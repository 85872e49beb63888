"""`python -m convert`, which is `easyspec convert`."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from easyspec_jax.cli.main import main as easyspec


def main(argv: Sequence[str] | None = None) -> int:
    """Convert as the arguments say; return the exit status, 1 after an error of one sentence."""
    return easyspec(["convert", *(sys.argv[1:] if argv is None else argv)])


if __name__ == "__main__":
    sys.exit(main())

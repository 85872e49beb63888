"""Text and tokens: where a stop string ends, and text that can be printed before its last token is known."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def find_stop(
    tokenizer: Any, before: Sequence[int], ids: Sequence[int], stop_strings: Sequence[str]
) -> int | None:
    """How many of `ids` it takes until the decoded text of `before + ids` holds a stop string; None if none does."""
    whole = [*before, *ids]

    def stopped(n):
        text = tokenizer.decode(whole[: len(before) + n])
        return any(stop in text for stop in stop_strings)

    if not stopped(len(ids)):
        return None
    return next(n for n in range(1, len(ids) + 1) if stopped(n))

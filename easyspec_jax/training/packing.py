"""Sequences of any lengths in rows of one length, so that one program trains on all of them.

Sequences are placed in the order they come, each into the first of a few open rows that has room:
more sequences behind them change no row that is full.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from easyspec_jax.training.head import Texts

_OPEN = 16  # rows that wait for what fits


@dataclasses.dataclass(frozen=True)
class Answer:
    """What the base said to a prompt."""

    prompt: list[int]  # ids, the chat template's included
    answer: list[int]
    temperature: float

    @property
    def tokens(self) -> list[int]:
        """All of them."""
        return self.prompt + self.answer

    @property
    def first(self) -> int:
        """Place of the first token whose next one is learnt; that at 0 has no pair."""
        return max(len(self.prompt) - 1, 1)

    @property
    def num_queries(self) -> int:
        """How many tokens have a next one that is learnt."""
        return max(len(self.prompt) + len(self.answer) - 1 - self.first, 0)


def pack(answers: Sequence[Answer], length: int, queries: int) -> list[list[int]]:
    """Indices of the answers that share a row, none with more tokens or queries than there is room
    for; those that no row can hold are left out.
    """
    rows: list[list[int]] = []
    room: list[tuple[list[int], int, int]] = []
    for index, one in enumerate(answers):
        size, asked = len(one.prompt) + len(one.answer), one.num_queries
        if size > length or not 0 < asked <= queries:
            continue
        fits = (i for i, (_, t, a) in enumerate(room) if size <= t and asked <= a)
        at = next(fits, None)
        if at is None:
            if len(room) == _OPEN:
                fullest = min(range(_OPEN), key=lambda i: min(room[i][1:]))
                rows.append(room.pop(fullest)[0])
            room.append(([], length, queries))
            at = len(room) - 1
        members, t, a = room[at]
        members.append(index)
        room[at] = (members, t - size, a - asked)
    return rows + [members for members, *_ in room]


def room_for_queries(answers: Sequence[Answer], length: int) -> int:
    """Queries a row of so many tokens should have room for: their share in all, and a tenth."""
    tokens = sum(len(one.prompt) + len(one.answer) for one in answers)
    asked = [one.num_queries for one in answers]
    share = int(1.1 * length * sum(asked) / tokens)
    return min(-(-max(share, *asked) // 32) * 32, length)


def texts_of(answers: Sequence[Answer], rows: Sequence[Sequence[int]], shape: tuple) -> Texts:
    """Rows of packed answers.

    Args:
      rows: which answers are in each.
      shape: T and A, tokens and queries of a row.
    """
    length, queries = shape
    empty = lambda size, fill: np.full((len(rows), size), fill, np.int32)  # noqa: E731
    tokens, segment, position = empty(length, 0), empty(length, -1), empty(length, 0)
    query, since = empty(queries, 0), empty(queries, -1)
    for b, members in enumerate(rows):
        t = a = 0
        for which, index in enumerate(members):
            one = answers[index]
            size, asked = len(one.prompt) + len(one.answer), one.num_queries
            tokens[b, t : t + size] = one.tokens
            segment[b, t : t + size] = which
            position[b, t : t + size] = np.arange(size)
            query[b, a : a + asked] = t + one.first + np.arange(asked)
            since[b, a : a + asked] = np.arange(asked)
            t, a = t + size, a + asked
    return Texts(tokens=tokens, segment=segment, position=position, query=query, since=since)

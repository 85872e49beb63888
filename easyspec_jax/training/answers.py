"""What a head learns from: answers of the base itself, kept in a file that only grows.

A line is {"prompt": [ids], "answer": [ids], "temperature": t}. Prompts of similar length are
answered together, half of them greedily; an answer that begins to go in circles is cut there.
"""

from __future__ import annotations

import json
import os
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

from easyspec_jax.config import ModelConfig, Sampling, is_integer, is_number
from easyspec_jax.decode import Decoder
from easyspec_jax.json_files import parse_object
from easyspec_jax.training.packing import Answer

_PERIODS = 24  # tokens of the longest circle that is looked for
_ROUNDS = 4  # how often it must have been gone
_KEPT = 8  # tokens of a circle that stay: to begin one is the base's way, too
_WINDOW = 8  # batches whose prompts are sorted by length together


def loop_start(tokens: Sequence[int]) -> int | None:
    """Where the circle begins in which a text ends; None where it ends in none."""
    for period in range(1, _PERIODS + 1):
        least = max(_ROUNDS * period, 8)
        if len(tokens) < least:
            continue
        start = len(tokens) - period
        while start > 0 and tokens[start - 1] == tokens[start - 1 + period]:
            start -= 1
        if len(tokens) - start >= least:
            return start
    return None


def read_answers(
    path: str | os.PathLike, config: ModelConfig, *, is_own: bool = False
) -> list[Answer]:
    """The answers of a file.

    Args:
      is_own: `write_answers` wrote it, and may have been killed: a last line without its end is
        left out.

    Raises:
      ValueError: a line says something else, or an id is none of the base's.
      OSError: it cannot be read.
    """
    *lines, rest = pathlib.Path(path).read_text(encoding="utf-8").split("\n")
    if rest and not is_own:
        lines.append(rest)
    return [_parse(line, f"{path}, line {i}", config) for i, line in enumerate(lines, 1)]


def _parse(line: str, where: str, config: ModelConfig) -> Answer:
    record = parse_object(line, where)
    for name in ("prompt", "answer"):
        ids: Any = record.get(name)
        sound = isinstance(ids, list) and ids and all(map(is_integer, ids))
        if not sound or not all(0 <= i < config.vocab_size for i in ids):
            raise ValueError(f"{where}: {name!r} must list token ids below {config.vocab_size}")
    warm: Any = record.get("temperature")
    if not (is_number(warm) and warm >= 0):
        raise ValueError(f"{where}: 'temperature' must be a number of at least 0, not {warm!r}")
    return Answer(record["prompt"], record["answer"], float(warm))


def write_answers(
    path: pathlib.Path,
    decoder: Decoder,
    prompts: Sequence[Sequence[int]],
    *,
    temperature: float,
    max_new_tokens: int,
    batch: int,
    eos_ids: Sequence[int],
    seed: int = 0,
) -> Iterator[int]:
    """The file holds an answer to every prompt; yields how many prompts are done, again and again.

    A prompt that the file has is not asked again, so what was broken off goes on.

    Args:
      temperature: of every second batch; the others are greedy.
      batch: prompts that are answered at once.
    """
    _drop_broken_line(path)
    known = {tuple(a.prompt) for a in read_answers(path, decoder.base.config)}
    batches = _batches(prompts, batch)
    done = 0
    with path.open("a", encoding="utf-8") as file:
        for index, asked in enumerate(batches):
            warm = temperature if index % 2 else 0.0
            if any(tuple(prompt) not in known for prompt in asked):
                _answer(file, decoder, asked, known, warm, max_new_tokens, eos_ids, seed + index)
            done += len(asked)
            yield done


def check_prompts(
    prompts: Sequence[Sequence[int]],
    known: Sequence[Answer],
    *,
    temperature: float,
    batch: int,
    held_out: int,
) -> None:
    """Refuse prompts whose answers, with those there are, leave too few to hold out or to learn.

    Raises:
      ValueError: saying which.
    """
    greedy = {tuple(one.prompt): one.temperature == 0 for one in known}
    for index, asked in enumerate(_batches(prompts, batch)):
        for prompt in asked:
            greedy.setdefault(tuple(prompt), index % 2 == 0 or temperature == 0)
    if sum(greedy.values()) < held_out:
        raise ValueError(too_few(held_out, sum(greedy.values())))
    if len(greedy) <= held_out:
        raise ValueError(f"no answer is left to learn: all {held_out} are to be held out")


def too_few(held_out: int, there: int) -> str:
    """What is wrong with so few greedy answers."""
    return f"{held_out} greedy answers are to be held out, but there are {there}"


def _drop_broken_line(path: pathlib.Path) -> None:
    """End the file behind its last whole line."""
    with path.open("ab+") as file:
        file.seek(0)
        file.truncate(file.read().rfind(b"\n") + 1)


def _batches(prompts: Sequence[Sequence[int]], size: int) -> list[list[Sequence[int]]]:
    """Prompts by similar length, all prompts once; the same for the same prompts."""
    unique = [list(ids) for ids in dict.fromkeys(map(tuple, prompts))]
    found = []
    for first in range(0, len(unique), _WINDOW * size):
        near = sorted(unique[first : first + _WINDOW * size], key=len)
        found += [near[i : i + size] for i in range(0, len(near), size)]
    return found


def _answer(file, decoder, asked, known, warm, max_new_tokens, eos_ids, seed) -> None:
    """Answer a batch whole, so that what is drawn is the same when it is asked for again, and write
    the answers that the file has not yet.
    """
    said = decoder.generate(
        asked,
        max_new_tokens=max_new_tokens,
        sampling=Sampling(temperature=warm),
        eos_ids=eos_ids,
        seed=seed,
    )
    lines = []
    for prompt, answer in zip(asked, said.tokens, strict=True):
        start = loop_start(answer)
        kept = answer if start is None else answer[: start + _KEPT]
        if tuple(prompt) not in known and kept:
            record = {"prompt": list(prompt), "answer": kept, "temperature": warm}
            lines.append(json.dumps(record) + "\n")
    file.write("".join(lines))
    file.flush()

"""Prompts from files: lines of text, JSON lines, and the formats of public evaluation sets."""

from __future__ import annotations

import csv
import gzip
import io
import itertools
import os
import pathlib
import zlib

from easyspec_jax.json_files import parse_object

# Fields of JSON lines, the first there is: of one's own files, HumanEval and IFEval; Spec-Bench and
# MT-Bench (a conversation, whose first turn is taken); GSM8K; MATH.
FIELDS = ("prompt", "turns", "question", "problem")


def read_prompts(
    path: str | os.PathLike, *, pattern: str = "*", category: str | None = None
) -> list[str]:
    """All prompts of a file or folder, none blank; at least one.

    A .jsonl file holds an object a line, with one of `FIELDS`; a .csv file questions with four
    choices (MMLU), which become one text; a .tsv file a prompt and its answer a line (MGSM); any
    other a prompt a line. Each may be gzipped (.gz). A set of several parts (files of a folder,
    categories of Spec-Bench) gives one item of each part in turn, so that a few first items cover
    it.

    Args:
      pattern: of the names of a folder's files.
      category: only the lines whose "category" this is.

    Raises:
      ValueError: no such file or category, not one prompt, or a line that holds none.
      OSError: it cannot be read.
    """
    parts: list[list[str]] = []
    for file in _find_files(pathlib.Path(path), pattern):
        found = _read_parts(file)
        if not found:
            raise ValueError(f"{file} holds no prompts")
        if category is not None and category not in found:
            there = ", ".join(map(repr, found))
            raise ValueError(f"{file} has no category {category!r}, but {there}")
        parts += found.values() if category is None else [found[category]]
    rounds = itertools.zip_longest(*parts)
    return [item for items in rounds for item in items if item is not None]


def _find_files(path: pathlib.Path, pattern: str) -> list[pathlib.Path]:
    """`path` itself, or that folder's files."""
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise ValueError(f"there is no file of prompts at {path}")
    found = sorted(file for file in path.glob(pattern) if file.is_file())
    if not found:
        raise ValueError(f"no prompts in {path}: it has no {pattern}")
    return found


def _read_parts(file: pathlib.Path) -> dict[str, list[str]]:
    """The prompts of one file by their category, "" for those that say none; {} for no prompts."""
    text = _read_text(file)
    suffix = pathlib.Path(file.name.removesuffix(".gz")).suffix
    # Not splitlines: it also breaks at separators that may stand inside a prompt.
    lines = [(f"{file}, line {i}", x.removesuffix("\r")) for i, x in enumerate(text.split("\n"), 1)]
    lines = [(where, line) for where, line in lines if line.strip()]
    if suffix == ".jsonl":
        parts: dict[str, list[str]] = {}
        for where, line in lines:
            record = parse_object(line, where)
            category = record.get("category", "") if "turns" in record else ""
            parts.setdefault(str(category), []).append(_prompt_of(record, where))
        return parts
    if suffix == ".csv":
        prompts = _multiple_choice(text, file)
    else:
        prompts = [line.partition("\t")[0] if suffix == ".tsv" else line for _, line in lines]
    return {"": prompts} if prompts else {}


def _read_text(file: pathlib.Path) -> str:
    """The text of a file, lines ended by a newline alone."""
    opened = gzip.open if file.suffix == ".gz" else open
    try:
        with opened(file, "rt", encoding="utf-8-sig") as stream:
            return stream.read()
    except (UnicodeDecodeError, EOFError, zlib.error, gzip.BadGzipFile):
        raise ValueError(f"{file} is not text in UTF-8") from None


def _prompt_of(record: dict, where: str) -> str:
    """What a line of JSON asks."""
    field = next((name for name in FIELDS if name in record), None)
    if field is None:
        raise ValueError(f"{where}: none of {', '.join(map(repr, FIELDS))} is there")
    value = record[field]
    if field == "turns" and isinstance(value, list) and value:
        value = value[0]
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{where}: {field!r} is blank or no text")
    return value


def _multiple_choice(text: str, file: pathlib.Path) -> list[str]:
    """Questions of a CSV file with columns question, four choices, answer; with a header or not."""
    try:
        rows = [row for row in csv.reader(io.StringIO(text)) if row]
    except csv.Error as error:
        raise ValueError(f"{file} is no CSV file: {error}") from None
    if rows and rows[0][:2] == ["question", "choice0"]:
        rows = rows[1:]
    for i, row in enumerate(rows, start=1):
        if len(row) != 6:
            raise ValueError(f"{file}, question {i}: {len(row)} columns, but six are expected")
    return [
        "\n".join([row[0].strip(), *map("{}. {}".format, "ABCD", row[1:5]), "Answer:"])
        for row in rows
    ]

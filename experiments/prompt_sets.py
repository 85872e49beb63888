"""Prompts of public evaluation sets, read in each set's own format from a local file or folder.

    read_set("gsm8k", "data/gsm8k")

A set of several parts (categories, languages, subjects) gives one item of each part in turn, so
that a few first items cover it. Texts are as stored; only mmlu's are put together, as the question
with lettered choices. Of conversations (specbench) the first turn is taken.
"""

from __future__ import annotations

import argparse
import csv
import gzip
import io
import itertools
import json
import os
import pathlib
from typing import Any

FILES = {  # what a set's folder holds
    "specbench": "question.jsonl",
    "humaneval": "HumanEval.jsonl",
    "gsm8k": "test.jsonl",
    "mgsm": "mgsm_*.tsv",  # one file per language
    "math": "test.jsonl",
    "ifeval": "input_data.jsonl",
    "mmlu": "*.csv",  # one file per subject
    "text": "*.txt",  # one prompt a line
}
FIELDS = {"humaneval": "prompt", "gsm8k": "question", "math": "problem", "ifeval": "prompt"}


def parse(
    p: argparse.ArgumentParser, argv: list[str] | None, max_tokens: int
) -> argparse.Namespace:
    """A command line of a script that measures a pair on sets, or prints what a file holds; the
    arguments that all such scripts have are added to its own.
    """
    names = ", ".join(FILES)
    p.add_argument("--base", help="converted checkpoint")
    p.add_argument("--draft", help="converted checkpoint; the base's own for self-drafting")
    p.add_argument("--set", action="append", metavar="NAME=PATH", help=f"repeatable: {names}")
    longer = "longer prompts are skipped"
    p.add_argument("--max-prompt-tokens", type=int, default=max_tokens, help=longer)
    p.add_argument("--chat", action="store_true", help="each prompt is a user's message")
    p.add_argument("--max-new-tokens", type=int, default=64)
    p.add_argument("--num-draft-tokens", type=int, default=5, help="depth of the draft")
    p.add_argument("--out", type=pathlib.Path, help="JSONL file of the results")
    p.add_argument("--table", type=pathlib.Path, help="only print the tables of this JSONL file")
    args = p.parse_args(argv)
    if not args.table and not all((args.base, args.draft, args.set, args.out)):
        p.error("--base, --draft, --set and --out are needed, or --table")
    return args


def read_set(name: str, path: str | os.PathLike) -> list[str]:
    """All prompts of a set, none empty; at least one.

    Args:
      name: one of `FILES`; "specbench:rag" is one category of specbench.
      path: a file of the set (it may be gzipped), or the folder with its file or files.

    Raises:
      ValueError: an unknown set or category, nothing to read there, or a file that is not of the
        set's format.
    """
    name, _, category = name.partition(":")
    if name not in FILES or (category and name != "specbench"):
        raise ValueError(
            f"unknown prompt set {name!r}{f' with category {category!r}' if category else ''}: "
            f"use one of {', '.join(FILES)}, or specbench:CATEGORY"
        )
    parts: list[list[str]] = []
    for file in _find_files(name, pathlib.Path(path)):
        found = _read_parts(name, file)
        if not found:
            raise ValueError(f"{file} holds no prompts")
        if category and category not in found:
            raise ValueError(
                f"{file} has no category {category!r}, but {', '.join(map(repr, found))}"
            )
        parts += [found[category]] if category else found.values()
    return interleave(parts)


def read_prompts(
    tokenizer: Any, options: list[str], num: int | None, max_tokens: int, *, chat: bool
) -> dict[str, list[list[int]]]:
    """Token ids of the first `num` short enough items of each set (None: of all), by set.

    Args:
      tokenizer: an `easyspec_jax.text.Tokenizer`.
      options: "NAME=PATH" of each set.
      max_tokens: longer prompts are skipped.
      chat: each is put into the chat template as a user's message.

    Raises:
      ValueError: a set that cannot be read, or has too few such prompts.
    """
    prompts: dict[str, list[list[int]]] = {}
    for option in options:
        name, _, path = option.partition("=")
        if not path or name in prompts:
            raise ValueError(f"--set takes NAME=PATH, every name once, got {option!r}")
        found = prompts.setdefault(name, [])
        for text in read_set(name, path):
            if len(found) == num:
                break
            if chat:
                text = tokenizer.render([{"role": "user", "content": text}])
            ids = tokenizer.encode(text, add_special_tokens=not chat)
            if len(ids) <= max_tokens:
                found.append(ids)
        if not found or (num is not None and not 0 < num <= len(found)):
            raise ValueError(
                f"the set {name} has {len(found)} prompts of at most {max_tokens} tokens, "
                f"but {'some' if num is None else num} are asked for"
            )
    return prompts


def interleave(parts: list[list[str]]) -> list[str]:
    """The first item of every part, then the second of those that have one, and so on."""
    rounds = itertools.zip_longest(*parts)
    return [item for items in rounds for item in items if item is not None]


def _find_files(name: str, path: pathlib.Path) -> list[pathlib.Path]:
    """`path` itself, or the set's files in that folder."""
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise ValueError(f"no prompts for the set {name}: {path} does not exist")
    found = sorted(path.glob(FILES[name]))
    if not found:
        raise ValueError(f"no prompts for the set {name}: {path} has no {FILES[name]}")
    return found


def _read_parts(name: str, file: pathlib.Path) -> dict[str, list[str]]:
    """The prompts of one file: by category for specbench, else one list; {} if there are none."""
    text = _read_text(file)
    if name == "specbench":
        categories: dict[str, list[str]] = {}
        for where, record in _records(text, file):
            turns = record.get("turns")
            first = turns[0] if isinstance(turns, list) and turns else None
            prompt = _checked(first, "turns", where)
            categories.setdefault(str(record.get("category")), []).append(prompt)
        return categories
    if name in FIELDS:
        field = FIELDS[name]
        prompts = [_checked(r.get(field), field, where) for where, r in _records(text, file)]
    elif name == "mmlu":
        prompts = _multiple_choice(text, file)
    else:
        lines = [line.partition("\t")[0] if name == "mgsm" else line for line in text.split("\n")]
        prompts = [line for line in lines if line.strip()]
    return {name: prompts} if prompts else {}


def _read_text(file: pathlib.Path) -> str:
    """The text of a file, lines ended by a newline alone."""
    opened = gzip.open if file.suffix == ".gz" else open
    try:
        with opened(file, "rt", encoding="utf-8-sig") as stream:
            return stream.read()
    except UnicodeDecodeError:
        raise ValueError(f"{file} is not text in UTF-8") from None


def _records(text: str, file: pathlib.Path) -> list[tuple[str, dict[str, Any]]]:
    """The JSON objects of a JSONL file, each with where it stands, for messages."""
    records = []
    # Not splitlines: it also breaks at separators that may stand inside a JSON string.
    for i, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            record = None
        if not isinstance(record, dict):
            raise ValueError(f"{file}, line {i}: not a JSON object")
        records.append((f"{file}, line {i}", record))
    return records


def _checked(value: Any, field: str, where: str) -> str:
    """`value`, which is a text and not blank."""
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{where}: {field!r} is missing, blank or no text")
    return value


def _multiple_choice(text: str, file: pathlib.Path) -> list[str]:
    """Questions of a CSV file with columns question, four choices, answer; with a header or not."""
    rows = [row for row in csv.reader(io.StringIO(text)) if row]
    if rows and rows[0][:2] == ["question", "choice0"]:
        rows = rows[1:]
    for i, row in enumerate(rows, start=1):
        if len(row) != 6:
            raise ValueError(f"{file}, question {i}: {len(row)} columns, but six are expected")
    return [
        "\n".join([row[0].strip(), *map("{}. {}".format, "ABCD", row[1:5]), "Answer:"])
        for row in rows
    ]

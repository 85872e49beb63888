"""Prompts of public evaluation sets from local files or folders (`easyspec_jax.prompts`).

    read_set("gsm8k", "data/gsm8k")

A set of several parts (categories, languages, subjects) gives one item of each part in turn, so
that a few first items cover it. Texts are as stored; only mmlu's are put together, as the question
with lettered choices. Of conversations (specbench) the first turn is taken.
"""

from __future__ import annotations

import argparse
import os
import pathlib
from typing import Any

from easyspec_jax import prompts

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
    try:
        return prompts.read_prompts(path, pattern=FILES[name], category=category or None)
    except ValueError as error:
        raise ValueError(f"no prompts for the set {name}: {error}") from None


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
    sets: dict[str, list[list[int]]] = {}
    for option in options:
        name, _, path = option.partition("=")
        if not path or name in sets:
            raise ValueError(f"--set takes NAME=PATH, every name once, got {option!r}")
        found = sets.setdefault(name, [])
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
    return sets

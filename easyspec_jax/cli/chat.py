"""`easyspec chat`: a conversation, line by line, whose earlier turns stay in the caches."""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Iterator
from typing import TextIO

import easyspec_jax as es
from easyspec_jax.cli import answering
from easyspec_jax.cli.options import add_max_len, max_len, standard_input
from easyspec_jax.text import Conversation

HELP = "talk, line by line; /reset clears, /exit ends"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Room for the conversation, and what an answer needs."""
    parser.set_defaults(chat=True)
    add_max_len(parser.add_argument, "tokens of the conversation there is room for")
    answering.add_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Answer every line of standard input."""
    stream = standard_input()
    setup = answering.check(args)
    talk = Conversation(setup.tokenizer, args.system)
    talk.ask("?")  # a template that is missing or refuses the system message should show now
    talk.withdraw()
    room = max_len(args, setup.config)
    answering.check_fits(args, setup, room)
    engine, session, seed = answering.Engine(args, setup), es.Session(room), args.seed
    for line in _lines(stream):
        if line == "/reset":
            talk = Conversation(setup.tokenizer, args.system)
            continue
        try:
            ids = talk.ask(line)
            rest = room - len(ids)
            if rest < 1:
                raise ValueError(
                    f"the conversation has reached {room} tokens: /reset, or a larger --max-len"
                )
            most = min(args.max_new_tokens, rest)
            new, text = engine.answer(ids, session, max_new_tokens=most, seed=seed)
        except ValueError as error:  # of this message: the conversation goes on
            print(f"error: {error}", file=sys.stderr)
            talk.withdraw()
            continue
        talk.answer(new, text, eos_ids=setup.eos_ids)
        seed += 1  # else every answer would draw the same random numbers
    return 0


def _lines(stream: TextIO) -> Iterator[str]:
    """What the user types, until /exit or the end; asked for with "> " on a terminal."""
    if stream.isatty():
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  (line editing in input)
    while True:
        try:
            line = input("> ") if stream.isatty() else input()
        except EOFError:
            return
        if line.strip() == "/exit":
            return
        if line.strip():
            yield line.strip() if line.startswith("/") else line

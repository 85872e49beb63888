"""What `generate` and `chat` share: their options, everything that can be refused before weights
are loaded, and an answer that is printed as it comes.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import sys
import time
from typing import Any

import jax

import easyspec_jax as es
from easyspec_jax.checkpoint import read_metadata
from easyspec_jax.cli import drafting
from easyspec_jax.cli.options import (
    COUNT,
    MODEL_HELP,
    add_attention,
    add_dtype,
    add_machine,
    add_mesh,
    add_quantization,
    flag,
    given,
)
from easyspec_jax.cli.report import Clock, print_report
from easyspec_jax.memory import check_memory
from easyspec_jax.sources import find_checkpoint
from easyspec_jax.text import TextPrinter, Tokenizer, read_generation_config, stop_ids


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Models, drafter, mesh, machine and text."""
    add = parser.add_argument_group("models").add_argument
    add("--base", required=True, metavar="MODEL", help=f"the base: {MODEL_HELP}")
    add_dtype(add)
    add_quantization(add)
    drafting.add_arguments(parser.add_argument_group("drafting").add_argument)
    add = parser.add_argument_group("machine").add_argument
    add_mesh(add)
    add_attention(add)
    add_machine(add)
    add = parser.add_argument_group("text").add_argument
    add("--max-new-tokens", **COUNT, default=128, help="of the answer, at most (default 128)")
    greedy = "0 is greedy (default: generation_config.json's sampling, else 0)"
    add("--temperature", type=float, metavar="T", help=greedy)
    add("--top-k", type=int, metavar="K", help="draw from the K likeliest tokens")
    add("--top-p", type=float, metavar="P", help="from the likeliest that make P together")
    add("--min-p", type=float, metavar="P", help="from those of at least P times the likeliest's")
    add("--seed", type=int, default=0, help="of what is drawn (default 0)")
    add("--stop", action="append", default=[], metavar="TEXT", help="end before it; repeatable")
    add("--system", metavar="TEXT", help="system message of a chat")
    add("--no-stats", dest="stats", action="store_false", help="print no statistics")
    add("--json", action="store_true", help="statistics as JSON on standard output's last line")


@dataclasses.dataclass(frozen=True)
class Setup:
    """What an answer needs beside the weights; all of it was checked."""

    config: es.ModelConfig  # the base's
    mesh: jax.sharding.Mesh
    tokenizer: Tokenizer
    sampling: es.Sampling
    eos_ids: tuple[int, ...]  # special tokens that were given as stop texts included


def check(args: argparse.Namespace) -> Setup:
    """Refuse what can be refused before weights, which may take minutes, are loaded; settles the
    drafter in `args`.
    """
    if "" in args.stop:
        raise ValueError("--stop needs a text that is not empty")
    if args.system is not None and not args.chat:
        raise ValueError("--system needs --chat")
    drafting.check_options(args)
    find_models(args)
    config, metadata = read_metadata(args.base)
    mesh = es.make_mesh(args.layer, args.tensor)
    drafting.check_drafter(args, metadata.get("tokenizer"))
    generation = read_generation_config(args.base)
    sampling = choose_sampling(args, generation)
    tokenizer = Tokenizer(args.base)
    # Decoding leaves special tokens out, so such a text is never in the answer: its id ends it.
    special = tokenizer.special_ids()
    stops = [special[text] for text in args.stop if text in special]
    eos_ids = (*stop_ids(generation, config), *(i for i in stops if i < config.vocab_size))
    return Setup(config, mesh, tokenizer, sampling, eos_ids)


def find_models(args: argparse.Namespace) -> None:
    """Name the checkpoints of models in `args`, converting those that are none (`sources`)."""
    for name in ("base", "draft", "middle"):
        if getattr(args, name, None) is not None:
            setattr(args, name, str(find_checkpoint(getattr(args, name))))


def check_fits(args: argparse.Namespace, setup: Setup, tokens: int) -> None:
    """Refuse what can be refused of the models together, a lack of memory for `tokens` included."""

    def planned(path, **options):
        return drafting.planned_model(path, *read_metadata(path), setup.mesh, **options)

    decoder = drafting.make_decoder(args, planned)
    budget = decoder.memory(max_new_tokens=tokens - 1, prompt_len=1, sampling=setup.sampling)
    check_memory(setup.mesh, budget)


def choose_sampling(args: argparse.Namespace, generation: dict[str, Any]) -> es.Sampling:
    """The arguments' sampling, else generation_config.json's, else greedy; says which on stderr."""
    names = ("temperature", "top_k", "top_p", "min_p")
    asked = given(args, *names)
    source = "as asked for" if asked else "the default"
    values: dict[str, Any] = asked
    if args.temperature is None and generation.get("do_sample"):
        source = "from generation_config.json" + (" and the arguments" if asked else "")
        if generation.get("repetition_penalty", 1.0) != 1.0:
            source += ", without its repetition_penalty"
        own = {name: generation[name] for name in names if generation.get(name) is not None}
        values = {"temperature": 1.0} | own | asked
    sampling = es.Sampling(**values)
    idle = asked.keys() - {"temperature"}
    if sampling.greedy and idle:
        raise ValueError(
            f"{flag(min(idle))} changes nothing without a temperature: add --temperature 0.8, say"
        )
    shown = "greedy" if sampling.greedy else " ".join(f"{n}={v:g}" for n, v in values.items())
    if args.stats:
        print(f"sampling: {shown} ({source})", file=sys.stderr)
    return sampling


class Engine:
    """The models of checked arguments, loaded."""

    def __init__(self, args: argparse.Namespace, setup: Setup):
        """Load them, which takes the time that the first report tells."""
        self.args, self.setup, began = args, setup, time.perf_counter()
        self._asked = False
        self.decoder = drafting.make_decoder(
            args, functools.partial(es.load_model, mesh=setup.mesh)
        )
        self._load_seconds = time.perf_counter() - began

    def answer(self, ids: list[int], session: es.Session, **options: Any) -> tuple[list[int], str]:
        """Print what follows `ids` as it comes, then the statistics; returns its tokens and its
        text. Options: max_new_tokens and seed.
        """
        stops, tokenizer = self.args.stop, self.setup.tokenizer
        if not self._asked and self.args.other_tokenizer and self.args.stats:
            print(_shared(self.args, ids), file=sys.stderr)
        self._asked = True
        options |= {"sampling": self.setup.sampling, "eos_ids": self.setup.eos_ids}
        options |= {"stop_strings": stops, "tokenizer": tokenizer}
        printer, new = TextPrinter(tokenizer, stops, mark=bool(self.args.show_draft)), []
        with Clock(self._load_seconds) as clock:
            for piece in self.decoder.stream(ids, session=session, **options):
                clock.count(piece)
                printer.piece(piece, piece.num_accepted)
                new += piece
        printer.end()
        print_report(self.args, session, clock)
        self._load_seconds = 0.0
        return new, printer.text


def _shared(args: argparse.Namespace, ids: list[int]) -> str:
    """What a draft with another tokenizer may draft, in one line."""
    vocabulary = drafting.shared_vocabulary(args.base, args.draft)
    number, size = vocabulary.num_shared, len(vocabulary.shared)
    covered = f"{vocabulary.covered(ids):.0%} of the prompt's"
    return f"another tokenizer: {number:,} of {size:,} tokens shared, {covered}"

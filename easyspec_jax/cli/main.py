"""The command line: `easyspec generate | chat | info | plan | tune | demo`.

Thin: it reads arguments, loads, prints. Only here does the package set jax options, in `configure`.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import os
import pathlib
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import jax

import easyspec_jax as es
from easyspec_jax.checkpoint import read_metadata
from easyspec_jax.cli.arguments import DEFAULT_SESSION, check_positive, make_parser
from easyspec_jax.cli.drafting import check_drafter, make_decoder
from easyspec_jax.cli.report import Clock, print_report
from easyspec_jax.distributed import check_agreement, is_lost_peer
from easyspec_jax.memory import check_memory
from easyspec_jax.request import make_request
from easyspec_jax.text import (
    Conversation,
    TextPrinter,
    Tokenizer,
    read_generation_config,
    stop_ids,
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; return its status: 1 after an error of one sentence, 130 interrupted."""
    args = make_parser().parse_args(argv)
    commands = {
        "generate": _generate, "chat": _chat, "info": _info, "plan": _plan_pair, "tune": _tune,
        "demo": _demo,
    }  # fmt: skip
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *_: print(f"warning: {message}", file=sys.stderr)
        try:
            configure(args)
            status = commands[args.command](args)
            sys.stdout.flush()
            return status
        except KeyboardInterrupt:
            print(file=sys.stderr)
            return _leave(args, 130)
        except BrokenPipeError:  # the reader has gone, and so must the interpreter's last flush
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return _leave(args, 1)
        except (ValueError, OSError, RuntimeError) as error:
            sys.stdout.flush()
            print(f"error: {_sentence(args, error)}", file=sys.stderr)
            return _leave(args, 1)


def _sentence(args: argparse.Namespace, error: Exception) -> str:
    """What to say of an error: of one from the devices the first line, as jax appends pages."""
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    if _is_distributed(args) and not isinstance(error, ValueError) and is_lost_peer(error):
        return f"another process has ended or cannot be reached ({reason})"
    return reason if isinstance(error, RuntimeError) else str(error)


def _is_distributed(args: argparse.Namespace) -> bool:
    return getattr(args, "coordinator", None) is not None


def _leave(args: argparse.Namespace, status: int) -> int:
    """The status; one of several processes ends here, lest it wait for others that wait for it."""
    if _is_distributed(args):
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    return status


def configure(args: argparse.Namespace) -> None:
    """Set the jax options that the arguments ask for; before anything else touches a device."""
    # Only its templates are used: that it finds no PyTorch is no news.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    devices = getattr(args, "cpu_devices", None)
    if args.command == "info":  # shapes only: as many devices as the mesh wants, none of them real
        devices = max(args.layer, 1) * max(args.tensor or 1, 1)
    if args.command == "plan" and not args.measure:  # shapes only, no mesh at all
        devices = 1
    if devices is not None:
        if devices < 1:
            raise ValueError(f"--cpu-devices must be at least 1, got {devices}")
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", devices)
    if getattr(args, "dtype", None) == "float32":  # else GPUs compute its products in TF32
        jax.config.update("jax_default_matmul_precision", "float32")
    if getattr(args, "compile_cache", False) and jax.config.jax_compilation_cache_dir is None:
        jax.config.update("jax_compilation_cache_dir", str(cache_root() / "compile"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
        jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    _join_processes(args)


def _join_processes(args: argparse.Namespace) -> None:
    """Become one of several processes where the arguments say so; only process 0 prints."""
    given = [
        n for n in ("num_processes", "process_id", "timeout") if getattr(args, n, None) is not None
    ]
    if not _is_distributed(args):
        if given:
            raise ValueError(f"--{given[0].replace('_', '-')} needs --coordinator")
        return
    # Libraries chat on the first file descriptor, which is for the answer alone.
    sys.stdout = os.fdopen(os.dup(1), "w", encoding=sys.stdout.encoding)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    where = None if args.coordinator == "auto" else args.coordinator
    wait = {} if args.timeout is None else {"timeout": args.timeout}
    es.initialize_distributed(where, args.num_processes, args.process_id, **wait)
    if jax.process_index() > 0:
        sys.stdout, args.stats = open(os.devnull, "w"), False


def cache_root() -> pathlib.Path:
    """Where downloads and compiled programs are kept between runs."""
    root = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return pathlib.Path(root).expanduser() / "easyspec_jax"


@dataclasses.dataclass(frozen=True)
class _Setup:
    """What both text commands need beside the weights; all of it was checked."""

    config: es.ModelConfig  # the base's
    mesh: jax.sharding.Mesh
    tokenizer: Tokenizer
    sampling: es.Sampling
    eos_ids: tuple[int, ...]  # special tokens that were given as stop texts included


@dataclasses.dataclass(frozen=True)
class _Engine:
    """A setup and the models."""

    decoder: es.Decoder
    setup: _Setup
    load_seconds: float

    def answer(
        self, args: argparse.Namespace, ids: list[int], clock: Clock, **options: Any
    ) -> tuple[list[int], str]:
        """Print what follows `ids` as it comes; returns its tokens and its text."""
        setup = self.setup
        printer = TextPrinter(setup.tokenizer, args.stop, mark=bool(args.show_draft))
        new: list[int] = []
        with clock:
            for piece in self.decoder.stream(
                ids,
                sampling=setup.sampling,
                eos_ids=setup.eos_ids,
                stop_strings=args.stop,
                tokenizer=setup.tokenizer,
                **options,
            ):
                clock.count(piece)
                printer.piece(piece, piece.num_accepted)
                new += piece
        printer.end()
        return new, printer.text


def _check(args: argparse.Namespace) -> _Setup:
    """Refuse what can be refused before weights, which may take minutes, are loaded."""
    _check_arguments(args)
    config, metadata = read_metadata(args.base)
    mesh = es.make_mesh(args.layer, args.tensor)
    check_drafter(args, metadata.get("tokenizer"))
    generation = read_generation_config(args.base)
    sampling = choose_sampling(args, generation)
    tokenizer = Tokenizer(args.base)
    # Decoding leaves special tokens out, so such a text is never in the answer: its id ends it.
    special = tokenizer.special_ids()
    stops = [special[text] for text in args.stop if text in special]
    return _Setup(
        config=config,
        mesh=mesh,
        tokenizer=tokenizer,
        sampling=sampling,
        eos_ids=(*stop_ids(generation, config), *(i for i in stops if i < config.vocab_size)),
    )


def _check_arguments(args: argparse.Namespace) -> None:
    check_positive(args, "max_new_tokens", "max_len")
    if "" in args.stop:
        raise ValueError("--stop needs a text that is not empty")
    if args.system is not None and not args.chat:
        raise ValueError("--system needs --chat")


def _plan(args: argparse.Namespace, setup: _Setup, tokens: int) -> None:
    """Refuse what can be refused of the pair, a lack of memory for `tokens` included."""

    def plan(path, **options):
        return es.abstract_model(read_metadata(path)[0], setup.mesh, **options)

    decoder = make_decoder(args, plan)
    budget = decoder.memory(max_new_tokens=tokens - 1, prompt_len=1, sampling=setup.sampling)
    check_memory(setup.mesh, budget)


def _load(args: argparse.Namespace, setup: _Setup) -> _Engine:
    began = time.perf_counter()
    decoder = make_decoder(args, functools.partial(es.load_model, mesh=setup.mesh))
    return _Engine(decoder=decoder, setup=setup, load_seconds=time.perf_counter() - began)


def choose_sampling(args: argparse.Namespace, generation: dict[str, Any]) -> es.Sampling:
    """The arguments' sampling, else generation_config.json's, else greedy; says which on stderr."""
    names = ("temperature", "top_k", "top_p", "min_p")
    given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    source = "as asked for" if given else "the default"
    values = given
    if args.temperature is None and generation.get("do_sample"):
        source = "from generation_config.json" + (" and the arguments" if given else "")
        if generation.get("repetition_penalty", 1.0) != 1.0:
            source += ", without its repetition_penalty"
        own = {name: generation[name] for name in names if generation.get(name) is not None}
        values = {"temperature": 1.0} | own | given
    sampling = es.Sampling(**values)
    if sampling.greedy and given.keys() - {"temperature"}:
        name = min(given.keys() - {"temperature"}).replace("_", "-")
        raise ValueError(
            f"--{name} changes nothing without a temperature: add --temperature 0.8, say"
        )
    shown = "greedy" if sampling.greedy else " ".join(f"{n}={v:g}" for n, v in values.items())
    if args.stats:
        print(f"sampling: {shown} ({source})", file=sys.stderr)
    return sampling


def _generate(args: argparse.Namespace) -> int:
    error = None
    try:
        setup, ids, values = _prepare(args)
    except (ValueError, OSError) as refused:
        error, values = refused, ()
    check_agreement(values, error)
    engine = _load(args, setup)
    session, clock = es.Session(), Clock(engine.load_seconds)
    options = {"max_new_tokens": args.max_new_tokens, "seed": args.seed, "session": session}
    engine.answer(args, ids, clock, **options)
    print_report(args, session, clock)
    return 0


def _prepare(args: argparse.Namespace) -> tuple[_Setup, list[int], tuple]:
    """Setup and prompt, checked, and what all processes must have in common."""
    # One line end of a piped text is the shell's, not the prompt's.
    prompt = sys.stdin.read().removesuffix("\n") if args.prompt == "-" else args.prompt
    setup = _check(args)
    if args.chat:
        ids = Conversation(setup.tokenizer, args.system).ask(prompt)
    else:
        ids = setup.tokenizer.encode(prompt)
    # The decoder's own check, but before there is one.
    make_request(setup.config, [ids], args.max_new_tokens, setup.sampling, setup.eos_ids, args.seed)
    _plan(args, setup, len(ids) + args.max_new_tokens)
    own = {"process_id", "base", "draft", "middle", "stats", "cpu_devices"}
    options = {name: value for name, value in vars(args).items() if name not in own}
    paths = (args.base, args.draft, args.middle)
    models = [read_metadata(path) for path in paths if path is not None]
    return setup, ids, (ids, options, models, setup.sampling, setup.eos_ids)


def _chat(args: argparse.Namespace) -> int:
    setup = _check(args)
    talk = Conversation(setup.tokenizer, args.system)
    talk.ask("?")  # a template that is missing or refuses the system message should show now
    talk.withdraw()
    max_len = min(setup.config.context, args.max_len or DEFAULT_SESSION)
    if max_len < 2:
        raise ValueError(f"--max-len must be at least 2, got {args.max_len}")
    _plan(args, setup, max_len)
    engine = _load(args, setup)
    session, clock, seed = es.Session(max_len), Clock(engine.load_seconds), args.seed
    for line in _lines():
        if line == "/reset":
            talk = Conversation(setup.tokenizer, args.system)
            continue
        try:
            ids = talk.ask(line)
            room = max_len - len(ids)
            if room < 1:
                raise ValueError(
                    f"the conversation has reached {max_len} tokens: /reset, or a larger --max-len"
                )
            options = {"max_new_tokens": min(args.max_new_tokens, room), "seed": seed}
            new, text = engine.answer(args, ids, clock, session=session, **options)
        except ValueError as error:  # of this message: the conversation goes on
            print(f"error: {error}", file=sys.stderr)
            talk.withdraw()
            continue
        talk.answer(new, text, eos_ids=setup.eos_ids)
        print_report(args, session, clock)
        clock, seed = Clock(0.0), seed + 1  # else every answer would draw the same random numbers
    return 0


def _lines() -> Iterator[str]:
    """What the user types, until /exit or the end; asked for with "> " on a terminal."""
    if sys.stdin.isatty():
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  (line editing in input)
    while True:
        try:
            line = input("> ") if sys.stdin.isatty() else input()
        except EOFError:
            return
        if line.strip() == "/exit":
            return
        if line.strip():
            yield line.strip() if line.startswith("/") else line


def _info(args: argparse.Namespace) -> int:
    from easyspec_jax.cli import info

    return info.run(args)


def _plan_pair(args: argparse.Namespace) -> int:
    from easyspec_jax.cli import plan as plan_command

    return plan_command.run(args)


def _tune(args: argparse.Namespace) -> int:
    from easyspec_jax.cli import tune as tune_command

    return tune_command.run(args)


def _demo(args: argparse.Namespace) -> int:
    from easyspec_jax.cli import demo

    check_positive(args, "max_new_tokens")
    return demo.run(args, cache_root())

"""`easyspec generate`: the text that follows one prompt."""

from __future__ import annotations

import argparse

import easyspec_jax as es
from easyspec_jax.checkpoint import read_metadata
from easyspec_jax.cli import answering
from easyspec_jax.cli.options import add_processes, standard_input
from easyspec_jax.distributed import check_agreement
from easyspec_jax.request import make_inputs
from easyspec_jax.text import Conversation, check_text

HELP = "continue a prompt"
# Options in which processes that decode together may differ: models are compared by content.
_OWN = {"process_id", "base", "draft", "middle", "stats", "cpu_devices"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The prompt, and how it is taken."""
    parser.add_argument("prompt", help='text to continue; "-" reads standard input')
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--chat", action="store_true", help="put the prompt into the chat template")
    how.add_argument("--raw", dest="chat", action="store_false", help="take it as it is (default)")
    answering.add_arguments(parser)
    processes = parser.add_argument_group("several processes, all started alike")
    add_processes(processes.add_argument)


def run(args: argparse.Namespace) -> int:
    """Print the prompt's continuation."""
    error = None
    try:
        setup, ids = _prepare(args)
        options = {name: value for name, value in vars(args).items() if name not in _OWN}
        paths = (args.base, args.draft, args.middle)
        models = [read_metadata(path) for path in paths if path is not None]
        common = (ids, options, models, setup.sampling, setup.eos_ids)
    except (ValueError, OSError) as refused:
        error, common = refused, ()
    check_agreement(common, error)
    engine = answering.Engine(args, setup)
    engine.answer(ids, es.Session(), max_new_tokens=args.max_new_tokens, seed=args.seed)
    return 0


def _prepare(args: argparse.Namespace) -> tuple[answering.Setup, list[int]]:
    """Setup and token ids of the prompt, checked."""
    # One line end of a piped text is the shell's, not the prompt's.
    prompt = standard_input().read().removesuffix("\n") if args.prompt == "-" else args.prompt
    check_text(prompt)
    setup = answering.check(args)
    if args.chat:
        ids = Conversation(setup.tokenizer, args.system).ask(prompt)
    else:
        ids = setup.tokenizer.encode(prompt)
    # The decoder's own check, but before there is one.
    make_inputs(setup.config, [ids], args.max_new_tokens, setup.sampling, setup.eos_ids, args.seed)
    answering.check_fits(args, setup, len(ids) + args.max_new_tokens)
    return setup, ids

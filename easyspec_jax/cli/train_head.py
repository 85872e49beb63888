"""`easyspec train-head`: an EAGLE-3 head for a base, trained on answers of the base itself."""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import sys
from typing import TYPE_CHECKING, Any

import easyspec_jax as es
from easyspec_jax.checkpoint import read_metadata
from easyspec_jax.cli.answering import find_models
from easyspec_jax.cli.options import (
    COUNT,
    COUNTS,
    MODEL_HELP,
    add_dtype,
    add_machine,
    add_mesh,
    given,
)
from easyspec_jax.json_files import read_object, write_object
from easyspec_jax.prompts import read_prompts
from easyspec_jax.request import make_inputs
from easyspec_jax.sharding import platform_of
from easyspec_jax.text import Conversation, Tokenizer, read_generation_config, stop_ids

if TYPE_CHECKING:  # training takes a while to import: only the command itself does
    from easyspec_jax.training.packing import Answer
    from easyspec_jax.training.train import Options

HELP = "train an EAGLE-3 head that drafts for a base"
ANSWERS, BASE = "answers.jsonl", "base.json"  # who answered: told apart by its weights and type
# Options of the training itself, by the names it has for them.
_TRAINING = (
    *("taps", "num_ids", "num_depths", "num_epochs", "num_rows", "row_length", "learning_rate"),
    *("held_out", "embed_residual", "keep_features", "own_rows", "checkpoint_minutes", "seed"),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The base, what it is asked, how the head is trained."""
    add = parser.add_argument
    add("--base", required=True, metavar="MODEL", help=f"it drafts for: {MODEL_HELP}")
    prompts = "what the base answers: one a line, JSON lines, or public sets' files (prompts.py)"
    add("--prompts", nargs="+", default=[], metavar="FILE", help=prompts)
    there = "answers that are there already, instead of prompts: training/README.md has the format"
    add("--answers", metavar="FILE", help=there)
    out = "folder of the head; what a run that was broken off left there is continued"
    add("--out", required=True, metavar="DIR", help=out)
    add = parser.add_argument_group("answers").add_argument
    add("--chat", action="store_true", help="put each prompt into the chat template")
    warm = "of half of the answers, the others are greedy (default 0.8)"
    add("--temperature", type=float, default=0.8, metavar="T", help=warm)
    add("--max-new-tokens", **COUNT, default=256, help="of each answer (default 256)")
    add("--batch", **COUNT, default=16, help="prompts that are answered at once (default 16)")
    add = parser.add_argument_group("training").add_argument
    taps = "layers of the base before which its state is read (default: 2, L / 2, L - 3)"
    add("--taps", **COUNTS, help=taps)
    ids = "tokens that are drafted, the commonest of the answers (default 4096)"
    add("--draft-vocab", dest="num_ids", **COUNT, help=ids)
    add("--depths", dest="num_depths", **COUNT, help="levels that are trained (default 3)")
    add("--epochs", dest="num_epochs", **COUNT, help="how often all answers are seen (default 2)")
    add("--rows", dest="num_rows", **COUNT, help="of a step (default 8)")
    longer = "tokens of a row; longer answers are left out (default 512)"
    add("--row-length", **COUNT, help=longer)
    rate = "of matrices, by Muon, and of norms, by AdamW (default 0.01)"
    add("--learning-rate", type=float, metavar="X", help=rate)
    held = "greedy answers that are kept for measuring (default 40)"
    add("--held-out", **COUNT, help=held)
    plain = "leave out embed_residual, which other engines do not know"
    add("--no-embed-residual", dest="embed_residual", action="store_false", help=plain)
    again = "run the base in every epoch instead of keeping what it computes in DIR/features"
    add("--no-features", dest="keep_features", action="store_false", help=again)
    rows = "leave out lm_head, whose rows are the base's: for loaders that take them there"
    add("--no-lm-head", dest="own_rows", action="store_false", help=rows)
    often = "between two checkpoints (default 5)"
    add("--checkpoint-minutes", type=float, metavar="MIN", help=often)
    add("--seed", type=int, help="of all that is drawn (default 0)")
    add_mesh(add, tensor="all else (default: all others)")
    add_dtype(add)
    add("--quiet", action="store_true", help="no progress bars")
    add_machine(add)


def run(args: argparse.Namespace) -> int:
    """Answer, train, measure, and write the head; all that can be refused is, before that."""
    from easyspec_jax.training.answers import read_answers
    from easyspec_jax.training.step import make_optimiser
    from easyspec_jax.training.train import Options, train

    if bool(args.prompts) == (args.answers is not None):
        raise ValueError("give either --prompts or --answers")
    options = Options(**given(args, *_TRAINING))
    make_optimiser(options.learning_rate, 1)
    out = pathlib.Path(args.out)
    _check_folder(out)
    find_models(args)
    config, metadata = read_metadata(args.base)
    about = {"weights": metadata["weights"], "dtype": args.dtype}
    _check_base(out, about)
    mesh = es.make_mesh(args.layer, args.tensor)
    options.check(config, mesh)
    prompts = _prompts(args, config, options)
    answers = None if args.answers is None else read_answers(args.answers, config)
    # Of a type that no CPU chooses by itself: a training goes on anywhere.
    dtype = "float32" if args.dtype is None and platform_of(mesh) == "cpu" else args.dtype
    base = es.load_model(args.base, mesh, dtype=dtype)
    bar: dict[str, Any] = {"disable": True if args.quiet else None}
    if answers is None:
        out.mkdir(parents=True, exist_ok=True)
        write_object(out / BASE, about)
        answers = _answer(args, out / ANSWERS, base, prompts, bar)
    record = train(base, answers, out, options, **bar)
    held = record["held_out"]
    print(f"{held['tokens_per_step']} tokens per step on {options.held_out} held-out answers")
    print(json.dumps(held))
    return 0


def _check_folder(out: pathlib.Path) -> None:
    """Refuse an output folder that holds something else than what a training leaves.

    Raises:
      ValueError: it does, or it cannot be written.
    """
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out} is no folder")
    from convert.folder import WEIGHTS
    from easyspec_jax.training.folder import CONFIG_FILE
    from easyspec_jax.training.train import CHECKPOINT, FEATURES, RECORD_FILE

    ours = {ANSWERS, BASE, CHECKPOINT, FEATURES, RECORD_FILE, WEIGHTS, CONFIG_FILE}
    there = {entry.name for entry in out.iterdir()} if out.is_dir() else set()
    unfinished = tuple(f".{name}" for name in ours)
    others = [name for name in there - ours if not name.startswith(unfinished)]
    if others:
        raise ValueError(f"{out} holds {min(others)}: name a folder for the head alone")
    if RECORD_FILE in there:
        raise ValueError(f"{out} holds a trained head: name another folder")
    parent = next(p for p in (out, *out.absolute().parents) if p.exists())
    if not os.access(parent, os.W_OK):
        raise ValueError(f"{out} cannot be written")


def _check_base(out: pathlib.Path, about: dict[str, Any]) -> None:
    """Refuse to go on with answers of another base.

    Raises:
      ValueError: those in the folder are.
    """
    if (out / BASE).is_file() and read_object(out / BASE) != about:
        raise ValueError(
            f"{out} has answers of another base, or of this one in another --dtype: name another "
            "folder"
        )


def _prompts(args: argparse.Namespace, config: es.ModelConfig, options: Options) -> list[list[int]]:
    """Ids of all prompts whose answers fit rows; those too long are left out with a word.

    Raises:
      ValueError: none fits, they are too few, or the base cannot be asked so.
    """
    if args.answers is not None:
        return []
    from easyspec_jax.training.answers import check_prompts, read_answers

    tokenizer = Tokenizer(args.base)
    texts = [text for file in args.prompts for text in read_prompts(file)]
    ask = lambda text: Conversation(tokenizer).ask(text)  # noqa: E731
    encode = ask if args.chat else tokenizer.encode
    longest = options.row_length - args.max_new_tokens
    ids = [encode(text) for text in texts]
    found = [one for one in ids if 1 <= len(one) <= longest]
    if not found:
        raise ValueError(
            f"no prompt and its answer of {args.max_new_tokens} tokens fit rows of "
            f"{longest + args.max_new_tokens}: raise --row-length or lower --max-new-tokens"
        )
    if len(found) < len(ids):
        print(f"{len(ids) - len(found)} prompts are too long, and left out", file=sys.stderr)
    sampling = es.Sampling(temperature=args.temperature)
    make_inputs(config, found[:1], args.max_new_tokens, sampling)
    there = pathlib.Path(args.out) / ANSWERS
    check_prompts(
        found,
        read_answers(there, config, is_own=True) if there.is_file() else (),
        temperature=args.temperature,
        batch=args.batch,
        held_out=options.held_out,
    )
    return found


def _answer(
    args: argparse.Namespace, path: pathlib.Path, base: es.Model, prompts: list[list[int]], bar: Any
) -> list[Answer]:
    """The base's answers to all prompts, which the file then holds."""
    from tqdm import tqdm

    from easyspec_jax.training.answers import read_answers, write_answers

    done = write_answers(
        path,
        es.Decoder(base),
        prompts,
        temperature=args.temperature,
        max_new_tokens=args.max_new_tokens,
        batch=args.batch,
        eos_ids=stop_ids(read_generation_config(args.base), base.config),
        seed=args.seed or 0,
    )
    with tqdm(total=len(prompts), desc="answering", unit="prompt", **bar) as shown:
        for count in done:
            shown.update(count - shown.n)
    return read_answers(path, base.config)

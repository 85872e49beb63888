"""`easyspec tune`: find a partition of a draft's layers on prompts of one's own, keep it beside the
draft's checkpoint.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import os
import pathlib
import sys
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

import easyspec_jax as es
from easyspec_jax.checkpoint import (
    PARTITION_FILE,
    agreed_quantization,
    read_metadata,
    read_partition,
    write_partition,
)
from easyspec_jax.cli.answering import find_models
from easyspec_jax.cli.drafting import FIXED_DEPTH, GROUPED, add_option
from easyspec_jax.cli.options import (
    COUNT,
    add_device,
    add_dtype,
    add_machine,
    add_mesh,
    add_quantization,
    given,
)
from easyspec_jax.planner.device import read_device
from easyspec_jax.prompts import read_prompts
from easyspec_jax.request import check_tokenizers, make_inputs
from easyspec_jax.sources import read_config
from easyspec_jax.text import Conversation, Tokenizer, read_generation_config, stop_ids

if TYPE_CHECKING:  # planner and tuner take a while to import: only the command itself does
    from easyspec_jax.tuner.tune import Candidate, StepSeconds, Tuning

_DECODING = ("num_draft_tokens", "max_new_tokens", "temperature")  # options that are kept
HELP = "find a partition of a draft's layers that fits it"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The pair, prompts, what partitions may be and how they are tried."""
    add = parser.add_argument
    add(
        "--draft", required=True, metavar="MODEL", help="its layers are grouped; the result is kept"
    )
    add("--base", metavar="MODEL", help="that drafts are made for (default: the draft itself)")
    prompts = (
        "texts like those to come: one a line, JSON lines, or a public set's file (prompts.py)"
    )
    add("--prompts", required=True, metavar="FILE", help=prompts)
    add("--num-prompts", **COUNT, help="only the first N of them (default: all)")
    add("--chat", action="store_true", help="put each into the chat template")
    steps = "groups that may run one after another (default: as many as in groups of --layer)"
    add("--attention-steps", type=int, metavar="K", help=steps)
    add_mesh(add, layer=None, tensor="tuning, here (default: all)")
    add_device(add, "weigh tokens against the times predicted for", "how many of them")
    add_option(add, "num_draft_tokens", **FIXED_DEPTH, default=5)
    add("--max-new-tokens", **COUNT, default=64, help="of each answer (default 64)")
    warm = "of the text to be drafted (default 0, greedy)"
    add("--temperature", type=float, default=0.0, metavar="T", help=warm)
    last = "partitions that are decoded with before one is chosen, at most (default 5)"
    add("--verify", **COUNT, default=5, help=last)
    add_dtype(add)
    add_quantization(add)
    add_option(add, "draft_quantization")
    add("--dry-run", action="store_true", help="find and print, but write nothing")
    add("--json", action="store_true", help="all figures as JSON on standard output's last line")
    add_machine(add)


def run(args: argparse.Namespace) -> int:
    """Tune as `args` say, print what was found and keep it; 1 if a text in float32 was not
    autoregression's.
    """
    from easyspec_jax.tuner.tune import check_options, tune

    args.base = args.base or args.draft
    texts, sampling = _read_texts(args), es.Sampling(temperature=args.temperature)
    (base_config, base_about), (config, about) = map(read_config, (args.base, args.draft))
    predict_times(args, base_config, config, **_codes(args, base_about, about))
    find_models(args)  # which may take minutes
    (config, about), (base_config, base_about) = map(read_metadata, (args.draft, args.base))
    check_tokenizers(base_about.get("tokenizer"), about.get("tokenizer"))
    codes = _codes(args, base_about, about)
    step_seconds = predict_times(args, base_config, config, **codes)
    steps = _attention_steps(args, config.num_layers)
    # A group larger than --layer takes turns, which only a predicted time can weigh.
    most = args.layer if step_seconds is None else None
    check_options(config.num_layers, steps, most, step_seconds is not None)
    there = pathlib.Path(args.draft) / PARTITION_FILE
    if not args.dry_run and (not os.access(args.draft, os.W_OK) or there.is_dir()):
        raise ValueError(f"{there} cannot be written: --dry-run shows the result alone")
    eos_ids = stop_ids(read_generation_config(args.base), base_config)
    prompts = _encode(args, texts)
    make_inputs(base_config, prompts, args.max_new_tokens, sampling, eos_ids)
    base, draft = _load(args, **codes)
    found = tune(
        base,
        draft,
        prompts,
        attention_steps=steps,
        max_group_size=most,
        step_seconds=step_seconds,
        num_confirmed=args.verify,
        eos_ids=eos_ids,
        progress=True,
        **{name: getattr(args, name) for name in _DECODING},
    )
    record = make_record(args, found, steps, about, base_about)
    _print(found)
    failed = _differs(found) and base.dtype == jnp.float32  # else near-ties may break
    if failed:
        print("nothing is written: that should not happen in float32", file=sys.stderr)
    elif not args.dry_run:
        _keep(args.draft, config.num_layers, found, record)
    if args.json:
        print(json.dumps({"partition": list(found.partition)} | record))
    return int(failed)


def _codes(
    args: argparse.Namespace, base: dict[str, Any], draft: dict[str, Any]
) -> dict[str, es.Quantization | None]:
    """How matrices are stored, as the planner names it.

    Args:
      base, draft: metadata.

    Raises:
      ValueError: other codes are stored than are asked for.
    """
    return {
        "base_codes": agreed_quantization(base, args.quantization, args.base),
        "draft_codes": agreed_quantization(draft, args.draft_quantization, args.draft),
    }


def _load(
    args: argparse.Namespace,
    base_codes: es.Quantization | None,
    draft_codes: es.Quantization | None,
) -> tuple[es.Model, es.Model]:
    """Base and draft, in the layout whose layers can be grouped anew; one model where they are."""
    options: dict[str, Any] = {"mesh": es.make_mesh(1, args.tensor), "layout": "tensor"}
    load = functools.partial(es.load_model, **options, **given(args, "dtype", "kv_dtype"))
    base = load(args.base, quantization=base_codes)
    if args.base == args.draft and base_codes == draft_codes:
        return base, base
    return base, load(args.draft, quantization=draft_codes)


def _differs(found: Tuning) -> bool:
    """Whether a text was not autoregression's; says which partition's on stderr."""
    differs = False
    for c in found.candidates:
        wrong = 0 if c.identical is None else found.num_prompts - c.identical
        if wrong:
            count = f"{wrong} of {found.num_prompts} answers"
            print(f"{shown(c.partition)}: {count} differ from autoregression's", file=sys.stderr)
        differs |= wrong > 0
    return differs


def predict_times(
    args: argparse.Namespace, base: es.ModelConfig, draft: es.ModelConfig, **codes: Any
) -> StepSeconds | None:
    """The predicted time of a step by partition on the devices of --device; None without it.

    Args:
      codes: of `Planner`, how matrices are stored.

    Raises:
      ValueError: an unknown device, or a number of them that --layer does not divide.
    """
    if args.device is None:
        if args.num_devices is not None:
            raise ValueError("--num-devices needs --device: for which kind times are predicted")
        return None
    layer = args.layer or args.num_devices or 1
    devices = args.num_devices or layer
    if devices % layer:
        raise ValueError(f"--layer {layer} does not divide --num-devices {devices}")
    from easyspec_jax.planner.plan import Deployment, Planner

    codes |= given(args, "kv_dtype")
    planner = Planner(base=base, draft=draft, device=read_device(args.device), **codes)
    place = Deployment(layer=layer, tensor=devices // layer, draft="groups", rules=GROUPED)

    def seconds(partition):
        where = dataclasses.replace(place, group_size=partition)
        return planner.price(where, args.num_draft_tokens).cost.seconds

    return seconds


def _attention_steps(args: argparse.Namespace, num_layers: int) -> int | None:
    """K: as asked for, else as many blocks as uniform groups of --layer have."""
    if args.attention_steps is not None:
        return args.attention_steps
    if args.device is not None:
        return None
    if args.layer is None:
        raise ValueError("tune needs --attention-steps or --layer: how much may run at once")
    return len(es.make_partition(num_layers, args.layer))


def _read_texts(args: argparse.Namespace) -> list[str]:
    """The prompts that `args` ask for."""
    texts = read_prompts(args.prompts)
    if args.num_prompts is not None and args.num_prompts > len(texts):
        raise ValueError(
            f"--num-prompts asks for {args.num_prompts}, but {args.prompts} has {len(texts)}"
        )
    return texts[: args.num_prompts]


def _encode(args: argparse.Namespace, texts: list[str]) -> list[list[int]]:
    """Their token ids."""
    tokenizer = Tokenizer(args.base)
    if args.chat:
        return [Conversation(tokenizer).ask(text) for text in texts]
    return [tokenizer.encode(text) for text in texts]


def make_record(
    args: argparse.Namespace,
    found: Tuning,
    attention_steps: int | None,
    draft: dict[str, Any],
    base: dict[str, Any],
) -> dict[str, Any]:
    """What is kept of a tuning beside its partition, in what JSON can hold; names, no places.

    Args:
      draft, base: metadata of the checkpoints.
    """
    options = (*_DECODING, "chat", "layer", "num_devices")
    options += ("quantization", "draft_quantization", "kv_dtype")
    return {
        "tuned_for": {
            "base": _name(args.base),
            "base_weights": base.get("weights"),
            "draft": _name(args.draft),
            "draft_weights": draft.get("weights"),
            "prompts": pathlib.Path(args.prompts).name,
            "num_prompts": found.num_prompts,
            "num_tokens": found.num_tokens,
            "attention_steps": attention_steps,
            **{name: getattr(args, name) for name in options},
            "device": None if args.device is None else read_device(args.device).name,
        },
        "exact_acceptance": found.exact_acceptance,
        "candidates": [dataclasses.asdict(c) for c in found.candidates],
        "version": es.__version__,
        "jax": jax.__version__,
    }


def _name(path: str) -> str:
    return pathlib.Path(path).resolve().name


def shown(partition: tuple[int, ...]) -> str:
    """A partition as --group-size takes it."""
    return ",".join(map(str, partition))


def _print(found: Tuning) -> None:
    """A table of what was decoded with, the best first."""
    print(f"{found.num_prompts} prompts, {found.num_tokens} tokens; tokens per step")
    timed = found.candidates[0].step_seconds is not None
    head = f"{'ms a step':>11}" if timed else ""
    print(f"{'steps':>5}{'predicted':>11}{'decoded':>9}{head}  partition")
    for c in found.candidates:
        time = f"{1e3 * c.step_seconds:>11.3f}" if c.step_seconds is not None else ""
        print(
            f"{c.attention_steps:>5}{c.predicted:>11.3f}{c.tokens:>9.3f}{time}  "
            f"{shown(c.partition)}{' (uniform)' if c.kind == 'uniform' else ''}"
        )
    best = found.candidates[0]
    uniform = next((c for c in found.candidates if c.kind == "uniform"), None)
    print(f"best: {shown(best.partition)}, {_gain(best, uniform)}")
    print(f"with --layer {max(best.partition)} every group runs at once")


def _gain(best: Candidate, uniform: Candidate | None) -> str:
    if uniform is None:
        return "and no uniform one has so few groups"
    if best is uniform:
        return "the uniform one: nothing that was tried is better"
    gain = f"{best.tokens / uniform.tokens:.3f} times the tokens per step of the best uniform one"
    if best.step_seconds is None:
        return gain
    return f"{gain}, {best.speed / uniform.speed:.3f} times its predicted speed"


def _keep(path: str, num_layers: int, found: Tuning, record: dict[str, Any]) -> None:
    """Write the file; say what it replaces."""
    replaced = ""
    if (pathlib.Path(path) / PARTITION_FILE).exists():
        try:
            replaced = f", which replaces {shown(read_partition(path, num_layers))}"
        except ValueError:
            replaced = ", which replaces a damaged one"
    file = write_partition(path, found.partition, record)
    print(f"written to {file}{replaced}; use it with --group-size tuned")

"""The arguments of all commands; what they mean is in `cli.py`."""

from __future__ import annotations

import argparse
import dataclasses
import pathlib
from typing import Any

from easyspec_jax.config import ModelConfig
from easyspec_jax.layer_parallel import make_partition
from easyspec_jax.planner.device import PRESETS
from easyspec_jax.sharding import LAYOUTS, MLPS, LayoutRules
from easyspec_jax.tuned import TUNED, read_partition

DEFAULT_SESSION = 2048  # tokens that a chat has room for, where the base's context is longer
DRAFTERS = ("layer-parallel", "prompt-lookup", "early-exit", "polybasic")


def make_parser() -> argparse.ArgumentParser:
    """The arguments of all commands."""
    parser = argparse.ArgumentParser(
        prog="easyspec", description="Lossless speculative decoding with a layer-parallel draft."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    generate = commands.add_parser("generate", help="continue a prompt")
    generate.set_defaults(command="generate")
    generate.add_argument("prompt", help='text to continue; "-" reads standard input')
    how = generate.add_mutually_exclusive_group()
    how.add_argument("--chat", action="store_true", help="put the prompt into the chat template")
    how.add_argument("--raw", dest="chat", action="store_false", help="take it as it is (default)")

    chat = commands.add_parser("chat", help="talk, line by line; /reset clears, /exit ends")
    chat.set_defaults(command="chat", chat=True)
    room = f"tokens there is room for (default: the context, at most {DEFAULT_SESSION})"
    chat.add_argument("--max-len", type=int, metavar="N", help=room)
    for command in (generate, chat):
        _add_models(command)
        _add_text(command)
    _add_processes(generate)

    info = commands.add_parser("info", help="what a checkpoint is, and how it is split")
    info.set_defaults(command="info")
    info.add_argument("checkpoint", help="converted checkpoint, or a config.json, of the base")
    _add_info(info)
    _add_mesh(info, tensor="1")

    plan = commands.add_parser("plan", help="which layout, groups and tree, from configurations")
    plan.set_defaults(command="plan")
    _add_plan(plan)

    tune = commands.add_parser("tune", help="find a partition of a draft's layers that fits it")
    tune.set_defaults(command="tune")
    _add_tune(tune)
    _add_machine(tune)

    demo = commands.add_parser("demo", help="fetch a small model and watch it draft for itself")
    demo.set_defaults(command="demo")
    demo.add_argument("--prompt", default="Explain in a few sentences why the sky is blue.")
    demo.add_argument("--max-new-tokens", type=int, default=128, metavar="N")
    demo.add_argument("--cache", type=pathlib.Path, metavar="DIR", help="for the converted model")
    demo.add_argument("--base", metavar="CKPT", help="use this checkpoint instead of the download")
    _add_machine(demo)
    return parser


def _add_models(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("models").add_argument
    add("--base", required=True, metavar="CKPT", help="converted checkpoint of the base")
    add("--draft", metavar="CKPT", help="that of the draft (default: none, autoregression)")
    _add_drafter(add)
    levels = "drafted per step (default 5; polybasic: mu + 5)"
    add("--num-draft-tokens", type=int, metavar="N", help=levels)
    add("--tree-width", type=int, metavar="N", help="draft tokens at each depth (default 1)")
    kinds = "draft tokens at temperature > 0: drawn (default), or the likeliest"
    add("--candidates", choices=("sampled", "best"), help=kinds)
    early = "stop drafting once even its likeliest path is less probable (default: never)"
    add("--min-draft-probability", type=float, metavar="P", help=early)
    sizes = "draft layers that run at once, all groups' sizes, or what `easyspec tune` found"
    sizes += " (default: as --layer)"
    add("--group-size", type=_group_size, metavar="N|N,N,..|tuned", help=sizes)
    _add_draft_layout(add)
    add("--no-calibrate", action="store_true", default=None, help="leave the draft's cache fuzzy")
    what = "what runs at once (default attention)"
    add("--parallel", choices=("attention", "layer"), help=what)
    dtypes = ("float32", "bfloat16", "float16")
    add("--dtype", choices=dtypes, help="default: float32 on CPU, else bfloat16")
    _add_mesh(parser)
    _add_machine(parser)


def _add_drafter(add) -> None:
    how = "a draft model (default with --draft), the text itself, the base's own early layers, or "
    how += "a chain of base, middle and draft"
    add("--drafter", choices=DRAFTERS, help=how)
    add("--max-ngram", type=int, metavar="N", help="prompt-lookup: tokens looked up (default 3)")
    few = "early-exit: layers to leave at (default: a few)"
    add("--exits", type=_exits, metavar="N,N,..", help=few)
    add("--middle", metavar="CKPT", help="polybasic: checkpoint between base and draft")
    copy = "polybasic: a copy of the base in so many bits instead"
    add("--middle-bits", type=int, choices=(4, 8), help=copy)
    least = "polybasic: tokens the middle collects for the base, at least (default 8)"
    add("--mu", type=int, metavar="N", help=least)


def _add_info(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--draft", metavar="CKPT", help="that of a draft: what the pair takes on each device")
    add("--group-size", type=_group_size, default=4, help="as for a draft (default 4)")
    _add_draft_layout(add)
    add("--num-draft-tokens", type=int, default=5, metavar="N", help="per step (default 5)")
    add("--tree-width", type=int, default=1, metavar="N", help="at each depth (default 1)")
    add("--batch", type=int, default=1, metavar="N", help="prompts at once (default 1)")
    room = f"tokens of each, prompt and answer (default: the context, at most {DEFAULT_SESSION})"
    add("--max-len", type=int, metavar="N", help=room)
    budget = "GiB of each device: refuse what does not fit into them in bfloat16"
    add("--device-memory", type=float, metavar="GIB", help=budget)
    add("--collectives", action="store_true", help="compile a step, list what devices exchange")


def _add_plan(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--base", metavar="CONFIG", help="checkpoint or config.json of the base")
    add("--draft", metavar="CONFIG", help="that of the draft")
    chain = "instead of all else: whether a further model pays in a chain, from a JSON file: "
    chain += '{"models": [{"name", "seconds", "accepted"}, ..], "draft_passes", "new": {"name", '
    chain += '"seconds", "accepted", "accepted_above", "after"}}; seconds and tokens per pass'
    add("--chain", metavar="FILE", help=chain)
    kinds = ", ".join(PRESETS)
    add("--device", metavar="NAME|FILE", help=f"{kinds}, or a JSON file of one")
    add("--measure", action="store_true", help="measure the machine at hand instead")
    add("--num-devices", type=int, metavar="N", help="default: 1; with --measure all there are")
    add("--kernel-us", type=float, metavar="US", help="microseconds that a kernel costs instead")
    add("--collective-us", type=float, metavar="US", help="those of a small collective")
    rates = "share of the exact draft's tokens that is accepted, or a file of measured runs"
    add("--acceptance", metavar="RATE|FILE", help=f"{rates} (default 0.8)")
    add("--num-draft-tokens", type=_numbers, metavar="N,N,..", help="those to consider")
    add("--tree-width", type=_numbers, metavar="N,N,..", help="those to consider")
    add("--group-size", type=_numbers, metavar="N,N,..", help="those to consider")
    add("--batch", type=int, metavar="N", help="prompts at once (default 1)")
    room = f"tokens of each, prompt and answer (default: the context, at most {DEFAULT_SESSION})"
    add("--max-len", type=int, metavar="N", help=room)
    budget = "GiB of each device that a program may use (default: the device's)"
    add("--device-memory", type=float, metavar="GIB", help=budget)
    types = "with --measure: of the weights (default float32 on CPU, else bfloat16)"
    add("--dtype", choices=("float32", "bfloat16", "float16"), help=types)
    add("--top", type=int, metavar="N", help="choices to show (default 10)")
    add("--json", action="store_true", help="all of it as one JSON document")


def _add_tune(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--draft", required=True, metavar="CKPT", help="its layers are grouped; the result is kept")
    add("--base", metavar="CKPT", help="that drafts are made for (default: the draft itself)")
    prompts = 'texts like those to come: one a line, or JSON lines with a "prompt" (.jsonl)'
    add("--prompts", required=True, metavar="FILE", help=prompts)
    add("--num-prompts", type=int, metavar="N", help="only the first N of them (default: all)")
    add("--chat", action="store_true", help="put each into the chat template")
    steps = "groups that may run one after another (default: as many as in groups of --layer)"
    add("--attention-steps", type=int, metavar="K", help=steps)
    add("--layer", type=int, metavar="N", help="devices for the layers of a group")
    add("--tensor", type=int, metavar="N", help="devices to tune on, here (default: all)")
    kinds = "kind of device to predict times for, as for plan: weighs tokens against them"
    add("--device", metavar="NAME|FILE", help=kinds)
    add("--num-devices", type=int, metavar="N", help="how many of them")
    add("--num-draft-tokens", type=int, default=5, metavar="N", help="per step (default 5)")
    add("--max-new-tokens", type=int, default=64, metavar="N", help="of each answer (default 64)")
    warm = "of the text to be drafted (default 0, greedy)"
    add("--temperature", type=float, default=0.0, metavar="T", help=warm)
    last = "partitions that are decoded with before one is chosen (default 5)"
    add("--verify", type=int, default=5, metavar="N", help=last)
    add("--dtype", choices=("float32", "bfloat16", "float16"), help="default: float32 on CPU, "
        "else bfloat16")  # fmt: skip
    add("--dry-run", action="store_true", help="find and print, but write nothing")
    add("--json", action="store_true", help="all figures as JSON on standard output's last line")


def _add_draft_layout(add) -> None:
    how = "draft's layers of a group side by side on --layer (default), shared, or all the same"
    add("--draft-layout", choices=tuple(LAYOUTS), help=how)
    add("--draft-mlp", choices=tuple(MLPS), help="devices that share the draft's MLPs")
    exact = "exact pass over a group: devices take turns (default), or a second copy over all"
    add("--exact-pass", choices=("turns", "copy"), help=exact)


def draft_layout(args: argparse.Namespace) -> LayoutRules:
    """The draft's layout that the arguments ask for.

    Raises:
      ValueError: a copy for layers that are not side by side.
    """
    changes = {}
    if args.draft_mlp is not None:
        changes["mlp"] = MLPS[args.draft_mlp]
    if args.exact_pass is not None:
        changes["exact"] = args.exact_pass
    return dataclasses.replace(LAYOUTS[args.draft_layout or "layer"], **changes)


def _add_processes(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("several processes, all started alike").add_argument
    where = "address of process 0, which prints; auto: all three as the cluster says"
    add("--coordinator", metavar="HOST:PORT", help=where)
    add("--num-processes", type=int, metavar="N", help="how many there are")
    add("--process-id", type=int, metavar="I", help="which of them this is, from 0")
    late = "seconds after which one that is silent counts as dead (default 100)"
    add("--timeout", type=int, metavar="S", help=late)


def _add_mesh(parser: argparse.ArgumentParser, tensor: str = "all others") -> None:
    add = parser.add_argument
    add("--layer", type=int, default=1, metavar="N", help="devices for the layers of a group")
    add("--tensor", type=int, metavar="N", help=f"devices for heads (default: {tensor})")


def _add_machine(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--cpu-devices", type=int, metavar="N", help="run on the CPU as N devices, to try meshes")
    keep = "keep no compiled programs on disk (as JAX_ENABLE_COMPILATION_CACHE=0)"
    add("--no-compile-cache", dest="compile_cache", action="store_false", help=keep)


def _add_text(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("text").add_argument
    add("--max-new-tokens", type=int, default=128, metavar="N")
    greedy = "0 is greedy (default: generation_config.json's sampling, else 0)"
    add("--temperature", type=float, metavar="T", help=greedy)
    add("--top-k", type=int, metavar="K")
    add("--top-p", type=float, metavar="P")
    add("--min-p", type=float, metavar="P")
    add("--seed", type=int, default=0)
    add("--stop", action="append", default=[], metavar="TEXT", help="end before it; repeatable")
    add("--system", metavar="TEXT", help="system message of a chat")
    mark = "mark the text that the draft proposed"
    add("--show-draft", action="store_true", default=None, help=mark)
    add("--no-stats", dest="stats", action="store_false", help="print no statistics")
    add("--json", action="store_true", help="statistics as JSON on standard output's last line")


def _numbers(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no list of numbers like 1,2,4") from None


def _exits(text: str) -> tuple[int, ...]:
    return tuple(_numbers(text))


def check_positive(args: argparse.Namespace, *names: str) -> None:
    """Refuse whole numbers (or lists of them) below 1 among these options, where they are given.

    Raises:
      ValueError: naming the first.
    """
    for name in names:
        value = getattr(args, name, None)
        least = min(value) if isinstance(value, list) else value
        if least is not None and least < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be at least 1, got {least}")


def partition_of(
    group_size: int | tuple[int, ...] | str,
    path: str,
    config: ModelConfig,
    metadata: dict[str, Any],
) -> tuple[int, ...]:
    """The partition that --group-size means for the checkpoint `path`.

    Raises:
      ValueError: it does not fit the model, or the checkpoint was not tuned.
    """
    if group_size == TUNED:
        return read_partition(path, config.num_layers, metadata.get("weights"))
    return make_partition(config.num_layers, group_size)


def _group_size(text: str) -> int | tuple[int, ...] | str:
    if text == TUNED:
        return text
    try:
        sizes = tuple(int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r} is neither a number nor sizes like 1,2,3,1 nor tuned"
        ) from None
    return sizes if len(sizes) > 1 else sizes[0]

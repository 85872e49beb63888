"""Ways of drafting: one table of the options that make a drafter, one of the drafters: the options
that each takes and needs, and how it is made of them.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax

import easyspec_jax as es
from easyspec_jax.checkpoint import TUNED, agreed_quantization, read_metadata, read_partition
from easyspec_jax.cli.options import (
    COUNT,
    COUNTS,
    MODEL_HELP,
    PROBABILITY,
    Add,
    flag,
    given,
    numbers,
)
from easyspec_jax.depth import AUTO
from easyspec_jax.layer_parallel import PARALLEL
from easyspec_jax.quantized import KINDS as QUANTIZATIONS
from easyspec_jax.request import check_tokenizers
from easyspec_jax.sharding import LAYOUTS, MLPS, LayoutRules

GROUPED = LAYOUTS["grouped"]  # EasySpec's layout of a draft

Load = Callable[..., es.Model]  # of a path and options, a model, loaded or abstract


def _group_size(text: str) -> int | tuple[int, ...] | str:
    if text == TUNED:
        return text
    try:
        sizes = numbers(text)
    except argparse.ArgumentTypeError:
        wanted = "neither a number nor sizes like 1,2,3,1 nor tuned"
        raise argparse.ArgumentTypeError(f"{text!r} is {wanted}") from None
    return sizes[0] if len(sizes) == 1 else sizes


def _draft_tokens(text: str) -> int | str:
    if text == AUTO:
        return text
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number nor {AUTO}") from None


_SIZES = "layers that run at once, all groups' sizes, or what `easyspec tune` found"
_LAYOUT = "layers of a group side by side on --layer (default), shared, or all the same"
_FLAG = {"action": "store_true", "default": None}

# Options of drafters by name: what argparse has to know of each. None: not given.
OPTIONS: dict[str, dict[str, Any]] = {
    "draft": dict(metavar="MODEL", help=f"the draft: {MODEL_HELP}"),
    "other_tokenizer": _FLAG | dict(help="the draft's is not the base's: draft what both share"),
    "num_draft_tokens": COUNT
    | dict(
        type=_draft_tokens,
        fits=lambda n: n == AUTO or int(n) >= 1,
        metavar="N|auto",
        help="per step (default 5; polybasic: mu + 5); auto: chosen anew in each step",
    ),
    "tree_width": COUNT | dict(help="draft tokens at each depth (default 1)"),
    "candidates": dict(
        choices=("sampled", "best"), help="at temperature > 0: drawn (default), or the likeliest"
    ),
    "min_draft_probability": PROBABILITY
    | dict(help="stop drafting once even its likeliest path is less probable (default: never)"),
    "group_size": dict(
        type=_group_size, metavar="N|N,N,..|tuned", help=f"{_SIZES} (default: as --layer)"
    ),
    "draft_layout": dict(choices=tuple(LAYOUTS), help=f"the draft's: {_LAYOUT}"),
    "draft_mlp": dict(choices=tuple(MLPS), help="devices that share the draft's MLPs"),
    "draft_quantization": dict(
        choices=tuple(QUANTIZATIONS), help="store matrices of draft or head so"
    ),
    "no_calibrate": _FLAG | dict(help="leave the draft's cache fuzzy"),
    "parallel": dict(choices=PARALLEL, help="what runs at once (default attention)"),
    "max_ngram": COUNT | dict(help="tokens looked up (default 3)"),
    "min_ngram": COUNT | dict(help="of them must be found (default 1; 3 before a draft model)"),
    "head": dict(metavar="FOLDER", help="an EAGLE-3 head: config.json and safetensors"),
    "exits": COUNTS | dict(help="layers to leave at (default: a few)"),
    "middle": dict(metavar="MODEL", help="a model between base and draft"),
    "middle_bits": dict(type=int, choices=(4, 8), help="a copy of the base in so many bits"),
    "mu": COUNT | dict(help="tokens the middle collects for the base, at least (default 8)"),
    "show_draft": _FLAG | dict(help="mark the text that the draft proposed"),
}


# For commands that are about a step of one depth.
FIXED_DEPTH = COUNT | dict(help="per step (default 5)")

# Tokenizers are read and compared once, for shapes and for weights.
shared_vocabulary = functools.cache(es.shared_vocabulary)


def _every_model(args: argparse.Namespace) -> dict[str, Any]:
    """Options that every model is loaded with."""
    return given(args, "dtype", "attention", "kv_dtype")


def _beside(base: es.Model, args: argparse.Namespace) -> dict[str, Any]:
    """The same for a model in one program with the base: one library multiplies there, and where
    the base's matrices are no bfloat16 that is not the one for it.
    """
    own = {} if base.layout.bf16_matrices else {"matrix_dtype": base.dtype}
    return _every_model(args) | own


def _layer_parallel(args: argparse.Namespace, base: es.Model, load: Load):
    options = {"group_size": args.group_size, "layout": draft_layout(args), **_beside(base, args)}
    if args.draft_quantization is not None:
        options["quantization"] = args.draft_quantization
    draft, how = load(args.draft, **options), given(args, "parallel", "candidates")
    if args.other_tokenizer:
        how["vocabulary"] = shared_vocabulary(args.base, args.draft)
    return es.LayerParallelDrafter(draft, calibrate=not args.no_calibrate, **how)


def _prompt_lookup(args: argparse.Namespace, base: es.Model, load: Load):
    return es.PromptLookupDrafter(**given(args, "max_ngram", "min_ngram"))


def _eagle(args: argparse.Namespace, base: es.Model, load: Load):
    how = given(args, "candidates")
    if args.draft_quantization is not None:
        how["quantization"] = args.draft_quantization
    return es.EagleDrafter.load(args.head, base, **how)


def _behind_lookup(make: Callable[..., es.Drafter]) -> Callable[..., es.Drafter]:
    def fallback(args: argparse.Namespace, base: es.Model, load: Load):
        least = {"min_ngram": min(args.max_ngram or 3, 3)}
        lookup = es.PromptLookupDrafter(**least | given(args, "max_ngram", "min_ngram"))
        return es.FallbackDrafter(lookup, make(args, base, load))

    return fallback


def _early_exit(args: argparse.Namespace, base: es.Model, load: Load):
    return es.EarlyExitDrafter(base, **given(args, "exits"))


def _polybasic(args: argparse.Namespace, base: es.Model, load: Load):
    if args.middle is None and (args.quantization or base.quantization):
        raise ValueError("--middle-bits makes codes of a base of floats: name a --middle instead")
    if args.middle is not None:
        middle = load(args.middle, **_beside(base, args))
    elif isinstance(jax.tree.leaves(base)[0], jax.ShapeDtypeStruct):
        middle = load(args.base, quantization=f"int{args.middle_bits}", **_every_model(args))
    else:
        middle = es.quantize_model(base, f"int{args.middle_bits}")
    return es.PolybasicDrafter(middle, _layer_parallel(args, base, load), **given(args, "mu"))


@dataclasses.dataclass(frozen=True)
class Kind:
    """A value of --drafter."""

    drafts: str  # what drafts, for the help
    make: Callable[[argparse.Namespace, es.Model, Load], Any]
    options: tuple[str, ...]  # names in OPTIONS beside those that every drafter takes
    needs: tuple[tuple[str, ...], ...] = ()  # exactly one of each


_ALL = ("num_draft_tokens", "show_draft")
_MODEL = (
    "draft", "other_tokenizer", "candidates", "group_size", "draft_layout", "draft_mlp",
    "draft_quantization", "no_calibrate", "parallel",
)  # fmt: skip
_DRAFT = (*_MODEL, "min_draft_probability")
_HEAD = ("head", "candidates", "draft_quantization")
_NGRAMS = ("max_ngram", "min_ngram")
KINDS = {
    "layer-parallel": Kind(
        "a draft model (default with --draft)",
        _layer_parallel,
        (*_DRAFT, "tree_width"),
        needs=(("draft",),),
    ),
    "prompt-lookup": Kind("the text itself", _prompt_lookup, (*_NGRAMS, "tree_width")),
    "prompt-lookup+layer-parallel": Kind(
        "the text itself, else a draft model",
        _behind_lookup(_layer_parallel),
        (*_MODEL, *_NGRAMS),
        needs=(("draft",),),
    ),
    "prompt-lookup+eagle": Kind(
        "the text itself, else a head",
        _behind_lookup(_eagle),
        (*_HEAD, *_NGRAMS),
        needs=(("head",),),
    ),
    "eagle": Kind(
        "a head trained for the base",
        _eagle,
        (*_HEAD, "tree_width", "min_draft_probability"),
        needs=(("head",),),
    ),
    "early-exit": Kind(
        "the base's own early layers", _early_exit, ("exits", "min_draft_probability")
    ),
    "polybasic": Kind(
        "a chain of base, middle and draft",
        _polybasic,
        (*_DRAFT, "middle", "middle_bits", "mu"),
        needs=(("draft",), ("middle", "middle_bits")),
    ),
}


def add_arguments(add: Add, *, without: tuple[str, ...] = ()) -> None:
    """--drafter and the options of all drafters; what only one of them takes says which.

    Args:
      without: options that the command has no use for.
    """
    kinds = "; ".join(f"{name}: {kind.drafts}" for name, kind in KINDS.items())
    add("--drafter", choices=tuple(KINDS), help=f"{kinds} (default: none)")
    for name, option in OPTIONS.items():
        if name in without:
            continue
        who = _takers(name)
        only = f"{who[0]}: " if len(who) == 1 else ""
        add_option(add, name, help=only + option["help"])


def add_option(add: Add, name: str, **changes: Any) -> None:
    """An option of OPTIONS, with another default or help where a command has its own."""
    add(flag(name), **OPTIONS[name] | changes)


def _takers(name: str) -> list[str]:
    """The kinds of drafters that take an option."""
    return [who for who, kind in KINDS.items() if name in (*_ALL, *kind.options)]


def check_drafter(args: argparse.Namespace, base_tokenizer: str | None) -> None:
    """Settle --group-size as a partition: what is read from a file is read once, and compared by
    processes; and --other-tokenizer, which means nothing where it is the base's.

    Raises:
      ValueError: a model that has another tokenizer than the base's, or not such groups.
    """
    if args.draft is not None:
        config, metadata = read_metadata(args.draft)
        groups = args.layer if args.group_size is None else args.group_size
        args.group_size = partition_of(groups, args.draft, config, metadata)
        if not args.other_tokenizer:
            check_tokenizers(base_tokenizer, metadata.get("tokenizer"), ", or --other-tokenizer")
        elif base_tokenizer is not None and base_tokenizer == metadata.get("tokenizer"):
            args.other_tokenizer = None
    if args.middle is not None:
        check_tokenizers(base_tokenizer, read_metadata(args.middle)[1].get("tokenizer"))


def check_options(args: argparse.Namespace) -> None:
    """Settle --drafter (layer-parallel where there is a --draft, None for autoregression).

    Raises:
      ValueError: an option that the drafter does not take, or one that it needs.
    """
    if args.drafter is None and args.draft is not None:
        args.drafter = "layer-parallel"
    drafter, names_given = args.drafter, given(args, *(n for n in OPTIONS if n in vars(args)))
    for name in names_given:
        who = _takers(name)
        if drafter is None:
            needed = "--draft" if "layer-parallel" in who else f"--drafter {who[0]}"
            raise ValueError(f"{flag(name)} needs {needed}")
        if drafter not in who:
            raise ValueError(f"--drafter {drafter} does not take {flag(name)}")
    for names in KINDS[drafter].needs if drafter is not None else ():
        count = sum(name in names_given for name in names)
        if count != 1:
            either = "" if count == 0 or len(names) == 1 else ", not both"
            raise ValueError(f"--drafter {drafter} needs {' or '.join(map(flag, names))}{either}")


def planned_model(
    path: str, config: es.ModelConfig, metadata: dict[str, Any], mesh: Any, **options: Any
) -> es.Model:
    """The shapes of a model as `load_model` would load it, with options of `abstract_model`; of a
    source that is not converted yet with matrices of the model's type.

    Raises:
      ValueError: it holds other codes than the options ask for.
    """
    agreed = agreed_quantization(metadata, options.pop("quantization", None), path)
    stored = metadata.get("dtype")
    return es.abstract_model(config, mesh, quantization=agreed, stored=stored, **options)


def draft_layout(args: argparse.Namespace) -> LayoutRules:
    """The draft's layout that --draft-layout and --draft-mlp ask for."""
    rules = GROUPED if args.draft_layout is None else LAYOUTS[args.draft_layout]
    return rules if args.draft_mlp is None else dataclasses.replace(rules, mlp=MLPS[args.draft_mlp])


def partition_of(
    group_size: int | tuple[int, ...] | str,
    path: str,
    config: es.ModelConfig,
    metadata: dict[str, Any],
) -> tuple[int, ...]:
    """The partition that --group-size means for the checkpoint `path`.

    Raises:
      ValueError: it does not fit the model, or the checkpoint was not tuned.
    """
    if isinstance(group_size, str):  # TUNED: the parser lets no other word pass
        return read_partition(path, config.num_layers, metadata.get("weights"))
    return es.make_partition(config.num_layers, group_size)


def make_decoder(args: argparse.Namespace, load: Load) -> es.Decoder:
    """The base with the drafter of checked arguments.

    Raises:
      ValueError: this drafter cannot draft for this base.
    """
    base = load(args.base, **_every_model(args), **given(args, "quantization"))
    if args.drafter is None:
        return es.Decoder(base)
    options = given(args, "num_draft_tokens", "tree_width", "min_draft_probability")
    return es.Decoder(base, KINDS[args.drafter].make(args, base, load), **options)

"""The drafter that a text command asks for: the options that each takes, and how it is made."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable

import jax

import easyspec_jax as es
from easyspec_jax.checkpoint import read_metadata
from easyspec_jax.cli.arguments import check_positive, draft_layout, partition_of
from easyspec_jax.request import check_tokenizers

DEPTH = 5  # draft tokens of a step by default; polybasic's: for each pass of the middle
NGRAM = 3  # last tokens that are looked up by default, at most
MU = 8  # tokens that the middle collects for the base by default
GROUP = 128  # weights that share a scale in a quantised copy of the base

_ALL = ("num_draft_tokens", "show_draft")
_LAYERS = (
    "draft", "candidates", "group_size", "draft_layout", "draft_mlp", "exact_pass", "no_calibrate",
    "parallel",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class _Kind:
    """What --drafter NAME takes and needs, beside what every drafter takes."""

    takes: tuple[str, ...]
    needs: tuple[tuple[str, ...], ...] = ()  # exactly one of each


_KINDS = {
    "layer-parallel": _Kind((*_LAYERS, "min_draft_probability", "tree_width"), (("draft",),)),
    "prompt-lookup": _Kind(("max_ngram", "tree_width")),
    "early-exit": _Kind(("exits", "min_draft_probability")),
    "polybasic": _Kind(
        (*_LAYERS, "middle", "middle_bits", "mu", "min_draft_probability"),
        (("draft",), ("middle", "middle_bits")),
    ),
}
_OPTIONS = tuple(dict.fromkeys(name for kind in _KINDS.values() for name in (*_ALL, *kind.takes)))


def check_drafter(args: argparse.Namespace, base_tokenizer: str | None) -> None:
    """Settle --drafter (layer-parallel where there is a --draft, None for autoregression), and
    --group-size as a partition: what is read from a file is read once, and compared by processes.

    Raises:
      ValueError: an option that the drafter does not take, one that it needs or a bad value; a
        checkpoint that is none, or has another tokenizer than the base's.
    """
    check_positive(args, "num_draft_tokens", "tree_width", "max_ngram", "mu")
    least = args.min_draft_probability
    if least is not None and not 0 <= least <= 1:
        raise ValueError(f"--min-draft-probability must be between 0 and 1, got {least}")
    if args.drafter is None and args.draft is not None:
        args.drafter = "layer-parallel"
    _check_options(args)
    if args.draft is not None:
        config, metadata = read_metadata(args.draft)
        groups = args.layer if args.group_size is None else args.group_size
        args.group_size = partition_of(groups, args.draft, config, metadata)
        check_tokenizers(base_tokenizer, metadata.get("tokenizer"))
    if args.middle is not None:
        check_tokenizers(base_tokenizer, read_metadata(args.middle)[1].get("tokenizer"))


def _check_options(args: argparse.Namespace) -> None:
    given = [name for name in _OPTIONS if getattr(args, name) is not None]
    if args.drafter is None:
        if given:
            who = [kind for kind, k in _KINDS.items() if given[0] in (*_ALL, *k.takes)]
            needed = "--draft" if "layer-parallel" in who else f"--drafter {who[0]}"
            raise ValueError(f"{_flag(given[0])} needs {needed}")
        return
    kind = _KINDS[args.drafter]
    for name in given:
        if name not in (*_ALL, *kind.takes):
            raise ValueError(f"--drafter {args.drafter} does not take {_flag(name)}")
    for names in kind.needs:
        count = sum(name in given for name in names)
        if count != 1:
            either = "" if count == 0 or len(names) == 1 else ", not both"
            flags = " or ".join(map(_flag, names))
            raise ValueError(f"--drafter {args.drafter} needs {flags}{either}")


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def make_decoder(args: argparse.Namespace, load: Callable[..., es.Model]) -> es.Decoder:
    """The base with the drafter of checked arguments, of models that `load(path, **options)`
    brings, loaded or abstract.

    Raises:
      ValueError: this drafter cannot draft for this base.
    """
    base = load(args.base, dtype=args.dtype)
    makers = {
        "layer-parallel": _layer_parallel,
        "prompt-lookup": _prompt_lookup,
        "early-exit": _early_exit,
        "polybasic": _polybasic,
    }
    if args.drafter is None:
        return es.Decoder(base)
    depth = DEPTH if args.drafter != "polybasic" else (args.mu or MU) + DEPTH
    return es.Decoder(
        base,
        makers[args.drafter](args, base, load),
        num_draft_tokens=args.num_draft_tokens or depth,
        tree_width=args.tree_width or 1,
        min_draft_probability=args.min_draft_probability,
    )


def _layer_parallel(args, base, load):
    draft = load(
        args.draft, group_size=args.group_size, dtype=args.dtype, layout=draft_layout(args)
    )
    return es.LayerParallelDrafter(
        draft,
        calibrate=not args.no_calibrate,
        parallel=args.parallel or "attention",
        candidates=args.candidates or "sampled",
    )


def _prompt_lookup(args, base, load):
    return es.PromptLookupDrafter(max_ngram=args.max_ngram or NGRAM)


def _early_exit(args, base, load):
    return es.EarlyExitDrafter(base, exits=args.exits)


def _polybasic(args, base, load):
    if args.middle is not None:
        middle = load(args.middle, dtype=args.dtype)
    elif isinstance(jax.tree.leaves(base)[0], jax.ShapeDtypeStruct):
        middle = load(args.base, dtype=args.dtype)  # a copy takes no more than this
    else:
        from easyspec_jax.quantize import quantize_weights

        middle = quantize_weights(base, bits=args.middle_bits, group_size=GROUP)
    return es.PolybasicDrafter(middle, _layer_parallel(args, base, load), mu=args.mu or MU)

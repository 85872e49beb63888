"""`easyspec info`: what a checkpoint is, what it and a draft weigh, how a mesh and groups split
them, and what the devices would exchange.

Everything is computed from shapes: no weights are read and nothing is allocated. So a config.json
serves as well as a checkpoint.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import math
import pathlib
from typing import TYPE_CHECKING, Any

import jax.numpy as jnp

import easyspec_jax as es
from easyspec_jax import weights
from easyspec_jax.checkpoint import agreed_quantization, stored_quantization
from easyspec_jax.cli.drafting import FIXED_DEPTH, add_option, draft_layout, partition_of
from easyspec_jax.cli.options import (
    MODEL_HELP,
    add_mesh,
    add_quantization,
    add_requests,
    given,
    max_len,
)
from easyspec_jax.memory import check_memory, listed
from easyspec_jax.quantized import wide_type
from easyspec_jax.sharding import LAYER, TENSOR, LayoutRules, make_layout
from easyspec_jax.sources import conversion, read_config
from easyspec_jax.text import has_chat_template, read_generation_config, stop_ids

if TYPE_CHECKING:
    from easyspec_jax.program.collectives import Collective

HELP = "what a checkpoint is, and how it is split"
SHOWN_DTYPES = ("float32", "bfloat16")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The model or the pair, how it drafts, requests and mesh."""
    add = parser.add_argument
    add("checkpoint", help=f"{MODEL_HELP}, or a config.json, of the base")
    add_option(add, "draft", help="that of a draft: what the pair takes on each device")
    add_option(add, "group_size", default=4, help="layers that run at once (default 4)")
    add_option(add, "draft_layout")
    add_option(add, "draft_mlp")
    add_option(add, "draft_quantization")
    add_quantization(add)
    add_option(add, "num_draft_tokens", **FIXED_DEPTH)
    add_option(add, "tree_width")
    add_requests(add, memory=": refuse what does not fit into them in bfloat16")
    add("--collectives", action="store_true", help="compile a step, list what devices exchange")
    add_mesh(add, tensor="heads (default: 1)")


def run(args: argparse.Namespace) -> int:
    """Print what the checkpoint is, how the mesh and the groups of `args` would split it, and what
    it takes on each device, with the draft where there is one.
    """
    if args.draft is None and args.draft_quantization is not None:
        raise ValueError("--draft-quantization needs --draft")
    c, metadata = read_config(args.checkpoint)
    draft, extra = (None, metadata) if args.draft is None else read_config(args.draft)
    grouped = c if draft is None else draft
    mesh = es.make_mesh(args.layer, args.tensor)
    partition = partition_of(args.group_size, args.draft or args.checkpoint, grouped, extra)
    rows = describe(args.checkpoint, c, metadata, args.kv_dtype)
    if draft is not None:
        rows["draft"] = f"{_dimensions(draft)}; {count_parameters(draft):,} parameters"
    rows |= {
        "groups": f"{','.join(map(str, partition))}: {len(partition)} attention steps "
        f"instead of {grouped.num_layers}",
        "mesh": f"{LAYER} {mesh.shape[LAYER]} x {TENSOR} {mesh.shape[TENSOR]}",
        "as base": _splits(make_layout(c, mesh, LayoutRules())),
        "as draft": _splits(make_layout(grouped, mesh, draft_layout(args))),
    }
    tokens = max_len(args, c)
    codes = [
        _codes(args.quantization, metadata, args.checkpoint),
        _codes(args.draft_quantization, {} if draft is None else extra, args.draft),
    ]
    pairs = {d: _decoder(args, c, draft, mesh, partition, d, codes) for d in SHOWN_DTYPES}
    budgets = {
        dtype: pair.memory(args.batch, 1, max_new_tokens=tokens - 1)
        for dtype, pair in pairs.items()
    }
    rows["on a device"] = f"GiB for {args.batch} x {tokens} tokens"
    for dtype, budget in budgets.items():
        rows[f"  {dtype}"] = f"{sum(budget.values()) / 2**30:.2f}: {listed(budget)}"
    for name, value in rows.items():
        print(f"{name:<13}  {value}")
    if args.collectives:
        from easyspec_jax.program.collectives import collectives

        _print_collectives(pairs["float32"], collectives(pairs["float32"], args.batch, tokens))
    if args.device_memory is not None:
        check_memory(mesh, budgets["bfloat16"], free=int(args.device_memory * 2**30))
    return 0


def describe(
    path: str, c: es.ModelConfig, metadata: dict[str, Any], kv_dtype: str | None = None
) -> dict[str, str]:
    """What there is to say of a model itself, by name."""
    rows = {
        "family": c.family + (", tied embedding" if c.tie_embeddings else ""),
        "dimensions": _dimensions(c),
        "parameters": f"{count_parameters(c):,}",
    }
    for dtype in SHOWN_DTYPES:
        size = jnp.dtype(dtype).itemsize
        # of codes a byte each, and a scale for all of a head
        entry = c.head_dim * size if kv_dtype is None else c.head_dim + wide_type(dtype).itemsize
        kv = 2 * c.num_layers * c.num_kv_heads * entry
        weight = f"{count_parameters(c) * size / 1e6:,.1f} MB"
        of_codes = "" if kv_dtype is None else f" of {kv_dtype}"
        rows[dtype] = f"{weight}, KV cache{of_codes} {kv:,} bytes per token"
    codes = stored_quantization(metadata)
    if "dtype" in metadata:
        rows["parameters"] += f", stored as {metadata['dtype']}"
    if codes is not None:
        rows["parameters"] += f", matrices as {codes}"
    if "dtype" not in metadata:  # no checkpoint
        return rows
    path = path if pathlib.Path(path).exists() else str(conversion(path))  # a hub id
    ids = stop_ids(read_generation_config(path), c)
    return rows | {
        "stop ids": ", ".join(map(str, ids)) or "none",
        "tokenizer": metadata.get("tokenizer") or "none (token ids only)",
        "chat template": "yes" if has_chat_template(path) else "no",
    }


def count_parameters(config: es.ModelConfig) -> int:
    """Numbers that a checkpoint stores; a tied head counts once."""
    tables = {weights.LAYER_WEIGHTS: config.num_layers, weights.TOP_WEIGHTS: 1}
    return sum(
        times * math.prod(weight.shape(config))
        for table, times in tables.items()
        for weight in weights.present(table, config).values()
    )


def _dimensions(c: es.ModelConfig) -> str:
    return (
        f"L {c.num_layers}, D {c.embed_dim}, F {c.mlp_dim}, N {c.num_heads}, "
        f"K {c.num_kv_heads}, H {c.head_dim}, V {c.vocab_size}, context {c.max_len}"
    )


def _splits(layout: Any) -> str:
    """Which mesh axes split what, in words."""
    names = {
        "layers of a group": (layout.group,) if layout.group else (),
        "kv heads": layout.kv,
        "query heads of each": layout.query,
        "MLP": layout.mlp,
        "vocabulary": layout.vocab,
    }
    parts = [f"{name} over {' and '.join(axes)}" for name, axes in names.items() if axes]
    return ", ".join(parts) or "whole on every device"


def _codes(
    wanted: str | None, metadata: dict[str, Any], path: str | None
) -> es.Quantization | None:
    """How the matrices of a model are stored on a device that keeps codes."""
    how = agreed_quantization(metadata, wanted, path or "")
    return None if how is None else dataclasses.replace(how, keep_codes=True)


def _decoder(args, base, draft, mesh, partition, dtype, codes) -> es.Decoder:
    """The pair as shapes; the base alone where there is no draft."""
    both = {"dtype": dtype, "kv_dtype": args.kv_dtype}
    model = es.abstract_model(base, mesh, quantization=codes[0], **both)
    if draft is None:
        return es.Decoder(model)
    options = {"group_size": partition, "layout": draft_layout(args), "quantization": codes[1]}
    drafter = es.LayerParallelDrafter(es.abstract_model(draft, mesh, **both, **options))
    return es.Decoder(model, drafter, **given(args, "num_draft_tokens", "tree_width"))


def _print_collectives(decoder: es.Decoder, found: list[Collective]) -> None:
    """A table: per phase and kind of part, what travels how often."""
    runs = collections.Counter({"draft": max(decoder.num_draft_tokens - 1, 1)})
    alike = collections.defaultdict(set)  # parts of a phase and a kind
    rows = collections.Counter()
    for one in found:
        kind = _kind_of_part(decoder, one)
        alike[one.phase, kind].add(one.part)
        rows[one.phase, kind, one.kind, one.bytes] += 1
    print("\nCollectives of a step, as compiled for CPU devices in float32 (activations take half")
    print("as many bytes in bfloat16, logits the same):")
    print(f"{'phase':<11}{'runs':>5}  {'part':<22}{'parts':>5}  {'each has':<20}{'bytes':>12}")
    for (phase, part, kind, size), number in sorted(rows.items(), key=lambda row: row[0][0]):
        parts = len(alike[phase, part])
        has, name = f"{number / parts:g} {kind}", phase or "loop"
        print(f"{name:<11}{runs[phase] or 1:>5}  {part:<22}{parts:>5}  {has:<20}{size:>12,}")
    times = [runs[one.phase] or 1 for one in found]
    sent = sum(n * one.bytes for n, one in zip(times, found, strict=True))
    print(f"in all {sum(times)} collectives and {sent:,} bytes a step")


def _kind_of_part(decoder: es.Decoder, one: Collective) -> str:
    """A part's name; a block's is a layer alone, or the size of its group."""
    if not one.part.startswith("block_"):
        return one.part
    model, drafter = decoder.base, decoder.drafter
    if one.phase != "verify" and isinstance(drafter, es.LayerParallelDrafter):
        model = drafter.draft
    size = model.partition[int(one.part.removeprefix("block_"))]
    return "layer" if size == 1 else f"group of {size}"

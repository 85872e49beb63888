"""`easyspec info`: what a checkpoint is, what it and a draft weigh, how a mesh and groups split
them, and what the devices would exchange.

Everything is computed from shapes: no weights are read and nothing is allocated. So a config.json
serves as well as a checkpoint.
"""

from __future__ import annotations

import argparse
import collections
import json
import math
import pathlib
from typing import Any

import jax.numpy as jnp

import easyspec_jax as es
from easyspec_jax.checkpoint import METADATA_FILE, read_metadata
from easyspec_jax.cli.arguments import DEFAULT_SESSION, check_positive, draft_layout, partition_of
from easyspec_jax.memory import check_memory, listed
from easyspec_jax.planner.program import Collective, collectives
from easyspec_jax.sharding import LAYER, TENSOR, LayoutRules, make_layout
from easyspec_jax.text import has_chat_template, read_generation_config, stop_ids

DTYPES = ("float32", "bfloat16")


def run(args: argparse.Namespace) -> int:
    """Print what the checkpoint is, how the mesh and the groups of `args` would split it, and what
    it takes on each device, with the draft where there is one.
    """
    check_positive(args, "num_draft_tokens", "tree_width", "batch", "max_len")
    if args.device_memory is not None and not 0 < args.device_memory < math.inf:
        raise ValueError(f"--device-memory must be a size above 0, got {args.device_memory:g}")
    c, metadata = read_config(args.checkpoint)
    draft, extra = (None, metadata) if args.draft is None else read_config(args.draft)
    small = c if draft is None else draft
    mesh, rules = es.make_mesh(args.layer, args.tensor), draft_layout(args)
    partition = partition_of(args.group_size, args.draft or args.checkpoint, small, extra)
    rows = describe(args.checkpoint, c, metadata)
    if draft is not None:
        rows["draft"] = f"{_dimensions(draft)}; {count_parameters(draft):,} parameters"
    rows |= {
        "groups": f"{','.join(map(str, partition))}: {len(partition)} attention steps "
        f"instead of {small.num_layers}",
        "mesh": f"{LAYER} {mesh.shape[LAYER]} x {TENSOR} {mesh.shape[TENSOR]}",
        "as base": _splits(make_layout(c, mesh, LayoutRules())),
        "as draft": _splits(make_layout(small, mesh, rules)),
    }
    tokens = args.max_len or min(c.context, DEFAULT_SESSION)
    if not 2 <= tokens <= c.context:
        raise ValueError(f"--max-len must be in 2 .. {c.context}, the base's context, got {tokens}")
    pairs = {dtype: _decoder(args, c, draft, mesh, partition, dtype) for dtype in DTYPES}
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
        _print_collectives(pairs["float32"], collectives(pairs["float32"], args.batch, tokens))
    if args.device_memory is not None:
        check_memory(mesh, budgets["bfloat16"], free=int(args.device_memory * 2**30))
    return 0


def read_config(path: str) -> tuple[es.ModelConfig, dict[str, Any]]:
    """Configuration and metadata of a checkpoint; of a config.json (or the folder it is in) that
    was never converted, no metadata.

    Raises:
      ValueError: it is neither.
    """
    folder = pathlib.Path(path)
    file = folder if folder.is_file() else folder / "config.json"
    if (folder / METADATA_FILE).is_file() or not file.is_file():
        return read_metadata(path)
    try:
        entries = json.loads(file.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{file} is no JSON file: name a checkpoint or a config.json") from error
    if not isinstance(entries, dict):
        raise ValueError(f"{file} is no configuration: name a checkpoint or a config.json")
    return es.ModelConfig.from_hf(entries), {}


def describe(path: str, c: es.ModelConfig, metadata: dict[str, Any]) -> dict[str, str]:
    """What there is to say of a model itself, by name."""
    rows = {
        "family": c.family + (", tied embedding" if c.tie_embeddings else ""),
        "dimensions": _dimensions(c),
        "parameters": f"{count_parameters(c):,}",
    }
    for dtype in DTYPES:
        size = jnp.dtype(dtype).itemsize
        kv = 2 * c.num_layers * c.num_kv_heads * c.head_dim * size
        weight = f"{count_parameters(c) * size / 1e6:,.1f} MB"
        rows[dtype] = f"{weight}, KV cache {kv:,} bytes per token"
    if not metadata:
        return rows
    rows["parameters"] += f", stored as {metadata.get('dtype')}"
    ids = stop_ids(read_generation_config(path), c)
    return rows | {
        "stop ids": ", ".join(map(str, ids)) or "none",
        "tokenizer": metadata.get("tokenizer") or "none (token ids only)",
        "chat template": "yes" if has_chat_template(path) else "no",
    }


def count_parameters(config: es.ModelConfig) -> int:
    """Numbers that a checkpoint stores; a tied head counts once."""
    shapes = [*config.layer_shapes().values()] * config.num_layers + [*config.top_shapes().values()]
    return sum(math.prod(shape) for shape in shapes)


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
    if layout.copy:
        heads = " and ".join(layout.copy.heads) or "no axis"
        parts.append(f"a second copy of the groups' attention with heads over {heads}")
    return ", ".join(parts) or "whole on every device"


def _decoder(args, base, draft, mesh, partition, dtype) -> es.Decoder:
    """The pair as shapes; the base alone where there is no draft."""
    model = es.abstract_model(base, mesh, dtype=dtype)
    if draft is None:
        return es.Decoder(model)
    rules = draft_layout(args)
    small = es.abstract_model(draft, mesh, group_size=partition, dtype=dtype, layout=rules)
    return es.Decoder(
        model,
        es.LayerParallelDrafter(small),
        num_draft_tokens=args.num_draft_tokens,
        tree_width=args.tree_width,
    )


def _print_collectives(decoder: es.Decoder, found: list[Collective]) -> None:
    """A table: per phase and kind of block, what travels how often."""
    runs = {"draft": max(decoder.num_draft_tokens - 1, 1)}
    blocks = collections.Counter()
    rows = collections.Counter()
    for one in found:
        part = one.part
        if part.startswith("block_"):
            part = _block_name(decoder, one.phase, int(part.removeprefix("block_")))
            blocks[one.phase, part, one.part] += 1
        rows[one.phase, part, one.kind, one.bytes] += 1
    counts = collections.Counter((phase, part) for phase, part, _ in blocks)
    print("\nCollectives of a step, as compiled for CPU devices in float32 (activations take half")
    print("as many bytes in bfloat16, logits the same):")
    print(f"{'phase':<11}{'runs':>5}  {'part':<22}{'parts':>5}  {'each has':<20}{'bytes':>12}")
    for (phase, part, kind, size), number in sorted(rows.items(), key=lambda row: row[0][0]):
        times = counts.get((phase, part), 1)
        has = f"{number / times:g} {kind}"
        name = phase or "loop"
        print(f"{name:<11}{runs.get(phase, 1):>5}  {part:<22}{times:>5}  {has:<20}{size:>12,}")
    total = sum(runs.get(one.phase, 1) for one in found)
    sent = sum(runs.get(one.phase, 1) * one.bytes for one in found)
    print(f"in all {total} collectives and {sent:,} bytes a step")


def _block_name(decoder: es.Decoder, phase: str, index: int) -> str:
    """A block's kind: a layer alone, or the size of its group."""
    model = decoder.base if phase == "verify" else decoder.drafter.draft
    size = model.partition[index]
    return "layer" if size == 1 else f"group of {size}"

"""`easyspec info`: what a checkpoint is, what it weighs, and how a mesh and groups would split it.

Everything is computed from shapes: no weights are read and nothing is allocated.
"""

from __future__ import annotations

import argparse
import math

import jax.numpy as jnp

import easyspec_jax as es
from easyspec_jax.checkpoint import abstract_params, read_metadata
from easyspec_jax.sharding import LAYER, TENSOR, device_bytes, make_layout
from easyspec_jax.text import has_chat_template, read_generation_config, stop_ids


def run(args: argparse.Namespace) -> int:
    """Print what the checkpoint is and how the mesh and the groups of `args` would split it."""
    c, metadata = read_metadata(args.checkpoint)
    mesh = es.make_mesh(args.layer, args.tensor)
    partition = es.make_partition(c.num_layers, args.group_size)
    base, draft = (make_layout(c, mesh, layer_parallel=parallel) for parallel in (False, True))
    groups = ",".join(map(str, partition))
    rows = {
        "family": c.family + (", tied embedding" if c.tie_embeddings else ""),
        "dimensions": f"L {c.num_layers}, D {c.embed_dim}, F {c.mlp_dim}, N {c.num_heads}, "
        f"K {c.num_kv_heads}, H {c.head_dim}, V {c.vocab_size}, context {c.max_len}",
        "parameters": f"{count_parameters(c):,}, stored as {metadata.get('dtype')}",
    }
    for dtype in ("float32", "bfloat16"):
        size = jnp.dtype(dtype).itemsize
        kv = 2 * c.num_layers * c.num_kv_heads * c.head_dim * size
        rows[dtype] = f"{_mb(count_parameters(c) * size)}, KV cache {kv:,} bytes per token"
        if mesh.size > 1:
            exact = abstract_params(c, base, (1,) * c.num_layers, dtype)
            grouped = abstract_params(c, draft, partition, dtype)
            both = f"{_mb(device_bytes(exact))} as base, {_mb(device_bytes(grouped))} as draft"
            rows[dtype] += f"; per device {both}"
    ids = stop_ids(read_generation_config(args.checkpoint), c)
    rows |= {
        "stop ids": ", ".join(map(str, ids)) or "none",
        "tokenizer": metadata.get("tokenizer") or "none (token ids only)",
        "chat template": "yes" if has_chat_template(args.checkpoint) else "no",
        "groups": f"{groups}: {len(partition)} attention steps instead of {c.num_layers}",
        "mesh": f"{LAYER} {mesh.shape[LAYER]} x {TENSOR} {mesh.shape[TENSOR]}",
        "as base": _splits(base),
        "as draft": _splits(draft),
    }
    for name, value in rows.items():
        print(f"{name:<13}  {value}")
    return 0


def count_parameters(config: es.ModelConfig) -> int:
    """Numbers that a checkpoint stores; a tied head counts once."""
    shapes = [*config.layer_shapes().values()] * config.num_layers + [*config.top_shapes().values()]
    return sum(math.prod(shape) for shape in shapes)


def _mb(count: int) -> str:
    return f"{count / 1e6:,.1f} MB"


def _splits(layout: es.Layout) -> str:
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

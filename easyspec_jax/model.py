"""The exact model: Llama, Mistral, Qwen2 and Qwen3 as pure functions of parameters, tokens and a KV
cache.

Dimension letters: B batch, T new tokens in this call, S cache capacity, D embed, F mlp, N query
heads, K kv heads, G = N // K query heads per kv head, H head dim, V vocabulary, L layers. Inside
`shard_map` K, G, F and V are the local share. Every weight product leaves a partial sum that is
added up over the axes its layout names, once per attention and once per MLP.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import lax

from easyspec_jax.cache import KVCache, LayerKV
from easyspec_jax.config import ModelConfig
from easyspec_jax.sharding import Layout, psum


@struct.dataclass(kw_only=True)
class Attention:
    """Attention weights of one layer, or of one slot of a group with a leading axis over the mesh
    axis "layer".
    """

    norm: jax.Array  # [D]
    wqkv: (
        jax.Array
    )  # [D, K, G + 2, H]: per kv head its queries, the key, the value; [D, K, G, H] beside a wkv
    wo: jax.Array  # [K, G, H, D]
    wkv: jax.Array | None = (
        None  # [D, K, 2, H], apart only where devices share a kv head but not its query heads
    )
    bqkv: jax.Array | None = None  # as wqkv, without D
    bkv: jax.Array | None = None  # as wkv, without D
    q_norm: jax.Array | None = None  # [H]
    k_norm: jax.Array | None = None  # [H]


@struct.dataclass(kw_only=True)
class Mlp:
    """Gated MLP weights of one layer."""

    norm: jax.Array  # [D]
    w_gate_up: jax.Array  # [D, 2, F]
    w_down: jax.Array  # [F, D]


@struct.dataclass(kw_only=True)
class Block:
    """One layer, or a group of layers whose attentions may run at once.

    Layer j of a group is in slot j // n on device j % n of the mesh axis "layer" (n devices); a
    short last slot is padded with zero layers. Where n = 1 every layer is a slot of its own, not
    stacked.
    """

    attention: tuple[Attention, ...]  # one per slot
    mlp: tuple[Mlp, ...]  # one per layer
    copy: tuple[Attention, ...] = ()  # one per layer, split over all devices: for exact passes


@struct.dataclass(kw_only=True)
class Params:
    """All weights of a model, arranged for its layout."""

    embed: jax.Array | None  # [V, D]; None when tied: the head is read by columns
    blocks: tuple[Block, ...]
    final_norm: jax.Array  # [D]
    lm_head: jax.Array  # [D, V]


@struct.dataclass(kw_only=True)
class Model:
    """Weights with everything static that is needed to run them; a pytree, so a jit argument."""

    params: Params
    config: ModelConfig = struct.field(pytree_node=False)
    layout: Layout = struct.field(pytree_node=False)
    partition: tuple[int, ...] = struct.field(
        pytree_node=False
    )  # layers per block, in order; sums to L
    tokenizer: str | None = struct.field(
        pytree_node=False, default=None
    )  # hash of the ordinary vocabulary

    @property
    def dtype(self) -> jnp.dtype:
        """Type of the weights, of the activations and of the KV cache."""
        return self.params.lm_head.dtype


@struct.dataclass(kw_only=True)
class Step:
    """What all layers of one pass share."""

    start: jax.Array  # i32[B], cache entry of the first new token
    cos: jax.Array  # [B, T, 1, 1, H / 2]
    sin: jax.Array  # the same
    mask: jax.Array  # bool[B, T, S], True where token t of row b may look at cache entry s


@struct.dataclass(kw_only=True)
class Placement:
    """Where T new tokens stand when they are not a chain: nodes of a tree, whose entries fill the
    cache behind `origin` in the order they are run.
    """

    origin: jax.Array  # i32[B], everything before this entry is seen by all T tokens
    positions: jax.Array  # i32[B, T], for the rotary embedding: depth counts, not the entry
    ancestors: jax.Array  # bool[B, T, R], which of the entries origin[b] .. origin[b] + R - 1 too

    def mask(self, max_len: int) -> jax.Array:
        """`Step.mask` for a cache of this capacity, which must hold all R entries."""
        before = jnp.arange(max_len, dtype=jnp.int32)[None, None] < self.origin[:, None, None]
        before = jnp.broadcast_to(before, (*self.ancestors.shape[:2], max_len))

        def put(row, new, start):
            return lax.dynamic_update_slice(row, new, (jnp.zeros_like(start), start))

        return jax.vmap(put)(before, self.ancestors, self.origin)


RunBlock = Callable[
    [Model, Block, jax.Array, tuple[LayerKV, ...], Step], tuple[jax.Array, tuple[LayerKV, ...]]
]


def wide_type(dtype: Any) -> jnp.dtype:
    """The type for norms, softmax, angles and logits: float32, or float64 where the model is."""
    return jnp.dtype(dtype) if jnp.dtype(dtype).itemsize >= 4 else jnp.dtype(jnp.float32)


def rms_norm(x: jax.Array, weight: jax.Array, eps: float) -> jax.Array:
    """x / RMS(x) * weight over the last axis, computed in at least float32."""
    wide = x.astype(wide_type(x.dtype))
    scale = lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + eps)
    return (wide * scale).astype(x.dtype) * weight.reshape((1,) * (x.ndim - 1) + weight.shape)


def rope_frequencies(config: ModelConfig) -> np.ndarray:
    """Angles per position, f64[H / 2], with Llama 3.1's or linear scaling applied."""
    h = config.head_dim
    freq = config.rope_theta ** -(np.arange(0, h, 2, dtype=np.float64) / h)
    scaling = config.rope_scaling
    if scaling is None:
        return freq
    if scaling.kind == "linear":
        return freq / scaling.factor
    # Llama 3.1: long wavelengths are divided by `factor`, short ones kept, others blended.
    turns = scaling.original_max_len * freq / (2 * math.pi)
    keep = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    keep = np.clip(keep, 0.0, 1.0)
    return keep * freq + (1 - keep) * freq / scaling.factor


def rotate(x: jax.Array, step: Step) -> jax.Array:
    """Rotary embedding in the rotate-half convention; x is [B, T, K, G, H]."""
    a, b = jnp.split(x.astype(step.cos.dtype), 2, axis=-1)
    turned = jnp.concatenate((a * step.cos - b * step.sin, b * step.cos + a * step.sin), axis=-1)
    return turned.astype(x.dtype)


def _project_heads(w: Attention, x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Queries [B, T, K, G, H], keys and values [B, T, K, 1, H] of x ([B, T, D]), before norms and
    rotation.
    """

    def project(weight, bias):
        d, k, n, h = weight.shape
        out = (x @ weight.reshape(d, -1)).reshape(*x.shape[:2], k, n, h)
        return out if bias is None else out + bias[None, None]

    heads = project(w.wqkv, w.bqkv)
    if w.wkv is not None:
        return heads, *jnp.split(project(w.wkv, w.bkv), 2, axis=3)
    return tuple(jnp.split(heads, (heads.shape[3] - 2, heads.shape[3] - 1), axis=3))


def attention(
    model: Model, w: Attention, x: jax.Array, kv: LayerKV, step: Step
) -> tuple[jax.Array, LayerKV]:
    """What one attention layer adds to x ([B, T, D]), as a partial sum over `layout.heads`, and its
    cache with x written.

    Writing first and reading the updated cache lets XLA update the donated buffer in place.
    """
    c = model.config
    batch, t, d = x.shape
    q, k, v = _project_heads(w, rms_norm(x, w.norm, c.norm_eps))
    k_heads, groups, h = q.shape[2:]
    if w.q_norm is not None:
        q, k = rms_norm(q, w.q_norm, c.norm_eps), rms_norm(k, w.k_norm, c.norm_eps)
    q, k = rotate(q, step), rotate(k, step)
    by_head = lambda y: y.transpose(2, 0, 1, 3, 4).reshape(k_heads * batch, -1, h)  # noqa: E731
    kv = kv.write(by_head(k), by_head(v), step.start)
    scores = jnp.einsum("xmh,xsh->xms", by_head(q), kv.k, preferred_element_type=step.cos.dtype)
    scores = scores.reshape(k_heads, batch, t, groups, -1) * (h**-0.5)
    scores = jnp.where(step.mask[None, :, :, None, :], scores, jnp.finfo(scores.dtype).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(x.dtype)
    out = jnp.einsum("xms,xsh->xmh", weights.reshape(k_heads * batch, -1, weights.shape[-1]), kv.v)
    out = out.reshape(k_heads, batch, t, groups, h).transpose(1, 2, 0, 3, 4)
    return out.reshape(batch, t, -1) @ w.wo.reshape(-1, d), kv


def mlp(model: Model, w: Mlp, x: jax.Array) -> jax.Array:
    """What one gated MLP adds to x ([B, T, D]), as a partial sum over `layout.mlp`."""
    hidden = rms_norm(x, w.norm, model.config.norm_eps) @ w.w_gate_up.reshape(
        w.w_gate_up.shape[0], -1
    )
    gate, up = jnp.split(hidden, 2, axis=-1)
    return (jax.nn.silu(gate) * up) @ w.w_down


def run_layer(
    model: Model, block: Block, x: jax.Array, kv: tuple[LayerKV, ...], step: Step
) -> tuple[jax.Array, tuple[LayerKV, ...]]:
    """One exact layer: `x` [B, T, D] and its cache after attention and MLP."""
    (attention_weights,), (mlp_weights,) = block.attention, block.mlp
    delta, new = attention(model, attention_weights, x, kv[0], step)
    x = x + psum(delta, model.layout.heads)
    return x + psum(mlp(model, mlp_weights, x), model.layout.mlp), (new,)


def forward(
    model: Model,
    tokens: jax.Array,
    cache: KVCache,
    *,
    num: jax.Array | None = None,
    placement: Placement | None = None,
    run_block: RunBlock = run_layer,
) -> tuple[jax.Array, KVCache]:
    """Run T new tokens behind the cache's `length` entries; the cache then holds them too.

    Args:
      tokens: i32[B, T]. Ids the model has no row for are read as its unknown or padding id.
      cache: consumed; row b is written at length[b] .. length[b] + T - 1, which must lie below
        `max_len`.
      num: i32[B], how many of the T tokens count; the cache's length grows by it. The rest is
        padding. Default T.
      placement: of nodes of a tree. Default: a chain, each token behind the one before.
      run_block: how a block runs; `layer_parallel` has the ways to run groups.

    Returns:
      Hidden states after the final norm, [B, T, D], the same on every device, and the cache.
    """
    t = tokens.shape[1]
    step = make_step(model, cache, t, placement)
    x, blocks = run_blocks(model, embed(model, tokens), cache.blocks, step, run_block=run_block)
    length = cache.length + (t if num is None else num)
    return final_norm(model, x), KVCache(blocks=blocks, length=length)


def make_step(
    model: Model, cache: KVCache, num_new: int, placement: Placement | None = None
) -> Step:
    """What the layers of a pass over `num_new` tokens behind the cache's `length` entries share."""
    if placement is None:
        positions = cache.length[:, None] + jnp.arange(num_new, dtype=jnp.int32)[None]
        seen = jnp.arange(cache.max_len, dtype=jnp.int32)[None, None] <= positions[..., None]
    else:
        positions, seen = placement.positions, placement.mask(cache.max_len)
    wide = wide_type(model.dtype)
    frequencies = jnp.asarray(rope_frequencies(model.config), wide)
    angles = positions.astype(wide)[..., None] * frequencies[None, None]
    angles = angles[:, :, None, None, :]
    return Step(start=cache.length, cos=jnp.cos(angles), sin=jnp.sin(angles), mask=seen)


def run_blocks(
    model: Model,
    x: jax.Array,
    caches: tuple[tuple[LayerKV, ...], ...],
    step: Step,
    *,
    first: int = 0,
    run_block: RunBlock = run_layer,
) -> tuple[jax.Array, tuple[tuple[LayerKV, ...], ...]]:
    """`x` [B, T, D] behind the blocks `first`, `first` + 1, ... whose caches are given, and these
    caches, written.
    """
    written = []
    for index, kv in enumerate(caches, first):
        with jax.named_scope(f"block_{index}"):
            x, kv = run_block(model, model.params.blocks[index], x, kv, step)
        written.append(kv)
    return x, tuple(written)


def final_norm(model: Model, x: jax.Array) -> jax.Array:
    """The norm before the head, of x [..., D]."""
    return rms_norm(x, model.params.final_norm, model.config.norm_eps)


def embed(model: Model, tokens: jax.Array) -> jax.Array:
    """Embeddings [B, T, D] of i32[B, T] ids; each device looks up its share of the vocabulary."""
    c, layout = model.config, model.layout
    unknown = next((i for i in (c.unk_id, c.pad_id) if i is not None and i < c.vocab_size), 0)
    tokens = jnp.where(tokens < c.vocab_size, tokens, unknown)
    table = model.params.embed
    rows = table.shape[0] if table is not None else model.params.lm_head.shape[1]
    local = tokens - lax.axis_index(layout.vocab) * rows if layout.vocab else tokens
    safe = jnp.clip(local, 0, rows - 1)
    found = table[safe] if table is not None else jnp.moveaxis(model.params.lm_head[:, safe], 0, -1)
    mine = (local >= 0) & (local < rows)
    with jax.named_scope("embed"):
        return psum(jnp.where(mine[..., None], found, jnp.zeros((), found.dtype)), layout.vocab)


def logits(model: Model, hidden: jax.Array) -> jax.Array:
    """Scores [B, T, V] over the whole vocabulary, at least float32, the same on every device."""
    wide = wide_type(hidden.dtype)
    out = jnp.einsum("btd,dv->btv", hidden, model.params.lm_head, preferred_element_type=wide)
    if model.layout.vocab:
        with jax.named_scope("logits"):
            return lax.all_gather(out, model.layout.vocab, axis=2, tiled=True, to="invarying")
    return out


# Dimension letters of every array of a checkpoint, for `Layout.spec`.
LETTERS = {
    **{"attn_norm": "D", "mlp_norm": "D", "q_norm": "H", "k_norm": "H"},
    **{"wq": "DKJH", "wk": "DKH", "wv": "DKH", "bq": "KJH", "bk": "KH", "bv": "KH", "wo": "KJHD"},
    **{"w_gate": "DF", "w_up": "DF", "w_down": "FD"},
    **{"embed": "VD", "final_norm": "D", "lm_head": "DV"},
}


def arrange_attention(layer: dict[str, Any], *, split_query: bool) -> Attention:
    """One layer of a checkpoint (`ModelConfig.layer_shapes`) as `Attention`; `split_query` keeps
    queries apart.
    """

    def join(*parts):  # [..., K, G, H] queries, [..., K, H] keys and values
        parts = [
            p if i == 0 and len(parts) == 3 else jnp.expand_dims(p, -2) for i, p in enumerate(parts)
        ]
        return jnp.concatenate(parts, axis=-2)

    has_bias = "bq" in layer
    if split_query:
        projections = {
            "wqkv": layer["wq"],
            "wkv": join(layer["wk"], layer["wv"]),
            "bqkv": layer["bq"] if has_bias else None,
            "bkv": join(layer["bk"], layer["bv"]) if has_bias else None,
        }
    else:
        projections = {
            "wqkv": join(layer["wq"], layer["wk"], layer["wv"]),
            "bqkv": join(layer["bq"], layer["bk"], layer["bv"]) if has_bias else None,
        }
    return Attention(
        norm=layer["attn_norm"],
        wo=layer["wo"],
        q_norm=layer.get("q_norm"),
        k_norm=layer.get("k_norm"),
        **projections,
    )


def arrange_block(layers: list[dict[str, Any]], layout: Layout) -> Block:
    """The layers of one block as checkpoints hold them, fused and, in a group over the axis
    "layer", stacked by slot.
    """
    n, copies, read = layout.group_devices, [], layers
    if layout.stacks(len(layers)):
        if layout.copy:
            apart = bool(layout.copy.query)
            copies = [arrange_attention(layer, split_query=apart) for layer in layers]
        # From parts as they were read to whole layers: the compiler finds no short way by itself.
        read = [
            {
                name: lax.with_sharding_constraint(x, layout.named(LETTERS[name]))
                for name, x in layer.items()
            }
            for layer in layers
        ]
    attentions = [arrange_attention(layer, split_query=bool(layout.query)) for layer in read]
    if layout.stacks(len(layers)):
        nothing = jax.tree.map(jnp.zeros_like, attentions[0])
        attentions += [nothing] * (-len(layers) % n)
        attentions = [
            jax.tree.map(lambda *leaves: jnp.stack(leaves), *attentions[i : i + n])
            for i in range(0, len(attentions), n)
        ]
    mlps = [
        Mlp(
            norm=layer["mlp_norm"],
            w_gate_up=jnp.stack((layer["w_gate"], layer["w_up"]), axis=1),
            w_down=layer["w_down"],
        )
        for layer in layers
    ]
    return Block(attention=tuple(attentions), mlp=tuple(mlps), copy=tuple(copies))


def separate_block(block: Block, layout: Layout) -> list[dict[str, Any]]:
    """The layers of a block as checkpoints hold them: `arrange_block` undone."""
    n, stacked = layout.group_devices, layout.stacks(len(block.mlp))
    layers = []
    for j, mlp in enumerate(block.mlp):
        one = block.attention[j // n if stacked else j]
        if stacked:
            one = jax.tree.map(lambda leaf, j=j: leaf[j % n], one)
        gate_up = {"w_gate": mlp.w_gate_up[:, 0], "w_up": mlp.w_gate_up[:, 1]}
        layers.append(
            _separate_attention(one) | gate_up | {"mlp_norm": mlp.norm, "w_down": mlp.w_down}
        )
    return layers


def _separate_attention(w: Attention) -> dict[str, Any]:
    def split(heads, apart):
        """Queries [..., K, G, H], keys and values [..., K, H]."""
        q, kv = (heads, apart) if apart is not None else (heads[..., :-2, :], heads[..., -2:, :])
        return q, kv[..., 0, :], kv[..., 1, :]

    layer = {"attn_norm": w.norm, "wo": w.wo, "q_norm": w.q_norm, "k_norm": w.k_norm}
    layer |= dict(zip(("wq", "wk", "wv"), split(w.wqkv, w.wkv), strict=True))
    if w.bqkv is not None:
        layer |= dict(zip(("bq", "bk", "bv"), split(w.bqkv, w.bkv), strict=True))
    return {name: array for name, array in layer.items() if array is not None}


def block_specs(config: ModelConfig, layout: Layout, size: int) -> Block:
    """The PartitionSpecs of `arrange_block` for a block of `size` layers."""

    def attention(layout, lead):
        apart = bool(layout.query)
        return Attention(
            norm=layout.spec(lead + "D"),
            wqkv=layout.spec(lead + "DKJH"),
            wo=layout.spec(lead + "KJHD"),
            wkv=layout.spec(lead + "DKEH") if apart else None,
            bqkv=layout.spec(lead + "KJH") if config.qkv_bias else None,
            bkv=layout.spec(lead + "KEH") if apart and config.qkv_bias else None,
            q_norm=layout.spec(lead + "H") if config.qk_norm else None,
            k_norm=layout.spec(lead + "H") if config.qk_norm else None,
        )

    mlps = Mlp(norm=layout.spec("D"), w_gate_up=layout.spec("DEF"), w_down=layout.spec("FD"))
    if not layout.stacks(size):
        return Block(attention=(attention(layout, ""),) * size, mlp=(mlps,) * size)
    return Block(
        attention=(attention(layout, "L"),) * -(-size // layout.group_devices),
        mlp=(mlps,) * size,
        copy=(attention(layout.copy, ""),) * size if layout.copy else (),
    )

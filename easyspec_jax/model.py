"""The exact model: Llama, Mistral, Qwen2 and Qwen3 as pure functions of parameters, tokens and a KV
cache.

Dimension letters: B batch, T new tokens in this call, S cache capacity, D embed, F mlp, N query
heads, K kv heads, G = N // K query heads per kv head, H head dim, V vocabulary, L layers. Inside
`shard_map` K, G, F and V are the local share. Every weight product leaves a partial sum that is
added up over the axes its layout names, once per attention and once per MLP.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import lax

from easyspec_jax import quantized, weights
from easyspec_jax.attend import attend, attend_cudnn
from easyspec_jax.cache import KVCache, LayerKV, abstract_cache
from easyspec_jax.config import ModelConfig
from easyspec_jax.quantized import Quantization, Quantized, look_up, wide_type
from easyspec_jax.sampling import Scores
from easyspec_jax.sharding import Layout, Placed, psum
from easyspec_jax.weights import Attention, Block, Mlp, Params


class Model(Placed, struct.PyTreeNode, kw_only=True):
    """Weights with everything static that is needed to run them; a pytree, so a jit argument."""

    params: Params
    config: ModelConfig = struct.field(pytree_node=False)
    layout: Layout = struct.field(pytree_node=False)
    # layers per block, in order; sums to L
    partition: tuple[int, ...] = struct.field(pytree_node=False)
    # how its matrices are stored, where they are codes
    quantization: Quantization | None = struct.field(pytree_node=False, default=None)
    # hash of the ordinary vocabulary
    tokenizer: str | None = struct.field(pytree_node=False, default=None)

    @property
    def dtype(self) -> jnp.dtype:
        """Type of the activations, of the KV cache, of norms, and of matrices but for codes and
        those that a CPU keeps in bfloat16.
        """
        return self.params.final_norm.dtype

    def abstract_cache(self, batch: int, max_len: int) -> KVCache:
        """Shapes and shardings of its empty KV cache, as ShapeDtypeStructs."""
        return abstract_cache(self.config, self.layout, self.partition, batch, max_len, self.dtype)

    def specs(self) -> Model:
        """The PartitionSpec of every array; a model may be without some that its config names."""
        params = weights.specs(self.config, self.layout, self.partition, self.quantization)
        there = lambda x, spec: None if x is None else spec  # noqa: E731
        params = jax.tree.map(there, self.params, params, is_leaf=lambda x: x is None)
        return self.replace(params=params)

    def own(self) -> Model:
        """This device's layer of every stacked slot."""

        def own(block: Block) -> Block:
            if not self.layout.stacks(len(block.mlp)):
                return block
            mine = jax.tree.map(lambda leaf: leaf.reshape(leaf.shape[1:]), block.attention)
            return block.replace(attention=mine)

        blocks = tuple(map(own, self.params.blocks))
        return self.replace(params=self.params.replace(blocks=blocks))


class Step(struct.PyTreeNode, kw_only=True):
    """What all layers of one pass share."""

    start: jax.Array  # i32[B], cache entry of the first new token
    cos: jax.Array  # [B, T, 1, 1, H / 2]
    sin: jax.Array  # the same
    mask: jax.Array  # bool[B, T, S], True where token t of row b may look at cache entry s


class Placement(struct.PyTreeNode, kw_only=True):
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


def rms_norm(x: jax.Array, weight: jax.Array, eps: float) -> jax.Array:
    """x / RMS(x) * weight over the last axis, computed in at least float32."""
    wide = x.astype(wide_type(x.dtype))
    scale = lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + eps)
    return (wide * scale).astype(x.dtype) * weight.reshape((1,) * (x.ndim - 1) + weight.shape)


def product(model: Model, x: jax.Array, w: jax.Array | Quantized) -> jax.Array:
    """x [B, T, I] times a matrix of the model that has I inputs, in at least float32: [B, T, O]."""
    layout = model.layout
    return quantized.product(
        x, w, outputs_first=layout.outputs_first, explicit_gemv=layout.explicit_gemv
    )


def normed(model: Model, x: jax.Array, weight: jax.Array | None) -> tuple[jax.Array, jax.Array]:
    """Two factors of `rms_norm`(x): an array like x for a product, and what to multiply the
    product by, [B, T, 1]. On GPUs the second is the scale: that saves a kernel. Without a weight x
    stays as it is.
    """
    wide, eps = x.astype(wide_type(x.dtype)), model.config.norm_eps
    if weight is None:
        return x, jnp.ones((1, 1, 1), wide.dtype)
    if not model.layout.for_gpu or x.dtype == jnp.float16:  # x * weight may be too large for it
        return rms_norm(x, weight, eps), jnp.ones((1, 1, 1), wide.dtype)
    scale = lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + eps)
    return x * weight[None, None], scale


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


def _project_heads(
    model: Model, w: Attention, x: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Queries [B, T, K, G, H], keys and values [B, T, K, 1, H] of x ([B, T, D]), not rotated."""
    row, scale = normed(model, x, w.norm)

    def project(weight, bias):
        out = (product(model, row, weight) * scale).astype(x.dtype)
        outputs = weight.shape[:-1] if model.layout.outputs_first else weight.shape[1:]
        out = out.reshape(*x.shape[:2], *outputs)
        return out if bias is None else out + bias[None, None]

    heads = project(w.wqkv, w.bqkv)
    if w.wkv is not None:
        query, (key, value) = heads, jnp.split(project(w.wkv, w.bkv), 2, axis=3)
    else:
        query, key, value = jnp.split(heads, (heads.shape[3] - 2, heads.shape[3] - 1), axis=3)
    if w.q_norm is not None:
        eps = model.config.norm_eps
        query, key = rms_norm(query, w.q_norm, eps), rms_norm(key, w.k_norm, eps)
    return query, key, value


def attention(
    model: Model,
    w: Attention,
    x: jax.Array,
    kv: LayerKV,
    step: Step,
    keep: jax.Array | None = None,
) -> tuple[jax.Array, LayerKV]:
    """What one attention layer adds to x ([B, T, D]), as a partial sum over `layout.heads`, and its
    cache with x written.

    Writing first and reading the updated cache lets XLA update the donated buffer in place.

    Args:
      keep: bool[], True where the cache stays as it is; None: it is written.
    """
    (delta,), (kv,) = attentions(model, (w,), x, (kv,), step, keep)
    return delta, kv


def attentions(
    model: Model,
    weights: Sequence[Attention],
    x: jax.Array,
    kv: Sequence[LayerKV],
    step: Step,
    keep: jax.Array | None = None,
) -> tuple[list[jax.Array], list[LayerKV]]:
    """The same of several layers that all read x."""
    batch, t, _ = x.shape
    find = attend_cudnn if model.layout.attention == "cudnn" else attend
    by_head = lambda y: y.transpose(2, 0, 1, 3, 4).reshape(y.shape[2] * batch, -1, h)  # noqa: E731
    h, found, written = model.config.head_dim, [], []
    for w, cache in zip(weights, kv, strict=True):
        q, k, v = _project_heads(model, w, x)
        new = by_head(rotate(k, step)), by_head(v)
        written.append(cache.write(*new, step.start, keep))
        found.append(find(by_head(rotate(q, step)), written[-1], step.mask))
    if len(found) > 1 and batch * t == 1 and model.layout.for_gpu:  # one kernel for all products
        found = jnp.split(lax.optimization_barrier(jnp.concatenate(found)), len(found))

    def output(w, y):
        y = y.reshape(-1, batch, t, *q.shape[3:]).transpose(1, 2, 0, 3, 4)
        return product(model, y.reshape(batch, t, -1), w.wo).astype(x.dtype)

    return [output(w, y) for w, y in zip(weights, found, strict=True)], written


def mlp(model: Model, w: Mlp, x: jax.Array) -> jax.Array:
    """What one gated MLP adds to x ([B, T, D]), as a partial sum over `layout.mlp`."""
    row, scale = normed(model, x, w.norm)
    hidden = (product(model, row, w.w_gate_up) * scale).astype(x.dtype)
    gate, up = jnp.split(hidden, 2, axis=-1)
    return product(model, jax.nn.silu(gate) * up, w.w_down).astype(x.dtype)


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
      Hidden states before the final norm, [B, T, D], the same on every device, and the cache.
    """
    return forward_tapped(
        model, tokens, cache, (), num=num, placement=placement, run_block=run_block
    )[:2]


def forward_tapped(
    model: Model,
    tokens: jax.Array,
    cache: KVCache,
    taps: tuple[int, ...],
    *,
    num: jax.Array | None = None,
    placement: Placement | None = None,
    run_block: RunBlock = run_layer,
) -> tuple[jax.Array, KVCache, jax.Array | None]:
    """`forward`, and the residual stream at the taps, [B, T, taps, D]; None where there are none.

    Args:
      taps: numbers of blocks (of a model that is not in groups: layers); the stream before each of
        them, and before the final norm for the number of all.
    """
    t, total = tokens.shape[1], len(cache.blocks)
    step = make_step(model, cache, t, placement)
    x, blocks, streams = embed(model, tokens), (), {}
    for first, end in itertools.pairwise(sorted({0, *taps, total})):
        streams[first] = x
        some = cache.blocks[first:end]
        x, written = run_blocks(model, x, some, step, first=first, run_block=run_block)
        blocks += written
    streams[total] = x
    features = jnp.stack([streams[i] for i in taps], axis=2) if taps else None
    length = cache.length + (t if num is None else num)
    return x, cache.replace(blocks=blocks, length=length), features


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
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    if model.layout.for_gpu:  # one kernel
        cos, sin = lax.optimization_barrier(jnp.stack((cos, sin)))
    return Step(start=cache.length, cos=cos, sin=sin, mask=seen)


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


def embed(model: Model, tokens: jax.Array) -> jax.Array:
    """Embeddings [B, T, D] of i32[B, T] ids; each device looks up its share of the vocabulary."""
    c, layout = model.config, model.layout
    unknown = next((i for i in (c.unk_id, c.pad_id) if i is not None and i < c.vocab_size), 0)
    tokens = jnp.where(tokens < c.vocab_size, tokens, unknown)
    table, axis = model.params.embed, 0
    if table is None:
        table, axis = model.params.lm_head, 0 if layout.outputs_first else 1
    rows = table.shape[axis]
    local = tokens - lax.axis_index(layout.vocab) * rows if layout.vocab else tokens
    safe = jnp.clip(local, 0, rows - 1)
    found = look_up(table, safe, axis, model.dtype)
    mine = (local >= 0) & (local < rows)
    with jax.named_scope("embed"):
        return psum(jnp.where(mine[..., None], found, jnp.zeros((), found.dtype)), layout.vocab)


def score(model: Model, hidden: jax.Array) -> Scores:
    """Logits of hidden states [B, T, D] as `forward` leaves them, at least float32: norm and head,
    each device's share of the vocabulary.
    """
    row, scale = normed(model, hidden, model.params.final_norm)
    share = product(model, row, model.params.lm_head) * scale
    return Scores(share=share, axes=model.layout.vocab, vocab_size=model.config.vocab_size)


def logits(model: Model, hidden: jax.Array) -> jax.Array:
    """The same whole on every device, [B, T, V]."""
    return score(model, hidden).whole()

"""The head that is trained (EAGLE-3), as pure functions of its weights and packed texts.

A pair is the embedding of token p and a feature g of the base behind token p - 1: one layer makes
of pairs the hidden state that says token p + 1. Behind the first draft token the base's feature is
missing, and the head's own last state stands in its place; so training runs the layer once for each
depth on what the depth before gave, and shows a query just the entries that it would find then.

Letters as in `model.py`; A queries of a row, J depths. Names and shapes are those of SafeAILab's
checkpoints, but matrices have their inputs first.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from easyspec_jax import weights
from easyspec_jax.config import ModelConfig
from easyspec_jax.model import Model, Step, rms_norm, rope_frequencies, rotate
from easyspec_jax.quantized import Quantized, dequantise, wide_type

ATTENTION, MLP = "midlayer.self_attn.", "midlayer.mlp."
EMBED_RESIDUAL = "embed_residual.weight"  # ours: others add no embedding to the residual stream

Head = dict[str, Any]  # tensors by name


class Texts(struct.PyTreeNode, kw_only=True):
    """Token sequences packed into rows of one length, and which positions of them are learnt."""

    tokens: Any  # i32[B, T]
    segment: Any  # i32[B, T], which sequence of its row a token is of; -1: padding
    position: Any  # i32[B, T], in its sequence
    # i32[B, A], places of the tokens whose next token is one of an answer; those of a sequence are
    # side by side
    query: Any
    since: Any  # i32[B, A], how many queries of the same sequence stand before; -1: padding


class Features(struct.PyTreeNode, kw_only=True):
    """What the base makes of `Texts`."""

    embedding: Any  # [B, T, D] of the tokens
    taps: Any  # [B, T, I], its residual stream before some layers, side by side
    hidden: Any  # [B, A, D] at the queries, behind the final norm
    greedy: Any  # i32[B, A], the likeliest next token


def start_head(base: Model, sizes: np.ndarray, *, embed_residual: bool, seed: int = 0) -> Head:
    """A head to begin with: the base's last layer behind its last tap.

    Args:
      sizes: f32[taps, D], RMS of each number of each tap. `fc` reads taps divided by them, and
        makes a residual stream of RMS 1 of the last: what the layer adds is as much smaller.
      embed_residual: whether embeddings are added to the residual stream too.
    """
    config = base.config
    block, layout = base.params.blocks[-1], base.layout
    separate = jax.jit(lambda b: _floats(weights.separate_block(b, layout)[-1]))
    w = {name: np.asarray(x, np.float32) for name, x in jax.device_get(separate(block)).items()}
    d, draw = config.embed_dim, np.random.default_rng(seed)
    whole = np.sqrt(np.mean(np.square(sizes[-1])))
    fc = np.zeros((len(sizes), d, d), np.float32)
    fc[-1] = np.diag(sizes[-1] / whole)
    head: Head = {"fc.weight": fc.reshape(-1, d)}
    head["midlayer.input_layernorm.weight"] = np.ones(d, np.float32)
    head["midlayer.hidden_norm.weight"] = w["attn_norm"]
    head["midlayer.post_attention_layernorm.weight"] = w["mlp_norm"]
    head["norm.weight"] = np.asarray(base.params.final_norm, np.float32)
    for name in "qkv":
        own = w[f"w{name}"].reshape(d, -1)
        new = 0.1 * own.std() * draw.standard_normal(own.shape, np.float32)
        head[f"{ATTENTION}{name}_proj.weight"] = np.concatenate((new, own))
    head[f"{ATTENTION}o_proj.weight"] = w["wo"].reshape(-1, d) / whole
    head |= {f"{MLP}gate_proj.weight": w["w_gate"], f"{MLP}up_proj.weight": w["w_up"]}
    head[f"{MLP}down_proj.weight"] = w["w_down"] / whole
    if embed_residual:
        head[EMBED_RESIDUAL] = np.zeros((d, d), np.float32)
    return head


def _floats(layer: dict[str, Any]) -> dict[str, Any]:
    codes = lambda x: dequantise(x) if isinstance(x, Quantized) else x  # noqa: E731
    return {name: codes(x).astype(jnp.float32) for name, x in layer.items() if x is not None}


def run_head(
    head: Head, config: ModelConfig, texts: Texts, embedding: Any, taps: Any, num_depths: int
) -> list[jax.Array]:
    """Hidden states of the queries at depths 0, 1, ...: [B, A, D] each, before the last norm.

    At depth j a query at position p stands j tokens behind the last feature of the base: it looks
    at the pairs up to p - j, and at those that depths 1 .. j made of the head's own states.

    Args:
      taps: as the `fc` of this head reads them.
    """
    e = rms_norm(embedding, head["midlayer.input_layernorm.weight"], config.norm_eps)
    g = _behind(taps @ head["fc.weight"], 1)  # pairs of first tokens have none: nobody sees them
    ours = lambda x: jnp.take_along_axis(x, texts.query[..., None], axis=1)  # noqa: E731
    own, e_own, g_own = ours(_pair(head, config, e, g)), ours(e), ours(g)
    positions = jnp.take_along_axis(texts.position, texts.query, axis=1)
    angles, angles_own = _angles(config, texts.position, e), _angles(config, positions, e)
    key, value = _keys(head, config, _pair(head, config, e, g), angles)
    states, made = [], []
    for depth in range(num_depths):
        if depth:
            g_own = _behind(states[-1], 1)
            own = _pair(head, config, e_own, g_own)
            made.append(_keys(head, config, own, angles_own))
        query = rotate(_project(head, config, "q", own), angles_own)
        diagonal = [tuple(_behind(x, depth - i) for x in kv) for i, kv in enumerate(made, 1)]
        found = _attend(query, key, value, diagonal, _mask(texts, positions, depth))
        x = g_own + found @ head[f"{ATTENTION}o_proj.weight"]
        if EMBED_RESIDUAL in head:
            x = x + e_own @ head[EMBED_RESIDUAL]
        states.append(x + _mlp(head, config, x))
    return states


def logits(head: Head, config: ModelConfig, state: jax.Array, rows: jax.Array) -> jax.Array:
    """Logits [B, A, V'] of hidden states over the draft's vocabulary; its rows are [V', D]."""
    return rms_norm(state, head["norm.weight"], config.norm_eps) @ rows.T


def _pair(head: Head, config: ModelConfig, e: jax.Array, g: jax.Array) -> jax.Array:
    """What projections read of normed embeddings and of features."""
    normed = rms_norm(g, head["midlayer.hidden_norm.weight"], config.norm_eps)
    return jnp.concatenate((e, normed), axis=-1)


def _project(head: Head, config: ModelConfig, name: str, x: jax.Array) -> jax.Array:
    """[B, T, K, G, H]; G is 1 for keys and values."""
    out = x @ head[f"{ATTENTION}{name}_proj.weight"]
    return out.reshape(*x.shape[:2], config.num_kv_heads, -1, config.head_dim)


def _keys(head: Head, config: ModelConfig, x: jax.Array, angles: Step) -> tuple[Any, Any]:
    """Keys and values of pairs, [B, T, K, H] each."""
    key = rotate(_project(head, config, "k", x), angles)
    return key[:, :, :, 0], _project(head, config, "v", x)[:, :, :, 0]


def _angles(config: ModelConfig, position: jax.Array, like: jax.Array) -> Step:
    """Rotations at positions [B, T]."""
    wide = wide_type(like.dtype)
    frequencies = jnp.asarray(rope_frequencies(config), wide)
    angles = position.astype(wide)[:, :, None, None, None] * frequencies[None, None, None, None]
    return Step(start=position[:, 0], cos=jnp.cos(angles), sin=jnp.sin(angles), mask=position)


def _behind(x: jax.Array, steps: int) -> jax.Array:
    """x [B, T, ..] as the places `steps` further see it; the first see zeros."""
    if not steps:
        return x
    empty = jnp.zeros((x.shape[0], steps, *x.shape[2:]), x.dtype)
    return jnp.concatenate((empty, x[:, :-steps]), axis=1)


def _mask(texts: Texts, positions: jax.Array, depth: int) -> jax.Array:
    """bool[B, A, T]: which pairs with features of the base a query may look at."""
    segment = jnp.take_along_axis(texts.segment, texts.query, axis=1)
    same = segment[:, :, None] == texts.segment[:, None]
    known = texts.position[:, None] <= positions[:, :, None] - depth
    return same & known & (texts.position[:, None] >= 1)


def _attend(query, key, value, diagonal, mask) -> jax.Array:
    """What queries [B, A, K, G, H] find among keys [B, T, K, H] and in entries of their own, a pair
    of [B, A, K, H] each: [B, A, N * H].
    """
    scale = query.shape[-1] ** -0.5
    scores = jnp.einsum("bakgh,btkh->bkgat", query, key) * scale
    scores = jnp.where(mask[:, None, None], scores, jnp.finfo(scores.dtype).min)
    beside = [jnp.einsum("bakgh,bakh->bkga", query, k)[..., None] * scale for k, _ in diagonal]
    shares = jax.nn.softmax(jnp.concatenate((scores, *beside), axis=-1), axis=-1)
    size = key.shape[1]
    found = jnp.einsum("bkgat,btkh->bakgh", shares[..., :size], value)
    for i, (_, v) in enumerate(diagonal):
        found = found + jnp.einsum("bkga,bakh->bakgh", shares[..., size + i], v)
    return found.reshape(*found.shape[:2], -1)


def _mlp(head: Head, config: ModelConfig, x: jax.Array) -> jax.Array:
    row = rms_norm(x, head["midlayer.post_attention_layernorm.weight"], config.norm_eps)
    gate = jax.nn.silu(row @ head[f"{MLP}gate_proj.weight"])
    return (gate * (row @ head[f"{MLP}up_proj.weight"])) @ head[f"{MLP}down_proj.weight"]

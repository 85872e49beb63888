"""The models written down slowly and plainly, to compare the library with.

Float64 numpy, one device, whole sequences, loops over rows and heads; nothing here is shared with
the library but the field names of `ModelConfig`. Weights come from Hugging Face tensors, as
transformers names and orients them. At the end stands the one way in which the tests call the
library's own forward.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from easyspec_jax.cache import KVCache
from easyspec_jax.config import ModelConfig
from easyspec_jax.model import Model, forward, logits, run_layer
from easyspec_jax.sharding import mesh_jit, zeros

Layer = dict[str, np.ndarray]


@dataclasses.dataclass
class Weights:
    """A model as checkpoints hold it: `LAYER_WEIGHTS` for each layer, and `TOP_WEIGHTS`."""

    layers: list[Layer]
    top: Layer


@dataclasses.dataclass
class Output:
    """What one pass over a sequence gives."""

    logits: np.ndarray  # [B, T, V]
    keys: list[np.ndarray]  # per layer [B, S, K, H], rotated; S counts the past too
    values: list[np.ndarray]


def from_hf(config: ModelConfig, tensors: dict[str, np.ndarray]) -> Weights:
    """Float64 weights in the shapes of a checkpoint, from Hugging Face tensors ([out, in])."""
    d, h, k = config.embed_dim, config.head_dim, config.num_kv_heads
    g = config.num_heads // k
    tensors = {name: np.asarray(x).astype(np.float64) for name, x in tensors.items()}
    layers = []
    for i in range(config.num_layers):
        get = lambda name, i=i: tensors.get(f"model.layers.{i}.{name}")  # noqa: E731
        layer = {
            "attn_norm": get("input_layernorm.weight"),
            "wq": get("self_attn.q_proj.weight").T.reshape(d, k, g, h),
            "wk": get("self_attn.k_proj.weight").T.reshape(d, k, h),
            "wv": get("self_attn.v_proj.weight").T.reshape(d, k, h),
            "wo": get("self_attn.o_proj.weight").T.reshape(k, g, h, d),
            "mlp_norm": get("post_attention_layernorm.weight"),
            "w_gate": get("mlp.gate_proj.weight").T,
            "w_up": get("mlp.up_proj.weight").T,
            "w_down": get("mlp.down_proj.weight").T,
        }
        if get("self_attn.q_proj.bias") is not None:
            layer["bq"] = get("self_attn.q_proj.bias").reshape(k, g, h)
            layer["bk"] = get("self_attn.k_proj.bias").reshape(k, h)
            layer["bv"] = get("self_attn.v_proj.bias").reshape(k, h)
        if get("self_attn.q_norm.weight") is not None:
            layer["q_norm"] = get("self_attn.q_norm.weight")
            layer["k_norm"] = get("self_attn.k_norm.weight")
        layers.append(layer)
    top = {
        "embed": tensors["model.embed_tokens.weight"],
        "final_norm": tensors["model.norm.weight"],
    }
    if "lm_head.weight" in tensors:
        top["lm_head"] = tensors["lm_head.weight"].T
    return Weights(layers, top)


def run(
    config: ModelConfig,
    weights: Weights,
    tokens: np.ndarray,
    *,
    partition: Sequence[int] | None = None,
    parallel: str = "attention",
    past: Output | None = None,
) -> Output:
    """A pass over `tokens` ([B, T]) behind `past`.

    The layers of each block of `partition` run at once, as `parallel` says; None runs them exactly.
    """
    tokens = np.asarray(tokens)
    first = past.keys[0].shape[1] if past is not None else 0
    partition = partition or (1,) * config.num_layers
    x = weights.top["embed"][tokens]
    keys, values = [], []
    i = 0
    for size in partition:
        group = range(i, i + size)
        before = [(past.keys[j], past.values[j]) if past is not None else None for j in group]
        layers = [weights.layers[j] for j in group]
        # every attention of a group reads the x from before the group
        out = [
            _attention(config, layer, x, first, old)
            for layer, old in zip(layers, before, strict=True)
        ]
        deltas = [delta for delta, _, _ in out]
        if size == 1 or parallel == "attention":
            for layer, delta in zip(layers, deltas, strict=True):
                x = x + delta
                x = x + _mlp(config, layer, x)
        else:
            # so does every MLP, with its own attention added, or all up to its own ("indirect");
            # what all of them add is summed
            seen = [deltas[0 if parallel == "indirect" else j : j + 1] for j in range(size)]
            x = x + sum(
                delta + _mlp(config, layer, x + sum(before))
                for layer, delta, before in zip(layers, deltas, seen, strict=True)
            )
        keys += [k for _, k, _ in out]
        values += [v for _, _, v in out]
        i += size
    x = _norm(x, weights.top["final_norm"], config.norm_eps)
    head = weights.top["lm_head"] if "lm_head" in weights.top else weights.top["embed"].T
    return Output(x @ head, keys, values)


def _norm(x, weight, eps):
    return x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + eps) * weight


def _mlp(config, w, x):
    x = _norm(x, w["mlp_norm"], config.norm_eps)
    gate = x @ w["w_gate"]
    return (gate / (1 + np.exp(-gate)) * (x @ w["w_up"])) @ w["w_down"]


def _rotate(config, x, first):
    """Entries i and i + H / 2 of a head are one complex number, turned by its position."""
    h = config.head_dim
    turned = np.empty_like(x)
    for i in range(h // 2):
        frequency = _frequency(config, config.rope_theta ** (-2 * i / h))
        for t in range(x.shape[1]):
            z = (x[:, t, ..., i] + 1j * x[:, t, ..., i + h // 2]) * np.exp(
                1j * (first + t) * frequency
            )
            turned[:, t, ..., i], turned[:, t, ..., i + h // 2] = z.real, z.imag
    return turned


def _frequency(config, frequency):
    scaling = config.rope_scaling
    if scaling is None:
        return frequency
    if scaling.kind == "linear":
        return frequency / scaling.factor
    # Llama 3.1, as published: in terms of the wavelength
    wavelength = 2 * math.pi / frequency
    longest = scaling.original_max_len / scaling.low_freq_factor
    shortest = scaling.original_max_len / scaling.high_freq_factor
    if wavelength < shortest:
        return frequency
    if wavelength > longest:
        return frequency / scaling.factor
    smooth = (scaling.original_max_len / wavelength - scaling.low_freq_factor) / (
        scaling.high_freq_factor - scaling.low_freq_factor
    )
    return (1 - smooth) * frequency / scaling.factor + smooth * frequency


def _attention(config, w, x, first, past):
    """What attention adds to x ([B, T, D]), and all keys and values it sees, [B, S, K, H]."""
    batch, t, d = x.shape
    h, num_kv, num_groups = config.head_dim, w["wq"].shape[1], w["wq"].shape[2]
    y = _norm(x, w["attn_norm"], config.norm_eps)
    q = (y @ w["wq"].reshape(d, -1)).reshape(batch, t, num_kv, num_groups, h) + w.get("bq", 0.0)
    k = (y @ w["wk"].reshape(d, -1)).reshape(batch, t, num_kv, h) + w.get("bk", 0.0)
    v = (y @ w["wv"].reshape(d, -1)).reshape(batch, t, num_kv, h) + w.get("bv", 0.0)
    if "q_norm" in w:
        q, k = _norm(q, w["q_norm"], config.norm_eps), _norm(k, w["k_norm"], config.norm_eps)
    q, k = _rotate(config, q, first), _rotate(config, k, first)
    if past is not None:
        k, v = np.concatenate((past[0], k), axis=1), np.concatenate((past[1], v), axis=1)
    out = np.zeros_like(x)
    for b in range(batch):
        for head in range(num_kv * num_groups):
            kv, group = divmod(head, num_groups)
            for i in range(t):
                seen = first + i + 1
                scores = k[b, :seen, kv] @ q[b, i, kv, group] / math.sqrt(h)
                weights = np.exp(scores - scores.max())
                weights /= weights.sum()
                out[b, i] += (weights @ v[b, :seen, kv]) @ w["wo"][kv, group]
    return out, k, v


# --- the library's forward, as the tests call it ---


def empty_cache(model: Model, batch: int, max_len: int, fill: float = 0.0) -> KVCache:
    """A cache with no committed tokens; every entry holds `fill`."""
    cache = zeros(model.abstract_cache(batch, max_len))
    if not fill:
        return cache
    blocks = jax.tree.map(
        lambda x: jnp.full(x.shape, fill, x.dtype, device=x.sharding), cache.blocks
    )
    return cache.replace(blocks=blocks)


def run_library(model: Model, tokens, cache: KVCache, *, num=None, run_block=run_layer):
    """Logits [B, T, V] and the new cache of the library's forward on the model's mesh."""
    tokens = np.asarray(tokens, np.int32)
    num = np.broadcast_to(np.int32(tokens.shape[1] if num is None else num), tokens.shape[:1])
    return _run(model, tokens, cache, num, run_block=run_block)


@mesh_jit(
    out=(None, "cache"),
    static_argnames="run_block",
    compiler_options={"xla_backend_optimization_level": 0},  # half the time; the HLO stays
)
def _run(model, tokens, cache, num, *, run_block):
    hidden, new = forward(model, tokens, cache, num=num, run_block=run_block)
    return logits(model, hidden), new


def compiled_text(model: Model, tokens, cache: KVCache, *, run_block) -> str:
    """Optimised HLO of `run_library`."""
    tokens = np.asarray(tokens, np.int32)
    num = np.full(tokens.shape[:1], tokens.shape[1], np.int32)
    lowered = _run.lower(model, tokens, cache, num, run_block=run_block)
    return lowered.compile().as_text()


def layer_kv(model: Model, cache: KVCache, size: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Keys and values [B, size, K, H] of every layer, in order, whatever device holds them."""
    n, num_kv = model.layout.group_devices, model.config.num_kv_heads

    def unpack(x):  # [K * B, S, H]
        return x.reshape(num_kv, -1, *x.shape[1:]).transpose(1, 2, 0, 3)[:, :size]

    pairs = []
    for num_layers, slots in zip(model.partition, jax.device_get(cache.blocks), strict=True):
        for j in range(num_layers):
            if n > 1 and num_layers > 1:  # stacked: layer j is slot j // n on device j % n
                k, v = slots[j // n].k[j % n], slots[j // n].v[j % n]
            else:
                k, v = slots[j].k, slots[j].v
            pairs.append((unpack(k), unpack(v)))
    return pairs

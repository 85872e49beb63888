"""Tiny random EAGLE-3 heads as folders in each format, and their equations in numpy."""

import json

import numpy as np
from safetensors.numpy import save_file

HEADS, KV_HEADS, H, MLP, EPS, THETA = 4, 2, 6, 20, 1e-5, 10000.0
KNOWN = 40  # ids of a reduced vocabulary
TAPS = (2, 1, 3)  # of a base of three layers


def layer_config(base, known=KNOWN, **more):
    """The config.json of a head for a base of this configuration, as SafeAILab writes it."""
    return {
        "architectures": ["LlamaForCausalLMEagle3"],
        "model_type": "llama",
        "hidden_size": base.embed_dim,
        "intermediate_size": MLP,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": H,
        "num_hidden_layers": 1,
        "rms_norm_eps": EPS,
        "rope_theta": THETA,
        "hidden_act": "silu",
        "max_position_embeddings": base.max_len,
        "vocab_size": base.vocab_size,
        "draft_vocab_size": known,
        "torch_dtype": "float64",
        **more,
    }


def random_tensors(base, known=KNOWN, taps=3, seed=0, own=False, normed=False, residual=False):
    """Tensors of a head, f64, by SafeAILab's names."""
    rng, d, v = np.random.default_rng(seed), base.embed_dim, base.vocab_size
    shapes = {
        "fc": (d, taps * d),
        "midlayer.self_attn.q_proj": (HEADS * H, 2 * d),
        "midlayer.self_attn.k_proj": (KV_HEADS * H, 2 * d),
        "midlayer.self_attn.v_proj": (KV_HEADS * H, 2 * d),
        "midlayer.self_attn.o_proj": (d, HEADS * H),
        "midlayer.mlp.gate_proj": (MLP, d),
        "midlayer.mlp.up_proj": (MLP, d),
        "midlayer.mlp.down_proj": (d, MLP),
        "lm_head": (known, d),
    }
    if own:
        shapes["embed_tokens"] = (v, d)
    if residual:
        shapes["embed_residual"] = (d, d)
    found = {f"{n}.weight": rng.normal(size=s) * s[1] ** -0.5 for n, s in shapes.items()}
    norms = {f"midlayer.{n}": d for n in ("input_layernorm", "hidden_norm")}
    norms |= {"midlayer.post_attention_layernorm": d, "norm": d}
    if normed:
        norms["input_norm"] = taps * d
    found |= {f"{n}.weight": rng.uniform(0.5, 1.5, size=s) for n, s in norms.items()}
    if known < v:
        ids = np.sort(rng.permutation(v)[:known])
        found["d2t"] = ids - np.arange(known)
        found["t2d"] = np.isin(np.arange(v), ids)
    return found


def write_published(folder, base, known=KNOWN):
    """A random head for a base of this configuration, as SafeAILab writes it but for its taps."""
    about = layer_config(base, known, eagle_aux_hidden_state_layer_ids=list(TAPS))
    return write_head(folder, random_tensors(base, known), about)


def write_head(folder, tensors, config):
    """A head's folder."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(
        {k: np.ascontiguousarray(x) for k, x in tensors.items()}, folder / "model.safetensors"
    )
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def norm(x, weight):
    return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + EPS) * weight


def fused(tensors, features):
    """g of every position, [T, D], of the base's stream at the taps, [T, taps, D]."""
    x = features.reshape(len(features), -1)
    if "input_norm.weight" in tensors:
        x = norm(x, tensors["input_norm.weight"])
    return x @ tensors["fc.weight"].T


def rotated(x, positions):
    """Rotary embedding of [T, heads, H] in the rotate-half convention."""
    angles = positions[:, None] * THETA ** -(np.arange(0, H, 2) / H)
    cos, sin = np.cos(angles)[:, None], np.sin(angles)[:, None]
    a, b = np.split(x, 2, axis=-1)
    return np.concatenate((a * cos - b * sin, b * cos + a * sin), axis=-1)


def head_layer(tensors, embedded, known, *, norm_before_residual=False):
    """Hidden states behind all pairs of a text ([T, D] each), each seeing those up to its own."""
    w = {k.removeprefix("midlayer.").removesuffix(".weight"): x for k, x in tensors.items()}
    t = len(known)
    token, before = norm(embedded, w["input_layernorm"]), norm(known, w["hidden_norm"])
    residual = before if norm_before_residual else known
    if "embed_residual" in w:
        residual = residual + token @ w["embed_residual"].T
    pairs = np.concatenate((token, before), axis=-1)
    heads = lambda name, n: (pairs @ w[f"self_attn.{name}"].T).reshape(t, n, H)  # noqa: E731
    q, k = (
        rotated(heads(n, m), np.arange(t)) for n, m in (("q_proj", HEADS), ("k_proj", KV_HEADS))
    )
    k, v = (np.repeat(x, HEADS // KV_HEADS, axis=1) for x in (k, heads("v_proj", KV_HEADS)))
    scores = np.einsum("tnh,snh->nts", q, k) * H**-0.5
    scores = np.where(np.tri(t, dtype=bool), scores, -np.inf)
    p = np.exp(scores - scores.max(axis=-1, keepdims=True))
    found = np.einsum("nts,snh->tnh", p / p.sum(axis=-1, keepdims=True), v).reshape(t, -1)
    x = residual + found @ w["self_attn.o_proj"].T
    y = norm(x, w["post_attention_layernorm"])
    gate = y @ w["mlp.gate_proj"].T
    return x + (gate / (1 + np.exp(-gate)) * (y @ w["mlp.up_proj"].T)) @ w["mlp.down_proj"].T


def draft_logits(tensors, table, text, drafted, features, *, norm_output=False, **how):
    """Logits over the base's ids behind a text and behind each token drafted, [1 + n, V].

    Args:
      table: embeddings, [V, D].
      features: the base's stream at the taps, [T - 1, taps, D], of all tokens but the text's last.
    """
    tokens, known = [*text], fused(tensors, features)
    rows = []
    for x in (*drafted, None):
        hidden = head_layer(tensors, table[tokens[1:]], known, **how)[-1]
        last = norm(hidden, tensors["norm.weight"])
        rows.append(last @ tensors["lm_head.weight"].T)
        known = np.concatenate((known, (last if norm_output else hidden)[None]))
        tokens.append(x)
    logits = np.stack(rows)
    if "d2t" not in tensors:
        return logits
    whole = np.full((len(rows), len(table)), -np.inf)
    whole[:, np.arange(logits.shape[1]) + tensors["d2t"]] = logits
    return whole

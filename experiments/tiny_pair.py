"""A base and a draft of random weights as Hugging Face folders, to try the whole way on anywhere.

The draft is the base with some noise on its weights, so that it is right now and then. The
tokenizer knows single characters.
"""

from __future__ import annotations

import json
import pathlib

import numpy as np
from safetensors.numpy import save_file

CHARACTERS = " abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.,!?'\"-:;\n"
SPECIAL = ("<unk>", "<s>", "</s>")
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": len(SPECIAL) + len(CHARACTERS),
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "hidden_act": "silu",
    "bos_token_id": 1,
    "eos_token_id": 2,
    "torch_dtype": "float32",
}


def write_pair(folder: pathlib.Path, noise: float = 0.05) -> tuple[pathlib.Path, pathlib.Path]:
    """The folders of a base and of its noisy draft, written into `folder`."""
    rng = np.random.default_rng(0)
    base = {name: _draw(rng, name, shape) for name, shape in _shapes().items()}
    draft = {
        name: (x * (1 + noise * rng.standard_normal(x.shape))).astype(np.float32)
        for name, x in base.items()
    }
    return _write(folder / "base-hf", base), _write(folder / "draft-hf", draft)


def _shapes() -> dict[str, tuple[int, ...]]:
    """Name and [out, in] shape of every tensor."""
    d, f, v = CONFIG["hidden_size"], CONFIG["intermediate_size"], CONFIG["vocab_size"]
    kv = d // CONFIG["num_attention_heads"] * CONFIG["num_key_value_heads"]
    layer = {
        "input_layernorm": (d,),
        "self_attn.q_proj": (d, d),
        "self_attn.k_proj": (kv, d),
        "self_attn.v_proj": (kv, d),
        "self_attn.o_proj": (d, d),
        "post_attention_layernorm": (d,),
        "mlp.gate_proj": (f, d),
        "mlp.up_proj": (f, d),
        "mlp.down_proj": (d, f),
    }
    shapes = {"model.embed_tokens.weight": (v, d), "model.norm.weight": (d,)}
    shapes["lm_head.weight"] = (v, d)
    for i in range(CONFIG["num_hidden_layers"]):
        shapes |= {f"model.layers.{i}.{name}.weight": shape for name, shape in layer.items()}
    return shapes


def _draw(rng: np.random.Generator, name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Norms of one, everything else of unit gain."""
    if len(shape) == 1:
        return np.ones(shape, np.float32)
    scale = 1.0 if "embed" in name else shape[-1] ** -0.5
    return (scale * rng.standard_normal(shape)).astype(np.float32)


def _write(folder: pathlib.Path, tensors: dict[str, np.ndarray]) -> pathlib.Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(CONFIG, indent=2))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "tokenizer.json").write_text(json.dumps(_tokenizer()))
    names = dict(zip(("unk_token", "bos_token", "eos_token"), SPECIAL, strict=True))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", **names}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def _tokenizer() -> dict:
    """One token a character, in the format of the tokenizers library."""
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    added = [{"id": i, "content": t, "special": True, **flags} for i, t in enumerate(SPECIAL)]
    vocab = {token: i for i, token in enumerate([*SPECIAL, *CHARACTERS])}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": {"type": "Fuse"},
        "model": {"type": "BPE", "unk_token": "<unk>", "vocab": vocab, "merges": []},
    }

"""Tiny random Hugging Face checkpoints, written without torch, for parity and conversion tests.

Weights carry the names and the [out, in] orientation that transformers gives them, so one folder is
read both by `AutoModelForCausalLM.from_pretrained` and by `convert`, whose
checkpoints are read back here.
"""

from __future__ import annotations

import json
import os
import pathlib
import re

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

import convert
from easyspec_jax import checkpoint, weights
from easyspec_jax.hf_config import config_from_hf
from easyspec_jax.quantized import Quantized, dequantise

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")

_ARCHITECTURES = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3"}
_SPECIAL_TOKENS = ("<unk>", "<s>", "</s>")
_CHARACTERS = (
    " abcdefghijklmnopqrstuvwxyz0123456789.,!?-+*/=()<>|:;'\"#\n_ABCDEFGHIJKLMNOPQRSTUVWXYZ"
)
_CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] + ': ' + message['content'] + '</s>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)


def tiny_config(family: str, **overrides) -> dict:
    """A raw config.json of one family: V 61, D 32, F 48, L 3, N 4, K 2, H 8.

    `overrides` win, None included.
    """
    config = {
        "architectures": [f"{_ARCHITECTURES[family]}ForCausalLM"],
        "model_type": family,
        "vocab_size": 61,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "hidden_act": "silu",
        "max_position_embeddings": 256,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "torch_dtype": "float32",
    }
    if family == "mistral":
        config["sliding_window"] = None
    return config | overrides


def tensor_shapes(config: dict) -> dict[str, tuple[int, ...]]:
    """Name and [out, in] shape of every tensor that transformers saves for this config."""
    d, f, v = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    n = config["num_attention_heads"]
    k, h = config.get("num_key_value_heads") or n, config.get("head_dim") or d // n
    layer = {
        "input_layernorm.weight": (d,),
        "self_attn.q_proj.weight": (n * h, d),
        "self_attn.k_proj.weight": (k * h, d),
        "self_attn.v_proj.weight": (k * h, d),
        "self_attn.o_proj.weight": (d, n * h),
        "post_attention_layernorm.weight": (d,),
        "mlp.gate_proj.weight": (f, d),
        "mlp.up_proj.weight": (f, d),
        "mlp.down_proj.weight": (d, f),
    }
    if config["model_type"] == "qwen2":
        layer |= {
            "self_attn.q_proj.bias": (n * h,),
            "self_attn.k_proj.bias": (k * h,),
            "self_attn.v_proj.bias": (k * h,),
        }
    if config["model_type"] == "qwen3":
        layer |= {"self_attn.q_norm.weight": (h,), "self_attn.k_norm.weight": (h,)}
    shapes = {"model.embed_tokens.weight": (v, d), "model.norm.weight": (d,)}
    for i in range(config["num_hidden_layers"]):
        shapes |= {f"model.layers.{i}.{name}": shape for name, shape in layer.items()}
    if not config.get("tie_word_embeddings", False):
        shapes["lm_head.weight"] = (v, d)
    return shapes


def random_tensors(config: dict, seed: int = 0, dtype=np.float32) -> dict[str, np.ndarray]:
    """Random weights of unit gain: norms around 1, small biases, projections / sqrt(in)."""
    rng = np.random.default_rng(seed)

    def draw(name: str, shape: tuple[int, ...]) -> np.ndarray:
        x = rng.standard_normal(shape)
        if name.endswith("norm.weight"):
            x = 1 + 0.2 * x
        elif name.endswith(".bias"):
            x = 0.2 * x
        elif name != "model.embed_tokens.weight":
            x = x / np.sqrt(shape[-1])
        return x.astype(np.float32).astype(dtype)

    return {name: draw(name, shape) for name, shape in tensor_shapes(config).items()}


def write_tensors(path: pathlib.Path, tensors: dict[str, np.ndarray], shards: int = 1) -> None:
    """Write model.safetensors, or `shards` files and their index."""
    if shards == 1:
        save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
        return
    names, index = list(tensors), {}
    for s in range(shards):
        file = f"model-{s + 1:05d}-of-{shards:05d}.safetensors"
        part = names[s::shards]
        save_file({n: tensors[n] for n in part}, path / file, metadata={"format": "pt"})
        index |= dict.fromkeys(part, file)
    text = json.dumps({"metadata": {}, "weight_map": index}, indent=1)
    (path / "model.safetensors.index.json").write_text(text)


def write_tokenizer(path: pathlib.Path, vocab_size: int) -> None:
    """Write a character tokenizer: 0 unknown, 1 begin, 2 end, then characters and fillers."""
    tokens = [*_SPECIAL_TOKENS, *_CHARACTERS][:vocab_size]
    tokens += [f"<extra_{i}>" for i in range(len(tokens), vocab_size)]
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    added = [
        {"id": i, "content": t, "special": True, **flags} for i, t in enumerate(_SPECIAL_TOKENS)
    ]
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [a for a in added if a["id"] < vocab_size],
        "normalizer": None,
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": {"type": "Fuse"},
        "model": {
            "type": "BPE",
            "unk_token": "<unk>",
            "vocab": {t: i for i, t in enumerate(tokens)},
            "merges": [],
        },
    }
    (path / "tokenizer.json").write_text(json.dumps(tokenizer))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "unk_token": "<unk>",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "chat_template": _CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False,
    }
    (path / "tokenizer_config.json").write_text(json.dumps(config))


def write_hf_folder(
    path,
    config_dict: dict,
    seed: int = 0,
    dtype=np.float32,
    shards: int = 1,
    tokenizer: bool = True,
) -> pathlib.Path:
    """Write a complete model folder (config, random weights, tokenizer) and return its path."""
    path = pathlib.Path(path)
    path.mkdir(parents=True, exist_ok=True)
    config = config_dict | {"torch_dtype": np.dtype(dtype).name}
    (path / "config.json").write_text(json.dumps(config, indent=2))
    write_tensors(path, random_tensors(config_dict, seed, dtype), shards)
    if tokenizer:
        write_tokenizer(path, config_dict["vocab_size"])
    return path


def load_part(folder: pathlib.Path, part: str) -> dict[str, np.ndarray]:
    """The arrays of one part, which must have the shapes of the config and the noted dtype; codes
    as floats.
    """
    config = config_from_hf(json.loads((folder / "config.json").read_text()))
    metadata = json.loads((folder / checkpoint.METADATA_FILE).read_text())
    codes, dtype = checkpoint.stored_quantization(metadata), np.dtype(metadata["dtype"])
    table = weights.TOP_WEIGHTS if part == checkpoint.TOP_PART else weights.LAYER_WEIGHTS
    shapes = {n: w.shape(config) for n, w in weights.present(table, config).items()}
    device = jax.sharding.SingleDeviceSharding(jax.devices("cpu")[0])
    plain = {n: jax.ShapeDtypeStruct(s, dtype) for n, s in shapes.items()}
    abstract = jax.eval_shape(lambda part: weights.quantised(part, config, codes), plain)
    abstract = jax.tree.map(lambda x: x.update(sharding=device), abstract)
    found = checkpoint.read_part(folder, part, abstract)
    return {
        name: np.asarray(dequantise(x) if isinstance(x, Quantized) else x)
        for name, x in found.items()
    }


def load_all(folder: pathlib.Path, num_layers: int = 3) -> dict[str, np.ndarray]:
    """The arrays of all parts, those of layer i under "i.name"."""
    arrays = load_part(folder, checkpoint.TOP_PART)
    for i in range(num_layers):
        part = load_part(folder, checkpoint.layer_name(i))
        arrays |= {f"{i}.{name}": value for name, value in part.items()}
    return arrays


def run(src, dst, **options) -> pathlib.Path:
    """Convert without a progress bar."""
    return convert.convert(src, dst, progress=False, **options)


def without_logs(stderr: str) -> str:
    """What a process said itself: jax's CUDA plugin logs whatever its level is said to be."""
    log = r"(WARNING: All log messages before absl::|[IWEF]\d{4} ).*\n"
    return re.sub(log, "", stderr)


MODELS = pathlib.Path(os.environ.get("EASYSPEC_MODELS", "~/.cache/easyspec-models")).expanduser()


def real_model(name: str) -> pathlib.Path:
    if not (MODELS / name / "config.json").exists():
        pytest.skip(f"needs the real weights of {name} in {MODELS}")
    return MODELS / name

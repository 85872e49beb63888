"""The folder of a trained head, as SafeAILab's checkpoints are: config.json and model.safetensors.

Tensors have their outputs first. The head over the draft's vocabulary is the base's own, row for
row, and may be left out: whoever loads the folder then takes the rows that `d2t` names.
"""

from __future__ import annotations

import os
import pathlib
from typing import Any

import jax.numpy as jnp
import numpy as np

from easyspec_jax.config import ModelConfig
from easyspec_jax.json_files import write_object
from easyspec_jax.training.head import Head

CONFIG_FILE = "config.json"


def write_head(
    folder: pathlib.Path,
    head: Head,
    config: ModelConfig,
    *,
    taps: tuple[int, ...],
    ids: np.ndarray,
    sizes: np.ndarray,
    rows: np.ndarray | None,
    dtype: str = "bfloat16",
) -> None:
    """The folder holds the head; each of the two files appears whole.

    Args:
      config: the base's.
      ids: i32[V'], which of the base's tokens are drafted, rising.
      sizes: f32[taps * D], what taps were divided by in training: `fc` does that from now on.
      rows: f32[V', D] of the base's head; None leaves them out.
      dtype: of floats.
    """
    from safetensors.numpy import save

    from convert.folder import WEIGHTS

    floats = dict(head) | {"fc.weight": head["fc.weight"] / sizes[:, None]}
    tensors = {name: np.asarray(x).T for name, x in floats.items()}
    if rows is not None:
        tensors["lm_head.weight"] = rows
    tensors = {name: np.ascontiguousarray(x, jnp.dtype(dtype)) for name, x in tensors.items()}
    tensors["d2t"] = ids.astype(np.int64) - np.arange(len(ids))
    tensors["t2d"] = np.isin(np.arange(config.vocab_size), ids)
    about = head_config(config, taps, len(ids), dtype)
    # Not save_file: that leaves a file which its owner alone may read.
    (folder / f".{WEIGHTS}").write_bytes(save(tensors, {"format": "pt"}))
    os.replace(folder / f".{WEIGHTS}", folder / WEIGHTS)
    write_object(folder / CONFIG_FILE, about)


def head_config(
    config: ModelConfig, taps: tuple[int, ...], num_ids: int, dtype: str
) -> dict[str, Any]:
    """config.json of a head for a base of this configuration."""
    scaling: Any = None
    if (rope := config.rope_scaling) is not None:
        scaling = {"rope_type": rope.kind, "factor": rope.factor}
        if rope.kind == "llama3":  # readers refuse keys that are not of the kind
            scaling["low_freq_factor"] = rope.low_freq_factor
            scaling["high_freq_factor"] = rope.high_freq_factor
            scaling["original_max_position_embeddings"] = rope.original_max_len
    return {
        "architectures": ["LlamaForCausalLMEagle3"],
        "model_type": "llama",
        "hidden_act": "silu",
        "hidden_size": config.embed_dim,
        "intermediate_size": config.mlp_dim,
        "num_hidden_layers": 1,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "rope_scaling": scaling,
        "max_position_embeddings": config.max_len,
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": False,
        "torch_dtype": dtype,
        "vocab_size": config.vocab_size,
        "draft_vocab_size": num_ids,
        "target_hidden_size": config.embed_dim,
        "eagle_config": {
            # here layers are named whose output is read
            "eagle_aux_hidden_state_layer_ids": [tap - 1 for tap in taps],
            "use_aux_hidden_state": True,
        },
    }

"""The model that a Hugging Face config.json describes.

The only place that reads the vocabulary of these files. It refuses to guess: every attribute is
handled, knowingly ignored, or at the one value this program computes.
"""

from __future__ import annotations

from typing import Any

from easyspec_jax.config import ModelConfig, RopeScaling, is_integer

_REQUIRED = (
    *("vocab_size", "hidden_size", "intermediate_size"),
    *("num_hidden_layers", "num_attention_heads"),
)

_COMMON_DEFAULTS = {
    "num_key_value_heads": None,
    "head_dim": None,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "sliding_window": None,
    "eos_token_id": None,
    "bos_token_id": None,
    "pad_token_id": None,
}
_QWEN_DEFAULTS = {
    "num_key_value_heads": 32,
    "max_position_embeddings": 32768,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
}
# The class defaults of transformers; tests/test_config.py compares them with the installed version.
_FAMILY_DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": _COMMON_DEFAULTS
    | {"max_position_embeddings": 2048, "bos_token_id": 1, "eos_token_id": 2},
    "mistral": _COMMON_DEFAULTS
    | {
        "num_key_value_heads": 8,
        "max_position_embeddings": 4096 * 32,
        "sliding_window": 4096,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
    "qwen2": _COMMON_DEFAULTS | _QWEN_DEFAULTS,
    "qwen3": _COMMON_DEFAULTS | _QWEN_DEFAULTS | {"head_dim": 128},
}
_DEFAULT_ROPE_THETA = 10000.0
_BOOLEANS = {"tie_word_embeddings", "use_sliding_window"}

_HANDLED = frozenset(
    {"model_type", "rope_theta", "rope_scaling", "rope_parameters", "unk_token_id", "layer_types"}
).union(_REQUIRED, *_FAMILY_DEFAULTS.values())

# Attributes that cannot change the logits: bookkeeping, training, generation defaults.
_IGNORED = frozenset(
    """
    architectures torch_dtype dtype use_cache transformers_version initializer_range tokenizer_class
    attention_dropout hidden_dropout resid_pdrop embd_pdrop use_bfloat16 tf_legacy_loss torchscript
    _name_or_path _attn_implementation _attn_implementation_autoset attn_implementation _commit_hash
    id2label label2id num_labels problem_type finetuning_task task_specific_params
    output_attentions output_hidden_states output_scores return_dict return_dict_in_generate prefix
    sep_token_id cls_token_id mask_token_id decoder_start_token_id is_decoder is_llama_config
    max_length min_length do_sample early_stopping num_beams num_beam_groups diversity_penalty
    temperature top_k top_p typical_p repetition_penalty length_penalty no_repeat_ngram_size
    encoder_no_repeat_ngram_size bad_words_ids num_return_sequences forced_bos_token_id
    forced_eos_token_id remove_invalid_values exponential_decay_length_penalty suppress_tokens
    begin_suppress_tokens chunk_size_feed_forward neftune_noise_alpha max_sequence_length
    transformers.js_config unsloth_fixed unsloth_version
    """.split()
)

# Attributes that do change it, with the values this program computes.
_ALLOWED: dict[str, tuple] = {
    "hidden_act": ("silu", "swish"),
    "attention_bias": (False, None),
    "mlp_bias": (False, None),
    "pretraining_tp": (1, None),
    "partial_rotary_factor": (1, None),
    "rope_interleaved": (False, None),
    "use_mrope": (False, None),
    "is_encoder_decoder": (False, None),
    "tie_encoder_decoder": (False, None),
    "add_cross_attention": (False, None),
    "cross_attention_hidden_size": (None,),
    "pruned_heads": ({}, None),
    "quantization_config": (None,),
    "compression_config": (None,),
    "auto_map": (None,),
}
_ALLOWED_BY_FAMILY: dict[str, dict[str, tuple]] = {
    "llama": {
        "sliding_window": (None,),
        "use_sliding_window": (False, None),
        "max_window_layers": (None,),
    },
    "mistral": {"use_sliding_window": (None,), "max_window_layers": (None,)},
    "qwen2": {"attention_bias": (True, False, None)},  # the class has its bias in any case
    "qwen3": {},
}


def config_from_hf(source: dict[str, Any] | Any) -> ModelConfig:
    """The model that a Hugging Face config.json describes.

    Args:
      source: the parsed config.json, of any transformers version, or a PretrainedConfig
        object. Absent attributes take the defaults of the transformers class.

    Raises:
      ValueError: the family is unknown, a required attribute is missing, or an attribute asks
        for arithmetic that is not done here; the message names each one and its value.
    """
    raw = dict(source) if isinstance(source, dict) else source.to_dict()
    family = raw.get("model_type")
    if not isinstance(family, str) or family not in _FAMILY_DEFAULTS:
        raise ValueError(
            f"model_type {family!r} is not supported; use one of {', '.join(_FAMILY_DEFAULTS)}."
        )
    missing = [name for name in _REQUIRED if raw.get(name) is None]
    if missing:
        raise ValueError(f"the {family} config lacks {', '.join(missing)}.")
    wrong = {name: raw[name] for name in _REQUIRED if not is_integer(raw[name])}
    if wrong:
        raise ValueError(f"the {family} config has sizes that are no integers: {_listed(wrong)}.")
    _refuse_unsupported(raw, family)
    values = _FAMILY_DEFAULTS[family] | raw
    for name in _BOOLEANS & values.keys():
        if not isinstance(values[name], bool | None):
            raise ValueError(f"{name} must be true or false, not {values[name]!r}.")
    vocab_size = values["vocab_size"]
    theta, scaling = _rope(raw)
    return ModelConfig(
        vocab_size=vocab_size,
        embed_dim=values["hidden_size"],
        mlp_dim=values["intermediate_size"],
        num_layers=values["num_hidden_layers"],
        num_heads=values["num_attention_heads"],
        num_kv_heads=_or(values["num_key_value_heads"], values["num_attention_heads"]),
        head_dim=_head_dim(values),
        norm_eps=values["rms_norm_eps"],
        rope_theta=theta,
        rope_scaling=scaling,
        max_len=values["max_position_embeddings"],
        sliding_window=_sliding_window(values, family),
        tie_embeddings=bool(values["tie_word_embeddings"]),
        qkv_bias=family == "qwen2",
        qk_norm=family == "qwen3",
        family=family,
        eos_ids=_eos_ids(values["eos_token_id"]),
        bos_id=_token_id(values["bos_token_id"], vocab_size),
        pad_id=_token_id(values["pad_token_id"], vocab_size),
        unk_id=_token_id(values.get("unk_token_id"), vocab_size),
    )


def _or(value, default):
    return default if value is None else value


def _listed(items: dict[str, Any]) -> str:
    return ", ".join(f"{name}={value!r}" for name, value in items.items())


def _refuse_unsupported(raw: dict, family: str) -> None:
    allowed = _ALLOWED | _ALLOWED_BY_FAMILY[family]
    bad = {
        name: value
        for name, value in raw.items()
        if (value not in allowed[name] if name in allowed else name not in _HANDLED | _IGNORED)
    }
    if bad:
        raise ValueError(f"the {family} config asks for what is not supported: {_listed(bad)}.")


def _head_dim(values: dict) -> int:
    if values["head_dim"] is not None:
        return values["head_dim"]
    embed_dim, num_heads = values["hidden_size"], values["num_attention_heads"]
    if num_heads <= 0 or embed_dim % num_heads:
        raise ValueError(
            f"hidden_size ({embed_dim!r}) is not a multiple of num_attention_heads ({num_heads!r}) "
            "and no head_dim is given."
        )
    return embed_dim // num_heads


def _sliding_window(values: dict, family: str) -> int | None:
    """The window of all layers, or None; layers that differ are refused."""
    window, num_layers = values["sliding_window"], values["num_hidden_layers"]
    if family.startswith("qwen"):
        window = window if values["use_sliding_window"] else None
        num_full = num_layers if window is None else values["max_window_layers"]
    else:
        num_full = num_layers if window is None else 0
    if not is_integer(num_full):
        raise ValueError(f"max_window_layers must be an integer, not {num_full!r}.")
    types = values.get("layer_types")
    if types is None:
        kinds = {"full_attention"} if num_full > 0 else set()
        kinds |= {"sliding_attention"} if num_full < num_layers else set()
    elif not isinstance(types, list) or not all(isinstance(kind, str) for kind in types):
        raise ValueError(f"layer_types must be a list of names, not {types!r}.")
    elif len(types) != num_layers:
        raise ValueError(
            f"the {family} config has {num_layers} layers but {len(types)} layer_types."
        )
    else:
        kinds = set(types)
    if kinds <= {"full_attention"} and (window is None or family.startswith("qwen")):
        return None
    if kinds == {"sliding_attention"} and window is not None:
        return window
    raise ValueError(
        f"the {family} config mixes attention kinds, which is not supported: layer_types="
        f"{sorted(kinds)}, sliding_window={window!r}, "
        f"max_window_layers={values.get('max_window_layers')!r}."
    )


def _rope(raw: dict) -> tuple[float, RopeScaling | None]:
    """Base and scaling of the rotary positions, from either style of config."""
    # transformers lets rope_scaling win over rope_parameters, and a theta inside over one outside.
    settings = raw.get("rope_scaling") or raw.get("rope_parameters") or {}
    if not isinstance(settings, dict):
        raise ValueError(f"rotary settings must be an object, not {settings!r}.")
    rope = dict(settings)
    theta = rope.pop("rope_theta", _or(raw.get("rope_theta"), _DEFAULT_ROPE_THETA))
    kinds = [rope.pop(key) for key in ("rope_type", "type") if key in rope] or ["default"]
    kind = kinds[0] if kinds[0] == kinds[-1] else None
    if rope.pop("partial_rotary_factor", 1) != 1 or not isinstance(kind, str):
        raise ValueError(f"rotary settings are not supported: {_listed(settings)}.")
    names = {
        "default": {},
        "linear": {"factor": "factor"},
        "llama3": {
            "factor": "factor",
            "low_freq_factor": "low_freq_factor",
            "high_freq_factor": "high_freq_factor",
            "original_max_position_embeddings": "original_max_len",
        },
    }
    if kind not in names:
        raise ValueError(
            f"rotary scaling {kind!r} is not supported; only 'default', 'linear' and 'llama3' are."
        )
    missing, unknown = names[kind].keys() - rope, rope.keys() - names[kind].keys()
    if missing or unknown:
        problem = f"lacks {sorted(missing)}" if missing else f"has unknown keys {sorted(unknown)}"
        raise ValueError(f"rotary scaling {kind!r} {problem}.")
    if kind == "default":
        return theta, None
    return theta, RopeScaling(kind=kind, **{ours: rope[hf] for hf, ours in names[kind].items()})


def _eos_ids(value) -> tuple[int, ...]:
    return tuple(i for i in stop_ids_of(value) if i != -1)


def stop_ids_of(value: Any) -> list[int]:
    """The ids in an `eos_token_id`, which is one, several or none; each once.

    Raises:
      ValueError: it holds something else.
    """
    ids = value if isinstance(value, list | tuple) else [value]
    if not all(i is None or is_integer(i) for i in ids):
        raise ValueError(f"eos_token_id must be a token id or a list of them, not {value!r}.")
    return list(dict.fromkeys(i for i in ids if i is not None))


def _token_id(value, vocab_size) -> int | None:
    """A token id, or None where the config has none; -1 and ids beyond the vocabulary mean none."""
    if value is None or not is_integer(value) or not 0 <= value < vocab_size:
        return None
    return value

"""What a model is and how tokens are drawn from it, as frozen values.

Both are hashable, so they can be static arguments of jit. `ModelConfig.from_hf` is the only place
that reads the vocabulary of Hugging Face configuration files. It refuses to guess: every attribute
is handled, knowingly ignored, or at the one value this program computes. Dimension letters are
those of the glossary in `model.py`.
"""

from __future__ import annotations

import dataclasses
import math
import numbers
from typing import Any

_SMALLEST = 1e-6  # below it float32 arithmetic on temperature or top_p has no meaning


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
    """How tokens are drawn; the filters run in field order, each on the renormalised rest."""

    temperature: float = 0.0  # 0 = greedy
    top_k: int = 0  # keep the k most likely tokens; 0 = all
    top_p: float = 1.0  # keep the smallest set with at least this probability; 1 = all
    min_p: float = 0.0  # drop tokens below this share of the largest probability; 0 = none

    def __post_init__(self):
        if not (is_number(self.temperature) and self.temperature >= 0):
            raise ValueError(f"temperature must be a finite number >= 0, not {self.temperature!r}.")
        if 0 < self.temperature < _SMALLEST:
            raise ValueError(
                f"temperature must be 0 (greedy) or at least {_SMALLEST}, not {self.temperature!r}."
            )
        if not (is_integer(self.top_k) and self.top_k >= 0):
            raise ValueError(f"top_k must be an integer >= 0 (0 = off), not {self.top_k!r}.")
        if not (is_number(self.top_p) and _SMALLEST <= self.top_p <= 1):
            raise ValueError(f"top_p must be in [{_SMALLEST}, 1], not {self.top_p!r}.")
        if not (is_number(self.min_p) and 0 <= self.min_p <= 1):
            raise ValueError(f"min_p must be in [0, 1], not {self.min_p!r}.")

    @property
    def greedy(self) -> bool:
        """Whether the most likely token is always taken."""
        return self.temperature == 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """Frequency scaling of Llama 3.1 ("llama3"), or plain position interpolation ("linear")."""

    kind: str  # "llama3" | "linear"
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_len: int = 8192

    def __post_init__(self):
        if self.kind not in ("llama3", "linear"):
            raise ValueError(
                f"rotary scaling {self.kind!r} is not supported; only 'llama3' and 'linear' are."
            )
        for name in ("factor", "low_freq_factor", "high_freq_factor", "original_max_len"):
            value = getattr(self, name)
            if not (is_number(value) and value > 0):
                raise ValueError(f"rotary scaling: {name} must be a number > 0, not {value!r}.")
        if self.low_freq_factor >= self.high_freq_factor:
            raise ValueError(
                f"rotary scaling: low_freq_factor ({self.low_freq_factor}) must be below "
                f"high_freq_factor ({self.high_freq_factor})."
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Everything that fixes the shapes and the arithmetic of one decoder-only transformer."""

    vocab_size: int  # V, rows of the embedding, padding rows included
    embed_dim: int  # D
    mlp_dim: int  # F
    num_layers: int  # L
    num_heads: int  # N, query heads
    num_kv_heads: int  # K; N is a multiple of K
    head_dim: int  # H; not D / N for every family
    norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    max_len: int = 2048  # context length in tokens
    sliding_window: int | None = None  # tokens a query sees, itself included; None = all
    tie_embeddings: bool = False
    qkv_bias: bool = False
    qk_norm: bool = False  # RMSNorm over H on queries and keys, before the rotation (Qwen3)
    family: str = "llama"  # model_type of the source, for messages
    eos_ids: tuple[int, ...] = ()
    bos_id: int | None = None
    pad_id: int | None = None
    unk_id: int | None = None

    def __post_init__(self):
        for name in (
            *("vocab_size", "embed_dim", "mlp_dim", "num_layers", "num_heads"),
            *("num_kv_heads", "head_dim", "max_len"),
        ):
            value = getattr(self, name)
            if not (is_integer(value) and value > 0):
                raise ValueError(f"{name} must be an integer > 0, not {value!r}.")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_heads ({self.num_heads}) must be a multiple of num_kv_heads "
                f"({self.num_kv_heads})."
            )
        if self.head_dim % 2:
            raise ValueError(
                f"head_dim ({self.head_dim}) must be even, as rotary positions turn pairs."
            )
        for name in ("norm_eps", "rope_theta"):
            value = getattr(self, name)
            if not (is_number(value) and value > 0):
                raise ValueError(f"{name} must be a finite number > 0, not {value!r}.")
        window = self.sliding_window
        if window is not None and not (is_integer(window) and window > 0):
            raise ValueError(f"sliding_window must be None or an integer > 0, not {window!r}.")
        if not isinstance(self.eos_ids, tuple) or not all(
            is_integer(i) and i >= 0 for i in self.eos_ids
        ):
            raise ValueError(f"eos_ids must be a tuple of token ids >= 0, not {self.eos_ids!r}.")
        for name in ("bos_id", "pad_id", "unk_id"):
            value = getattr(self, name)
            if value is not None and not (is_integer(value) and 0 <= value < self.vocab_size):
                raise ValueError(
                    f"{name} must be None or a token id below {self.vocab_size}, not {value!r}."
                )

    @property
    def num_groups(self) -> int:
        """G, query heads per kv head."""
        return self.num_heads // self.num_kv_heads

    @property
    def context(self) -> int:
        """Tokens a text may have: the context length, within the sliding window if there is one."""
        return min(self.max_len, self.sliding_window or self.max_len)

    def layer_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every array of one layer, as stored: projections are [in, out]."""
        d, f, h = self.embed_dim, self.mlp_dim, self.head_dim
        k, g = self.num_kv_heads, self.num_groups
        shapes = {
            "attn_norm": (d,),
            "wq": (d, k, g, h),
            "wk": (d, k, h),
            "wv": (d, k, h),
            "wo": (k, g, h, d),
            "mlp_norm": (d,),
            "w_gate": (d, f),
            "w_up": (d, f),
            "w_down": (f, d),
        }
        if self.qkv_bias:
            shapes |= {"bq": (k, g, h), "bk": (k, h), "bv": (k, h)}
        if self.qk_norm:
            shapes |= {"q_norm": (h,), "k_norm": (h,)}
        return shapes

    def top_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every array outside the layers, as stored; a tied model stores no head."""
        shapes = {"embed": (self.vocab_size, self.embed_dim), "final_norm": (self.embed_dim,)}
        if not self.tie_embeddings:
            shapes["lm_head"] = (self.embed_dim, self.vocab_size)
        return shapes

    @classmethod
    def from_hf(cls, source: dict[str, Any] | Any) -> ModelConfig:
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
        if family not in _FAMILY_DEFAULTS:
            raise ValueError(
                f"model_type {family!r} is not supported; use one of {', '.join(_FAMILY_DEFAULTS)}."
            )
        missing = [name for name in _REQUIRED if raw.get(name) is None]
        if missing:
            raise ValueError(f"the {family} config lacks {', '.join(missing)}.")
        wrong = {name: raw[name] for name in _REQUIRED if not is_integer(raw[name])}
        if wrong:
            raise ValueError(
                f"the {family} config has sizes that are no integers: {_listed(wrong)}."
            )
        _refuse_unsupported(raw, family)
        values = _FAMILY_DEFAULTS[family] | raw
        vocab_size = values["vocab_size"]
        theta, scaling = _rope(raw)
        return cls(
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


def is_integer(value: Any) -> bool:
    """Whether value is a whole number, numpy's included, and no bool."""
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def is_number(value) -> bool:
    """Whether value is a finite real number, numpy's included, and no bool."""
    is_real = isinstance(value, numbers.Real) and not isinstance(value, bool)
    return is_real and math.isfinite(value)


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
    types = values.get("layer_types")
    if types is None:
        types = [
            "full_attention" if i < num_full else "sliding_attention" for i in range(num_layers)
        ]
    if len(types) != num_layers:
        raise ValueError(
            f"the {family} config has {num_layers} layers but {len(types)} layer_types."
        )
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
    kinds = {rope.pop(key) for key in ("rope_type", "type") if key in rope}
    kind = kinds.pop() if len(kinds) == 1 else (None if kinds else "default")
    if rope.pop("partial_rotary_factor", 1) != 1 or kind is None:
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
    ids = value if isinstance(value, list | tuple) else [value]
    return tuple(dict.fromkeys(i for i in ids if i is not None and i != -1))


def _token_id(value, vocab_size) -> int | None:
    """A token id, or None where the config has none; -1 and ids beyond the vocabulary mean none."""
    if value is None or not is_integer(value) or not 0 <= value < vocab_size:
        return None
    return value

"""What a model is and how tokens are drawn from it, as frozen values.

Both are hashable, so they can be static arguments of jit. Dimension letters are those of the
glossary in `model.py`.
"""

from __future__ import annotations

import dataclasses
import math
import numbers
from typing import Any

MAX_LAYERS = 10_000  # far above any model's: what loops over layers must end
MAX_SIZE = 2**31 - 1  # of a dimension, and of a context: positions are 32-bit integers
_SMALLEST = 1e-6  # below it float32 arithmetic on temperature or top_p has no meaning


def is_integer(value: Any) -> bool:
    """Whether value is a whole number, numpy's included, and no bool."""
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def is_number(value) -> bool:
    """Whether value is a finite real number, numpy's included, and no bool."""
    if not isinstance(value, numbers.Real) or isinstance(value, bool):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer beyond all floats
        return False


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
            most = MAX_LAYERS if name == "num_layers" else MAX_SIZE
            if not (is_integer(value) and 0 < value <= most):
                raise ValueError(f"{name} must be an integer in 1 .. {most}, not {value!r}.")
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

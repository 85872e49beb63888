"""A GGUF file as a source of tensors under the names and in the order of transformers.

Tensors are read a slice of rows at a time. What a GGUF file says about the arithmetic
becomes an ordinary config.json, so that `config_from_hf` judges it like any other; metadata
under the architecture's prefix that is not understood is refused.
"""

from __future__ import annotations

import json
import math
import pathlib
from collections.abc import Iterator
from typing import Any

import numpy as np

from convert.gguf_tokenizer import check_tokenizer, write_tokenizer
from convert.tensors import Rows, Tensor, expected_tensors, row_ranges
from easyspec_jax.config import MAX_SIZE, is_integer, is_number
from easyspec_jax.hf_config import config_from_hf
from easyspec_jax.quantized import Form
from easyspec_jax.weights import EMBED, GGUF_PREFIX, HEAD, HF_PREFIX, LAYER_WEIGHTS, TOP_WEIGHTS

_ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
_FLOATS = ("F32", "F16", "BF16")
_BLOCK = 32  # inputs that share a scale in those of these types
# Types whose codes a checkpoint can hold, as what.
_KEPT = {
    "Q8_0": Form("int8", _BLOCK, "float16"),
    "Q4_0": Form("int4", _BLOCK, "float16"),
    "Q4_1": Form("int4", _BLOCK, "float16", "float16"),
}
_MAX_ENTRIES = 2**24  # of a list in the metadata: no vocabulary is so large
_ROPE_FACTORS = "rope_freqs.weight"

# Keys under "<architecture>.": config attribute, or None where the code below reads them.
_HANDLED = {
    "block_count": "num_hidden_layers",
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "attention.key_length": None,
    "attention.value_length": None,
    "rope.dimension_count": None,
    "rope.freq_base": "rope_theta",
    "rope.scaling.type": None,
    "rope.scaling.factor": None,
    "rope.scale_linear": None,
    "vocab_size": None,
}
_IGNORED = frozenset(
    {"rope.scaling.finetuned", "rope.scaling.original_context_length", "tensor_data_layout"}
)
_ALLOWED: dict[str, tuple] = {
    "expert_count": (0,),
    "expert_used_count": (0,),
    "attention.causal": (True,),
    "attention.sliding_window": (0,),
    "use_parallel_residual": (False,),
    "rope.scaling.attn_factor": (1.0,),
}
_COUNTS = {
    *("block_count", "context_length", "embedding_length", "feed_forward_length"),
    *("attention.head_count", "attention.head_count_kv"),
    *("attention.key_length", "attention.value_length", "rope.dimension_count"),
}
_REQUIRED = (
    *("block_count", "context_length", "embedding_length", "feed_forward_length"),
    *("attention.head_count", "attention.layer_norm_rms_epsilon"),
)


class GgufSource:
    """`Source` over one GGUF file; the file is mapped, not read."""

    note = ""

    def __init__(self, path: pathlib.Path):
        self.path = path
        reader = _open(path)
        self._metadata = _contents(reader, path)
        self._stored = {t.name: t for t in reader.tensors}
        raw = self._config()
        check_tokenizer(self._metadata)
        self.config = config_from_hf(raw)
        self.config_text = json.dumps(raw, indent=2) + "\n"
        self.generation_config = self._generation_config()
        self._labels = {w.hf: w.gguf for w in TOP_WEIGHTS}
        for i in range(self.config.num_layers):
            for w in LAYER_WEIGHTS:
                self._labels[HF_PREFIX.format(i) + w.hf] = GGUF_PREFIX.format(i) + w.gguf
        names = {theirs: hf for hf, theirs in self._labels.items()}
        self.tensors = {
            names.get(n, n): _header(t) for n, t in self._stored.items() if n != _ROPE_FACTORS
        }
        self.dtype = self._dtype()
        packed = {
            t.tensor_type.name
            for n, t in self._stored.items()
            if len(t.shape) == 2 and t.tensor_type.name not in _FLOATS
        }
        self.codes = f"weights of {', '.join(sorted(packed))}" if packed else ""

    def label(self, name: str) -> str:
        """The name in the file."""
        return self._labels.get(name, name)

    def chunks(self, name: str) -> Iterator[np.ndarray]:
        """Consecutive slices along the first axis, dequantised."""
        from gguf.quants import dequantize

        shape = self.tensors[name].shape
        for rows, kind in self._stored_rows(name):
            yield self._in_order(name, dequantize(rows, kind).reshape(-1, *shape[1:]))

    def form(self, name: str) -> Form | str | None:
        """Of the codes of a matrix, or why there is none; None: it is floats."""
        kind = self._stored[self.label(name)].tensor_type.name
        if kind in _FLOATS:
            return None
        return _KEPT.get(kind, f"is {kind}")

    def coded(self, name: str) -> Iterator[Rows]:
        """Consecutive slices of a matrix along its outputs; every 32 inputs are a scale, of Q4_1 a
        minimum, and their codes: of Q8_0 one by one, else each of the first 16 below one of the
        others.
        """
        shape = self.tensors[name].shape
        for rows, kind in self._stored_rows(name):
            blocks = np.ascontiguousarray(rows).reshape(len(rows), shape[1] // _BLOCK, -1)
            floats = 4 if kind.name == "Q4_1" else 2  # bytes of them
            shared, codes = blocks[..., :floats].copy().view(np.float16), blocks[..., floats:]
            if kind.name != "Q8_0":
                codes = np.concatenate([codes & 15, codes >> 4], axis=-1)
            if kind.name == "Q4_0":
                codes = codes - np.uint8(8)
            codes = codes.view(np.uint8 if floats == 4 else np.int8).reshape(len(rows), -1)
            codes, scales, *minima = (
                self._in_order(name, x) for x in (codes, *np.moveaxis(shared, -1, 0))
            )
            yield Rows(codes, None, scales, _BLOCK, *minima)

    def _stored_rows(self, name: str) -> Iterator[tuple[np.ndarray, Any]]:
        """Consecutive slices of a tensor as bytes, and their type."""
        tensor, shape = self._stored[self.label(name)], self.tensors[name].shape
        multiple = self.config.head_dim if self._rotary(name) else 1
        # the data of a vector in a packed type is its bytes, which are no rows
        for rows in [slice(None)] if len(shape) == 1 else row_ranges(shape, 4, multiple):
            yield tensor.data[rows], tensor.tensor_type

    def _rotary(self, name: str) -> bool:
        """Whether the rows of a matrix stand in another order than in transformers."""
        own = self.config.family == "llama" and ".self_attn." in name
        return own and name.endswith(("q_proj.weight", "k_proj.weight"))

    def _in_order(self, name: str, rows: np.ndarray) -> np.ndarray:
        """Rows of a tensor, or scales of them, in the order of transformers."""
        return _to_half_rotation(rows, self.config.head_dim) if self._rotary(name) else rows

    def write_tokenizer(self, folder: pathlib.Path) -> None:
        """Build the tokenizer files from the metadata, where the file has a vocabulary."""
        write_tokenizer(self._metadata, folder)

    def _get(self, key: str, default: Any = None) -> Any:
        return self._metadata.get(f"{self._metadata['general.architecture']}.{key}", default)

    def _token_id(self, kind: str) -> int | None:
        key = f"tokenizer.ggml.{kind}_token_id"
        value = self._metadata.get(key)
        if value is not None and not is_integer(value):
            raise ValueError(f"{self.path}: {key} must be a token id, not {value!r}.")
        return value

    def _generation_config(self) -> dict:
        ids = [self._token_id(kind) for kind in ("eos", "eot", "eom")]
        ids = list(dict.fromkeys(i for i in ids if i is not None))
        return {"eos_token_id": ids} if ids else {}

    def _config(self) -> dict:
        """The config.json that a converter to Hugging Face format would write."""
        arch = self._metadata.get("general.architecture")
        if not isinstance(arch, str) or arch not in _ARCHITECTURES:
            raise ValueError(
                f"{self.path}: architecture {arch!r} is not supported; "
                f"use one of {', '.join(_ARCHITECTURES)}."
            )
        self._check_metadata(arch)
        config = {"architectures": [_ARCHITECTURES[arch]], "model_type": arch, "hidden_act": "silu"}
        for key, attribute in _HANDLED.items():
            if attribute and self._get(key) is not None:
                config[attribute] = self._get(key)
        heads = config["num_attention_heads"]
        # the files say nothing where the class default of transformers would step in
        config.setdefault("num_key_value_heads", heads)
        config.setdefault("rope_theta", 10000.0)
        config["head_dim"] = self._head_dim(config["hidden_size"] // heads)
        config["vocab_size"] = self._vocab_size()
        config["tie_word_embeddings"] = HEAD.gguf not in self._stored
        config["rope_scaling"] = self._rope_scaling(config["head_dim"], config["rope_theta"])
        names = {"bos": "bos", "eos": "eos", "pad": "padding", "unk": "unknown"}
        config |= {f"{ours}_token_id": self._token_id(theirs) for ours, theirs in names.items()}
        return config

    def _check_metadata(self, arch: str) -> None:
        own = {
            k.removeprefix(f"{arch}."): v
            for k, v in self._metadata.items()
            if k.startswith(f"{arch}.")
        }
        bad = {
            f"{arch}.{k}": v
            for k, v in own.items()
            if (v not in _ALLOWED[k] if k in _ALLOWED else k not in _HANDLED.keys() | _IGNORED)
            or (k in _HANDLED and isinstance(v, list))
        }
        if self._metadata.get("split.count", 1) not in (0, 1):
            bad["split.count"] = self._metadata["split.count"]
        if bad:
            listed = ", ".join(f"{k}={v!r}" for k, v in bad.items())
            raise ValueError(f"{self.path} asks for what is not supported: {listed}.")
        missing = [f"{arch}.{k}" for k in _REQUIRED if k not in own]
        if missing:
            raise ValueError(f"{self.path} lacks the metadata {', '.join(missing)}.")
        for key in _COUNTS & own.keys():
            if not is_integer(own[key]) or not 0 < own[key] <= MAX_SIZE:
                raise ValueError(
                    f"{self.path}: {arch}.{key} must be in 1 .. {MAX_SIZE}, not {own[key]!r}."
                )

    def _head_dim(self, default: int) -> int:
        head_dim = self._get("attention.key_length", default)
        for key in ("attention.value_length", "rope.dimension_count"):
            if self._get(key, head_dim) != head_dim:
                raise ValueError(
                    f"{self.path}: {key} {self._get(key)} differs from the head width {head_dim}, "
                    "which is not supported."
                )
        return head_dim

    def _vocab_size(self) -> int:
        embed = self._stored.get(EMBED.gguf)
        if embed is None or len(embed.shape) != 2:
            raise ValueError(f"{self.path} lacks the tensor {EMBED.gguf}.")
        return int(embed.shape[-1])

    def _rope_scaling(self, head_dim: int, theta: float) -> dict | None:
        kind = self._get("rope.scaling.type", "linear")  # as llama.cpp has it
        factor = self._get("rope.scaling.factor", self._get("rope.scale_linear"))
        if kind not in ("none", "linear"):
            raise ValueError(f"{self.path}: rotary scaling {kind!r} is not supported.")
        scaled = kind != "none" and factor not in (None, 0.0, 1.0)
        if _ROPE_FACTORS not in self._stored:
            return {"rope_type": "linear", "factor": factor} if scaled else None
        if scaled:
            raise ValueError(
                f"{self.path}: {_ROPE_FACTORS} together with the rotary scaling factor {factor} "
                "is not supported."
            )
        return self._llama3_scaling(head_dim, theta)

    def _llama3_scaling(self, head_dim: int, theta: float) -> dict | None:
        """The llama3 scaling whose factors per frequency the file holds.

        Converters store the factors only; the factor itself is the largest of them, and the other
        parameters have been the same in every release of Llama 3.
        """
        stored = np.asarray(self._stored[_ROPE_FACTORS].data, np.float64)
        if stored.shape != (head_dim // 2,) or not is_number(theta):
            raise ValueError(f"{self.path}: {_ROPE_FACTORS} does not fit heads of {head_dim}.")
        low, high, original, factor = 1.0, 4.0, 8192, round(float(stored.max()), 4)
        turns = original * theta ** -(np.arange(0, head_dim, 2) / head_dim) / (2 * math.pi)
        smooth = np.clip((turns - low) / (high - low), 0, 1)
        expected = 1 / ((1 - smooth) / factor + smooth)
        if stored.shape != expected.shape or not np.allclose(stored, expected, rtol=1e-3):
            raise ValueError(
                f"{self.path}: the factors in {_ROPE_FACTORS} are not those of Llama 3, "
                "and no other frequency scaling is supported."
            )
        if factor == 1:
            return None
        return {
            "rope_type": "llama3",
            "factor": factor,
            "low_freq_factor": low,
            "high_freq_factor": high,
            "original_max_position_embeddings": original,
        }

    def _dtype(self) -> str:
        """The type of all matrices, where it is a 16-bit one; else float32."""
        kinds = {
            self._stored[self.label(name)].tensor_type.name
            for name, shape in expected_tensors(self.config).items()
            if len(shape) > 1 and self.label(name) in self._stored
        }
        half = {"F16": "float16", "BF16": "bfloat16"}
        return half.get(kinds.pop(), "float32") if len(kinds) == 1 else "float32"


def _open(path: pathlib.Path):
    with path.open("rb") as file:
        magic = file.read(4)
    if magic != b"GGUF":
        raise ValueError(f"{path} is not a GGUF file; a source is a model folder or a GGUF file.")
    import gguf

    class Reader(gguf.GGUFReader):
        """One that does not read on behind the end of the file, where it would find nothing."""

        @property
        def data(self):
            return self._bytes

        @data.setter
        def data(self, mapped):
            # A slice of a memmap costs several times one of an array, and there are 250,000 in a
            # vocabulary; each is also something that the garbage collector looks through.
            self._bytes = mapped.view(np.ndarray)

        def _get(self, offset, dtype, count=1, override_order=None):
            if offset + int(count) * np.dtype(dtype).itemsize > len(self.data):
                raise ValueError("it ends too early")
            return super()._get(offset, dtype, count, override_order)

        def _get_field_parts(self, orig_offs, raw_type):
            if raw_type == gguf.GGUFValueType.ARRAY:
                (count,) = self._get(orig_offs + 4, np.uint64)
                if count > _MAX_ENTRIES:
                    raise ValueError(f"a list of {count} entries")
            return super()._get_field_parts(orig_offs, raw_type)

    try:
        return Reader(path)
    except (ValueError, IndexError, KeyError, TypeError, OverflowError, RecursionError) as error:
        raise ValueError(f"{path} is a broken GGUF file: {error}") from None


def _contents(reader: Any, path: pathlib.Path) -> dict[str, Any]:
    """The metadata by key.

    Raises:
      ValueError: a value cannot be read.
    """
    try:
        return {key: field.contents() for key, field in reader.fields.items()}
    except (ValueError, IndexError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is a broken GGUF file: {error}") from None


def _header(tensor) -> Tensor:
    from gguf.quants import _type_traits  # the library has no public list of what it decodes

    shape = tuple(int(n) for n in reversed(tensor.shape))
    kind = tensor.tensor_type
    readable = kind.name in ("F32", "F16") or kind in _type_traits
    return Tensor(shape, "float32" if readable else kind.name)


def _to_half_rotation(rows: np.ndarray, head_dim: int) -> np.ndarray:
    """Rows of whole heads, from rotary pairs side by side to pairs half a head apart."""
    pairs = rows.reshape(-1, head_dim // 2, 2, rows.shape[-1])
    return pairs.swapaxes(1, 2).reshape(rows.shape)

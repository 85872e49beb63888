"""What `quantization_config` in a config.json says of how the matrices of a folder are stored.

Four methods are read: fp8, compressed-tensors, gptq and awq. As with the rest of config.json
nothing is guessed: every key is handled, knowingly ignored, or at the one value that changes
nothing; what asks for arithmetic beyond that of the weights is refused by name.
"""

from __future__ import annotations

import dataclasses
import re
from typing import Any

from easyspec_jax.config import ModelConfig, is_integer
from easyspec_jax.hf_config import config_from_hf

KEY = "quantization_config"


@dataclasses.dataclass(frozen=True)
class Scheme:
    """How every quantised matrix of a folder is stored."""

    method: str  # as `quant_method` has it
    # Where codes stand: "plain" one by one in `weight`, "packed" in `weight_packed` along inputs,
    # "gptq" in `qweight` along inputs, "awq" in `qweight` along outputs.
    storage: str
    bits: int
    code: str  # type of plain codes in a header: F8_E4M3 or I8
    # Outputs and inputs that share a scale, None: all. Where both are None a scale for every
    # output is one as well if `per_output`.
    block: tuple[int | None, int | None] = (None, None)
    per_output: bool = False
    needs_zeros: bool = False  # else a zero point is 0 where none is stored
    zero_offset: int = 0  # what a stored zero point of gptq is short of the true one
    needs_index: bool = False  # only `g_idx` says which inputs share a scale
    ignored: tuple[str, ...] = ()  # modules that are said to be floats
    codes: str = ""  # what the weights are, for people
    note: str = ""  # what is not done as the config says, for people

    def ignores(self, module: str) -> bool:
        """Whether the config says of a module that it is stored as floats."""
        return any(_matches(pattern, module) for pattern in self.ignored)


def read_hf_config(raw: dict[str, Any]) -> tuple[ModelConfig, dict[str, Any], Scheme | None]:
    """The model of a config.json; the config.json that says nothing of codes; and how weights are
    stored, None where they are floats.

    Raises:
      ValueError: as `config_from_hf`, or the quantisation is none that is read here.
    """
    if raw.get(KEY) is None:
        return config_from_hf(raw), raw, None
    plain = {name: value for name, value in raw.items() if name != KEY}
    return config_from_hf(plain), plain, read_scheme(raw[KEY])


def read_scheme(config: Any) -> Scheme:
    """The scheme that a `quantization_config` describes.

    Raises:
      ValueError: the method or a part of it is unknown or not done here; each is named.
    """
    method = config.get("quant_method") if isinstance(config, dict) else None
    if not isinstance(method, str) or method not in _READERS:
        known = ", ".join(_READERS)
        raise ValueError(f"{KEY}: quant_method {method!r} is not supported; use one of {known}.")
    scheme = _READERS[method]({k: v for k, v in config.items() if k != "quant_method"})
    for pattern in scheme.ignored:
        if pattern.startswith("re:"):
            try:
                re.compile(pattern[3:])
            except (re.error, OverflowError, RecursionError) as error:
                raise ValueError(f"{KEY}: {pattern!r} is no regular expression: {error}.") from None
    return scheme


def _fp8(config: dict[str, Any]) -> Scheme:
    _check(
        "fp8",
        config,
        handled="activation_scheme weight_block_size modules_to_not_convert ignored_layers",
        ignored="dequantize is_checkpoint_fp8_serialized expert_dtype",
        allowed={
            "fmt": ("e4m3", "float8_e4m3fn", None),
            "scale_fmt": ("float", None),
            "kv_cache_scheme": (None,),
            "modules_to_convert": ([], None),
        },
    )
    activations = config.get("activation_scheme", "dynamic")
    if activations != "dynamic":
        raise ValueError(
            f"{KEY}: activation_scheme {activations!r} is not supported; activations are not "
            "quantised here."
        )
    block = config.get("weight_block_size")
    if block is not None:
        if not isinstance(block, list | tuple) or len(block) != 2 or not all(map(_size, block)):
            raise ValueError(f"{KEY}: weight_block_size must be two sizes, not {block!r}.")
    return Scheme(
        method="fp8",
        storage="plain",
        bits=8,
        code="F8_E4M3",
        block=(None, None) if block is None else (block[0], block[1]),
        per_output=block is None,
        ignored=_names(config, "modules_to_not_convert", "ignored_layers"),
        codes="fp8 weights",
        note=_ROUNDED,
    )


_ROUNDED = "activations stay floats, though the config would have them rounded to fp8"


def _compressed(config: dict[str, Any]) -> Scheme:
    _check(
        "compressed-tensors",
        config,
        handled="format config_groups ignore sparsity_config",
        ignored="version quantization_status global_compression_ratio run_compressed dequantize "
        "use_optimized_inference",
        allowed={"kv_cache_scheme": (None,), "transform_config": ({}, None)},
    )
    sparsity = config.get("sparsity_config") or {}
    if not isinstance(sparsity, dict) or sparsity.get("format", "dense") != "dense":
        raise ValueError(f"{KEY}: sparsity_config {sparsity!r} is not supported.")
    groups, layout = config.get("config_groups"), config.get("format")
    if not isinstance(layout, str) or layout not in _FORMATS:
        known = ", ".join(_FORMATS)
        raise ValueError(f"{KEY}: format {layout!r} is not supported; use one of {known}.")
    if not isinstance(groups, dict) or len(groups) != 1:
        raise ValueError(f"{KEY}: config_groups must be one group, not {groups!r}.")
    (group,) = groups.values()
    weights = group.get("weights") if isinstance(group, dict) else None
    if not isinstance(weights, dict):
        raise ValueError(f"{KEY}: the group {group!r} says nothing of weights.")
    inputs = group.get("input_activations")
    fp8 = {"type": "float", "num_bits": 8, "dynamic": True}
    rounded = isinstance(inputs, dict) and fp8.items() <= inputs.items()
    rounded = rounded and weights.get("type") == "float"
    _check(
        "compressed-tensors",
        group,
        handled="weights",
        allowed={
            "targets": (["Linear"],),
            "input_activations": (inputs if rounded else None,),
            "output_activations": (None,),
            "format": (layout, None),
        },
    )
    bits, storage, code = _compressed_codes(layout, weights)
    return Scheme(
        method="compressed-tensors",
        storage=storage,
        bits=bits,
        code=code,
        block=_strategy(weights),
        needs_zeros=weights.get("symmetric", True) is False,
        ignored=_names(config, "ignore"),
        codes=f"weights of {bits} bits ({layout})",
        note=_ROUNDED if rounded else "",
    )


_FORMATS = {
    "pack-quantized": ("int",),
    "int-quantized": ("int",),
    "float-quantized": ("float",),
    "naive-quantized": ("int", "float"),
}


def _compressed_codes(layout: str, weights: dict[str, Any]) -> tuple[int, str, str]:
    """Bits, storage and type of the codes of the weights of a group."""
    _check(
        "compressed-tensors",
        weights,
        handled="num_bits type symmetric strategy group_size",
        ignored="observer observer_kwargs scale_dtype zp_dtype",
        allowed={
            "dynamic": (False, None),
            "actorder": ("weight", "static", False, None),  # orders of making, not of reading
            "block_structure": (None,),
        },
    )
    bits, kind = weights.get("num_bits", 8), weights.get("type", "int")
    sizes = (8,) if kind == "float" else (4, 8)
    if kind not in _FORMATS[layout] or not is_integer(bits) or bits not in sizes:
        raise ValueError(f"{KEY}: weights of {bits!r} bits, {kind!r}, in {layout} are not read.")
    if not isinstance(weights.get("symmetric", True), bool):
        raise ValueError(f"{KEY}: symmetric must be true or false.")
    if kind == "float" and not weights.get("symmetric", True):
        raise ValueError(f"{KEY}: asymmetric floats are not supported.")
    storage = "packed" if layout == "pack-quantized" else "plain"
    return bits, storage, "F8_E4M3" if kind == "float" else "I8"


def _strategy(weights: dict[str, Any]) -> tuple[int | None, int | None]:
    """Outputs and inputs that share a scale of compressed-tensors."""
    size, strategy = weights.get("group_size"), weights.get("strategy")
    if size == -1:
        size, strategy = None, strategy or "channel"
    if size is not None and not _size(size):
        raise ValueError(f"{KEY}: group_size must be a size, not {size!r}.")
    strategy = strategy or ("tensor" if size is None else "group")
    if (strategy == "group") != (size is not None):
        raise ValueError(f"{KEY}: strategy {strategy!r} with group_size {size!r} is not supported.")
    blocks = {"tensor": (None, None), "channel": (1, None), "group": (1, size)}
    if not isinstance(strategy, str) or strategy not in blocks:
        known = ", ".join(blocks)
        raise ValueError(f"{KEY}: strategy {strategy!r} is not supported; use one of {known}.")
    return blocks[strategy]


# Keys of gptq and awq that say how the codes were found, or by which kernels they are multiplied.
_MAKING = """
    sym damp_percent damp_auto_increment true_sequential static_groups act_group_aware mse
    model_name_or_path model_file_base_name meta tokenizer dataset batch_size pad_token_id
    model_seqlen max_input_length block_name_to_quantize module_name_preceding_first_block
    modules_in_block_to_quantize cache_block_outputs use_cuda_fp16 use_exllama disable_exllama
    exllama_config lm_head do_fuse fuse_max_seq_len modules_to_fuse
"""


def _gptq(config: dict[str, Any]) -> Scheme:
    _check(
        "gptq",
        config,
        handled="bits group_size desc_act checkpoint_format format",
        ignored=f"{_MAKING} backend",
        allowed={
            "dynamic": ({}, None),
            "pack_dtype": ("int32", None),
            "is_marlin_format": (False, None),
        },
    )
    bits, group = _bits(config, (4, 8)), _group_size(config)
    layout = config.get("checkpoint_format") or config.get("format") or "gptq"
    if layout not in ("gptq", "gptq_v2") or config.get("format") not in (None, layout):
        raise ValueError(
            f"{KEY}: checkpoint_format {layout!r} is not supported; use gptq or gptq_v2."
        )
    ordered = config.get("desc_act", False)
    if not isinstance(ordered, bool):
        raise ValueError(f"{KEY}: desc_act must be true or false, not {ordered!r}.")
    offset = int(layout == "gptq")
    return _in_words("gptq", bits, group, layout, zero_offset=offset, needs_index=ordered)


def _awq(config: dict[str, Any]) -> Scheme:
    _check(
        "awq",
        config,
        handled="bits group_size version format modules_to_not_convert",
        ignored=_MAKING,
        allowed={
            "zero_point": (True,),
            "desc_act": (False, None),
            "backend": ("autoawq", "auto", None),  # another has another order
        },
    )
    bits, group = _bits(config, (4,)), _group_size(config)
    version = config.get("version") or config.get("format") or "gemm"
    if not isinstance(version, str) or version.lower() != "gemm":
        raise ValueError(f"{KEY}: version {version!r} of awq is not supported; use gemm.")
    return _in_words("awq", bits, group, "awq", ignored=_names(config, "modules_to_not_convert"))


def _in_words(method: str, bits: int, group: int | None, layout: str, **more: Any) -> Scheme:
    """Codes in words of 32 bits, with zero points of groups of inputs."""
    return Scheme(
        method=method,
        storage=method,
        bits=bits,
        code="I32",
        block=(1, group),
        needs_zeros=True,
        codes=f"weights of {bits} bits ({layout})",
        **more,
    )


_READERS = {"fp8": _fp8, "compressed-tensors": _compressed, "gptq": _gptq, "awq": _awq}


def _check(
    method: str,
    config: dict[str, Any],
    *,
    handled: str,
    ignored: str = "",
    allowed: dict[str, tuple],
) -> None:
    """Refuse keys that are neither handled nor ignored, and values that are not allowed."""
    known = {*handled.split(), *ignored.split()}
    bad = {
        name: value
        for name, value in config.items()
        if (value not in allowed[name] if name in allowed else name not in known)
    }
    if bad:
        listed = ", ".join(f"{name}={value!r}" for name, value in bad.items())
        raise ValueError(f"{KEY} of {method} asks for what is not supported: {listed}.")


def _bits(config: dict[str, Any], known: tuple[int, ...]) -> int:
    bits = config.get("bits")
    if not is_integer(bits) or bits not in known:
        raise ValueError(f"{KEY}: bits {bits!r} are not supported; use {known}.")
    return bits


def _group_size(config: dict[str, Any]) -> int | None:
    """Inputs that share a scale, None: all."""
    size = config.get("group_size")
    if size == -1:
        return None
    if not _size(size):
        raise ValueError(f"{KEY}: group_size must be a size, or -1 for all, not {size!r}.")
    return size


def _size(value: Any) -> bool:
    return is_integer(value) and 0 < value < 2**31


def _names(config: dict[str, Any], *keys: str) -> tuple[str, ...]:
    """The modules in lists under these keys."""
    found: list[str] = []
    for key in keys:
        names = config.get(key) or []
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise ValueError(f"{KEY}: {key} must be a list of names, not {names!r}.")
        found += names
    return tuple(found)


def _matches(pattern: str, module: str) -> bool:
    """Whether a pattern is a module's name, that of one around it, or its last names; behind "re:"
    stands a regular expression for the beginning.
    """
    if pattern.startswith("re:"):
        return re.match(pattern[3:], module) is not None
    return module == pattern or module.startswith(f"{pattern}.") or module.endswith(f".{pattern}")

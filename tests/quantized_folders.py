"""Tiny folders of quantised safetensors, and what their weights are as floats.

Every checkpoint is made here from codes, zero points and scales that are drawn, packed one by one
as the definition of the format has it; what must come back is (code - zero point) * scale, one
by one, in float32. Definitions: for fp8 the kernel that DeepSeek published with its weights and OCP
OFP8 for the numbers; for compressed-tensors `pack_to_int32` and `dequantize` of that library; for
gptq the slow path of AutoGPTQ's linear layer; for awq the gemm packing of AutoAWQ.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Callable

import ml_dtypes
import numpy as np
from hf_models import random_tensors, tiny_config, write_hf_folder, write_tensors

F16, BF16 = np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16)


def pack(codes, bits: int) -> np.ndarray:
    """Codes along a line in words of 32 bits, the first in the lowest bits."""
    count = 32 // bits
    words = [0] * -(-len(codes) // count)
    for j, code in enumerate(codes):
        words[j // count] |= int(code) << (bits * (j % count))
    return np.array(words, np.uint32).view(np.int32)


def pack_rows(codes: np.ndarray, bits: int) -> np.ndarray:
    return np.stack([pack(row, bits) for row in codes])


def pack_awq(codes: np.ndarray) -> np.ndarray:
    """[in, out] of 4 bits: nibble i of a word holds the column that stands at i in this order."""
    order = [0, 2, 4, 6, 1, 3, 5, 7]
    return np.stack(
        [pack([row[k + j] for k in range(0, len(row), 8) for j in order], 4) for row in codes]
    )


def e4m3(byte: int) -> float:
    """The number that a byte is in OFP8 E4M3."""
    sign, exponent, fraction = byte >> 7, byte >> 3 & 15, byte & 7
    size = fraction / 8 * 2.0**-6 if exponent == 0 else (1 + fraction / 8) * 2.0 ** (exponent - 7)
    return -size if sign else size


def dense(codes, zero_of, scale_of) -> np.ndarray:
    """f32[out, in]: (code - zero point) * scale, one by one."""
    out = np.empty(np.shape(codes), np.float32)
    for o, i in np.ndindex(*out.shape):
        out[o, i] = np.float32(codes[o][i] - int(zero_of(o, i))) * np.float32(scale_of(o, i))
    return out


def fp8(rng, shape, *, scales: Callable, index: Callable, name="weight_scale", dtype=np.float32):
    """Bytes and scales of shape `scales(out, in)`, of which element o, i has that at `index`."""
    codes = rng.integers(0, 256, shape, dtype=np.uint8)
    codes[codes & 127 == 127] = 0  # not a number
    scale = (rng.uniform(1, 2, scales(*shape)) / 2000).astype(dtype)
    numbers = [[e4m3(int(code)) for code in row] for row in codes]
    want = dense(numbers, lambda o, i: 0, lambda o, i: scale[index(o, i)])
    return {"weight": codes.view(ml_dtypes.float8_e4m3fn), name: np.asarray(scale)}, want


def whole(rng, shape, *, group: int | None, bits=8, packed=False, zeros="", tensor=False):
    """Integers of compressed-tensors; `zeros`: "" without, "plain" or "packed"."""
    half, (outputs, inputs) = 2 ** (bits - 1), shape
    size = group or inputs
    grid = (1, 1) if tensor else (outputs, inputs // size)
    codes = rng.integers(-half, half, shape)
    zero = rng.integers(-half, half, grid) if zeros else np.zeros(grid, int)
    scale = (rng.uniform(1, 2, grid) / 4 / half).astype(BF16)
    at = (lambda o, i: (0, 0)) if tensor else (lambda o, i: (o, i // size))
    want = dense(codes, lambda o, i: zero[at(o, i)], lambda o, i: scale[at(o, i)])
    stored = {"weight_scale": scale.reshape(-1) if tensor else scale}
    if packed:
        stored["weight_packed"] = pack_rows(codes + half, bits)
        stored["weight_shape"] = np.array(shape, np.int64)
    else:
        stored["weight"] = codes.astype(np.int8)
    if zeros == "plain":
        stored["weight_zero_point"] = zero.astype(np.int8)
    elif zeros:
        stored["weight_zero_point"] = pack_rows((zero + half).T, bits).T.copy()
    return stored, want


def gptq(rng, shape, *, bits=4, group: int | None = 16, offset=1, order="even", symmetric=False):
    """Codes along inputs, zero points along outputs, less `offset`; the group of every input is
    said ("even"), drawn ("drawn") or left out ("").
    """
    outputs, inputs = shape
    size, top = group or inputs, 2**bits
    index = np.arange(inputs, dtype=np.int32) // size
    if order == "drawn":
        rng.shuffle(index)
    codes = rng.integers(0, top, shape)
    zero = rng.integers(0, top, (outputs, inputs // size))
    if symmetric:
        zero[:] = top // 2
    scale = (rng.uniform(1, 2, zero.shape) / 2 / top).astype(F16)
    want = dense(codes, lambda o, i: zero[o, index[i]], lambda o, i: scale[o, index[i]])
    stored = {
        "qweight": pack_rows(codes, bits).T.copy(),
        "qzeros": pack_rows((zero.T - offset) % top, bits),
        "scales": scale.T.copy(),
    }
    return stored | ({"g_idx": index} if order else {}), want


def awq(rng, shape, *, group: int = 16):
    codes = rng.integers(0, 16, shape)
    zero = rng.integers(0, 16, (shape[0], shape[1] // group))
    scale = (rng.uniform(1, 2, zero.shape) / 32).astype(F16)
    want = dense(codes, lambda o, i: zero[o, i // group], lambda o, i: scale[o, i // group])
    stored = {"qweight": pack_awq(codes.T), "qzeros": pack_awq(zero.T), "scales": scale.T.copy()}
    return stored, want


def compressed(layout: str, bits: int, strategy: str, group=None, symmetric=True, kind="int"):
    weights = {"num_bits": bits, "type": kind, "strategy": strategy, "symmetric": symmetric}
    weights |= {"group_size": group, "dynamic": False, "observer": "minmax", "actorder": None}
    group_0 = {"targets": ["Linear"], "weights": weights, "input_activations": None}
    return {
        "quant_method": "compressed-tensors",
        "format": layout,
        "config_groups": {"group_0": group_0},
        "ignore": ["lm_head"],
        "kv_cache_scheme": None,
        "quantization_status": "compressed",
    }


@dataclasses.dataclass
class Case:
    """A format: what config.json says, and how a matrix is made."""

    config: dict
    make: Callable
    options: dict
    dtype: np.dtype = BF16  # of what is stored as floats
    hidden: int = 32
    head: bool = False  # quantised as well
    # Kind and group of what a checkpoint has of it, and whether with minima.
    kept: tuple[str, int | None] | tuple[str, int | None, str] | None = None


FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic"}
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 16, "desc_act": False, "sym": False}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 16, "version": "GEMM", "zero_point": True}
CASES = {
    # blocks that fit neither the outputs nor the inputs
    "fp8 blocks": Case(
        FP8 | {"weight_block_size": [20, 24], "fmt": "e4m3", "modules_to_not_convert": ["lm_head"]},
        fp8,
        {
            "scales": lambda o, i: (-(-o // 20), -(-i // 24)),
            "index": lambda o, i: (o // 20, i // 24),
            "name": "weight_scale_inv",
        },
    ),
    "fp8 tensor": Case(
        FP8 | {"ignored_layers": ["lm_head"]},
        fp8,
        {"scales": lambda o, i: (), "index": lambda o, i: ()},
        kept=("fp8", None),
    ),
    "fp8 whole blocks": Case(
        FP8 | {"weight_block_size": [20, 16], "modules_to_not_convert": ["lm_head"]},
        fp8,
        {
            "scales": lambda o, i: (-(-o // 20), i // 16),
            "index": lambda o, i: (o // 20, i // 16),
            "name": "weight_scale_inv",
        },
        kept=("fp8", 16),
    ),
    "fp8 channels": Case(
        compressed("float-quantized", 8, "channel", kind="float"),
        fp8,
        {"scales": lambda o, i: (o, 1), "index": lambda o, i: (o, 0), "dtype": BF16},
        kept=("fp8", None),
    ),
    "int8 tensor": Case(
        compressed("naive-quantized", 8, "tensor"),
        whole,
        {"group": None, "tensor": True},
        kept=("int8", None),
    ),
    "int8 channels": Case(
        compressed("int-quantized", 8, "channel"), whole, {"group": None}, kept=("int8", None)
    ),
    "int8 groups": Case(
        compressed("int-quantized", 8, "group", 16, symmetric=False),
        whole,
        {"group": 16, "zeros": "plain"},
        kept=("int8", 16, "minima"),
    ),
    # words of eight codes that the inputs do not fill
    "packed int4": Case(
        compressed("pack-quantized", 4, "group", 4),
        whole,
        {"group": 4, "bits": 4, "packed": True},
        hidden=36,
        kept=("int4", 4),
    ),
    "packed int4 channels": Case(
        compressed("pack-quantized", 4, "channel"),
        whole,
        {"group": None, "bits": 4, "packed": True},
        kept=("int4", -1),
    ),
    "packed int4 with zeros": Case(
        compressed("pack-quantized", 4, "group", 4, symmetric=False),
        whole,
        {"group": 4, "bits": 4, "packed": True, "zeros": "packed"},
        hidden=36,
        kept=("int4", 4, "minima"),
    ),
    "packed int8": Case(
        compressed("pack-quantized", 8, "channel", symmetric=False),
        whole,
        {"group": None, "packed": True, "zeros": "plain"},
        kept=("int8", None, "minima"),
    ),
    "gptq": Case(GPTQ, gptq, {}, F16, kept=("int4", 16, "minima")),
    "gptq in order": Case(
        GPTQ | {"desc_act": True, "checkpoint_format": "gptq", "lm_head": True},
        gptq,
        {"order": "drawn"},
        F16,
        head=True,
    ),
    "gptq_v2": Case(
        GPTQ | {"bits": 8, "group_size": -1, "checkpoint_format": "gptq_v2"},
        gptq,
        {"bits": 8, "group": None, "offset": 0, "order": ""},
        F16,
        kept=("int8", None, "minima"),
    ),
    "gptq of 8 bits": Case(GPTQ | {"bits": 8}, gptq, {"bits": 8}, F16, kept=("int8", 16, "minima")),
    # groups of 16 inputs over heads of 8
    "gptq symmetric": Case(
        GPTQ | {"sym": True, "lm_head": True},
        gptq,
        {"symmetric": True},
        F16,
        head=True,
        kept=("int4", 16),
    ),
    "gptq symmetric of 8 bits": Case(
        GPTQ | {"bits": 8, "group_size": -1, "sym": True, "checkpoint_format": "gptq_v2"},
        gptq,
        {"bits": 8, "group": None, "offset": 0, "symmetric": True},
        F16,
        kept=("int8", None),
    ),
    "awq": Case(AWQ, awq, {}, F16, kept=("int4", 16, "minima")),
}


def write(
    path: pathlib.Path, name: str, *, config=None, change=None, layers=1
) -> dict[str, np.ndarray]:
    """Write the quantised folder of a case, its config and tensors changed; what its weights are
    as floats. The head has 64 outputs, so that all is whole words.
    """
    case = CASES[name]
    raw = tiny_config("llama", num_hidden_layers=layers, hidden_size=case.hidden, vocab_size=64)
    write_hf_folder(path, raw, dtype=case.dtype)
    said = case.config | (config or {})
    (path / "config.json").write_text(json.dumps(raw | {"quantization_config": said}))
    rng, stored, floats = np.random.default_rng(0), {}, {}
    for weight, array in random_tensors(raw, dtype=case.dtype).items():
        floats[weight] = array.astype(np.float32)
        kept = weight == "lm_head.weight" and not case.head
        if kept or array.ndim == 1 or "embed" in weight:
            stored[weight] = array
            continue
        parts, floats[weight] = case.make(rng, array.shape, **case.options)
        stored |= {weight.removesuffix("weight") + part: value for part, value in parts.items()}
    if change is not None:
        change(stored)
    write_tensors(path, stored)
    return floats


def float_folder(path: pathlib.Path, name: str, floats: dict[str, np.ndarray]) -> pathlib.Path:
    raw = tiny_config("llama", num_hidden_layers=1, hidden_size=CASES[name].hidden, vocab_size=64)
    write_hf_folder(path, raw)
    write_tensors(path, floats)
    return path

"""Folders of quantised safetensors: read as what their formats say, or refused."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import pathlib
from collections.abc import Callable

import jax
import ml_dtypes
import numpy as np
import pytest
from hf_models import load_all, run, tiny_config, write_hf_folder, write_tensors
from quantized_folders import AWQ, BF16, CASES, F16, FP8, GPTQ, compressed, float_folder, write

import convert
import easyspec_jax as es
from convert.__main__ import main as command
from convert.folder import FolderSource
from convert.quantization_config import read_scheme
from easyspec_jax import checkpoint, sharding, sources

Q = "model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize("name", CASES)
def test_weights_are_what_their_format_says_to_the_last_bit(name, tmp_path, monkeypatch):
    floats = write(tmp_path / "hf", name)
    want = load_all(run(float_folder(tmp_path / "floats", name, floats), tmp_path / "a"), 1)
    monkeypatch.setattr("convert.tensors.CHUNK_BYTES", 700)  # slices that end inside a word
    out = run(tmp_path / "hf", tmp_path / "b", dtype="float32")
    for key, array in load_all(out, 1).items():
        np.testing.assert_array_equal(array, want[key], strict=True)
    assert "quantization_config" not in json.loads((out / "config.json").read_text())
    codes, case = stored_codes(out), CASES[name]
    if codes is None:
        assert case.kept is None
    else:
        minima = ("minima",) if codes.minimum_dtype else ()
        assert case.kept == (codes.kind, codes.group_size, *minima)
        places = ("float", "layers" if case.head else "float")
        assert (codes.embed, codes.lm_head) == places


def stored_codes(folder: pathlib.Path) -> es.Quantization | None:
    return checkpoint.stored_quantization(checkpoint.read_metadata(folder)[1])


@pytest.mark.slow
def test_codes_are_kept_on_a_mesh_and_say_what_the_floats_say(tmp_path, monkeypatch):
    """On two layers at once, in the order of GPUs; greedily, and from disk to disk."""
    write(tmp_path / "hf", "awq", layers=2)
    codes = run(tmp_path / "hf", tmp_path / "codes")
    floats = run(tmp_path / "hf", tmp_path / "floats", dequantize=True, dtype="float32")
    assert stored_codes(floats) is None
    plain = es.load_model(floats, es.make_mesh(1, 1), dtype="float64", progress=False)
    want = es.Decoder(plain).generate([[5, 9, 33]], max_new_tokens=12).tokens
    monkeypatch.setattr(sharding, "has_gpus", lambda mesh: True)
    mesh = es.make_mesh(4, 2)
    options = {"group_size": 2, "progress": False}
    model = es.load_model(codes, mesh, dtype="float64", **options)
    assert model.quantization is not None and model.params.embed.dtype == np.float64
    stored = model.params.blocks[0].mlp[0].w_down
    assert stored.scales.dtype == np.float16
    assert stored.minima.dtype == np.float32
    assert es.Decoder(model).generate([[5, 9, 33]], max_new_tokens=12).tokens == want
    half = es.load_model(codes, mesh, dtype="float16", **options)
    es.save_model(half, tmp_path / "again", like=codes)
    assert checkpoint.read_metadata(tmp_path / "again") == checkpoint.read_metadata(codes)


def said(capsys, src, dst, *options: str) -> str:
    """What the command has to say of a source, all of it one line."""
    assert command([str(src), str(dst), *options]) == 0
    (line,) = [x for x in capsys.readouterr().err.splitlines() if x.startswith(f"{src}: ")]
    return line.removeprefix(f"{src}: ")


def test_one_line_says_what_becomes_of_codes(tmp_path, capsys):
    write(tmp_path / "kept", "fp8 tensor")
    line = said(capsys, tmp_path / "kept", tmp_path / "a")
    assert line.startswith("fp8 weights stay codes and scales; activations stay floats")
    line = said(capsys, tmp_path / "kept", tmp_path / "b", "--dequantize")
    assert line.startswith("fp8 weights become floats; activations") and not stored_codes(
        tmp_path / "b"
    )
    line = said(capsys, tmp_path / "kept", tmp_path / "c", "--quantization", "int8")
    assert line.startswith("fp8 weights are rounded to int8; activations")
    assert stored_codes(tmp_path / "c") == es.Quantization("int8")

    def wider(stored):
        stored[f"{Q}.scales"] = stored[f"{Q}.scales"].astype(np.float32)

    write(tmp_path / "not", "awq", change=wider)
    line = said(capsys, tmp_path / "not", tmp_path / "d")
    why = f"{Q}.qweight has zero points and scales in float32"
    assert line == f"weights of 4 bits (awq) become floats: {why}"


def test_scales_of_several_types_are_kept_in_one_that_holds_them(tmp_path):
    def wider(stored):
        stored[f"{Q}.weight_scale"] = stored[f"{Q}.weight_scale"].astype(np.float32) + np.float32(
            2.0**-20
        )

    write(tmp_path / "hf", "int8 channels", change=wider)
    out = run(tmp_path / "hf", tmp_path / "codes", dtype="float32")
    want = load_all(run(tmp_path / "hf", tmp_path / "a", dtype="float32", dequantize=True), 1)
    assert stored_codes(out).scale_dtype == "float32"
    jax.tree.map(np.testing.assert_array_equal, load_all(out, 1), want)


def test_codes_that_are_no_numbers_are_refused(tmp_path):
    def spoil(stored):
        stored[f"{Q}.weight"].view(np.uint8)[3, 5] = 0x7F

    write(tmp_path / "hf", "fp8 tensor", change=spoil)
    with pytest.raises(ValueError, match=r"q_proj\.weight holds values that are not finite"):
        run(tmp_path / "hf", tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["hf"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["fp8 blocks", "gptq in order"])
def test_a_folder_loads_and_predicts_as_its_floats_do(name, tmp_path, monkeypatch, capsys):
    """In the type of what it stores as floats, into which both are rounded alike."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    floats = write(tmp_path / "hf", name)
    dtype = CASES[name].dtype.name
    same = run(float_folder(tmp_path / "floats", name, floats), tmp_path / "same", dtype=dtype)
    assert sources.read_config(tmp_path / "hf")[0].vocab_size == 64
    model = es.load_model(tmp_path / "hf", es.make_mesh(1, 1))
    told = capsys.readouterr().err
    assert told.count("become floats") == 1
    assert ("activations stay floats" in told) == name.startswith("fp8")
    want = es.logits(es.load_model(same, es.make_mesh(1, 1), progress=False), [[5, 9, 33]])
    stored = sources.find_checkpoint(tmp_path / "hf")
    assert checkpoint.read_metadata(stored)[1]["dtype"] == dtype
    np.testing.assert_array_equal(es.logits(model, [[5, 9, 33]]), want)


@pytest.mark.slow  # torch takes seconds to be imported
def test_blocks_are_those_of_transformers(tmp_path):
    torch = pytest.importorskip("torch")
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    rng = np.random.default_rng(1)
    codes = rng.integers(0, 127, (64, 96), dtype=np.uint8)
    scale = rng.uniform(1, 2, (4, 4)).astype(np.float32)
    stored = {f"{Q}.weight": codes.view(ml_dtypes.float8_e4m3fn), f"{Q}.weight_scale_inv": scale}
    raw = tiny_config("llama", num_hidden_layers=1, hidden_size=96, num_attention_heads=8)
    raw["quantization_config"] = FP8 | {"weight_block_size": [16, 24]}
    write_hf_folder(tmp_path, raw)
    write_tensors(tmp_path, stored)
    with contextlib.ExitStack() as stack:
        (got,) = FolderSource(tmp_path, stack).chunks(f"{Q}.weight")
    want = Fp8Dequantize(None)._dequantize_one(
        torch.from_numpy(codes).view(torch.float8_e4m3fn), torch.from_numpy(scale), torch.float32
    )
    np.testing.assert_array_equal(got, want.numpy(), strict=True)


class Counted:
    """A stored tensor that notes how many bytes a slice of it has."""

    def __init__(self, stored, seen: list[int]):
        self.stored, self.seen = stored, seen
        self.get_shape, self.get_dtype = stored.get_shape, stored.get_dtype

    def __getitem__(self, index):
        found = self.stored[index]
        self.seen.append(found.nbytes)
        return found


@pytest.mark.parametrize("name", ["fp8 blocks", "packed int4", "gptq in order", "awq"])
def test_only_slices_are_read(name, tmp_path, monkeypatch):
    monkeypatch.setattr("convert.tensors.CHUNK_BYTES", 700)
    write(tmp_path, name)
    seen: list[int] = []
    with contextlib.ExitStack() as stack:
        source = FolderSource(tmp_path, stack)
        for matrix in source.matrices.values():
            stored = {part: Counted(rows, seen) for part, rows in matrix.stored.items()}
            counted = dataclasses.replace(matrix, stored=stored)
            assert max(chunk.nbytes for chunk in counted.chunks()) <= 700
    assert 0 < max(seen) <= 700


def test_biases_of_zeros_are_dropped_and_others_are_not(tmp_path):
    bias = np.zeros(32, F16)
    write(tmp_path / "a", "gptq", change=lambda stored: stored.update({f"{Q}.bias": bias}))
    assert len(load_all(run(tmp_path / "a", tmp_path / "out"), 1)) == 12
    write(tmp_path / "b", "gptq", change=lambda stored: stored.update({f"{Q}.bias": bias + 1}))
    with pytest.raises(ValueError, match=r"not part of the model: .*q_proj\.bias"):
        run(tmp_path / "b", tmp_path / "out2")


def test_a_matrix_that_is_left_as_floats_makes_floats_of_all(tmp_path, capsys):
    rows = np.full((32, 36), 0.5, BF16)

    def plain(stored):
        for part in ("weight_scale", "weight_packed", "weight_shape"):
            del stored[f"{Q}.{part}"]
        stored[f"{Q}.weight"] = rows

    write(tmp_path / "hf", "packed int4", config={"ignore": ["re:.*q_proj"]}, change=plain)
    line = said(capsys, tmp_path / "hf", tmp_path / "out")
    assert (
        line == f"weights of 4 bits (pack-quantized) become floats: {Q}.weight is stored as floats"
    )
    out = load_all(tmp_path / "out", 1)
    assert (out["0.wq"] == 0.5).all() and out["0.wq"].dtype == BF16


def without(key: str) -> Callable:
    return lambda stored: stored.pop(key)


def with_part(key: str, value) -> Callable:
    return lambda stored: stored.update({key: value})


WRONG_TENSORS = [
    ("fp8 blocks", without(f"{Q}.weight_scale_inv"), r"missing: .*q_proj\.weight_scale"),
    ("fp8 tensor", with_part(f"{Q}.input_scale", np.ones(1, BF16)), "quantised activations.*q_pro"),
    ("fp8 tensor", with_part("model.layers.0.self_attn.k_scale", np.ones(1, BF16)), "cache.*k_sca"),
    (
        "fp8 blocks",
        with_part(f"{Q}.weight_scale_inv", np.ones((2, 1), np.float32)),
        r"wrong shape: .*q_proj\.weight_scale_inv \[2, 1\] instead of \[2, 2\]",
    ),
    ("fp8 channels", with_part(f"{Q}.weight_scale_inv", np.ones(1, BF16)), "not part of the model"),
    (
        "fp8 channels",
        with_part(f"{Q}.weight", np.ones((32, 32), ml_dtypes.float8_e5m2)),
        r"a type that is not read: .*q_proj\.weight \(F8_E5M2\)",
    ),
    (
        "fp8 channels",
        with_part("lm_head.weight", np.ones((64, 32), np.int8)),
        r"leaves them out: lm_head",
    ),
    ("packed int4", without(f"{Q}.weight_shape"), r"missing: .*q_proj\.weight_shape"),
    (
        "packed int4",
        with_part(f"{Q}.weight_shape", np.array([32, 40])),
        r"weight_shape says \[32, 40\] instead of \[32, 36\]",
    ),
    ("packed int4", with_part(f"{Q}.weight_g_idx", np.zeros(36, np.int32)), "act-order.*weight_g_"),
    ("packed int4", with_part(f"{Q}.weight", np.ones((32, 36), BF16)), "there twice.*q_proj.weigh"),
    ("packed int4 with zeros", without(f"{Q}.weight_zero_point"), "missing: .*weight_zero_point"),
    ("gptq", without(f"{Q}.qweight"), r"missing: .*q_proj\.weight.*not part .*q_proj\.qzeros"),
    ("gptq", without(f"{Q}.scales"), r"missing: .*q_proj\.scales"),
    ("gptq in order", without(f"{Q}.g_idx"), r"missing: .*q_proj\.g_idx"),
    ("gptq", with_part(f"{Q}.g_idx", np.full(32, 2, np.int32)), "group that is none of its 2"),
    (
        "awq",
        with_part(f"{Q}.qweight", np.ones((4, 32), np.int32)),
        r"qweight \[4, 32\] instead of \[32, 4\]",
    ),
    ("awq", with_part("model.layers.0.spare", np.ones(4, F16)), "not part of the model: .*spare"),
]


@pytest.mark.parametrize(("name", "change", "message"), WRONG_TENSORS)
def test_tensors_that_do_not_fit_are_named_and_nothing_is_written(name, change, message, tmp_path):
    write(tmp_path / "hf", name, change=change)
    with pytest.raises(ValueError, match=f"^the weights do not fit .*{message}.*\\.$"):
        run(tmp_path / "hf", tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["hf"]


def test_groups_that_do_not_divide_the_inputs_are_refused(tmp_path):
    write(tmp_path / "hf", "gptq", config={"group_size": 12})
    with pytest.raises(ValueError, match=r"not made of whole groups of 12 inputs: .*q_proj \(32\)"):
        run(tmp_path / "hf", tmp_path / "out")


def test_a_quantisation_of_nothing_is_refused(tmp_path):
    raw = tiny_config("llama", quantization_config=AWQ)
    with pytest.raises(ValueError, match="quantization_config of awq, but no matrix is quantised"):
        run(write_hf_folder(tmp_path / "hf", raw), tmp_path / "out")


def in_group(**changes) -> dict:
    config = compressed("pack-quantized", 4, "group", 4)
    return config | {"config_groups": {"group_0": config["config_groups"]["group_0"] | changes}}


def in_weights(layout="pack-quantized", **changes) -> dict:
    config = compressed(layout, 4, "group", 4)
    group = config["config_groups"]["group_0"]
    group |= {"weights": group["weights"] | changes}
    return config


def test_inputs_rounded_to_fp8_as_they_come_are_told_of():
    config = compressed("float-quantized", 8, "channel", kind="float")
    inputs = {"num_bits": 8, "type": "float", "dynamic": True, "strategy": "token"}
    config["config_groups"]["group_0"]["input_activations"] = inputs
    assert "activations stay floats" in read_scheme(config).note


WRONG_CONFIGS = [
    ("gptq", "quant_method None is not supported; use one of fp8, compressed-tensors, gptq, awq"),
    ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "quant_method 'bitsandbytes'"),
    (FP8 | {"activation_scheme": "static"}, "activation_scheme 'static'"),
    (FP8 | {"weight_block_size": [128]}, "weight_block_size must be two sizes"),
    (FP8 | {"weight_block_size": [10**30, 4]}, "weight_block_size must be two sizes"),
    (FP8 | {"ignored_layers": ["re:a{9999999999999999}"]}, "is no regular expression"),
    (FP8 | {"fmt": "e5m2", "kv_cache_scheme": "static"}, "fmt='e5m2', kv_cache_scheme='static'"),
    (FP8 | {"modules_to_not_convert": "lm_head"}, "modules_to_not_convert must be a list"),
    (compressed("nvfp4-pack-quantized", 4, "group", 16), "format 'nvfp4-pack-quantized'"),
    (in_group(input_activations={"num_bits": 8, "dynamic": True}), "input_activations={'num_bits'"),
    (in_group(targets=["Linear", "Embedding"]), "targets="),
    (in_group(format="int-quantized"), "format='int-quantized'"),
    (in_weights(actorder="group"), "actorder='group'"),
    (in_weights(num_bits=3), "weights of 3 bits"),
    (in_weights(layout="float-quantized"), "'int', in float-quantized are not read"),
    (in_weights(strategy="block", group_size=None), "strategy 'block'"),
    (in_weights(strategy="channel"), "strategy 'channel' with group_size 4"),
    (in_weights(group_size=0), "group_size must be a size, not 0"),
    (in_weights(gain=2), "gain=2"),
    (in_group() | {"ignore": ["re:("]}, r"'re:\(' is no regular expression"),
    (in_group() | {"config_groups": {}}, "config_groups must be one group"),
    (in_group() | {"config_groups": {"W4A16": ["Linear"]}}, "says nothing of weights"),
    (in_group() | {"sparsity_config": {"format": "sparse-24-bitmask"}}, "sparsity_config"),
    (in_group() | {"kv_cache_scheme": {"num_bits": 8}}, "kv_cache_scheme="),
    (in_group() | {"transform_config": {"config_groups": {"R1": {}}}}, "transform_config="),
    (GPTQ | {"bits": 3}, "bits 3 are not supported"),
    (GPTQ | {"group_size": None}, "group_size must be a size, or -1"),
    (GPTQ | {"checkpoint_format": "marlin"}, "checkpoint_format 'marlin'"),
    (GPTQ | {"dynamic": {"-:.*down": {}}}, "dynamic="),
    (GPTQ | {"desc_act": "yes"}, "desc_act must be true or false"),
    (GPTQ | {"rotation": "hadamard"}, "gptq asks for what is not supported: rotation='hadamard'"),
    (AWQ | {"bits": 8}, "bits 8 are not supported"),
    (AWQ | {"version": "gemv"}, "version 'gemv'"),
    (AWQ | {"zero_point": False}, "zero_point=False"),
    (AWQ | {"backend": "llm-awq"}, "backend='llm-awq'"),
]


@pytest.mark.parametrize(("config", "message"), WRONG_CONFIGS)
def test_configs_that_ask_for_more_are_refused_by_name(config, message):
    with pytest.raises(ValueError, match=f"quantization_config.*{message}.*\\.$"):
        read_scheme(config)


def test_a_config_alone_says_the_model_and_refuses_as_conversion_does(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(tiny_config("qwen3", quantization_config=GPTQ)))
    assert sources.read_config(path)[0].family == "qwen3"
    path.write_text(json.dumps(tiny_config("qwen3", quantization_config=GPTQ | {"bits": 2})))
    with pytest.raises(ValueError, match="bits 2 are not supported"):
        sources.read_config(path)


def test_a_quiet_conversion_says_nothing(tmp_path, capsys):
    write(tmp_path / "hf", "awq")
    convert.convert(tmp_path / "hf", tmp_path / "out", progress=False)
    assert capsys.readouterr().err == ""

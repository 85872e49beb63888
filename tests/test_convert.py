"""Conversion of Hugging Face folders: values, refusals, memory, and what a killed run leaves."""

from __future__ import annotations

import hashlib
import itertools
import json
import pathlib

import ml_dtypes
import numpy as np
import pytest
from hf_models import (
    FAMILIES,
    load_all,
    load_part,
    random_tensors,
    run,
    tiny_config,
    write_hf_folder,
    write_tensors,
)

import convert
from convert.tensors import read_array
from easyspec_jax import checkpoint
from easyspec_jax.hf_config import config_from_hf
from easyspec_jax.weights import LAYER_WEIGHTS, TOP_WEIGHTS, present

pytestmark = pytest.mark.usefixtures("digests_of_host")

ROOT = pathlib.Path(__file__).parent.parent
slow = pytest.mark.slow
RAW = tiny_config("llama", num_hidden_layers=2)
SHALLOW = tiny_config("llama", num_hidden_layers=1)


@pytest.fixture
def folder(tmp_path) -> pathlib.Path:
    return write_hf_folder(tmp_path / "hf", RAW)


def rewrite(folder: pathlib.Path, **changes) -> pathlib.Path:
    """Change tensors of a tiny folder: a value replaces, None removes, a function maps."""
    tensors = random_tensors(RAW)
    for name, change in changes.items():
        if change is None:
            del tensors[name]
        else:
            tensors[name] = change(tensors[name]) if callable(change) else change
    write_tensors(folder, tensors)
    return folder


@pytest.mark.parametrize(
    "family", [pytest.param(f, marks=slow) if f == "mistral" else f for f in FAMILIES]
)
def test_every_array_is_the_transposed_tensor_with_its_heads_split(family, tmp_path):
    raw = tiny_config(family, num_attention_heads=6, num_key_value_heads=2, num_hidden_layers=2)
    src = write_hf_folder(tmp_path / "hf", raw)
    out, hf = run(src, tmp_path / "out"), random_tensors(raw)
    config = config_from_hf(raw)
    top = load_part(out, checkpoint.TOP_PART)
    assert top.keys() == present(TOP_WEIGHTS, config).keys()
    np.testing.assert_array_equal(top["embed"], hf["model.embed_tokens.weight"])
    np.testing.assert_array_equal(top["lm_head"], hf["lm_head.weight"].T)
    layer, prefix = load_part(out, checkpoint.layer_name(1)), "model.layers.1."
    assert layer.keys() == present(LAYER_WEIGHTS, config).keys()
    q, k = hf[prefix + "self_attn.q_proj.weight"], hf[prefix + "self_attn.k_proj.weight"]
    o = hf[prefix + "self_attn.o_proj.weight"]
    for kv in range(2):
        np.testing.assert_array_equal(layer["wk"][:, kv], k[8 * kv : 8 * kv + 8].T)
        for g in range(3):
            rows = slice(8 * (3 * kv + g), 8 * (3 * kv + g) + 8)
            np.testing.assert_array_equal(layer["wq"][:, kv, g], q[rows].T)
            np.testing.assert_array_equal(layer["wo"][kv, g], o[:, rows].T)
    np.testing.assert_array_equal(layer["w_down"], hf[prefix + "mlp.down_proj.weight"].T)
    np.testing.assert_array_equal(layer["mlp_norm"], hf[prefix + "post_attention_layernorm.weight"])
    if family == "qwen2":
        bias = hf[prefix + "self_attn.q_proj.bias"]
        np.testing.assert_array_equal(layer["bq"], bias.reshape(2, 3, 8))


def test_the_folder_holds_configs_tokenizer_and_metadata(folder, tmp_path):
    (folder / "generation_config.json").write_text('{"eos_token_id": [7, 2], "temperature": 0.6}')
    out = run(folder, tmp_path / "out")
    assert (out / "config.json").read_bytes() == (folder / "config.json").read_bytes()
    assert (out / "tokenizer.json").read_bytes() == (folder / "tokenizer.json").read_bytes()
    assert json.loads((out / "generation_config.json").read_text()) == {
        "eos_token_id": [7, 2],
        "temperature": 0.6,
    }
    parts = {
        part: f"{int(checkpoint.digest(load_part(out, part))):08x}"
        for part in (checkpoint.TOP_PART, *map(checkpoint.layer_name, range(2)))
    }
    assert json.loads((out / checkpoint.METADATA_FILE).read_text()) == {
        "format": checkpoint.FORMAT,
        "dtype": "float32",
        "tokenizer": convert.tokenizer_hash(folder),
        "parts": parts,
        "weights": checkpoint.digest_of(parts),
    }
    assert {p.name for p in tmp_path.iterdir()} == {"hf", "out"}


def test_eos_ids_of_both_configs_are_joined(tmp_path):
    src = write_hf_folder(tmp_path / "hf", SHALLOW | {"eos_token_id": [2, 5]})
    (src / "generation_config.json").write_text('{"eos_token_id": 9}')
    written = json.loads((run(src, tmp_path / "a") / "generation_config.json").read_text())
    assert written["eos_token_id"] == [9, 2, 5]
    (src / "generation_config.json").unlink()
    written = json.loads((run(src, tmp_path / "b") / "generation_config.json").read_text())
    assert written == {"eos_token_id": [2, 5]}


def test_shards_give_the_same_arrays_as_one_file(folder, tmp_path):
    sharded = write_hf_folder(tmp_path / "sharded", RAW, shards=3)
    one, many = (load_all(run(s, tmp_path / f"{s.name}-out"), 2) for s in (folder, sharded))
    assert one.keys() == many.keys()
    for name in one:
        np.testing.assert_array_equal(one[name], many[name])


TYPES = ["float32", "bfloat16", "float16"]
CASTS = {("float32", "bfloat16"), ("bfloat16", "float16"), ("float16", "float32")}


@pytest.mark.parametrize(
    ("stored", "wanted"),
    [
        pytest.param(*pair, marks=[] if pair[1] is None or pair in CASTS else [slow])
        for pair in itertools.product(TYPES, [None, *TYPES])
    ],
)
def test_types_are_kept_or_cast(stored, wanted, tmp_path):
    raw = SHALLOW
    src = write_hf_folder(tmp_path / "hf", raw, dtype=np.dtype(stored))
    out = run(src, tmp_path / "out", dtype=wanted)
    want = np.dtype(wanted or stored)
    assert json.loads((out / checkpoint.METADATA_FILE).read_text())["dtype"] == want.name
    embed = random_tensors(raw, dtype=np.dtype(stored))["model.embed_tokens.weight"].astype(want)
    got = load_part(out, checkpoint.TOP_PART)["embed"]
    assert got.dtype == want
    np.testing.assert_array_equal(got, embed)


def test_mixed_types_become_float32(folder, tmp_path):
    half = {"model.norm.weight": lambda x: x.astype(ml_dtypes.bfloat16)}
    rewrite(folder, **half)
    top = load_part(run(folder, tmp_path / "out"), checkpoint.TOP_PART)
    assert top["embed"].dtype == np.float32


def test_small_chunks_change_nothing(folder, tmp_path, monkeypatch):
    whole = load_all(run(folder, tmp_path / "whole"), 2)
    monkeypatch.setattr("convert.tensors.CHUNK_BYTES", 300)
    for name, array in load_all(run(folder, tmp_path / "pieces"), 2).items():
        np.testing.assert_array_equal(array, whole[name])


def tied_folder(path: pathlib.Path, dtype, change) -> pathlib.Path:
    """A folder that ties the head and stores one as well: `change` of the embedding."""
    raw = SHALLOW | {"tie_word_embeddings": True}
    folder, tensors = write_hf_folder(path, raw), random_tensors(raw, dtype=dtype)
    tensors["lm_head.weight"] = change(tensors["model.embed_tokens.weight"])
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(4, np.float32)
    write_tensors(folder, tensors)
    return folder


@pytest.mark.parametrize("stored", ["float32", "bfloat16"])
def test_known_harmless_tensors_are_dropped(stored, tmp_path, monkeypatch):
    monkeypatch.setattr("convert.tensors.CHUNK_BYTES", 600)
    src = tied_folder(tmp_path / "hf", np.dtype(stored), lambda x: x.astype(np.float32))
    top = load_part(run(src, tmp_path / "out"), checkpoint.TOP_PART)
    assert top.keys() == {"embed", "final_norm"}


@pytest.mark.parametrize(
    "change",
    [
        lambda x: x + (np.arange(x.size).reshape(x.shape) == 0),  # the first value
        lambda x: x + (np.arange(x.size).reshape(x.shape) == x.size - 1),  # the last
        lambda x: x.astype(np.float16),
        lambda x: np.vstack([x, x[:3]]),
        lambda x: x.astype(np.int8),
    ],
)
def test_a_tied_head_that_differs_from_the_embedding_is_refused(change, tmp_path, monkeypatch):
    monkeypatch.setattr("convert.tensors.CHUNK_BYTES", 600)
    monkeypatch.delattr("convert.write._temporary")  # nothing may be written before
    src = tied_folder(tmp_path / "hf", np.float32, change)
    with pytest.raises(ValueError, match=r"lm_head.weight differs from the embedding: set tie"):
        run(src, tmp_path / "out")


NORM = "model.norm.weight"
Q_PROJ = "model.layers.1.self_attn.q_proj.weight"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({Q_PROJ: None}, f"tensors are missing: {Q_PROJ}"),
        ({"lm_head.weight": None}, "tensors are missing: lm_head.weight"),
        ({"model.extra": np.ones(3, np.float32)}, "not part of the model: model.extra"),
        ({Q_PROJ: lambda x: x[:-1]}, r"wrong shape: .*q_proj.weight \[31, 32\] instead of \[32, 3"),
        ({NORM: lambda x: x.astype(np.int8)}, r"type that cannot be read: model.norm.weight .I8."),
        ({NORM: lambda x: x * np.nan}, f"{NORM} holds values that are not finite"),
        ({Q_PROJ: lambda x: x * np.inf}, f"{Q_PROJ} holds values that are not finite"),
    ],
)
def test_tensors_that_do_not_fit_are_refused_by_name(folder, tmp_path, changes, message):
    rewrite(folder, **changes)
    with pytest.raises(ValueError, match=message):
        run(folder, tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["hf"]


def test_many_names_are_cut_short(folder, tmp_path):
    config = json.loads((folder / "config.json").read_text()) | {"num_hidden_layers": 9}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"missing: model\.layers\.2\..* and 55 more"):
        run(folder, tmp_path / "out")


@pytest.mark.parametrize("tensor", ["model.embed_tokens.weight", NORM, Q_PROJ])
@pytest.mark.parametrize(
    ("dtype", "value", "wider"),
    [("float16", 7e4, "bfloat16 or float32"), ("bfloat16", 3.4e38, "float32")],
)
def test_values_beyond_the_range_are_refused(dtype, value, wider, tensor, folder, tmp_path):
    rewrite(folder, **{tensor: lambda x: np.full_like(x, value)})
    message = f"{tensor} holds values beyond the range of {dtype}; convert with --dtype {wider}"
    with pytest.raises(ValueError, match=message):
        run(folder, tmp_path / "out", dtype=dtype)
    if tensor == NORM:
        run(folder, tmp_path / "out", dtype=wider.split()[0])


@pytest.mark.parametrize("rows", [30, 33])
def test_a_source_that_yields_another_number_of_rows_is_refused(rows):
    class Source:
        config = config_from_hf(tiny_config("llama"))

        def label(self, name):
            return "its.name"

        def chunks(self, name):
            yield np.ones(20, np.float32)
            yield np.ones(rows - 20, np.float32)

    with pytest.raises(ValueError, match=f"^tensor its.name holds {rows} rows instead of 32.$"):
        norm = present(TOP_WEIGHTS, Source.config)["final_norm"]
        read_array(Source(), NORM, norm, np.dtype(np.float32))


@pytest.mark.parametrize(
    "content",
    ["{}", '{"model": {"type": "BPE"}}', '{"model": {"vocab": ["a"]}}', "[]", "{"],
)
def test_a_tokenizer_without_vocabulary_is_refused_before_the_weights(
    content, folder, tmp_path, monkeypatch
):
    monkeypatch.delattr(checkpoint, "save_part")
    (folder / "tokenizer.json").write_text(content)
    with pytest.raises(ValueError, match=r"^tokenizer.json (cannot be read|is not a JSON object)"):
        run(folder, tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["hf"]


def test_sources_that_are_no_safetensors_folder_are_refused(folder, tmp_path):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"pytorch_model.bin is a pickle, and pickles are never"):
        run(folder, tmp_path / "out")
    (folder / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config.json cannot be read"):
        run(folder, tmp_path / "out")
    (folder / "config.json").unlink()
    with pytest.raises(ValueError, match=r"has no config.json"):
        run(folder, tmp_path / "out")
    (tmp_path / "file.bin").write_bytes(b"\x80\x04 pickle")
    with pytest.raises(ValueError, match="is not a GGUF file"):
        run(tmp_path / "file.bin", tmp_path / "out")


@pytest.mark.parametrize(
    "shard", ["../x.safetensors", "/x.safetensors", "a/b.safetensors", "x.bin", 3]
)
def test_an_index_may_not_name_files_outside_the_folder(folder, tmp_path, shard):
    (folder / "model.safetensors").rename(tmp_path / "x.safetensors")
    index = {"weight_map": {NORM: shard}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="not a safetensors file inside the folder"):
        run(folder, tmp_path / "out")


def test_an_index_must_be_true(tmp_path):
    src = write_hf_folder(tmp_path / "hf", tiny_config("llama"), shards=2)
    index = json.loads((src / "model.safetensors.index.json").read_text())
    index["weight_map"]["ghost"] = "model-00001-of-00002.safetensors"
    (src / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"lacks tensor ghost, which"):
        run(src, tmp_path / "out")
    (src / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(ValueError, match=r"lacks the shard model-00002-of-00002.safetensors"):
        run(src, tmp_path / "out")
    (src / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(ValueError, match="has no weight_map"):
        run(src, tmp_path / "out")


def safetensors_bytes(header, data: bytes = b"\0" * 8) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def entry(begin: int, end: int, shape=(2,), dtype: str = "F32") -> dict:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


ENTRY = json.dumps(entry(0, 8))
TWICE = f'{{"a": {ENTRY}, "a": {ENTRY}}}'.encode()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"abc", "header too small"),
        ((10**12).to_bytes(8, "little") + b"{}", "header too large"),
        (safetensors_bytes(b"{"), "invalid JSON in header"),
        (safetensors_bytes(b"[]"), "invalid JSON in header"),
        (safetensors_bytes({"a": {"dtype": "F32"}}), "missing field `shape`"),
        (safetensors_bytes({"a": entry(0, 8, dtype="F33")}), "unknown variant `F33`"),
        (safetensors_bytes({"a": entry(0, 8, [-2])}), "invalid value: integer `-2`"),
        (safetensors_bytes({"a": entry(0, 8, [3])}), "invalid shape, data type, or offset"),
        (safetensors_bytes({"a": entry(0, 8), "b": entry(4, 12)}), "invalid offset for tensor `b`"),
        (safetensors_bytes({"a": entry(0, 8)}, b"\0" * 9), "file not fully covered"),
        (safetensors_bytes({"a": entry(0, 8)}, b"\0" * 7), "file not fully covered"),
        (safetensors_bytes(TWICE), "a key appears twice"),
    ],
)
def test_broken_safetensors_files_are_refused_by_name(content, message, folder, tmp_path):
    (folder / "model.safetensors").write_bytes(content)
    message = rf"^\S+model.safetensors is not a valid safetensors file: .*{message}.*\.$"
    with pytest.raises(ValueError, match=message):
        run(folder, tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["hf"]


def test_a_folder_without_tokenizer_warns_once(tmp_path):
    src = write_hf_folder(tmp_path / "hf", SHALLOW, tokenizer=False)
    with pytest.warns(UserWarning, match="has no tokenizer") as caught:
        out = run(src, tmp_path / "out")
    assert len(caught) == 1
    assert json.loads((out / checkpoint.METADATA_FILE).read_text())["tokenizer"] is None


def test_the_tokenizer_hash_is_of_the_ordinary_vocabulary(tmp_path):
    def write(vocab, added=()):
        added = [{"id": 0, "content": token} for token in added]
        content = {"model": {"vocab": vocab}, "added_tokens": added}
        (tmp_path / "tokenizer.json").write_text(json.dumps(content))
        return convert.tokenizer_hash(tmp_path)

    plain = write({"a": 0, "b": 1})
    assert plain == hashlib.sha256(b'[["a", 0], ["b", 1]]').hexdigest()
    assert write({"b": 1, "a": 0, "<s>": 2}, ["<s>", "<new>"]) == plain
    assert write([["a", -1.0], ["b", -2.0]]) == plain
    assert write({"a": 1, "b": 0}) != plain


def test_a_hub_id_fetches_no_pickles(folder, tmp_path, monkeypatch):
    import huggingface_hub

    calls = []

    def snapshot_download(repo, **options):
        calls.append((repo, options))
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    out = run("owner/some-model", tmp_path / "out", revision="v1")
    assert len(load_all(out, 2)) == 21
    ((repo, options),) = calls
    assert (repo, options["revision"]) == ("owner/some-model", "v1")
    assert "model*.safetensors" in options["allow_patterns"]
    assert not any("bin" in pattern or pattern == "*" for pattern in options["allow_patterns"])


def test_a_hub_that_fails_ends_in_one_sentence(tmp_path, monkeypatch):
    import huggingface_hub

    def snapshot_download(repo, **options):
        raise RuntimeError("offline")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    with pytest.raises(OSError, match=r"owner/x is no local folder, and the hub .*: offline"):
        run("owner/x", tmp_path / "out")

"""GGUF files: the same weights and tokenizer as the Hugging Face folder, or a refusal by name."""

from __future__ import annotations

import contextlib
import json
import pathlib

import gguf
import numpy as np
import pytest
from hf_models import (
    load_all,
    load_part,
    random_tensors,
    real_model,
    run,
    tiny_config,
    write_hf_folder,
)
from tokenizers import Tokenizer

import convert
import easyspec_jax as es
from convert import tensors
from convert.folder import FolderSource
from convert.gguf_source import GgufSource
from convert.gguf_tokenizer import _SPLITS, write_tokenizer
from easyspec_jax import checkpoint
from easyspec_jax.config import RopeScaling
from easyspec_jax.hf_config import config_from_hf
from easyspec_jax.weights import GGUF_PREFIX, HF_PREFIX, LAYER_WEIGHTS, TOP_WEIGHTS

pytestmark = pytest.mark.usefixtures("digests_of_host")

untokenized = pytest.mark.filterwarnings("ignore:the source has no tokenizer")
KINDS = {"control": 3, "user": 4, "unused": 5, "byte": 6}


def to_interleaved(rows: np.ndarray, head_dim: int) -> np.ndarray:
    """Row 2i of a head from row i, row 2i + 1 from row i + H/2: how llama models are stored."""
    out = np.empty_like(rows)
    for start in range(0, len(rows), head_dim):
        for i in range(head_dim // 2):
            out[start + 2 * i] = rows[start + i]
            out[start + 2 * i + 1] = rows[start + i + head_dim // 2]
    return out


def write_gguf(
    path, raw: dict, *, kind="F32", vector_kind="F32", metadata=(), tensors=(), kinds=()
) -> pathlib.Path:
    """A GGUF file of the random weights of a tiny config; `metadata` and `tensors` are added, and
    `kinds` says which matrices are of others.
    """
    arch, config = raw["model_type"], config_from_hf(raw)
    writer = gguf.GGUFWriter(str(path), arch)
    writer.add_block_count(config.num_layers)
    writer.add_context_length(config.max_len)
    writer.add_embedding_length(config.embed_dim)
    writer.add_feed_forward_length(config.mlp_dim)
    writer.add_head_count(config.num_heads)
    writer.add_head_count_kv(config.num_kv_heads)
    writer.add_key_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_rope_freq_base(config.rope_theta)
    for key, value in dict(metadata).items():
        add = {bool: writer.add_bool, float: writer.add_float32, str: writer.add_string}
        add |= {int: writer.add_uint32, list: writer.add_array}
        add[type(value)](key, value)
    names = {w.hf: w.gguf for w in TOP_WEIGHTS}
    for i in range(config.num_layers):
        names |= {HF_PREFIX.format(i) + w.hf: GGUF_PREFIX.format(i) + w.gguf for w in LAYER_WEIGHTS}
    stored = {names[name]: array for name, array in random_tensors(raw).items()}
    for name, array in (stored | dict(tensors)).items():
        if arch == "llama" and name.endswith(("attn_q.weight", "attn_k.weight")):
            array = to_interleaved(array, config.head_dim)
        own = dict(kinds).get(name, kind)
        wanted = gguf.GGMLQuantizationType[own if array.ndim > 1 else vector_kind]
        data = gguf.quants.quantize(array, wanted)
        writer.add_tensor(name, data, raw_dtype=wanted)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@untokenized
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_a_gguf_file_gives_what_the_folder_gives(family, tmp_path):
    raw = tiny_config(family, num_key_value_heads=1 if family == "qwen3" else 2)
    folder = write_hf_folder(tmp_path / "hf", raw, tokenizer=False)
    file = write_gguf(tmp_path / "m.gguf", raw)
    one, two = run(folder, tmp_path / "a"), run(file, tmp_path / "b")
    wanted, got = load_all(one), load_all(two)
    assert wanted.keys() == got.keys()
    for name in wanted:
        np.testing.assert_array_equal(got[name], wanted[name], err_msg=name)
    config = config_from_hf(json.loads((two / "config.json").read_text()))
    assert config.norm_eps == pytest.approx(1e-5)


@untokenized
@pytest.mark.parametrize(
    ("kind", "dtype"), [("F16", "float16"), ("BF16", "bfloat16"), ("Q8_0", "float32")]
)
def test_types_and_quantisation(kind, dtype, tmp_path):
    raw = tiny_config("llama", hidden_size=32, intermediate_size=64, tie_word_embeddings=True)
    out = run(write_gguf(tmp_path / "m.gguf", raw, kind=kind), tmp_path / "out")
    assert json.loads((out / checkpoint.METADATA_FILE).read_text())["dtype"] == dtype
    top = load_part(out, checkpoint.TOP_PART)
    assert set(top) == {"embed", "final_norm"}
    embed = random_tensors(raw)["model.embed_tokens.weight"]
    if kind == "Q8_0":
        np.testing.assert_allclose(top["embed"], embed, atol=0.03)
        assert not np.array_equal(top["embed"], embed)
    else:
        np.testing.assert_array_equal(top["embed"], embed.astype(np.dtype(dtype)))


# Groups of 32 inputs over heads of 8, whose rows llama has in another order.
BLOCKS = tiny_config("llama", intermediate_size=64, num_hidden_layers=1)
ALL = ("layers", "layers")


@untokenized
@pytest.mark.parametrize(
    "kind, kinds, want, line",
    [
        ("Q8_0", {}, es.Quantization("int8", 32, None, *ALL, "float16"), "stay"),
        (
            "Q4_0",
            {"output.weight": "Q8_0"},
            es.Quantization("int4", 32, None, "layers", "float", "float16"),
            "stay codes and scales; output.weight is int8 with a scale for 32 inputs and becomes "
            "floats",
        ),
        (
            "Q4_0",
            {"output.weight": "Q4_1", "token_embd.weight": "F16"},
            es.Quantization("int4", 32, None, "float", "float", "float16"),
            "stay codes and scales; output.weight is int4 with a scale and a minimum for 32 inputs "
            "and becomes floats",
        ),
        ("Q4_1", {}, es.Quantization("int4", 32, None, *ALL, "float16", "float16"), "stay"),
        # those without a minimum are given one
        (
            "Q4_1",
            {"blk.0.ffn_up.weight": "Q4_0", "output.weight": "Q4_0"},
            es.Quantization("int4", 32, None, *ALL, "float16", "float32"),
            "stay",
        ),
        ("Q5_0", {}, None, "become floats: blk.0.attn_q.weight is Q5_0"),
        (
            "Q4_0",
            {"blk.0.ffn_down.weight": "Q8_0"},
            None,
            "become floats: blk.0.ffn_down.weight is int8 with a scale for 32 inputs, "
            "blk.0.attn_q.weight is int4 with a scale for 32 inputs",
        ),
        ("F16", {"token_embd.weight": "Q8_0"}, None, "become floats: blk.0.attn_q.weight is stor"),
    ],
)
def test_codes_are_kept_bit_for_bit(kind, kinds, want, line, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("convert.tensors.CHUNK_BYTES", 1200)
    file = write_gguf(tmp_path / "m.gguf", BLOCKS, kind=kind, kinds=kinds)
    floats = load_all(run(file, tmp_path / "floats", dequantize=True), 1)
    out = convert.convert(file, tmp_path / "out", progress=None)
    told = capsys.readouterr().err
    assert told.startswith(f"{file}: weights of ") and f" {line}" in told
    assert told.count("\n") == 1
    assert checkpoint.stored_quantization(checkpoint.read_metadata(out)[1]) == want
    got = load_all(out, 1)
    assert got.keys() == floats.keys()
    for name, array in floats.items():
        np.testing.assert_array_equal(got[name], array, strict=True, err_msg=name)


@untokenized
@pytest.mark.parametrize("kind", ["BF16", "F16", "Q8_0"])
def test_vectors_of_packed_types_are_read_whole(kind, tmp_path):
    raw = tiny_config("qwen2", head_dim=16)
    file = write_gguf(tmp_path / "m.gguf", raw, vector_kind=kind)
    got, hf = load_all(run(file, tmp_path / "out")), random_tensors(raw)
    tolerance = {"BF16": 2**-8, "F16": 2**-11, "Q8_0": 2**-6}[kind]
    norm = hf["model.norm.weight"]
    np.testing.assert_allclose(got["final_norm"], norm, atol=2 * tolerance)
    bias = hf["model.layers.2.self_attn.k_proj.bias"]
    np.testing.assert_allclose(got["2.bk"].reshape(-1), bias, atol=tolerance)


def llama3_factors(factor: float) -> np.ndarray:
    """The factors of Llama 3 for heads of width 64 and theta 5e5."""
    wavelength = 2 * np.pi * 5e5 ** (np.arange(0, 64, 2) / 64)
    smooth = (8192 / wavelength - 1) / 3
    factors = np.where(wavelength > 8192, factor, 1 / ((1 - smooth) / factor + smooth))
    return np.where(wavelength < 2048, 1.0, factors).astype(np.float32)


@untokenized
@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_llama3_factors_become_rope_scaling(factor, tmp_path):
    raw = tiny_config("llama", head_dim=64, rope_theta=5e5)
    factors = llama3_factors(factor)
    file = write_gguf(tmp_path / "m.gguf", raw, tensors={"rope_freqs.weight": factors})
    out = run(file, tmp_path / "out")
    config = config_from_hf(json.loads((out / "config.json").read_text()))
    assert config.rope_scaling == RopeScaling(kind="llama3", factor=factor)
    factors[7] = 3.0
    file = write_gguf(tmp_path / "n.gguf", raw, tensors={"rope_freqs.weight": factors})
    with pytest.raises(ValueError, match=r"rope_freqs.weight are not those of Llama 3"):
        run(file, tmp_path / "out2")


@untokenized
def test_linear_scaling_and_end_tokens(tmp_path):
    metadata = {
        "llama.rope.scaling.type": "linear",
        "llama.rope.scaling.factor": 4.0,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.eot_token_id": 9,
    }
    out = run(
        write_gguf(tmp_path / "m.gguf", tiny_config("llama"), metadata=metadata), tmp_path / "out"
    )
    config = config_from_hf(json.loads((out / "config.json").read_text()))
    assert config.rope_scaling == RopeScaling(kind="linear", factor=4.0)
    assert config.eos_ids == (2,) and config.bos_id is None
    generation = json.loads((out / "generation_config.json").read_text())
    assert generation == {"eos_token_id": [2, 9]}


@untokenized
@pytest.mark.parametrize(
    ("scaling", "factor"),
    [
        ({"scaling.factor": 4.0}, 4.0),  # the type is linear unless said
        ({"scale_linear": 2.0}, 2.0),
        ({"scaling.type": "linear", "scale_linear": 2.0}, 2.0),
        ({"scaling.factor": 4.0, "scale_linear": 2.0}, 4.0),
        ({"scaling.type": "none", "scaling.factor": 4.0}, None),
        ({"scaling.type": "none", "scale_linear": 2.0}, None),
        ({"scaling.type": "linear"}, None),
        ({"scaling.type": "linear", "scaling.factor": 0.0}, None),
        ({"scaling.factor": 1.0}, None),
    ],
)
def test_scaling_is_linear_unless_none_is_said(scaling, factor, tmp_path):
    metadata = {f"llama.rope.{key}": value for key, value in scaling.items()}
    file = write_gguf(tmp_path / "m.gguf", tiny_config("llama"), metadata=metadata)
    wanted = factor and RopeScaling(kind="linear", factor=factor)
    assert GgufSource(file).config.rope_scaling == wanted


@pytest.mark.parametrize(
    ("scaling", "refused"),
    [
        ({"scaling.factor": 4.0}, True),
        ({"scale_linear": 2.0}, True),
        ({"scaling.factor": 1.0}, False),
        ({"scaling.type": "none", "scaling.factor": 4.0}, False),
    ],
)
def test_llama3_factors_go_with_no_other_scaling(scaling, refused, tmp_path):
    raw = tiny_config("llama", head_dim=64, rope_theta=5e5)
    metadata = {f"llama.rope.{key}": value for key, value in scaling.items()}
    tensors = {"rope_freqs.weight": llama3_factors(8.0)}
    file = write_gguf(tmp_path / "m.gguf", raw, metadata=metadata, tensors=tensors)
    if refused:
        with pytest.raises(ValueError, match=r"rope_freqs.weight together with .* factor [24].0"):
            run(file, tmp_path / "out")
    else:
        assert GgufSource(file).config.rope_scaling == RopeScaling(kind="llama3", factor=8.0)


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"llama.expert_count": 8}, r"not supported: llama.expert_count=8"),
        ({"llama.logit_scale": 2.0}, r"llama.logit_scale=2.0"),
        ({"llama.rope.scaling.type": "yarn"}, "rotary scaling 'yarn'"),
        ({"llama.rope.dimension_count": 4}, r"rope.dimension_count 4 differs from .* 8"),
        ({"split.count": 2}, r"split.count=2"),
        (
            {
                "tokenizer.ggml.tokens": ["a"],
                "tokenizer.ggml.model": "llama",
                "tokenizer.ggml.scores": [0.0],
                "tokenizer.ggml.remove_extra_whitespaces": True,
            },
            r"tokenizer.ggml.remove_extra_whitespaces is set",
        ),
        (
            {"tokenizer.ggml.tokens": ["a"], "tokenizer.ggml.model": "bert"},
            r"tokenizer.ggml.model 'bert' is not supported",
        ),
        (
            {"tokenizer.ggml.tokens": ["a"], "tokenizer.ggml.model": "gpt2"},
            r"vocabulary of the kind gpt2 but no tokenizer.ggml.merges\.",
        ),
        (
            {"tokenizer.ggml.tokens": ["a"], "tokenizer.ggml.model": "llama"},
            r"vocabulary of the kind llama but no tokenizer.ggml.scores\.",
        ),
        (
            {
                "tokenizer.ggml.tokens": ["a", "b"],
                "tokenizer.ggml.model": "llama",
                "tokenizer.ggml.scores": [0.0],
            },
            r"tokenizer.ggml.scores has 1 entries for 2 tokens",
        ),
        (
            {
                "tokenizer.ggml.tokens": ["a", "b"],
                "tokenizer.ggml.model": "gpt2",
                "tokenizer.ggml.merges": ["a b"],
                "tokenizer.ggml.token_type": [1],
            },
            r"tokenizer.ggml.token_type has 1 entries for 2 tokens",
        ),
    ],
)
def test_metadata_that_is_not_understood_is_refused(metadata, message, tmp_path, monkeypatch):
    file = write_gguf(tmp_path / "m.gguf", tiny_config("llama"), metadata=metadata)
    # nothing may be written, not even for a moment
    monkeypatch.delattr("convert.write._temporary")
    with pytest.raises(ValueError, match=message):
        run(file, tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["m.gguf"]


def test_tensors_are_refused_under_their_own_names(tmp_path):
    extra = {"blk.0.attn_q.bias": np.zeros(32, np.float32)}
    file = write_gguf(tmp_path / "m.gguf", tiny_config("llama"), tensors=extra)
    with pytest.raises(ValueError, match=r"not part of the model: blk.0.attn_q.bias"):
        run(file, tmp_path / "out")
    wrong = {"blk.1.ffn_up.weight": np.zeros((47, 32), np.float32)}
    file = write_gguf(tmp_path / "m.gguf", tiny_config("llama"), tensors=wrong)
    with pytest.raises(ValueError, match=r"blk.1.ffn_up.weight \[47, 32\] instead of \[48, 32\]"):
        run(file, tmp_path / "out")


def test_broken_files_are_refused(tmp_path):
    whole = write_gguf(tmp_path / "m.gguf", tiny_config("llama")).read_bytes()
    (tmp_path / "cut.gguf").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="is a broken GGUF file"):
        run(tmp_path / "cut.gguf", tmp_path / "out")
    writer = gguf.GGUFWriter(str(tmp_path / "x.gguf"), "falcon")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ValueError, match="architecture 'falcon' is not supported"):
        run(tmp_path / "x.gguf", tmp_path / "out")


def byte_level_metadata(pre: str) -> dict:
    from tokenizers import pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*alphabet, "1" + "2", "h" + "i", "<|end|>", "<tool>", "[PAD0]"]
    types = [1] * (len(alphabet) + 2) + [KINDS["control"], KINDS["user"], KINDS["unused"]]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.merges": ["1 2", "h i"],
        "tokenizer.ggml.bos_token_id": len(alphabet) + 2,
    }


@pytest.mark.parametrize("pre", list(_SPLITS))
def test_byte_level_tokenizers_split_as_their_name_says(pre, tmp_path):
    write_tokenizer(byte_level_metadata(pre), tmp_path)
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    pieces = tokenizer.encode("12<|end|>hi<tool>é", add_special_tokens=False)
    digits = ["1", "2"] if pre in ("smollm", "qwen2", "tekken") else ["12"]
    assert pieces.tokens == [*digits, "<|end|>", "hi", "<tool>", "Ã", "©"]
    assert tokenizer.decode(pieces.ids) == "12hi<tool>é"
    begins = pre in ("llama-bpe", "llama3", "llama-v3", "tekken")
    assert (tokenizer.encode("hi").tokens[0] == "<|end|>") == begins
    assert tokenizer.token_to_id("[PAD0]") is None


def test_unknown_ways_of_splitting_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"tokenizer.ggml.pre 'viking' is not supported; known"):
        write_tokenizer(byte_level_metadata("viking"), tmp_path)


@pytest.mark.parametrize("prefix", [True, False])
def test_sentencepiece_scores_become_merges(prefix, tmp_path):
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))]
    types = [2, 3, 3, *[KINDS["byte"]] * 256]
    pieces = ["\u2581", "a", "b", "ab", "\u2581a", "\u2581ab"]
    scores = [0.0] * len(tokens) + [-9.0, -9.0, -9.0, -1.0, -2.0, -3.0]
    metadata = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens + pieces,
        "tokenizer.ggml.token_type": types + [1] * len(pieces),
        "tokenizer.ggml.scores": scores,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.add_space_prefix": prefix,
        "tokenizer.chat_template": "{{ messages }}",
    }
    write_tokenizer(metadata, tmp_path)
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    encoded = tokenizer.encode("ab aé</s>")
    first = "\u2581ab" if prefix else "ab"
    assert encoded.tokens == ["<s>", first, "\u2581a", "<0xC3>", "<0xA9>", "</s>"]
    assert tokenizer.decode(encoded.ids) == "ab aé"
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert (config["bos_token"], config["unk_token"]) == ("<s>", "<unk>")
    assert config["chat_template"] == "{{ messages }}" and config["add_bos_token"]


STRINGS = [
    *("", " ", "  ", "hello", "Hello, world!", " leading", "trailing ", "a  b   c    d", "\t\ttab"),
    *("12345", "3.14159 2,718", "1st 2nd", "don't I'll WE'RE they've", "x=y+1;", "(a)[b]{c}"),
    *("naïve café ÉÀÜ", "e\u0301 combining", "日本語のテスト", "한국어", "مرحبا بالعالم", "שלום"),
    *("🙂👍🏽👨\u200d👩\u200d👧", "\u00a0nbsp\u2003em", "\u2581under", "<0x0A>"),
    *("tab\tnew\nline\r\n", "\x00\x01"),
    *(
        "def f(x):\n    return x ** 2\n",
        "for (int i = 0; i < 10; ++i) {\n\t\n}",
        "\n\n\n",
        " \n \n",
    ),
    *("<s>hi</s>", "</s> after", "a</s>b", "<|im_start|>user\nhi 42<|im_end|>\n", "<|endoftext|>"),
    *(
        "http://a.b/c?d=e&f=%20",
        "aaaa" * 9,
        "   " * 7,
        "Ω≈ç√∫ ½ ²",
        "ǅ ŉ İstanbul",
        "\u2014\u2013…“”",
    ),
]


@pytest.mark.real
@pytest.mark.parametrize("name", ["smollm2-135m", "tinyllama-1.1b"])
def test_real_tokenizers_equal_those_of_the_folder(name, tmp_path):
    transformers = pytest.importorskip("transformers", reason="renders the chat template")
    folder = real_model(name)
    reader = gguf.GGUFReader(folder / "source.gguf")
    write_tokenizer({k: f.contents() for k, f in reader.fields.items()}, tmp_path)
    ours = transformers.AutoTokenizer.from_pretrained(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    chat = [
        {"role": "system", "content": "Be brief, 12 words."},
        {"role": "user", "content": "  Was ist 3 + 4?\n"},
        {"role": "assistant", "content": "7 🙂"},
    ]
    rendered = theirs.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert ours.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) == rendered
    rng = np.random.default_rng(0)
    mixed = ["".join(rng.choice(STRINGS, 3)) for _ in range(200 - len(STRINGS))]
    texts = [*STRINGS, *mixed, rendered]
    assert len(texts) > 200
    for text in texts:
        for special in (True, False):
            ids = theirs(text, add_special_tokens=special).input_ids
            assert ours(text, add_special_tokens=special).input_ids == ids, text
        assert ours.decode(ids) == theirs.decode(ids), text
    assert convert.tokenizer_hash(tmp_path) == convert.tokenizer_hash(folder)


@pytest.mark.real
@pytest.mark.slow
def test_real_weights_equal_those_of_the_folder():
    folder = real_model("smollm2-135m")
    file = GgufSource(folder / "source.gguf")
    parts = dict(tensors.model_parts(file.config))
    with contextlib.ExitStack() as stack:
        source = FolderSource(folder, stack)
        assert parts == dict(tensors.model_parts(source.config)) and len(parts) == 31
        tensors.check_tensors(source)
        tensors.check_tensors(file)
        for part in parts.values():
            for name, weight in part.items():
                got, want = (
                    tensors.read_array(one, name, weight, np.float32) for one in (file, source)
                )
                np.testing.assert_array_equal(got, want, err_msg=name)

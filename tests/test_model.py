"""The exact model equals transformers and the reference, whatever pieces a text is read in."""

from __future__ import annotations

import dataclasses
import warnings

import decoders
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from hf_models import random_tensors, tiny_config, write_hf_folder

import convert
import easyspec_jax as es
from easyspec_jax.model import rope_frequencies

TOKENS = np.random.default_rng(1).integers(0, 61, (3, 9))
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
MHA, MQA = {"num_key_value_heads": 4}, {"num_key_value_heads": 1}


def tiny(family, **overrides):
    return tiny_config(family, num_hidden_layers=2, **overrides)


CONFIGS = {
    "llama": tiny("llama"),
    "llama-mha": tiny("llama", rms_norm_eps=0.3, rope_theta=7.0, **MHA),
    "llama-mqa": tiny("llama", **MQA),
    "llama-tied": tiny("llama", tie_word_embeddings=True),
    "llama-llama3": tiny("llama", head_dim=16, rope_theta=500.0, rope_scaling=LLAMA3),
    "llama-linear": tiny("llama", rope_scaling={"rope_type": "linear", "factor": 2.5}),
    "mistral-window": tiny("mistral", sliding_window=64, rms_norm_eps=0.1),
    "qwen2": tiny("qwen2"),
    "qwen2-tied": tiny("qwen2", tie_word_embeddings=True, rope_theta=1e6, **MQA),
    "qwen3": tiny("qwen3"),
    "qwen3-wide": tiny("qwen3", head_dim=12, rms_norm_eps=0.2, tie_word_embeddings=True, **MHA),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory, digests_of_host):
    """name -> (Hugging Face folder, checkpoint folder), made when first asked for."""
    root, made = tmp_path_factory.mktemp("models"), {}

    def get(name):
        if name not in made:
            source = write_hf_folder(root / name / "hf", CONFIGS[name])
            made[name] = source, convert.convert(source, root / name / "ckpt", progress=False)
        return made[name]

    return get


@pytest.fixture(scope="module")
def load(folders):
    """name, dtype -> the library's model on one device."""
    mesh, made = es.make_mesh(tensor=1), {}

    def get(name, dtype=jnp.float64):
        if (name, dtype) not in made:
            made[name, dtype] = es.load_model(folders(name)[1], mesh, dtype=dtype)
        return made[name, dtype]

    return get


def plain(name, tokens, **options):
    """The reference's pass for one of CONFIGS."""
    config = es.config_from_hf(CONFIGS[name])
    return reference.run(
        config, reference.from_hf(config, random_tensors(CONFIGS[name])), tokens, **options
    )


def torch_logits(folder, tokens, dtype):
    reason = "parity with transformers needs torch"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what torch and transformers say at import is not ours
        torch = pytest.importorskip("torch", reason=reason)
        transformers = pytest.importorskip("transformers", reason=reason)
        model = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=getattr(torch, dtype)
        )
        with torch.no_grad():
            return model(torch.tensor(tokens)).logits.double().numpy()


# each is half of another, as a variant of its own
COVERED = {"llama-mha", "llama-tied", "qwen2", "qwen3"}


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow) if n in COVERED else n for n in CONFIGS]
)
def test_logits_and_cache_equal_the_reference(name, load):
    model = load(name)
    got, cache = reference.run_library(model, TOKENS, reference.empty_cache(model, 3, 16))
    want = plain(name, TOKENS)
    np.testing.assert_allclose(got, want.logits, atol=1e-9)
    for (k, v), want_k, want_v in zip(
        reference.layer_kv(model, cache, 9), want.keys, want.values, strict=True
    ):
        np.testing.assert_allclose(k, want_k, atol=1e-9)
        np.testing.assert_allclose(v, want_v, atol=1e-9)


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_equal_transformers(name, folders, load):
    # transformers computes norms and angles in float32 even where the model is float64
    want = torch_logits(folders(name)[0], TOKENS, "float64")
    model = load(name)
    got, _ = reference.run_library(model, TOKENS, reference.empty_cache(model, 3, 16))
    np.testing.assert_allclose(got, want, atol=1e-5 * max(1.0, np.abs(want).max() / 4))


def test_float32_logits_equal_transformers_float32(folders, load):
    want = torch_logits(folders("llama")[0], TOKENS, "float32")
    model = load("llama", jnp.float32)
    got, cache = reference.run_library(model, TOKENS, reference.empty_cache(model, 3, 16))
    assert got.dtype == jnp.float32 and cache.blocks[0][0].k.dtype == jnp.float32
    np.testing.assert_allclose(got, want, atol=2e-5)


def test_bfloat16_keeps_the_logits_in_float32(load):
    model = load("llama", jnp.bfloat16)
    got, cache = reference.run_library(model, TOKENS, reference.empty_cache(model, 3, 16))
    assert got.dtype == jnp.float32 and cache.blocks[0][0].k.dtype == jnp.bfloat16
    np.testing.assert_allclose(got, plain("llama", TOKENS).logits, atol=0.3)


@pytest.mark.parametrize(
    "name, field",
    [
        ("llama-mha", "rms_norm_eps"),
        ("llama-mha", "rope_theta"),
        ("llama-linear", "rope_scaling"),
        ("llama-llama3", "rope_scaling"),
    ],
)
def test_every_field_changes_the_logits(name, field):
    # else one that is ignored on both sides would go unnoticed
    usual = CONFIGS[name] | {field: CONFIGS["llama"].get(field)}
    config = es.config_from_hf(usual)
    without = reference.run(config, reference.from_hf(config, random_tensors(usual)), TOKENS)
    assert np.abs(plain(name, TOKENS).logits - without.logits).max() > 1e-2


@pytest.mark.parametrize("name", ["llama", "qwen3"])
@pytest.mark.parametrize("cuts", [(1,) * 9, (4, 4, 1), (1, 4, 4)], ids=str)
def test_prefill_equals_decoding_in_pieces(name, cuts, load):
    model = load(name)
    want, whole = reference.run_library(model, TOKENS, reference.empty_cache(model, 3, 16))
    cache = reference.empty_cache(model, 3, 16, fill=50.0)  # scratch must never be read
    pieces = []
    for piece in np.split(TOKENS, np.cumsum(cuts)[:-1], axis=1):
        out, cache = reference.run_library(model, piece, cache)
        pieces.append(out)
    np.testing.assert_allclose(np.concatenate(pieces, axis=1), want, atol=1e-9)
    np.testing.assert_array_equal(cache.length, [9, 9, 9])
    for got, expected in zip(
        reference.layer_kv(model, cache, 9), reference.layer_kv(model, whole, 9), strict=True
    ):
        np.testing.assert_allclose(got, expected, atol=1e-9)


def test_one_row_equals_its_row_in_a_batch(load):
    model = load("llama")
    want = plain("llama", TOKENS).logits
    for b in range(3):
        cache = reference.empty_cache(model, 1, 16, fill=50.0)
        got, cache = reference.run_library(model, TOKENS[b : b + 1, :4], cache)
        np.testing.assert_allclose(got[0], want[b, :4], atol=1e-9)
        got, cache = reference.run_library(model, TOKENS[b : b + 1, 4:5], cache)
        np.testing.assert_allclose(got[0, 0], want[b, 4], atol=1e-9)


def test_rows_of_different_lengths_do_not_disturb_each_other(load):
    # Rows count 4, 2 and 0 of their first 4 tokens; then all go on from where they stand.
    model, num = load("llama"), np.array([4, 2, 0])
    want = plain("llama", TOKENS).logits
    cache = reference.empty_cache(model, 3, 16, fill=50.0)
    padded = np.where(np.arange(4) < num[:, None], TOKENS[:, :4], 7)
    first, cache = reference.run_library(model, padded, cache, num=num)
    np.testing.assert_array_equal(cache.length, num)
    for b, n in enumerate(num):
        np.testing.assert_allclose(first[b, :n], want[b, :n], atol=1e-9)
    for _ in range(4):
        at = np.asarray(cache.length)
        out, cache = reference.run_library(model, TOKENS[np.arange(3), at][:, None], cache)
        np.testing.assert_allclose(out[:, 0], want[np.arange(3), at], atol=1e-9)
    np.testing.assert_array_equal(cache.length, num + 4)


@pytest.mark.parametrize("lengths", [[5], [2, 5, 12]], ids=str)
def test_cache_changes_only_where_the_new_tokens_are(lengths, load):
    model, batch = load("llama"), len(lengths)
    cache = reference.empty_cache(model, batch, 16, fill=3.0)
    cache = cache.rollback(jnp.asarray(lengths, jnp.int32))
    _, cache = reference.run_library(model, TOKENS[:batch, :4], cache)
    np.testing.assert_array_equal(cache.length, np.array(lengths) + 4)
    slots = np.arange(16)
    for pair in reference.layer_kv(model, cache, 16):
        for x in pair:
            for b, n in enumerate(lengths):
                new = (slots >= n) & (slots < n + 4)
                np.testing.assert_array_equal(x[b, ~new], 3.0)
                assert (x[b, new] != 3.0).all()


def test_rolled_back_tokens_are_forgotten(load):
    model = load("llama")
    cache = reference.empty_cache(model, 3, 16)
    _, cache = reference.run_library(model, TOKENS[:, :4], cache)
    _, cache = reference.run_library(model, (TOKENS[:, 4:8] + 1) % 61, cache)
    cache = cache.rollback(jnp.asarray([4, 4, 4], jnp.int32))
    got, _ = reference.run_library(model, TOKENS[:, 4:5], cache)
    np.testing.assert_allclose(got[:, 0], plain("llama", TOKENS).logits[:, 4], atol=1e-9)


@pytest.mark.parametrize("unk, pad, row", [(5, 9, 5), (None, 9, 9), (None, None, 0)], ids=str)
@pytest.mark.parametrize("name", ["llama", "llama-tied"])
def test_ids_without_a_row_are_read_as_unknown_or_padding(name, unk, pad, row, load):
    model = load(name)
    model = model.replace(config=dataclasses.replace(model.config, unk_id=unk, pad_id=pad))
    tokens = TOKENS[:, :4].copy()
    tokens[0, 1], tokens[1, 3], tokens[2, 0] = 61, 100, 151935
    known = np.where(tokens < 61, tokens, row)
    got, _ = reference.run_library(model, tokens, reference.empty_cache(model, 3, 16))
    np.testing.assert_allclose(got, plain(name, known).logits, atol=1e-9)


def test_rotary_frequencies_by_hand():
    config = es.config_from_hf(tiny_config("llama", head_dim=4, rope_theta=100.0))
    np.testing.assert_allclose(rope_frequencies(config), [1.0, 0.1])
    linear = dataclasses.replace(config, rope_scaling=es.RopeScaling(kind="linear", factor=4.0))
    np.testing.assert_allclose(rope_frequencies(linear), [0.25, 0.025])
    # wavelengths 2 pi and 20 pi: the first, below 40 / 4, is kept; the second, above 40, divided
    scaling = es.RopeScaling(
        kind="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_len=40
    )
    llama3 = dataclasses.replace(config, rope_scaling=scaling)
    np.testing.assert_allclose(rope_frequencies(llama3), [1.0, 0.0125])
    # between: 40 pi holds the second wavelength twice, a third of the way from 1 to 4
    between = dataclasses.replace(scaling, original_max_len=40 * np.pi)
    blended = rope_frequencies(dataclasses.replace(config, rope_scaling=between))
    np.testing.assert_allclose(blended, [1.0, 0.1 / 3 + 0.0125 * 2 / 3])


@pytest.mark.parametrize("mesh_shape", [(1, 1), pytest.param((2, 2), marks=pytest.mark.slow)])
def test_logits_of_texts(mesh_shape):
    m = decoders.model(mesh_shape)
    text = [[1, 2, 3, 4], [9, 8, 7, 6]]
    got = es.logits(m, text)
    assert got.shape == (2, 4, 61)
    want = decoders.all_logits(decoders.model((1, 1)), text)
    np.testing.assert_allclose(got, want, atol=1e-9)
    assert es.logits(m, [[1] * 96]).shape == (1, 96, 61)  # the whole context
    for wrong, sentence in (([[1], [1, 2]], "of one length"), ([[61]], "token id 61"),
                            ([[1] * 97], "prompt 0 has 97 tokens")):  # fmt: skip
        with pytest.raises(ValueError, match=sentence):
            es.logits(m, wrong)

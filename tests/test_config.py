"""config_from_hf on config.json files of every style, and what the dataclasses refuse."""

from __future__ import annotations

import dataclasses
import json

import pytest
from hf_models import FAMILIES, tiny_config

from easyspec_jax.config import ModelConfig, RopeScaling, Sampling
from easyspec_jax.hf_config import _FAMILY_DEFAULTS, config_from_hf
from easyspec_jax.weights import LAYER_WEIGHTS, TOP_WEIGHTS, present

SIZES = {
    "vocab_size": 64,
    "hidden_size": 256,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 32,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def tiny(family: str = "llama", **overrides) -> ModelConfig:
    return config_from_hf(tiny_config(family, **overrides))


def test_tiny_llama_is_read_field_by_field():
    assert tiny(pad_token_id=3) == ModelConfig(
        vocab_size=61,
        embed_dim=32,
        mlp_dim=48,
        num_layers=3,
        num_heads=4,
        num_kv_heads=2,
        head_dim=8,
        norm_eps=1e-5,
        rope_theta=10000.0,
        max_len=256,
        family="llama",
        eos_ids=(2,),
        bos_id=1,
        pad_id=3,
    )


def test_shapes_split_heads_and_follow_the_family():
    def shapes(table, config):
        return {name: weight.shape(config) for name, weight in present(table, config).items()}

    layer = shapes(LAYER_WEIGHTS, tiny("qwen2"))
    assert layer["wq"] == (32, 2, 2, 8) and layer["wo"] == (2, 2, 8, 32)
    assert layer["bq"] == (2, 2, 8) and "q_norm" not in layer
    assert shapes(LAYER_WEIGHTS, tiny("qwen3"))["k_norm"] == (8,)
    assert shapes(TOP_WEIGHTS, tiny())["lm_head"] == (32, 61)
    assert "lm_head" not in shapes(TOP_WEIGHTS, tiny(tie_word_embeddings=True))


def test_configs_are_hashable_and_frozen():
    assert hash(tiny(rope_scaling=LLAMA3)) == hash(tiny(rope_scaling=LLAMA3))
    with pytest.raises(dataclasses.FrozenInstanceError):
        tiny().num_layers = 2


@pytest.mark.parametrize("family", FAMILIES)
def test_absent_attributes_take_the_defaults_of_transformers(family):
    transformers = pytest.importorskip("transformers", reason="compares with its class defaults")
    hf = transformers.AutoConfig.for_model(family, **SIZES)
    hf_default = transformers.AutoConfig.for_model(family)
    for name, value in _FAMILY_DEFAULTS[family].items():
        if name in ("num_key_value_heads", "head_dim", "sliding_window"):
            continue  # filled in by the class, compared below
        assert getattr(hf_default, name) == value, name
    ours = config_from_hf({"model_type": family, **SIZES})
    assert ours.num_kv_heads == hf.num_key_value_heads
    assert ours.head_dim == (getattr(hf, "head_dim", None) or 256 // 32)
    assert ours.sliding_window == getattr(hf, "sliding_window", None)
    assert ours.rope_theta == hf.rope_parameters["rope_theta"]


@pytest.mark.parametrize("family", FAMILIES)
def test_objects_of_transformers_and_their_saved_form_agree_with_the_raw_dict(family):
    transformers = pytest.importorskip("transformers", reason="makes configuration objects")
    raw = tiny_config(family, rope_scaling=LLAMA3, eos_token_id=[2, 5])
    hf = transformers.AutoConfig.for_model(**raw)
    assert config_from_hf(hf) == config_from_hf(raw)
    assert config_from_hf(json.loads(hf.to_json_string(use_diff=False))) == tiny(
        family, rope_scaling=LLAMA3, eos_token_id=[2, 5]
    )


def test_rope_of_both_styles():
    llama3 = RopeScaling(kind="llama3", factor=32.0)
    assert tiny(rope_scaling=LLAMA3).rope_scaling == llama3
    new = tiny(rope_theta=None, rope_parameters=LLAMA3 | {"rope_theta": 5e5})
    assert (new.rope_theta, new.rope_scaling) == (5e5, llama3)
    old = tiny(rope_scaling={"type": "linear", "factor": 2.0}, rope_theta=77.0)
    assert (old.rope_theta, old.rope_scaling) == (77.0, RopeScaling(kind="linear", factor=2.0))
    plain = tiny(rope_parameters={"rope_type": "default", "rope_theta": 9.0})
    assert (plain.rope_theta, plain.rope_scaling) == (9.0, None)
    assert tiny(rope_scaling=None).rope_scaling is None


def test_head_layouts():
    assert tiny(head_dim=None).head_dim == 8
    assert tiny(head_dim=16).head_dim == 16
    assert tiny(num_key_value_heads=None).num_kv_heads == 4
    mqa = tiny(num_key_value_heads=1)
    assert (mqa.num_kv_heads, mqa.num_groups) == (1, 4)


def test_sliding_windows():
    assert tiny("mistral").sliding_window is None
    assert tiny("mistral", sliding_window=16).sliding_window == 16
    window = {"use_sliding_window": True, "sliding_window": 16}
    assert tiny("qwen2", sliding_window=16).sliding_window is None
    assert tiny("qwen2", **window, max_window_layers=3).sliding_window is None
    assert tiny("qwen3", **window, max_window_layers=0).sliding_window == 16
    assert tiny("qwen3", **window, layer_types=["sliding_attention"] * 3).sliding_window == 16
    for family in ("qwen2", "qwen3"):
        with pytest.raises(ValueError, match=r"mixes attention kinds.*max_window_layers=2"):
            tiny(family, **window, max_window_layers=2)
    with pytest.raises(ValueError, match="3 layers but 2 layer_types"):
        tiny(layer_types=["full_attention"] * 2)
    with pytest.raises(ValueError, match="mixes attention kinds"):
        tiny(layer_types=["full_attention", "sliding_attention", "full_attention"])
    with pytest.raises(ValueError, match="mixes attention kinds"):
        tiny("mistral", sliding_window=16, layer_types=["full_attention"] * 3)


def test_token_ids():
    assert tiny(eos_token_id=[5, 2, 5]).eos_ids == (5, 2)
    assert tiny(eos_token_id=None).eos_ids == ()
    ids = tiny(bos_token_id=None, pad_token_id=-1, unk_token_id=0)
    assert (ids.bos_id, ids.pad_id, ids.unk_id) == (None, None, 0)
    assert tiny(pad_token_id=61).pad_id is None


def test_known_harmless_attributes_are_ignored():
    extra = {"_name_or_path": "x", "attention_dropout": 0.1, "temperature": 0.7, "use_mrope": False}
    assert tiny(**extra, rope_interleaved=False, pretraining_tp=1) == tiny()
    assert tiny("qwen2", attention_bias=True) == tiny("qwen2")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"model_type": "gpt2"}, "model_type 'gpt2' is not supported; use one of llama, mistral"),
        ({"hidden_size": None}, "the llama config lacks hidden_size"),
        ({"hidden_size": "32"}, "no integers: hidden_size='32'"),
        (
            {"attention_bias": True, "hidden_act": "gelu", "logit_scale": 2},
            "not supported: .*hidden_act='gelu'.*attention_bias=True.*logit_scale=2",
        ),
        ({"mlp_bias": True}, "mlp_bias=True"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"sliding_window": 8}, "sliding_window=8"),
        ({"rope_scaling": {"type": "yarn", "factor": 2.0}}, "rotary scaling 'yarn'"),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "rotary scaling 'dynamic'"),
        ({"rope_scaling": {"rope_type": "longrope"}}, "rotary scaling 'longrope'"),
        ({"rope_scaling": {"rope_type": "linear", "type": "yarn"}}, "rotary settings"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "lacks .'high_freq_factor'"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0, "beta": 1}}, "unknown keys .'beta'"),
        ({"rope_parameters": {"full_attention": {}}}, "unknown keys .'full_attention'"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "rotary settings .*0.5"),
        ({"rope_scaling": "linear"}, "rotary settings must be an object"),
        ({"num_attention_heads": 5, "head_dim": None}, "not a multiple of num_attention_heads"),
        ({"num_key_value_heads": 3}, "must be a multiple of num_kv_heads"),
        ({"head_dim": 7}, "head_dim .7. must be even"),
        ({"num_hidden_layers": 0}, "num_layers must be an integer in 1 .. 10000"),
        ({"rms_norm_eps": 0.0}, "norm_eps must be a finite number > 0"),
        ({"rope_theta": float("inf")}, "rope_theta must be a finite number > 0"),
        ({"eos_token_id": ["2"]}, "eos_token_id must be a token id or a list"),
    ],
)
def test_refusals_of_config_from_hf(overrides, message):
    with pytest.raises(ValueError, match=message):
        tiny(**overrides)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"kind": "yarn"}, "'yarn' is not supported"),
        ({"factor": 0.0}, "factor must be a number > 0"),
        ({"low_freq_factor": 4.0}, "must be below high_freq_factor"),
    ],
)
def test_refusals_of_rope_scaling(fields, message):
    with pytest.raises(ValueError, match=message):
        RopeScaling(**{"kind": "llama3", "factor": 8.0} | fields)


def test_sampling_is_greedy_unless_told_otherwise():
    assert Sampling().greedy and not Sampling(temperature=0.5).greedy
    assert Sampling(temperature=1, top_k=5, top_p=0.9, min_p=0.1).top_k == 5


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"temperature": -1.0}, "temperature must be"),
        ({"temperature": float("nan")}, "temperature must be"),
        ({"top_k": -1}, "top_k must be"),
        ({"top_k": 0.5}, "top_k must be"),
        ({"top_p": 0.0}, "top_p must be"),
        ({"top_p": 1.1}, "top_p must be"),
        ({"min_p": -0.1}, "min_p must be"),
        ({"min_p": 2}, "min_p must be"),
    ],
)
def test_refusals_of_sampling(fields, message):
    with pytest.raises(ValueError, match=message):
        Sampling(**fields)

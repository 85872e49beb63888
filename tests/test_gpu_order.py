"""Weights and caches arranged as GPUs read them best, on CPU devices: the same model."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from decoders import PROMPTS

import easyspec_jax as es
from easyspec_jax import cache, sharding
from easyspec_jax import model as models
from easyspec_jax.weights import separate_block, separate_top

CONFIG = es.ModelConfig(
    vocab_size=64, embed_dim=24, mlp_dim=48, num_layers=5, num_heads=8, num_kv_heads=2,
    head_dim=4, max_len=96, qkv_bias=True, qk_norm=True,
)  # fmt: skip
NARROW = es.ModelConfig(**{**vars(CONFIG), "num_layers": 1})
FLAT = es.ModelConfig(**{**vars(CONFIG), "num_layers": 2})
TIED = es.ModelConfig(**{**vars(FLAT), "tie_embeddings": True})


@pytest.fixture
def pretend(monkeypatch):
    """Whether the devices of meshes pass for GPUs."""
    return lambda gpus: monkeypatch.setattr(sharding, "has_gpus", lambda mesh: gpus)


def both(pretend, shape, config=CONFIG, **options):
    """The same model in the order of CPUs and of GPUs."""
    found = []
    for gpus in (False, True):
        pretend(gpus)
        found.append(es.random_model(config, es.make_mesh(*shape), dtype="float32", **options))
    assert [m.layout.for_gpu for m in found] == [False, True]
    return found


# On 2 x 4 devices share a kv head: keys and values stay apart from queries.
@pytest.mark.parametrize(
    "config, shape",
    [(FLAT, (1, 1)), (TIED, (2, 4))],
    ids=["head", "tied, split"],
)
def test_both_orders_say_the_same(pretend, shape, config):
    cpu, gpu = both(pretend, shape, config)
    text = [[5, 3, 8, 1, 9]]
    np.testing.assert_allclose(es.logits(gpu, text), es.logits(cpu, text), atol=2e-5)
    one = [[5]]  # a row alone is multiplied and summed
    np.testing.assert_allclose(es.logits(gpu, one), es.logits(cpu, one), atol=2e-5)


@pytest.mark.parametrize("shape, size", [((1, 1), 1), ((4, 2), 3)], ids=str)
def test_a_checkpoint_has_one_order(pretend, shape, size):
    cpu, gpu = (
        [separate_block(b, m.layout) for b in m.params.blocks] + [separate_top(m.params, m.layout)]
        for m in both(pretend, shape, group_size=size)
    )
    jax.tree.map(np.testing.assert_array_equal, cpu, gpu)


@pytest.mark.parametrize("shape", [pytest.param((1, 1), marks=pytest.mark.slow), (4, 2)], ids=str)
def test_padding_changes_no_rounded_weight(pretend, shape):
    """48 inputs of an MLP, or 6 on each device, are padded to 64: groups are of the true ones."""
    codes = es.Quantization("int4", 12, keep_codes=True)
    cpu, gpu = both(pretend, shape, NARROW, quantization=codes)
    assert gpu.layout.mlp_padding and not cpu.layout.mlp_padding
    for a, b in zip(cpu.params.blocks, gpu.params.blocks, strict=True):
        for x, y in zip(separate_block(a, cpu.layout), separate_block(b, gpu.layout), strict=True):
            jax.tree.map(np.testing.assert_array_equal, x, y)


@pytest.mark.parametrize("shape", [(1, 1), (2, 4)], ids=str)
def test_a_layout_says_who_attends(pretend, xla_for_cudnn, shape):
    cpu, gpu = both(pretend, shape, FLAT)
    other = gpu.replace(layout=dataclasses.replace(gpu.layout, attention="cudnn"))
    assert len(other.abstract_cache(1, 8).blocks[0][0].arrays) == 2
    text = [[5, 3, 8, 1, 9], [7, 7, 2, 4, 6]]
    np.testing.assert_allclose(es.logits(other, text), es.logits(cpu, text), atol=2e-5)


@pytest.mark.slow
def test_both_orders_write_the_same(pretend, monkeypatch):
    """Keys and values of GPUs as newer versions of jax have them: in two arrays."""
    monkeypatch.setattr(cache, "ONE_ARRAY", False)
    config = es.ModelConfig(**{**vars(CONFIG), "num_layers": 3})
    texts = []
    for gpus in (False, True):
        pretend(gpus)
        mesh = es.make_mesh(4, 2)
        base = es.random_model(config, mesh, dtype="float32")
        draft = es.random_model(config, mesh, dtype="float32", group_size=(1, 2))
        assert draft.layout.for_gpu == gpus
        drafter = es.LayerParallelDrafter(draft)
        decoder = es.Decoder(base, drafter, num_draft_tokens=3, tree_width=2)
        out = decoder.generate(PROMPTS, max_new_tokens=16)
        texts.append((out.tokens, out.stats.tokens_per_step))
    assert texts[0] == texts[1]
    assert es.Decoder(base).generate(PROMPTS, max_new_tokens=16).tokens == out.tokens


@pytest.mark.slow
@pytest.mark.parametrize("num_tokens", [1, 6])
def test_in_bfloat16_the_order_of_gpus_is_no_further_from_the_truth(pretend, num_tokens):
    """Than the products before it: the norm in front of them, each rounded."""
    wide = es.ModelConfig(**{**vars(CONFIG), "embed_dim": 256, "mlp_dim": 512, "qkv_bias": False})
    text = np.random.default_rng(0).integers(wide.vocab_size, size=(8, num_tokens)).tolist()
    exact, gpu = both(pretend, (1, 1), wide)

    def rounded(model):
        return jax.tree.map(lambda x: x.astype(jnp.bfloat16), model)

    truth = np.concatenate([es.logits(rounded_up(rounded(exact)), [row])[0] for row in text])
    errors = {}
    for name in ("now", "before"):
        with pytest.MonkeyPatch.context() as patch:
            if name == "before":
                patch.setattr(models, "normed", norm_first)
                patch.setattr(models, "product", rounded_product)
            jax.clear_caches()
            found = np.concatenate([es.logits(rounded(gpu), [row])[0] for row in text])
        errors[name] = np.square(found - truth).mean()
    jax.clear_caches()
    assert 0 < errors["now"] <= errors["before"]


def rounded_up(model):
    """A model of the same numbers that computes in float32."""
    return jax.tree.map(lambda x: x.astype(jnp.float32), model)


def norm_first(model, x, weight):
    """As the norm was applied in front of a product."""
    return models.rms_norm(x, weight, model.config.norm_eps), jnp.ones((1, 1, 1), jnp.float32)


def rounded_product(model, x, w):
    """As products were rounded."""
    w = w.reshape(-1, x.shape[-1])
    return jnp.einsum("bti,oi->bto", x, w).astype(jnp.float32)

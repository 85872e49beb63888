"""Whose kernels attend: cuDNN's, computed here by what every device has, and when it is them."""

from __future__ import annotations

import dataclasses
import logging
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import easyspec_jax as es
from easyspec_jax import attend, cache
from easyspec_jax.model import Placement

CONFIG = es.ModelConfig(
    vocab_size=64, embed_dim=24, mlp_dim=48, num_layers=2, num_heads=6, num_kv_heads=2,
    head_dim=8, max_len=96,
)  # fmt: skip


def seen_entries(kind, start, t, entries):
    """Step.mask of a chain, or of a tree, behind these starts."""
    if kind == "chain":
        positions = start[:, None] + np.arange(t, dtype=np.int32)[None]
        return jnp.asarray(np.arange(entries)[None, None] <= positions[:, :, None])
    drawn = np.random.default_rng(2).random((len(start), t, t)) < 0.5
    ancestors = np.tril(drawn) | np.eye(t, dtype=bool)
    positions = jnp.zeros((len(start), t), jnp.int32)
    placed = Placement(origin=start, positions=positions, ancestors=jnp.asarray(ancestors))
    return placed.mask(entries)


def some_attention(kind, t, batch):
    """Queries, a cache and what of it they see."""
    k_heads, groups, h, entries = 2, 3, 8, 16
    draw = np.random.default_rng(t).standard_normal
    q = jnp.asarray(draw((k_heads * batch, t * groups, h)), jnp.float32)
    shape = (k_heads * batch, entries, h)
    arrays = tuple(jnp.asarray(draw(shape), jnp.float32) for _ in range(2))
    kv = cache.LayerKV(arrays, letters=("KSH", "KSH"))
    start = np.asarray([5, 0, 9][:batch], np.int32)
    return q, kv, seen_entries(kind, start, t, entries)


@pytest.mark.parametrize("kind, t", [("chain", 1), ("chain", 4), ("tree", 4)])
@pytest.mark.parametrize("batch", [1, 3])
def test_one_call_finds_what_the_sums_find(xla_for_cudnn, kind, t, batch):
    want, found = jax.jit(lambda *x: (attend.attend(*x), attend.attend_cudnn(*x)))(
        *some_attention(kind, t, batch)
    )
    np.testing.assert_allclose(found, want, atol=1e-6)


def test_where_the_library_is_missing_one_sentence_says_so(monkeypatch):
    def missing(*args, **options):
        raise RuntimeError("cuDNN is not detected.\nLook elsewhere.")

    monkeypatch.setattr(jax.nn, "dot_product_attention", missing)
    with pytest.raises(ValueError) as error:
        attend.attend_cudnn(*some_attention("chain", 1, 1))
    sentence = 'attention="cudnn" needs cuDNN (nvidia-cudnn-cu12): cuDNN is not detected.'
    assert str(error.value) == sentence


def a_gpu(monkeypatch, capability, processes=1):
    """A mesh of one device that passes for a GPU."""
    monkeypatch.setattr(attend, "has_gpus", lambda mesh: True)
    device = types.SimpleNamespace(platform="gpu", process_index=0)
    if capability is not None:
        device.compute_capability = capability
    mesh = types.SimpleNamespace(devices=np.array([[device]]), is_multi_process=processes > 1)
    monkeypatch.setattr(attend, "Mesh", types.SimpleNamespace)
    return mesh


@pytest.mark.parametrize(
    "capability, head_dim, dtype, has_one",
    [
        ("8.0", 128, "bfloat16", True),
        ("10.3", 64, "float16", True),
        ("8.0", 128, "float32", False),
        ("8.0", 12, "bfloat16", False),
        ("8.0", 136, "bfloat16", False),
        ("7.5", 64, "float16", False),
        ("gfx942", 128, "bfloat16", False),
        (None, 128, "bfloat16", False),
    ],
)
def test_cudnn_is_asked_only_for_what_it_has(monkeypatch, capability, head_dim, dtype, has_one):
    mesh = a_gpu(monkeypatch, capability)
    config = dataclasses.replace(CONFIG, head_dim=head_dim)
    monkeypatch.setattr(attend, "why_not_cudnn", lambda *asked: None)
    for wanted in ("auto", "cudnn"):
        found = attend.attention_on(mesh, wanted, config, dtype, codes=None)
        assert found == ("cudnn" if has_one else "xla")
        assert attend.attention_on(mesh, wanted, config, dtype, codes="int8") == "xla"
    assert attend.attention_on(mesh, "xla", config, dtype, codes=None) == "xla"


@pytest.fixture
def ask():
    """What a device of this machine says when it is asked for bfloat16."""
    attend.why_not_cudnn.cache_clear()
    yield lambda: attend.why_not_cudnn(jax.devices()[0], 3, 16, "bfloat16")
    attend.why_not_cudnn.cache_clear()


def test_a_device_that_finds_the_same_has_it(xla_for_cudnn, ask):
    assert ask() is None


def test_a_device_without_the_library_does_not(ask):
    assert ask().startswith("cuDNN has no attention here (")


@pytest.mark.parametrize("wrong", ["mask", "own token", "values", "nan"])
def test_a_device_that_finds_something_else_does_not(monkeypatch, xla_for_cudnn, ask, wrong):
    def instead(q, k, v, *, mask, implementation):
        mask = jnp.ones_like(mask) if wrong == "mask" else mask
        mask = jnp.roll(mask, -1, axis=-1) if wrong == "own token" else mask
        found = xla_for_cudnn(q, k, v, mask=mask, implementation=implementation)
        return {"values": 1.2 * found, "nan": jnp.nan * found}.get(wrong, found)

    monkeypatch.setattr(jax.nn, "dot_product_attention", instead)
    assert "away from XLA's" in ask()


def test_where_the_device_shows_nothing_xla_attends_and_a_line_says_why(monkeypatch, caplog):
    monkeypatch.setattr(attend, "why_not_cudnn", lambda *asked: "no plan")
    with caplog.at_level(logging.WARNING, "easyspec_jax"):
        found = attend.attention_on(a_gpu(monkeypatch, "9.0"), "auto", CONFIG, "bfloat16", None)
    assert found == "xla" and caplog.messages == ["attention by XLA: no plan"]
    several = a_gpu(monkeypatch, "9.0", processes=2)  # which are to run one program
    with pytest.raises(ValueError, match='no plan; attention="xla" does without, in all processes'):
        attend.attention_on(several, "auto", CONFIG, "bfloat16", None)
    assert attend.attention_on(several, "cudnn", CONFIG, "bfloat16", None) == "cudnn"


def test_where_cudnn_has_nothing_the_program_is_the_same():
    mesh = es.make_mesh(tensor=1)
    same = es.random_model(CONFIG, mesh, dtype="bfloat16")
    asked = es.random_model(CONFIG, mesh, dtype="bfloat16", attention="cudnn")
    assert jax.tree.structure(asked) == jax.tree.structure(same)  # layouts too: what jit compares
    with pytest.raises(ValueError, match='attention must be "auto", "cudnn" or "xla", got \'fl'):
        es.abstract_model(CONFIG, mesh, attention="flash")

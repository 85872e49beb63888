"""Rounded weights are those of a plain reference, on any mesh and in any partition."""

import re

import jax
import numpy as np
import pytest
from decoders import GROUPS, SMALL, all_logits, model

import easyspec_jax as es
from easyspec_jax import quantize
from easyspec_jax.weights import separate_block

# The axis of each checkpoint matrix's inputs: of `wo` the last before its outputs.
INPUTS = {"wq": 0, "wk": 0, "wv": 0, "wo": -2, "w_gate": 0, "w_up": 0, "w_down": 0}


def reference(w, axis, bits, group_size):
    """Every group of consecutive inputs rounded by itself, in a loop."""
    w = np.moveaxis(np.asarray(w, np.float64), axis, 0)
    group = next(d for d in range(min(group_size, len(w)), 0, -1) if len(w) % d == 0)
    out = np.empty_like(w)
    for start in range(0, len(w), group):
        part = w[start : start + group]
        scale = np.abs(part).max(axis=0) / (2 ** (bits - 1) - 1)
        out[start : start + group] = np.round(part / np.where(scale > 0, scale, 1)) * scale
    return np.moveaxis(out, 0, axis)


def layers(m):
    """Every layer's arrays as a checkpoint holds them."""
    return [x for block in m.params.blocks for x in separate_block(block, m.layout)]


@pytest.mark.parametrize(("bits", "group_size"), [(4, 8), (8, 128), (4, 7), (8, 1)])
def test_matrices_are_rounded_as_the_reference_rounds_them(bits, group_size):
    exact = model((1, 1))
    rounded = es.quantize_weights(exact, bits=bits, group_size=group_size)
    for before, after in zip(layers(exact), layers(rounded), strict=True):
        for name, w in before.items():
            want = reference(w, INPUTS[name], bits, group_size) if name in INPUTS else w
            np.testing.assert_allclose(after[name], want, rtol=0, atol=1e-12, err_msg=name)
    head = reference(exact.params.lm_head, 0, bits, group_size)
    np.testing.assert_allclose(rounded.params.lm_head, head, rtol=0, atol=1e-12)
    assert rounded.params.embed is exact.params.embed  # and the norms: nothing is copied
    assert rounded.params.final_norm is exact.params.final_norm
    assert rounded.dtype == exact.dtype and rounded.config == exact.config


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_errors_are_at_most_half_a_code_and_rounding_again_changes_nothing(dtype):
    exact = model((1, 1), dtype=dtype)
    rounded = es.quantize_weights(exact, bits=4, group_size=8)
    again = es.quantize_weights(rounded, bits=4, group_size=8)
    spacing = 2.0 ** (-7 if dtype == "bfloat16" else -22)
    for name in ("w_gate_up", "w_down"):
        w, r, twice = (
            np.asarray(getattr(m.params.blocks[1].mlp[0], name), np.float64)
            for m in (exact, rounded, again)
        )
        largest = np.abs(w.reshape(-1, 8, *w.shape[1:])).max(axis=1, keepdims=True)
        error = np.abs(w - r).reshape(-1, 8, *w.shape[1:])
        assert (error <= largest * (0.5 / 7 + spacing)).all()
        assert len(np.unique(r[:8, ..., 0])) <= 15 < len(np.unique(w[:, ..., 0]))
        np.testing.assert_allclose(twice, r, rtol=2 * spacing, atol=0)


def test_a_tied_head_stays_with_its_embedding_and_zeros_stay_zero():
    exact = model((1, 1), config=SMALL)
    rounded = es.quantize_weights(exact)
    assert rounded.params.lm_head is exact.params.lm_head and rounded.params.embed is None
    zero = exact.replace(params=exact.params.replace(blocks=tuple(
        b.replace(mlp=tuple(m.replace(w_down=0 * m.w_down) for m in b.mlp))
        for b in exact.params.blocks
    )))  # fmt: skip
    assert (es.quantize_weights(zero).params.blocks[0].mlp[0].w_down == 0).all()


LAYOUTS = [
    ((4, 2), GROUPS, "grouped"),
    ((1, 8), 1, "tensor"),
]


@pytest.mark.parametrize(("mesh_shape", "group_size", "layout"), LAYOUTS, ids=str)
def test_it_is_the_same_on_every_mesh(mesh_shape, group_size, layout):
    """Of 32 MLP columns a device holds 4, so that a group of 16 lies on four of them."""
    want = layers(es.quantize_weights(model((1, 1)), bits=4, group_size=16))
    exact = model(mesh_shape, group_size=group_size, layout=layout)
    rounded = es.quantize_weights(exact, bits=4, group_size=16)
    for layer, expected in zip(layers(rounded), want, strict=True):
        for name, w in expected.items():
            np.testing.assert_allclose(layer[name], w, rtol=0, atol=1e-12, err_msg=name)
    shardings = [jax.tree.map(lambda x: x.sharding, m.params) for m in (rounded, exact)]
    assert shardings[0] == shardings[1]


def test_only_scales_travel():
    """Of an [F, D] matrix over eight devices: one maximum of each group and output."""
    w = model((1, 8)).params.blocks[0].mlp[0].w_down
    program = quantize._run.lower(w, -2, 4, 16, w.sharding).compile().as_text()
    moved = re.findall(r"= (.*?) (?:all-\w+|collective-\w+|reduce-scatter)(?:-start)?\(", program)
    assert len(moved) == 1 and moved[0].startswith("f64[2,24]")


def test_a_rounded_model_says_much_the_same():
    exact = model((1, 1))
    text = [[5, 9, 33, 2, 60, 14]]
    rounded = [es.quantize_weights(exact, bits=bits, group_size=8) for bits in (8, 4)]
    scores = [all_logits(m, text) for m in (exact, *rounded)]
    fine, coarse = (float(abs(x - scores[0]).max()) for x in scores[1:])
    assert 0 < 4 * fine < coarse < 0.5 * float(abs(scores[0]).max())


def test_refusals():
    with pytest.raises(ValueError, match="bits must be 4 or 8, got 3"):
        es.quantize_weights(model((1, 1)), bits=3)
    with pytest.raises(ValueError, match="group_size must be a whole number above 0, got 0"):
        es.quantize_weights(model((1, 1)), group_size=0)

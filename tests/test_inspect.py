"""The modules behind the notebooks: layers looked into, distributions enumerated."""

from __future__ import annotations

import functools
import importlib
import itertools
import json
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import easyspec_jax as es
from easyspec_jax.layer_parallel import PARALLEL, run_fuzzy, run_whole_layers
from easyspec_jax.model import Step, rotate
from easyspec_jax.sharding import zeros
from easyspec_jax.tuner import stale_passes

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "experiments"))  # scripts, no package
inspect_layers = importlib.import_module("inspect_layers")
lossless = importlib.import_module("lossless")

TINY = es.ModelConfig(
    vocab_size=6, embed_dim=8, mlp_dim=12, num_layers=3, num_heads=2, num_kv_heads=1, head_dim=4,
    max_len=32,
)  # fmt: skip
GROUPED = es.ModelConfig(
    vocab_size=61, embed_dim=24, mlp_dim=32, num_layers=5, num_heads=8, num_kv_heads=4, head_dim=6,
    max_len=96, family="qwen3", qk_norm=True, qkv_bias=True,
)  # fmt: skip
PARTITION = (1, 3, 1)


@pytest.fixture(scope="module")
def exact():
    """A model with every option of attention, a text of it, and an exact pass over that."""
    model = es.random_model(GROUPED, es.make_mesh(1, 1), dtype="float64")
    text = stale_passes.write_texts(model, [[5, 6, 7]], 9)[0]
    return model, text, inspect_layers.exact_pass(model, text)


@functools.cache
def tiny_model():
    return es.random_model(TINY, es.make_mesh(1, 1), dtype="float64")


@functools.cache
def grouped_model():
    return es.random_model(GROUPED, es.make_mesh(1, 1), group_size=PARTITION, dtype="float64")


@functools.partial(jax.jit, static_argnames="run_block")
def run(model, tokens, cache, run_block):
    """Hidden states and cache of the library's own forward."""
    return es.model.forward(model, jnp.asarray(tokens, jnp.int32), cache, run_block=run_block)


def empty_cache(model, size=32):
    return zeros(model.abstract_cache(1, size))


def last_log_probs(model, hidden):
    scores = np.asarray(es.model.logits(model, hidden)[0, -1], np.float64)
    return scores - np.log(np.exp(scores).sum())


def test_texts_are_prompts_with_greedy_answers():
    model = tiny_model()
    prompts = [[1, 2, 3], [4]]
    answers = es.Decoder(model).generate(prompts, max_new_tokens=4).tokens
    texts = stale_passes.write_texts(model, prompts, 4)
    assert [text.tokens.shape for text in texts] == [(1, 7)] * 2
    assert texts[0].tokens[0].tolist() == prompts[0] + answers[0]
    assert texts[1].tokens[0].tolist() == [4, *answers[1], 0, 0]
    assert [text.tokens[0, text.counted].tolist() for text in texts] == answers


@pytest.mark.slow
def test_a_regrouped_model_is_the_one_loaded_in_groups(exact):
    model = stale_passes.regroup(exact[0], PARTITION)
    want = grouped_model()
    assert model.partition == want.partition
    got, _ = run(model, exact[1].tokens, empty_cache(model), run_fuzzy)
    np.testing.assert_array_equal(got, run(want, exact[1].tokens, empty_cache(want), run_fuzzy)[0])
    with pytest.raises(ValueError, match="regroup needs layers that share their devices"):
        stale_passes.regroup(es.abstract_model(TINY, es.make_mesh(8, 1), layout="grouped"), 2)


@pytest.mark.slow
def test_an_exact_pass_records_what_each_layer_reads_and_makes(exact):
    """By the library's arithmetic: the recorded states give the keys that its cache holds."""
    model, text, seen = exact
    t = text.tokens.shape[1]
    assert seen.states.shape == (6, t, 24)
    angles = np.arange(t)[:, None] * es.model.rope_frequencies(GROUPED)[None]
    angles = jnp.asarray(angles[None, :, None, None])
    step = Step(start=None, cos=jnp.cos(angles), sin=jnp.sin(angles), mask=None)
    for layer, (kv,) in enumerate(seen.cache.blocks):
        _, keys = inspect_layers.queries_and_keys(model, layer, seen.states[layer])
        turned = rotate(jnp.asarray(keys[None, :, :, None], jnp.float64), step)[0, :, :, 0]
        np.testing.assert_allclose(turned.swapaxes(0, 1), kv.k[:, :t], atol=1e-5)
    hidden, _ = run(model, text.tokens, empty_cache(model), es.model.run_layer)
    np.testing.assert_allclose(seen.log_probs[-1], last_log_probs(model, hidden), atol=1e-5)
    queries, _ = inspect_layers.queries_and_keys(model, 0, seen.states[0])
    assert queries.shape == (t, 8, 6)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("parallel", "run_block"), [("attention", run_fuzzy), ("layer", run_whole_layers)]
)
def test_a_calibrated_pass_is_one_fuzzy_token_behind_an_exact_text(exact, parallel, run_block):
    _, text, seen = exact
    model = grouped_model()
    fuzzy = inspect_layers.fuzzy_pass(model, text, parallel, seen.cache, calibrate=True)
    _, cache = run(model, text.tokens[:, :7], empty_cache(model), es.layer_parallel.run_exact)
    hidden, _ = run(model, text.tokens[:, 7:8], cache, run_block)
    np.testing.assert_allclose(fuzzy.log_probs[7], last_log_probs(model, hidden), atol=1e-5)
    assert np.abs(fuzzy.log_probs - seen.log_probs).max() > 1e-2


@pytest.mark.slow
def test_a_pass_that_is_not_calibrated_has_an_exact_prompt_alone(exact):
    _, text, seen = exact
    model = grouped_model()
    fuzzy = inspect_layers.fuzzy_pass(model, text, "attention", seen.cache, calibrate=False)
    start, end = text.start, text.end
    _, cache = run(model, text.tokens[:, :start], empty_cache(model), es.layer_parallel.run_exact)
    hidden, _ = run(model, text.tokens[:, start:end], cache, run_fuzzy)
    np.testing.assert_allclose(fuzzy.log_probs[end - 1], last_log_probs(model, hidden), atol=1e-5)
    calibrated = inspect_layers.fuzzy_pass(model, text, "attention", seen.cache, calibrate=True)
    np.testing.assert_allclose(fuzzy.log_probs[start], calibrated.log_probs[start], atol=1e-6)
    assert np.abs(fuzzy.log_probs[end - 1] - calibrated.log_probs[end - 1]).max() > 1e-3


@pytest.mark.slow
def test_states_inside_a_group_are_those_of_shorter_groups(exact):
    """Behind two of three layers stands what a group of the first two gives."""
    model, text, seen = exact
    whole = inspect_layers.fuzzy_pass(grouped_model(), text, "layer", seen.cache, calibrate=True)
    shorter = stale_passes.regroup(model, (1, 2, 1, 1))
    part = inspect_layers.fuzzy_pass(shorter, text, "layer", seen.cache, calibrate=True)
    np.testing.assert_allclose(whole.states[:4], part.states[:4], atol=1e-6)
    np.testing.assert_allclose(whole.states[:3], seen.states[:3], atol=1e-6)  # first of the group
    assert np.abs(whole.states[4] - part.states[4]).max() > 1e-2


def test_distributions_are_compared_by_hand():
    p, q = (
        np.log([[0.5, 0.25, 0.25], [0.1, 0.8, 0.1]]),
        np.log([[0.25, 0.5, 0.25], [0.1, 0.8, 0.1]]),
    )
    found = inspect_layers.compare_distributions(p, q)
    assert found["kl"] == pytest.approx(0.25 * np.log(2) / 2)
    assert found["argmax_agreement"] == 0.5 and found["overlap"] == pytest.approx(0.875)


@pytest.mark.slow
def test_what_is_measured_is_nothing_for_groups_of_one_and_grows():
    model = tiny_model()
    texts = stale_passes.write_texts(model, [[1, 2, 3], [4]], 6)
    found = inspect_layers.measure(model, texts, [1, 3])
    assert (found["texts"], found["positions"]) == (2, 12) and set(found["stale"]) == {"1", "2"}
    assert [len(found["stale"]["1"][part]) for part in ("hidden", "queries", "keys")] == [2] * 3
    assert json.loads(json.dumps(found)) == found
    one, three = found["groups"][:6], found["groups"][6:]
    assert [(g["parallel"], g["calibrate"]) for g in one] == list(
        itertools.product(PARALLEL, (True, False))
    )
    assert all(abs(g["kl"]) < 1e-6 and g["argmax_agreement"] == 1 for g in one)
    np.testing.assert_allclose([g["hidden"] for g in one], 1, atol=1e-5)
    assert len(three) == 6 and all(g["partition"] == [1, 1, 1] for g in three)


def test_sequences_are_enumerated_by_the_chain_rule():
    base = tiny_model()
    s = es.Sampling(temperature=0.7)
    one = lossless.enumerate_sequences(base, [3, 1], s, 1)
    two = lossless.enumerate_sequences(base, [3, 1], s, 2)
    assert len(two) == 36 and sum(two.values()) == pytest.approx(1)
    behind = lossless.enumerate_sequences(base, [3, 1, 4], s, 1)
    for token in range(6):
        assert two[4, token] == pytest.approx(one[4,] * behind[token,])
    scores = lossless.all_logits(base, [[3, 1]])[0, -1]
    p = np.exp(scores / 0.7) / np.exp(scores / 0.7).sum()
    np.testing.assert_allclose([one[token,] for token in range(6)], p, rtol=1e-5)


def test_total_variation_by_hand():
    table = {(0,): 0.5, (1,): 0.25, (2,): 0.25}
    assert lossless.total_variation([[0], [0], [1], [2]], table) == 0
    assert lossless.total_variation([[0], [0], [0], [3]], table) == 0.5
    few, many = lossless.honest_variation(table, [4, 4000])
    assert 0.1 < few < 0.5 and many < 0.03


def test_a_divergence_has_the_gap_that_decided_it():
    base = tiny_model()
    prompts = [[1, 2], [3]]
    expected = es.Decoder(base).generate(prompts, max_new_tokens=5).tokens
    other = [list(row) for row in expected]
    other[1][3] = (other[1][3] + 1) % 6
    (found,) = lossless.divergences(base, prompts, expected, other)
    assert (found.row, found.at) == (1, 3)
    scores = np.sort(lossless.all_logits(base, [[3, *expected[1][:3]]])[0, -1])
    assert found.gap == pytest.approx(scores[-1] - scores[-2]) and found.gap > 0
    assert lossless.divergences(base, prompts, expected, expected) == []

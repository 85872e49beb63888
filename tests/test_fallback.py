"""A drafter and its fallback: each row takes the chain of one of them, and the text stays the
base's.
"""

import dataclasses
import functools

import numpy as np
import pytest
from decoders import GROUPS, NEW, PROMPTS, autoregressive, model, started, surprise
from mutation import mutate
from test_decode import committed, entries_apart
from test_distribution import FILTERED, PAIR, PLAIN, TINY, tiny_table
from test_verify import DEPTH, ends, outcomes

import easyspec_jax as es
from easyspec_jax.drafters import fallback

slow = pytest.mark.slow
REPEATS = [4, 9, 17, 4, 9, 33, 4, 9]


@functools.cache
def falling_back(mesh_shape=(1, 1), gamma=3):
    draft = model(mesh_shape, group_size=GROUPS, layout="grouped")
    lookup = es.PromptLookupDrafter(min_ngram=2)
    drafter = es.FallbackDrafter(lookup, es.LayerParallelDrafter(draft))
    return es.Decoder(model(mesh_shape), drafter, num_draft_tokens=gamma)


@pytest.mark.parametrize("mesh_shape", [(1, 1), pytest.param((4, 2), marks=slow)])
def test_rows_take_different_drafters_and_the_text_is_autoregressions(mesh_shape):
    prompts = [REPEATS, *PROMPTS, [5, 6] * 6]
    out = falling_back(mesh_shape).generate(prompts, max_new_tokens=NEW)
    assert out.tokens == autoregressive().generate(prompts, max_new_tokens=NEW).tokens
    report = out.drafter_report
    assert report["first_steps"] + report["second_steps"] == out.stats.steps
    assert report["first_steps"] > 0 and report["second_accepted"] > 0
    both = report["first_accepted"] + report["second_accepted"]
    assert both >= out.stats.nodes_accepted > both - len(prompts) * 3  # but for what a stop cut


@slow
def test_the_draft_model_absorbs_what_it_was_not_asked_for():
    """After steps of either kind its cache is that of a fresh prefill."""
    run = started(falling_back(), [[3, 8, 1, 30] * 4, REPEATS])
    for _ in range(5):
        run.step()
    steps = falling_back().drafter.report(run.state.draft)
    assert steps["first_steps"] > 0 and steps["second_steps"] > 0
    fresh, absorbed = started(run.decoder, committed(run)), np.asarray(run.state.absorbed)
    mine, other = run.state.draft.second, fresh.state.draft.second
    np.testing.assert_array_equal(mine.length, absorbed)
    assert entries_apart(mine, other, absorbed) < 1e-9


def test_a_chosen_token_is_a_drawn_one_of_which_q_is_certain():
    """Every token of a chain is accepted with its p, and the rest of p is left of it."""
    rng, rows = np.random.default_rng(0), 64
    p = rng.dirichlet(np.ones(5), (rows, DEPTH + 1))
    tokens = rng.integers(0, 5, (rows, DEPTH)).astype(np.int32)
    certain = tokens[..., None] == np.arange(5)
    drawn = es.Proposal(
        tokens=tokens,
        parents=np.broadcast_to(np.arange(-1, DEPTH - 1, dtype=np.int32), tokens.shape),
        valid=np.ones(tokens.shape, bool),
        probs=certain.astype(float),
        depth=DEPTH,
    )
    thresholds, left = outcomes(p, drawn)
    reached = ends(thresholds)[:, ::-1].cumsum(axis=1)[:, ::-1]
    p_x = np.take_along_axis(p[:, :DEPTH], tokens[..., None], axis=-1)[..., 0]
    np.testing.assert_allclose(reached[:, 1:], p_x.cumprod(axis=1), rtol=0, atol=1e-9)
    rest = np.where(certain, 0.0, p[:, :DEPTH])
    share = lambda x: x / x.sum(axis=-1, keepdims=True)  # noqa: E731
    np.testing.assert_allclose(share(left[:, :DEPTH]), share(rest), rtol=0, atol=1e-9)


@slow
def test_greedy_text_is_autoregressions_with_a_chain_of_models_behind():
    middle, draft = model((1, 1), seed=3), model((1, 1), group_size=GROUPS)
    lookup, layers = es.PromptLookupDrafter(min_ngram=2), es.LayerParallelDrafter(draft)
    drafter = es.FallbackDrafter(lookup, es.PolybasicDrafter(middle, layers, mu=3))
    decoder = es.Decoder(model((1, 1)), drafter, num_draft_tokens=5)
    prompts = [REPEATS, *PROMPTS, [5, 6] * 6]
    out = decoder.generate(prompts, max_new_tokens=NEW)
    assert out.tokens == autoregressive().generate(prompts, max_new_tokens=NEW).tokens
    assert out.stats.nodes_accepted > 0


@functools.cache
def tiny_fallback(label="llama"):
    """`label` changes nothing but the key of jit's cache."""
    config = dataclasses.replace(TINY, family=label)
    base = model((1, 1), config=config, seed=1, dtype="float32")
    draft = model((1, 1), config=config, seed=2, group_size=PAIR, dtype="float32")
    drafter = es.FallbackDrafter(
        es.PromptLookupDrafter(min_ngram=2), es.LayerParallelDrafter(draft)
    )
    return es.Decoder(base, drafter, num_draft_tokens=2)


def fallback_surprise(decoder, s, rows=2048):
    """Behind this prompt rows go on differently, so that either drafts for some."""
    prompt = (3, 1, 2, 0, 3, 1)
    out = decoder.generate(np.tile([prompt], (rows, 1)), max_new_tokens=3, sampling=s, seed=5)
    return surprise(map(tuple, out.tokens), tiny_table(s, prompt)), out.drafter_report


@slow
def test_sampled_sequences_follow_the_base():
    found, report = fallback_surprise(tiny_fallback(), FILTERED)
    assert found < 5
    assert min(report["first_accepted"], report["second_accepted"]) > 200


@slow
def test_a_certain_q_that_is_not_is_noticed(monkeypatch):
    decoder = tiny_fallback("half certain")
    mutate(monkeypatch, fallback, "_of_either", "(jnp.float32) if", "(jnp.float32) * 0.5 if")
    assert fallback_surprise(decoder, PLAIN)[0] > 5


def test_what_cannot_be_is_refused_in_a_sentence():
    base = model((1, 1))
    lookup, early = es.PromptLookupDrafter(), es.EarlyExitDrafter(base)
    for first, second, options, words in (
        (lookup, None, {}, "a fallback needs two drafters, .* got None"),
        (lookup, 3, {}, "a fallback needs two drafters, .* got int"),
        (lookup, early, {}, "EarlyExitDrafter drafts in the base's own cache, .* use it alone"),
        (early, lookup, {}, "EarlyExitDrafter drafts in the base's own cache, .* use it alone"),
        (lookup, lookup, {"tree_width": 2}, "drafts chains: tree_width must be 1, got 2"),
    ):
        with pytest.raises(ValueError, match=words):
            es.Decoder(base, es.FallbackDrafter(first, second), **options)
    middle = es.PolybasicDrafter(base, lookup, mu=8)
    with pytest.raises(ValueError, match="num_draft_tokens must be above mu=8, got 4"):
        es.Decoder(base, es.FallbackDrafter(lookup, middle), num_draft_tokens=4)
    assert es.Decoder(base, es.FallbackDrafter(lookup, middle)).num_draft_tokens == 13

"""A chain of three models: lossless at both stages, and its caches and counters are right."""

import collections
import dataclasses
import functools

import jax
import numpy as np
import pytest
from decoders import (
    CONFIG,
    PROMPTS,
    SMALL,
    compilations,
    entries,
    fresh_cache,
    model,
    started,
    surprise,
)
from test_distribution import FILTERED, PLAIN, TINY, enumerate_sequences

import easyspec_jax as es
from easyspec_jax.drafters import polybasic

slow = pytest.mark.slow
NEW = 20
BASE = dataclasses.replace(CONFIG, num_layers=3)
STRANGER = dataclasses.replace(SMALL, num_layers=2)  # of a larger vocabulary, with a tied head


class OwnVerification(es.LayerParallelDrafter):
    """A drafter that may use its base's cache: the middle has to keep that whole."""

    @property
    def shares_base_cache(self):
        return True


def middle_model(name, mesh_shape=(1, 1)):
    if name == "base":
        return model(mesh_shape, config=BASE)
    return model(mesh_shape, seed=7, config=STRANGER)


@functools.cache
def chain(middle="stranger", inner="self", mesh_shape=(1, 1), *, gamma=6, mu=3, **options):
    own = model(mesh_shape, group_size=(1, 2), config=BASE)
    stranger = model(mesh_shape, group_size=2, seed=8, config=STRANGER)
    drafter = {
        "self": es.LayerParallelDrafter(own),
        "stranger": es.LayerParallelDrafter(stranger, calibrate=False),
        "own verification": OwnVerification(own),
        "chain": es.PolybasicDrafter(
            middle_model("stranger", mesh_shape), es.LayerParallelDrafter(own), mu=1
        ),
    }[inner]
    drafter = es.PolybasicDrafter(middle_model(middle, mesh_shape), drafter, mu=mu)
    base = model(mesh_shape, config=BASE)
    return es.Decoder(base, drafter, num_draft_tokens=gamma, **options)


@functools.cache
def plain():
    return es.Decoder(model((1, 1), config=BASE))


# I1: greedy tokens are those of greedy autoregression; float64 makes this exact.


@pytest.mark.parametrize(
    ("middle", "inner", "mesh_shape", "options"),
    [
        ("base", "own verification", (1, 1), {"gamma": 4, "mu": 2}),
        pytest.param("stranger", "chain", (1, 1), {"gamma": 6, "mu": 3}, marks=slow),
        pytest.param(
            "stranger", "self", (1, 1), {"min_draft_probability": 0.1, "gamma": 8}, marks=slow
        ),
    ],
)
def test_greedy_equals_autoregression_for_every_chain(middle, inner, mesh_shape, options):
    want = plain().generate(PROMPTS, max_new_tokens=NEW).tokens
    out = chain(middle, inner, mesh_shape, **options).generate(PROMPTS, max_new_tokens=NEW)
    assert out.tokens == want
    assert out.drafter_report["buffered_tokens"] == out.stats.nodes_drafted
    if middle == "base":
        assert sum(out.stats.tried_per_depth) == out.stats.nodes_accepted


@slow
def test_the_base_as_its_own_middle_accepts_every_buffer_and_counters_add_up():
    out = chain("base").generate(PROMPTS, max_new_tokens=NEW)
    stats, report = out.stats, out.drafter_report
    assert sum(stats.tried_per_depth) == stats.nodes_accepted  # no token was rejected
    assert report["buffered_tokens"] == stats.nodes_drafted >= 3 * stats.steps
    passes, histogram = report["inner_drafts"], report["middle_accepted_histogram"]
    assert report["middle_passes"] == passes == sum(histogram)  # none only to catch up
    accepted = sum(n * count for n, count in enumerate(histogram))
    assert report["buffered_tokens"] == accepted + passes
    assert report["tokens_per_middle_pass"] == report["buffered_tokens"] / passes
    assert report["inner_draft_tokens"] == 3 * passes
    assert 0 < report["inner_catch_up_passes"] < stats.steps
    # 4 to 6 tokens of the middle's and the base's own; the last step of each row is cut.
    assert stats.steps <= 3 * -(-NEW // 4)


def test_a_drafter_that_uses_the_middles_cache_finds_it_whole():
    out = chain("base", "own verification", gamma=4, mu=2).generate(PROMPTS, max_new_tokens=NEW)
    report = out.drafter_report
    assert report["middle_catch_up_passes"] == out.stats.steps - len(PROMPTS)  # all but the first
    assert report["middle_passes"] == report["inner_drafts"] + report["middle_catch_up_passes"]


# The middle's cache, and what a waiting row keeps.


def check_middle_cache(decoder, state):
    """The middle's cache is that of a fresh prefill of its tokens, the committed ones first."""
    stage, middle = state.draft.stage, decoder.drafter.middle
    batch, size = stage.tokens.shape
    _, want = jax.jit(es.model.forward)(middle, stage.tokens, fresh_cache(middle, batch, size))
    for got, expected in zip(entries(stage.cache), entries(want), strict=True):
        rows = (x.reshape(-1, batch, *x.shape[1:]).swapaxes(0, 1) for x in (got, expected))
        for row, fresh, length in zip(*rows, stage.cache.length.tolist(), strict=True):
            np.testing.assert_allclose(row[:, :length], fresh[:, :length], rtol=0, atol=1e-10)


def test_the_middles_cache_is_that_of_a_fresh_prefill():
    """One that is not whole has a base reject what it wrote as its own middle."""
    decoder = chain("stranger")
    run = started(decoder, [[*range(9)]], NEW)
    for _ in range(4):
        before = np.asarray(run.state.tokens[0]), int(run.state.length[0])
        run.step()
        stage, length = run.state.draft.stage, before[1]
        assert stage.tokens[0, :length].tolist() == before[0][:length].tolist()
        assert 3 <= int(stage.length[0]) - length <= 6
        check_middle_cache(decoder, run.state)


# I4: both stages keep the distribution that they are to keep.


@functools.cache
def tiny_chain(label="llama", gamma=4, mu=2):
    """`label` changes nothing but the key of jit's cache."""
    config = dataclasses.replace(TINY, family=label, num_layers=2)
    base, middle, draft = (
        model((1, 1), config=config, seed=seed, dtype="float32") for seed in (1, 3, 2)
    )
    drafter = es.PolybasicDrafter(middle, es.LayerParallelDrafter(draft), mu=mu)
    return es.Decoder(base, drafter, num_draft_tokens=gamma)


ROWS = np.tile([[3, 1]], (2048, 1))


def chain_surprise(decoder, s):
    out = decoder.generate(ROWS, max_new_tokens=3, sampling=s, seed=5)
    return surprise(map(tuple, out.tokens), enumerate_sequences(decoder.base, [3, 1], s))


@slow
def test_sampled_sequences_follow_the_base():
    """And end with a stop id, behind which the middle drafts nothing, and which the base may reject
    to go on.
    """
    decoder, stop = tiny_chain(), 2
    table = collections.Counter()
    for text, p in enumerate_sequences(decoder.base, [3, 1], FILTERED).items():
        table[text[: text.index(stop) + 1] if stop in text else text] += p
    out = decoder.generate(ROWS, max_new_tokens=3, sampling=FILTERED, eos_ids=[stop], seed=5)
    assert surprise(map(tuple, out.tokens), table) < 5
    assert any(row[-1] == stop and len(row) < 3 for row in out.tokens)


@slow
def test_a_wrong_q_is_noticed(monkeypatch):
    right = polybasic.probabilities
    monkeypatch.setattr(polybasic, "probabilities", lambda scores, f: right(scores / 2, f))
    assert chain_surprise(tiny_chain("another q"), FILTERED) > 5


@slow
def test_the_buffer_follows_the_middle():
    decoder = tiny_chain()
    run = started(decoder, ROWS, 3, PLAIN)
    run.step()
    buffers = np.asarray(run.state.draft.stage.tokens)[:, 2:4].tolist()
    models = decoder.drafter.middle, decoder.base
    of_middle, of_base = (enumerate_sequences(m, [3, 1], PLAIN, length=2) for m in models)
    assert surprise(map(tuple, buffers), of_middle) < 5 < surprise(map(tuple, buffers), of_base)


# Refusals, memory, time.


def test_what_cannot_be_is_refused_in_a_sentence():
    base, stranger = model((1, 1), config=BASE), middle_model("stranger")
    inner = es.LayerParallelDrafter(stranger)
    for mu in (0, 2.5, True, "8"):
        with pytest.raises(ValueError, match="mu must be a whole number above 0"):
            es.PolybasicDrafter(base, inner, mu=mu)
    drafter = es.PolybasicDrafter(stranger, inner)
    with pytest.raises(ValueError, match=r"must be above mu=8, got 8: choose mu plus .* 13 say"):
        es.Decoder(base, drafter, num_draft_tokens=8)
    with pytest.raises(ValueError, match="tree_width must be 1, got 2"):
        es.Decoder(base, drafter, num_draft_tokens=12, tree_width=2)
    grouped = model((1, 1), group_size=(1, 2), config=BASE)
    with pytest.raises(ValueError, match=r"middle model runs layer after layer.*group_size=1"):
        es.Decoder(base, es.PolybasicDrafter(grouped, inner), num_draft_tokens=12)
    with pytest.raises(ValueError, match=r"needs a drafter, .* got Model"):
        es.Decoder(base, es.PolybasicDrafter(stranger, stranger), num_draft_tokens=12)
    with pytest.raises(ValueError, match=r"inner drafter, with .* = 4 levels: .* above mu=8"):
        es.Decoder(base, es.PolybasicDrafter(base, drafter), num_draft_tokens=12)
    elsewhere = es.PolybasicDrafter(middle_model("stranger", (1, 8)), inner)
    with pytest.raises(ValueError, match="different meshes"):
        es.Decoder(base, elsewhere, num_draft_tokens=12)


def test_its_memory_counts_both_caches_and_shared_weights_once():
    decoder = chain("base")
    budget = decoder.memory(2, 8, max_new_tokens=NEW)
    draft = decoder.drafter.drafter.draft
    assert budget["draft weights"] in (0, sum(x.nbytes for x in jax.tree.leaves(draft.params)))
    assert budget["draft cache"] > 2 * budget["base cache"]
    middle = model((1, 1), seed=5, config=BASE)  # drafts for itself: twice in the drafter
    drafter = es.PolybasicDrafter(middle, es.EarlyExitDrafter(middle), mu=2)
    budget = es.Decoder(model((1, 1), config=BASE), drafter).memory(1, 8, max_new_tokens=NEW)
    assert budget["draft weights"] == sum(x.nbytes for x in jax.tree.leaves(middle.params))


@slow
@pytest.mark.parametrize("kind", ["early-exit", "prompt-lookup"])
def test_any_drafter_may_stand_below_a_middle_of_another_vocabulary(kind):
    """Greedy, the base's own text; and sampled, where q must cover the base's ids and no more."""
    config = dataclasses.replace(BASE, vocab_size=BASE.vocab_size + 3)
    base, middle = model((1, 1), config=BASE), model((1, 1), seed=5, config=config)
    inner = es.PromptLookupDrafter() if kind == "prompt-lookup" else es.EarlyExitDrafter(middle)
    drafter = es.PolybasicDrafter(middle, inner, mu=2)
    decoder = es.Decoder(base, drafter, num_draft_tokens=4)
    prompts = [PROMPTS[0]]
    want = plain().generate(prompts, max_new_tokens=9).tokens
    assert decoder.generate(prompts, max_new_tokens=9).tokens == want
    if kind == "early-exit":
        out = decoder.generate(prompts, max_new_tokens=9, sampling=es.Sampling(temperature=0.8))
        assert len(out.tokens[0]) == 9 and max(out.tokens[0]) < BASE.vocab_size


@slow
def test_requests_of_one_size_compile_once_and_the_state_is_donated():
    decoder = chain("base")  # compiled above
    decoder.generate(PROMPTS, max_new_tokens=NEW)
    compiled = compilations()
    decoder.generate([[5] * 12, [4], [9, 9]], max_new_tokens=NEW - 3)
    assert compilations() == compiled
    run = started(decoder, PROMPTS, NEW)
    state = run.state
    run.finish()
    assert all(x.is_deleted() for x in jax.tree.leaves(state.draft.stage.cache.blocks))
    assert state.draft.stage.tokens.is_deleted()

"""Tuned partitions: stale passes, the search over a table, the file, the command."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from decoders import CONFIG, PROMPTS, all_logits, fresh_cache, model

import easyspec_jax as es
from easyspec_jax.tuner import search, stale_passes, tune
from easyspec_jax.tuner.partitions import (
    cheapest_partitions,
    expected_tokens,
    fastest_partitions,
    interpolate,
    neighbours,
    uniform_partitions,
)

MODEL = functools.partial(model, layout="tensor", config=dataclasses.replace(CONFIG, num_layers=5))


def compositions(total, largest):
    """Every partition of `total` layers into blocks of at most `largest`."""
    if total == 0:
        return [()]
    return [
        (size, *rest)
        for size in range(1, min(total, largest) + 1)
        for rest in compositions(total - size, largest)
    ]


@functools.cache
def written():
    """A model, its text and the window of that."""
    m = MODEL((1, 1))
    text = stale_passes.write_texts(m, [PROMPTS[0]], 7)[0]
    return m, text, stale_passes.make_window(m, text, 9)


def stale(m, window, partition, recent=1):
    options = {"recent": recent, "vocab_size": m.config.vocab_size}
    found = search._log_probs(m, window, stale_passes.staleness(partition), **options)
    return np.asarray(found[0, : window.size])


@functools.partial(jax.jit, static_argnames="run_block")
def forward(m, tokens, cache, run_block):
    hidden, cache = es.model.forward(m, tokens, cache, run_block=run_block)
    return jax.nn.log_softmax(es.model.logits(m, hidden)[0, -1]), cache


def drafted(partition, text, recent):
    """Log-probabilities behind each token of an answer, by the library's own groups: the text
    before it exactly, then the last `recent` tokens one after another in parallel passes.
    """
    exact, fuzzy = es.layer_parallel.run_exact, es.layer_parallel.run_fuzzy
    m = stale_passes.regroup(MODEL((1, 1)), partition)
    rows = []
    for at in range(text.start - 1, text.end - 1):
        first = max(at - recent + 1, text.start - 1)
        cache = fresh_cache(m, 1, 64)
        _, cache = forward(m, jnp.asarray(text.tokens), cache, exact)
        cache = cache.rollback(jnp.array([first], jnp.int32))  # what lies behind is written again
        for place in range(first, at + 1):
            row, cache = forward(m, jnp.asarray(text.tokens[:, place : place + 1]), cache, fuzzy)
        rows.append(row)
    return np.asarray(rows)


def all_log_probs(m, text):
    """Of the ordinary model, behind each token that an answer's next one follows."""
    return jax.nn.log_softmax(all_logits(m, text.tokens)[0, text.start - 1 : text.end - 1])


@pytest.mark.parametrize(
    "partition",
    [(1, 3, 1), *(pytest.param(p, marks=pytest.mark.slow) for p in ((2, 3), (5,), (2, 1, 2)))],
)
def test_a_stale_pass_is_the_pass_of_the_grouped_model(partition):
    m, text, window = written()
    got, exact = stale(m, window, partition), stale(m, window, (1,) * 5)
    np.testing.assert_allclose(got, drafted(partition, text, 1), atol=1e-12)
    np.testing.assert_allclose(exact, all_log_probs(m, text), atol=1e-12)
    assert np.abs(got - exact).max() > 1e-2


def test_a_stale_pass_sees_recent_tokens_as_drafting_leaves_them():
    """Exact for one token; of more, the entries of the earlier ones were made seeing as many."""
    m, text, window = written()
    two, one = stale(m, window, (1, 3, 1), recent=2), stale(m, window, (1, 3, 1))
    want = drafted((1, 3, 1), text, 2)
    np.testing.assert_allclose(two[:2], want[:2], atol=1e-12)
    assert np.abs(two - want).mean() < np.abs(one - want).mean() / 2
    exact = (1,) * 5
    np.testing.assert_allclose(stale(m, window, exact, 4), stale(m, window, exact), atol=1e-12)


def test_a_stale_pass_on_several_devices_is_that_on_one():
    one, text, window = written()
    m = MODEL((2, 4))
    got = stale(m, stale_passes.make_window(m, text, 9), (1, 3, 1))
    np.testing.assert_allclose(got, stale(one, window, (1, 3, 1)), atol=1e-12)


def test_a_window_needs_a_model_without_groups():
    m, text, _ = written()
    with pytest.raises(ValueError, match="a window needs the exact model"):
        stale_passes.make_window(stale_passes.regroup(m, 2), text, 11)


def test_the_cheapest_partitions_are_those_of_brute_force():
    rng = np.random.default_rng(0)
    costs = rng.random((7, 4))
    every = {}
    for partition in compositions(7, 4):
        cost = sum(costs[j, s] for j, s in enumerate(stale_passes.staleness(partition)))
        every.setdefault(len(partition), []).append((cost, partition))
    found = cheapest_partitions(costs, 7, keep=3)
    assert found.keys() == every.keys() == set(range(2, 8))
    for num, ways in every.items():
        want = sorted(ways)[:3]
        assert [p for _, p in found[num]] == [p for _, p in want]
        np.testing.assert_allclose([c for c, _ in found[num]], [c for c, _ in want])
    assert cheapest_partitions(costs, 4)[4] == found[4][:1]
    assert max(cheapest_partitions(costs, 4)) == 4
    assert cheapest_partitions(costs, 1) == {}  # no block has 7 layers


def test_partitions_that_none_beats_in_cost_and_time():
    costs = np.array([[0, 9, 9], [0, 4, 9], [0, 1, 2], [0, 1, 3]], float)
    # each layer beyond two in a block takes another turn
    found = fastest_partitions(costs, 4, lambda p: sum(-(-size // 2) for size in p))
    # in 2, 3 and 4 turns; (1, 3), the cheapest of 2 blocks, takes 3 turns, as (1, 1, 2) does
    assert found == [(2, 2), (1, 1, 2), (1, 1, 1, 1)]
    assert fastest_partitions(costs, 2, len) == [(1, 3)]


def test_neighbours_and_uniform_partitions_by_hand():
    assert list(neighbours((1, 2, 3), 4)) == [(2, 1, 3), (1, 1, 4), (1, 3, 2)]
    assert list(neighbours((1, 2, 3), 3)) == [(2, 1, 3), (1, 3, 2)]
    assert uniform_partitions(8, 8, 8) == [
        (1,) * 8, (1, 2, 2, 2, 1), (1, 3, 3, 1), (1, 6, 1)
    ]  # fmt: skip
    assert uniform_partitions(8, 4, 3) == [(1, 3, 3, 1)]


def test_costs_between_measured_places_lie_on_lines():
    measured = {1: 2.0, 2: 3.0, 4: 7.0}
    np.testing.assert_allclose(interpolate(measured, 7), [0, 2, 3, 5, 7, 9, 11])
    np.testing.assert_allclose(interpolate({1: 2.0, 2: 1.0}, 5), [0, 2, 1, 0, 0])
    np.testing.assert_allclose(interpolate({}, 1), [0])


def test_expected_tokens_by_hand():
    a, b = np.full(9, 0.8), np.full(9, 0.5)
    assert expected_tokens(a, b, 3) == pytest.approx(1 + 0.8 * (1 + 0.5 + 0.25))
    assert expected_tokens(a, b, 1) == pytest.approx(1.8)
    first, later = np.array([1, 0, 1, 1]), np.array([0, 1, 1, 0])
    # from token 0: all three; from token 1: none
    assert expected_tokens(first, later, 3) == pytest.approx((4 + 1) / 2)
    assert expected_tokens(first[:2], later[:2], 3) == pytest.approx(
        3
    )  # cut, but there is no other


@functools.cache
def scorer(gamma=3):
    m = MODEL((1, 1))
    return search.make_scorer(m, m, stale_passes.write_texts(m, PROMPTS, 16), gamma)


@pytest.mark.slow
def test_scores_are_of_the_exact_model_and_fall_with_groups():
    s = scorer()
    assert s.exact_acceptance == 1.0
    divergence, acceptance, predicted = s.score((1,) * 5)
    assert divergence == pytest.approx(0, abs=1e-12)
    assert (acceptance, predicted) == (1.0, pytest.approx(4))
    divergence, acceptance, predicted = s.score((5,))
    assert divergence > 0.01 and acceptance < 1 and predicted < 4


def test_above_temperature_zero_acceptance_is_the_overlap():
    m, _, window = written()
    base = search._tempered(m, window, 0.7)
    s = search.Scorer(m, [window], 4, 0.7, [base], vocab_size=m.config.vocab_size)
    assert s.exact_acceptance == pytest.approx(1, abs=1e-6)
    p, q = stale(m, window, (1,) * 5), stale(m, window, (1, 3, 1), recent=2)
    p, q = (np.exp(x / 0.7) / np.exp(x / 0.7).sum(-1, keepdims=True) for x in (p, q))
    assert s.score((1, 3, 1))[1] == pytest.approx(np.minimum(p, q).sum(-1).mean(), abs=1e-6)


@pytest.mark.parametrize(
    ("more", "temperature"),
    [
        (3, 0.8),
        (-3, 0.0),
    ],
)
def test_vocabularies_may_be_padded_differently(temperature, more):
    """A draft with more columns than the base, or fewer, that no text needs, is as good as it."""
    base = MODEL((1, 1))
    head = base.params.lm_head
    if more > 0:
        large = base.replace(
            params=base.params.replace(lm_head=jnp.pad(head, ((0, 0), (0, more)))),
            config=dataclasses.replace(base.config, vocab_size=head.shape[1] + more),
        )
        base, draft = base, large
    else:
        head = jnp.pad(head, ((0, 0), (0, -more)))
        config = dataclasses.replace(base.config, vocab_size=head.shape[1])
        base, draft = base.replace(params=base.params.replace(lm_head=head), config=config), base
    texts = stale_passes.write_texts(base, PROMPTS[:1], 8)
    s = search.make_scorer(base, draft, texts, 3, temperature)
    divergence, acceptance, _ = s.score((1,) * 5)
    assert divergence == pytest.approx(0, abs=1e-12) and np.isfinite(s.score((1, 4))[0])
    if more > 0:
        assert acceptance == pytest.approx(1.0, abs=1e-6)
    else:  # the base gives its further ids what is left
        assert 0.7 < acceptance <= 1.0


@functools.cache
def sensitive(layer):
    """A model in which one layer's attention listens to the layer before it, and hardly any other
    layer does anything.
    """
    m = MODEL((1, 1))
    blocks = []
    for j, block in enumerate(m.params.blocks):
        gain = 8.0 if j == layer else 3.0 if j == layer - 1 else 0.05
        attention = block.attention[0].replace(wo=block.attention[0].wo * gain)
        mlp = block.mlp[0].replace(w_down=block.mlp[0].w_down * gain)
        blocks.append(block.replace(attention=(attention,), mlp=(mlp,)))
    return m.replace(params=m.params.replace(blocks=tuple(blocks)))


@pytest.mark.slow
def test_a_sensitive_layer_begins_a_block():
    layer = 2
    m = sensitive(layer)
    found = tune.tune(
        m, m, PROMPTS, attention_steps=2, num_draft_tokens=3, max_new_tokens=16, num_confirmed=1
    )
    assert found.sensitivity[1:, 1].argmax() == layer - 1
    assert found.partition == (layer, 5 - layer)
    best = found.candidates[0]
    assert best.identical == 3 and best.tokens_per_step > 2.5
    assert (found.num_prompts, found.num_tokens) == (3, 48)


@pytest.mark.slow
def test_uniform_partitions_are_decoded_with_too_and_text_is_autoregressions():
    m = MODEL((1, 1))
    found = tune.tune(
        m, m, PROMPTS, attention_steps=3, num_draft_tokens=3, max_new_tokens=16, num_confirmed=1
    )
    assert (1, 3, 1) in {c.partition for c in found.candidates}
    tokens = [c.tokens_per_step for c in found.candidates]
    assert tokens == sorted(tokens, reverse=True) and all(
        c.identical == 3 for c in found.candidates
    )
    drafter = es.LayerParallelDrafter(stale_passes.regroup(m, found.partition))
    out = es.Decoder(m, drafter, num_draft_tokens=3).generate(PROMPTS, max_new_tokens=16)
    assert out.tokens == es.Decoder(m).generate(PROMPTS, max_new_tokens=16).tokens
    assert out.stats.tokens_per_step == tokens[0]


@pytest.mark.slow
def test_several_devices_tune_as_one():
    found = [
        tune.tune(
            *(MODEL(shape),) * 2, PROMPTS, attention_steps=2, num_draft_tokens=3,
            max_new_tokens=16, num_confirmed=1,
        )
        for shape in ((1, 1), (2, 4))
    ]  # fmt: skip
    one, many = ([(c.partition, c.tokens_per_step) for c in f.candidates] for f in found)
    assert one == many and all(c.identical == 3 for f in found for c in f.candidates)
    one, many = (f.sensitivity for f in found)
    np.testing.assert_allclose(one, many, atol=1e-9)


@pytest.mark.slow
def test_tuning_above_temperature_zero():
    m, stranger = MODEL((1, 1)), MODEL((1, 1), seed=3)
    options = {"attention_steps": 2, "num_draft_tokens": 2, "max_new_tokens": 8, "num_confirmed": 1}
    found = tune.tune(m, m, PROMPTS, temperature=0.8, **options)
    assert found.exact_acceptance == pytest.approx(1)
    assert all(c.identical is None and c.tokens_per_step > 1 for c in found.candidates)
    found = tune.tune(m, stranger, PROMPTS, temperature=0.8, **options)
    assert 0 < found.exact_acceptance < 0.9


def test_with_a_time_for_steps_speed_decides():
    s, costs = scorer(), np.zeros((5, 5))
    free = search.search(s, costs, 5, step_seconds=lambda partition: 1.0)
    assert free[0].partition == (1,) * 5  # as many tokens as there can be
    dear = search.search(s, costs, 5, step_seconds=lambda partition: 10.0 ** len(partition))
    assert dear[0].partition == (5,) and dear[0].step_seconds == 10.0
    assert dear[0].speed == dear[0].predicted / 10
    assert fastest_partitions(costs + 1.0, 5, lambda p: max(p))[0] == (1,) * 5
    few = search.search(s, costs, 4)
    assert {len(c.partition) for c in few if c.kind != "uniform"} == {4}


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ((5, None, None, False), "needs attention_steps, or step_seconds"),
        ((5, 0, None, False), "attention_steps must be in 1 .. 5, the draft's layers, got 0"),
        ((5, 6, None, True), "attention_steps must be in 1 .. 5, the draft's layers, got 6"),
        ((5, 2, 0, False), "max_group_size must be a whole number above 0, got 0"),
        ((5, 2, 2, False), "cover 4 of the draft's 5 layers: allow 3 steps or larger groups"),
    ],
)
def test_impossible_options_are_one_sentence(options, sentence):
    with pytest.raises(ValueError) as error:
        tune.check_options(*options)
    assert sentence in str(error.value)


def test_groups_worth_looking_at():
    assert tune.check_options(30, 9, None, False) == (9, 12)
    assert tune.check_options(30, 9, 4, False) == (9, 4)
    assert tune.check_options(30, None, None, True) == (30, 12)
    assert tune.check_options(5, 1, None, False) == (1, 5)


@pytest.mark.parametrize(
    ("decoded", "tried"),
    [
        ({4: 4.0}, [4, 1]),  # as predicted: what promises less is not tried
        ({4: 2.9}, [4, 1, 3]),  # the first disappoints, the second is as promised
        ({4: 1.9, 3: 1.8}, [4, 1, 3, 2]),
        ({1: 2.5}, [4, 1, 3, 2]),  # predictions may be far too low
    ],
    ids=str,
)
def test_only_candidates_that_might_be_the_best_are_decoded_with(monkeypatch, decoded, tried):
    """Candidates of so many predicted tokens per step; decoding gives those, or as said."""

    def stand_in(base, draft, candidate, prompts, expected):
        seen.append(int(candidate.predicted))
        tokens = decoded.get(seen[-1], candidate.predicted)
        return dataclasses.replace(candidate, tokens_per_step=tokens)

    seen = []
    monkeypatch.setattr(tune, "confirm", stand_in)
    kinds = {4: "sum", 3: "moved", 2: "sum", 1: "uniform"}
    candidates = [search.Candidate((n,), kind, 0.0, 0.5, float(n)) for n, kind in kinds.items()]
    options = {"num_confirmed": 3}
    found = tune.confirm_best(None, None, candidates, [], None, **options)
    assert seen == tried
    assert found[0].tokens == max(c.tokens for c in found)

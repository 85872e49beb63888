"""Depths chosen step by step: what is learnt and chosen, and that the text stays the base's."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from decoders import (
    GROUPS,
    NEW,
    PROMPTS,
    autoregressive,
    compilations,
    joined,
    model,
    spy_on_prefills,
    started,
)
from test_decode import committed, entries_apart, new_tokens
from test_distribution import FILTERED, PAIR, TINY, many_rows, tiny_table
from test_drafters import REPETITIVE, WAYS

import easyspec_jax as es
from easyspec_jax import step_costs
from easyspec_jax.depth import (
    BELIEF,
    CATCHING_UP,
    DECAY,
    FIRST,
    HOPE,
    PROBING,
    SOONER,
    Pace,
    Pacing,
    usual_depths,
)

slow = pytest.mark.slow
ALIKE = es.AutoDepth(most=2, costs=(1, 1, 1))  # as deep as there is hope


def moody(drafter, gamma=2):
    """The same drafter, which now says before each step how deep it can draft: 0 to γ, by how much
    text there is.
    """

    def foresee(self, request, tokens, length):
        kind, _ = type(drafter).foresee(self, request, tokens, length)
        tokens = length.sum(dtype=length.dtype)
        return kind, jnp.broadcast_to((tokens * 7 + tokens // 5) % (gamma + 1), length.shape)

    kind = type(f"Moody{type(drafter).__name__}", (type(drafter),), {"foresee": foresee})
    return kind(**{f.name: getattr(drafter, f.name) for f in dataclasses.fields(drafter)})


def grouped(mesh_shape=(1, 1)):
    return es.LayerParallelDrafter(model(mesh_shape, group_size=GROUPS, layout="grouped"))


@functools.cache
def moving(mesh_shape=(1, 1), width=1):
    """The depth of every step is another one."""
    drafter = moody(grouped(mesh_shape))
    return es.Decoder(model(mesh_shape), drafter, num_draft_tokens=ALIKE, tree_width=width)


def plain_choice(tried, accepted, levels, costs, depths, waited):
    """What `Pace.choose` does, one row after the other, of kind 0."""
    tokens = np.zeros(len(depths))
    for row in range(len(tried)):
        share, path, total = accepted[row, 0] / tried[row, 0], 1.0, [1.0]
        for i in range(tried.shape[1]):
            if i:
                share = (accepted[row, i] + BELIEF * share) / (tried[row, i] + BELIEF)
            path *= share
            total.append(total[-1] + (path if i < levels[row] else 0.0))
        tokens += np.array(total)[list(depths)]
    best = int(np.argmax(tokens / costs))
    loss = costs[1] / costs[0] - tokens[1] / tokens[0]
    if best == 0 and waited * PROBING >= loss and levels.max() > 0:
        return 1
    return best


def test_the_choice_has_most_tokens_a_second():
    rng, seen = np.random.default_rng(0), set()
    depths = usual_depths(5)
    choose = jax.jit(lambda pace, pacing, *rest: pace.choose(pacing, *rest).choice)
    for _ in range(60):
        tried = rng.uniform(0.1, 10, (2, 1, 5)).astype(np.float32)
        accepted = tried * rng.uniform(0, 1, (2, 1, 1)).astype(np.float32)
        levels = rng.integers(0, 6, 2).astype(np.int32)
        costs = 1 + rng.uniform(0, 0.8) * np.array(depths, np.float32)
        waited = int(rng.integers(0, 60))
        pace = Pace.begin(2, 1, 5).replace(
            tried=tried, accepted=accepted, waited=np.full((2, 1), waited, np.int32)
        )
        row = np.zeros(2, np.int32), levels, np.ones(2, bool)
        got = int(
            choose(pace, Pacing(catch_up=np.float32(0), costs=costs[None], depths=depths), *row)
        )
        assert got == plain_choice(tried[:, 0], accepted[:, 0], levels, costs, depths, waited)
        seen.add(got)
    assert len(seen) >= 4


def test_rows_that_are_done_and_other_kinds_do_not_count():
    costs = np.array([[1, 1.1, 1.2], [1, 5, 9]], np.float32)
    pacing, pace = (
        Pacing(catch_up=np.float32(0), costs=costs, depths=(0, 1, 2)),
        Pace.begin(2, 2, 2),
    )
    cheap, dear = np.zeros(2, np.int32), np.array([0, 1], np.int32)
    all_levels, both = np.full(2, 2, np.int32), np.ones(2, bool)
    assert int(pace.choose(pacing, cheap, all_levels, both).choice) == 2
    assert int(pace.choose(pacing, dear, all_levels, both).choice) == 0  # a batch costs its dearest
    assert int(pace.choose(pacing, dear, all_levels, np.array([True, False])).choice) == 2
    assert int(pace.choose(pacing, cheap, all_levels, ~both).choice) == -1
    # A row that is done may find what it likes: nobody asks whether to draft it.
    first, waited = np.array([True, False]), pace.replace(waited=np.full((2, 2), 1000, np.int32))
    never = Pacing(
        catch_up=np.float32(0), costs=np.array([[1, 3, 5], [1, 5, 9]], np.float32), depths=(0, 1, 2)
    )
    assert int(waited.choose(never, cheap, np.array([2, 0], np.int32), first).choice) == 1
    assert int(waited.choose(never, cheap, np.array([0, 2], np.int32), first).choice) == 0
    # Nor where what was missed takes longer to absorb than asking may.
    behind = never.replace(catch_up=np.float32(1.1 * CATCHING_UP))
    assert int(waited.choose(behind, cheap, all_levels, first).choice) == 0


def test_what_a_step_teaches():
    pace = Pace.begin(3, 2, 4).replace(
        kind=np.array([0, 1, 0], np.int32), levels=np.array([4, 2, 4], np.int32)
    )
    pace = pace.learn(3, np.array([1, 2, 3], np.int32), np.array([True, True, False]))
    tried, accepted = np.zeros((3, 2, 4)), np.zeros((3, 2, 4))
    tried[:, :, 0], accepted[:, :, 0] = FIRST, FIRST * HOPE
    tried[0, 0] = [DECAY * FIRST + 1, 1, 0, 0]  # the second was rejected, a third never asked
    accepted[0, 0] = [DECAY * FIRST * HOPE + 1, 0, 0, 0]
    tried[1, 1] = [DECAY * FIRST + 1, 1, 0, 0]  # there were no more than two
    accepted[1, 1] = [DECAY * FIRST * HOPE + 1, 1, 0, 0]
    np.testing.assert_allclose(pace.tried, tried, rtol=1e-6)
    np.testing.assert_allclose(pace.accepted, accepted, rtol=1e-6)
    np.testing.assert_array_equal(pace.waited, [[SOONER, 0], [0, SOONER], [0, 0]])
    rejected = pace.learn(1, np.zeros(3, np.int32), np.ones(3, bool))
    assert float(rejected.tried[0, 0, 0]) == pytest.approx(DECAY * tried[0, 0, 0] + 1)
    assert float(rejected.accepted[0, 0, 0]) == pytest.approx(DECAY * accepted[0, 0, 0])
    np.testing.assert_array_equal(rejected.waited, [[0, 0], [0, 0], [0, 0]])
    again = pace.learn(0, np.zeros(3, np.int32), np.array([True, True, False]))
    np.testing.assert_array_equal(again.waited, [[SOONER + 1, 0], [0, SOONER + 1], [0, 0]])


@pytest.mark.parametrize(
    ("mesh_shape", "width"),
    [((1, 1), 1), pytest.param((4, 2), 2, marks=slow)],
)
def test_text_and_caches_are_exact_when_every_step_has_another_depth(mesh_shape, width):
    """A drafter that was left out absorbs what it missed."""
    run = started(moving(mesh_shape, width), [[1, 2, 3, 4, 5, 6, 7], [9, 8]])
    fresh, steps = started(run.decoder, committed(run)), []
    for _ in range(8):
        emission = run.step()
        steps.append(int(emission.depth))
        if steps[-1]:
            fresh = started(run.decoder, committed(run))
            absorbed = np.asarray(run.state.absorbed)
            np.testing.assert_array_equal(run.state.draft.length, absorbed)
            assert entries_apart(run.state.draft, fresh.state.draft, absorbed) < 1e-9
    want = autoregressive().generate([[1, 2, 3, 4, 5, 6, 7], [9, 8]], max_new_tokens=NEW).tokens
    for new, expected in zip(new_tokens(run), want, strict=True):
        assert len(new) > 8 and new == expected[: len(new)]
    assert {*steps} == {0, 1, 2}


@slow
@pytest.mark.parametrize("name", [*WAYS][1:])  # "fallback" is of lookup and an eagle
def test_every_drafter_may_be_left_out(name):
    way, base = WAYS[name], model((1, 1))
    gamma = 4 if name == "polybasic" else 2  # above mu
    alike = es.AutoDepth(most=gamma, costs=[1] * len(way.make(base).depths(gamma)))
    decoder = es.Decoder(base, moody(way.make(base), gamma), num_draft_tokens=alike)
    prompts = [REPETITIVE[0], PROMPTS[0]][: 1 + way.batches]
    out = decoder.generate(prompts, max_new_tokens=NEW)
    assert out.tokens == autoregressive().generate(prompts, max_new_tokens=NEW).tokens
    assert out.stats.nodes_drafted > 0
    depths = [i for i, n in enumerate(out.stats.steps_per_depth) if n]
    assert depths == [gamma] if name == "early-exit" else 0 in depths and len(depths) > 1


def test_costs_decide_and_stats_tell():
    """A draft that is the base is always right: what it costs is all that counts."""
    base, exact = model((1, 1)), es.LayerParallelDrafter(model((1, 1)))
    before = compilations()
    for costs, used in (((1, 1.1, 1.2), {2}), ((1, 9, 9), {0})):
        auto = es.AutoDepth(most=2, costs=costs)
        decoder = es.Decoder(base, exact, num_draft_tokens=auto)
        stats = decoder.generate(PROMPTS, max_new_tokens=NEW).stats
        assert {i for i, n in enumerate(stats.steps_per_depth) if n} == used
        assert sum(stats.steps_per_depth) == stats.steps
    assert compilations()[0] == before[0] + 1  # costs are no part of the program


def test_a_text_that_is_not_drafted_is_asked_again():
    pacing = Pacing(catch_up=np.float32(0), costs=np.array([[1, 1.3]], np.float32), depths=(0, 1))
    pace, drafted = Pace.begin(1, 1, 1), []
    one, levels = np.ones(1, bool), np.ones(1, np.int32)
    for step in range(240):
        pace = pace.choose(pacing, np.zeros(1, np.int32), levels, one)
        drafted.append(int(pace.choice))
        accepted = np.array([drafted[-1] if step >= 120 else 0], np.int32)
        pace = pace.learn(drafted[-1], accepted, one)
    assert sum(drafted[:120]) < 12  # from now on every draft would be accepted
    assert sum(drafted[180:]) > 50
    runs = [len([*group]) for choice, group in itertools.groupby(drafted[:120]) if not choice]
    assert 8 < runs[-2] <= 0.3 / PROBING + 1  # what a draft in vain may cost


@slow
def test_streams_and_sessions(monkeypatch):
    """A later turn absorbs what the drafter has not."""
    decoder, session = moving(), es.Session(max_len=90)
    prompt, starts = [1, 2, 3, 4, 5, 6, 7], spy_on_prefills(monkeypatch)
    first = joined(decoder.stream(prompt, max_new_tokens=NEW, session=session))
    stats = session.stats
    out = decoder.generate([prompt], max_new_tokens=NEW)
    assert first == out.tokens[0] and stats.rows == out.stats.rows
    longer = [*prompt, *first, 5, 9, 11]
    again = joined(decoder.stream(longer, max_new_tokens=NEW, session=session))
    assert len(prompt) < starts[-1] < len(longer)
    assert again == autoregressive().generate([longer], max_new_tokens=NEW).tokens[0]


@slow
def test_sampled_sequences_follow_the_base():
    """Whatever was drawn before decides how deep to draft."""
    from decoders import surprise

    base = model((1, 1), config=TINY, seed=1, dtype="float32")
    draft = model((1, 1), config=TINY, seed=2, group_size=PAIR, dtype="float32")
    auto = es.AutoDepth(most=2, costs=(1, 1.3, 1.6))
    decoder = es.Decoder(base, es.LayerParallelDrafter(draft), num_draft_tokens=auto)
    out = many_rows(decoder, FILTERED)
    assert surprise(map(tuple, out.tokens), tiny_table(FILTERED)) < 5
    other = es.Decoder(base, es.LayerParallelDrafter(draft), num_draft_tokens=auto)
    assert many_rows(other, FILTERED).tokens == out.tokens  # the same costs, the same draws


def test_one_reading_of_a_straying_clock_decides_nothing():
    true, calls = [10.0, 11.0, 14.0], []

    def take(number, steps, state):
        calls.append(number)
        return (0.5 + steps * true[number]) * (0.6 if len(calls) == 3 * 6 + 4 else 1.0), state + 1

    seconds, state = step_costs._in_turns(take, 3, 0)
    np.testing.assert_allclose(seconds, true)
    assert state == len(calls) >= 6 * (1 + step_costs.LEAST_ROUNDS)


@slow
def test_costs_are_measured_once_and_kept(tmp_path, monkeypatch):
    drafter = es.FallbackDrafter(es.PromptLookupDrafter(min_ngram=2), grouped())
    auto = es.AutoDepth(most=1)
    before = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", str(tmp_path))
    try:
        first = es.Decoder(model((1, 1)), drafter, num_draft_tokens=auto)
        want = first.generate([REPETITIVE[0]], max_new_tokens=NEW)
        costs = first.found_costs[1, True]
        seconds = costs.seconds
        assert seconds.shape == (2, 2) and (seconds > 0).all() and seconds[0, 0] == seconds[1, 0]
        assert (np.diff(seconds) >= 0).all() and costs.catch_up >= 0
        monkeypatch.setattr(step_costs, "measured", None)
        again = es.Decoder(model((1, 1)), drafter, num_draft_tokens=auto)
        assert again.generate([REPETITIVE[0]], max_new_tokens=NEW).tokens == want.tokens
        same = again.found_costs[1, True]
        np.testing.assert_array_equal(same.seconds, seconds)
        assert same.catch_up == costs.catch_up
        for file in tmp_path.glob("easyspec-step-costs-*"):
            file.write_text('{"seconds": [[1, 2]]}')
        other = es.Decoder(model((1, 1)), drafter, num_draft_tokens=auto)
        with pytest.raises(TypeError, match="NoneType"):  # what does not fit is measured again
            other.generate([REPETITIVE[0]], max_new_tokens=NEW)
    finally:
        jax.config.update("jax_compilation_cache_dir", before)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"most": 0}, "most must be"),
        ({"most": True}, "most must be"),
        ({"costs": 3}, "costs must be positive"),
        ({"costs": "abc"}, "costs must be positive"),
        ({"costs": (1, 0.0, 1, 1)}, "costs must be positive"),
        ({"costs": ()}, "costs must be positive"),
        ({"catch_up": -1.0}, "catch_up must be"),
        ({"most": 3, "costs": (1, 2)}, "4 numbers, one for each depth of 0, 1, 2, 3"),
        ({"most": 3, "costs": ((1, 2, 3, 4), (1, 2, 3))}, "costs must be 4 numbers"),
    ],
)
def test_bad_options_are_refused(options, says):
    with pytest.raises(ValueError, match=says):
        es.Decoder(model((1, 1)), grouped(), num_draft_tokens=es.AutoDepth(**options))


def test_a_word_that_is_not_auto_is_refused():
    with pytest.raises(ValueError, match="num_draft_tokens must be"):
        es.Decoder(model((1, 1)), grouped(), num_draft_tokens="automatic")

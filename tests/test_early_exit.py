"""Early exit: lossless, exact in its cache, and its choices are those of a plain reference."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from decoders import (
    CONFIG,
    GROUPS,
    NEW,
    PROMPTS,
    all_logits,
    autoregressive,
    compilations,
    entries,
    joined,
    model,
    started,
    surprise,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from mutation import mutate
from test_distribution import FILTERED, PLAIN, TINY, enumerate_sequences
from test_requests import cache_traffic

import easyspec_jax as es
from easyspec_jax import engine
from easyspec_jax.drafters import early_exit, exit_statistics
from easyspec_jax.request import make_inputs


@functools.cache
def exiting(mesh_shape=(1, 1), exits=(1, 2), gamma=7, adaptive=True):
    return early(model(mesh_shape), exits, gamma, adaptive)


def fading(scale=0.02):
    """As `exiting`, but all layers but the first change little."""
    return early(faded(model((1, 1)), 1, scale))


def early(base, exits=(1, 2), gamma=7, adaptive=True):
    drafter = es.EarlyExitDrafter(base, exits=exits, adaptive=adaptive)
    return es.Decoder(base, drafter, num_draft_tokens=gamma)


def faded(base, first, scale):
    """`base`, whose layers from `first` on add `scale` times what they did: as if it had been
    trained for early exit.
    """

    def fade(block):
        attention = tuple(w.replace(wo=w.wo * scale) for w in block.attention)
        return block.replace(
            attention=attention, mlp=tuple(w.replace(w_down=w.w_down * scale) for w in block.mlp)
        )

    blocks = base.params.blocks
    blocks = blocks[:first] + tuple(map(fade, blocks[first:]))
    return base.replace(params=base.params.replace(blocks=blocks))


# I1: greedy tokens are autoregression's.


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mesh_shape", "exits", "gamma", "adaptive"),
    [
        ((4, 2), (1, 2), 7, True),
        ((1, 1), (2,), 18, True),
    ],
)
def test_greedy_equals_autoregression_on_meshes(mesh_shape, exits, gamma, adaptive):
    decoder = exiting(mesh_shape, exits, gamma, adaptive)
    for prompt in PROMPTS:
        want = autoregressive().generate([prompt], max_new_tokens=NEW)
        got = decoder.generate([prompt], max_new_tokens=NEW)
        assert got.tokens == want.tokens
        if gamma == 7:  # what one device does, to the last count
            one = exiting().generate([prompt], max_new_tokens=NEW)
            assert got.stats == one.stats
            assert got.drafter_report["chosen"] == one.drafter_report["chosen"]


@pytest.mark.slow
@settings(max_examples=3, deadline=None)
@given(
    num_layers=st.integers(2, 4),
    data=st.data(),
    gamma=st.sampled_from([1, 2, 5, 7]),
    scale=st.sampled_from([0.02, 0.3, 1.0]),
    least=st.sampled_from([None, 0.1]),
    prompt=st.lists(st.integers(0, 60), min_size=1, max_size=9),
)
def test_greedy_equals_autoregression_for_random_models(
    num_layers, data, gamma, scale, least, prompt
):
    exits = data.draw(
        st.none() | st.sets(st.integers(1, num_layers - 1), min_size=1).map(sorted).map(tuple)
    )
    adaptive = exits is None or len(exits) > 1 or data.draw(st.booleans())
    config = dataclasses.replace(CONFIG, num_layers=num_layers)
    base = faded(model((1, 1), config=config), 1, scale)
    drafter = es.EarlyExitDrafter(base, exits=exits, adaptive=adaptive)
    decoder = es.Decoder(base, drafter, num_draft_tokens=gamma, min_draft_probability=least)
    want = es.Decoder(base).generate([prompt], max_new_tokens=NEW)
    assert decoder.generate([prompt], max_new_tokens=NEW).tokens == want.tokens


# I4: sampled sequences follow the base.


@functools.cache
def tiny_exiting(exits, adaptive):
    config = dataclasses.replace(TINY, num_layers=3)
    base = model((1, 1), config=config, seed=1, dtype="float32")
    drafter = es.EarlyExitDrafter(base, exits=exits, adaptive=adaptive)
    return es.Decoder(base, drafter, num_draft_tokens=2)


def sequence_surprise(decoder, s, rows=2048):
    """Of many runs of one row each, under keys of their own. Where the drafter chooses, it begins
    with statistics that make it draft on or stop by what it drew.
    """
    run = started(decoder, [[3, 1]], 3, s)
    state = run.state
    if decoder.drafter.adaptive:
        counts = {"matched": 8.0, "mismatched": 1.0}
        sums = {"matched_confidence": 8 * 0.45, "mismatched_confidence": 0.45}
        x = len(decoder.drafter.exits)
        statistics = {name: jnp.full((x,), v, jnp.float32) for name, v in (counts | sums).items()}
        statistics = exit_statistics.ExitStatistics(**statistics)
        draft = state.draft.replace(statistics=statistics, limit=jnp.int32(2))
        state = state.replace(draft=draft)

    @jax.jit
    @jax.vmap
    def three_steps(key):
        end = jax.lax.fori_loop(0, 3, lambda _, s: run.after(s, key), state)
        return end.tokens[0, 2:5], end.counters.drafted

    tokens, drafted = three_steps(jax.random.split(jax.random.key(5), rows))
    table = enumerate_sequences(decoder.base, [3, 1], s)
    return surprise(map(tuple, np.asarray(tokens).tolist()), table), np.asarray(drafted)


# A surprise above 5 is a false alarm once in 100,000 times.
@pytest.mark.slow
@pytest.mark.parametrize(
    ("s", "exits", "adaptive"),
    [
        (FILTERED, (1, 2), True),
        (PLAIN, (2,), False),
    ],
)
def test_sampled_sequences_follow_the_base(s, exits, adaptive):
    found, drafted = sequence_surprise(tiny_exiting(exits, adaptive), s)
    assert found < 5
    assert len(np.unique(drafted)) > 1  # draws and verdicts decide how much is drafted


@pytest.mark.slow
def test_a_draft_of_another_temperature_is_noticed(monkeypatch):
    mutate(monkeypatch, es.tree, "_best", "perturbed(key, log_q)", "perturbed(key, 3 * log_q)")
    assert sequence_surprise(tiny_exiting((2,), False), PLAIN)[0] > 5


# The base's cache: what drafting wrote is kept, and verification completes it.


@pytest.mark.parametrize("make", [exiting, fading], ids=["few accepted", "many accepted"])
def test_base_cache_equals_fresh_prefill(make):
    decoder, session, again = make(), es.Session(), es.Session()
    new = joined(decoder.stream(PROMPTS[0], max_new_tokens=NEW, session=session))
    es.Decoder(decoder.base).stream(PROMPTS[0] + new, max_new_tokens=1, session=again)
    length = int(session._state.cache.length[0])
    assert length == len(PROMPTS[0]) + NEW - 1
    both = (entries(s._state.cache) for s in (session, again))
    for a, b in zip(*both, strict=True):
        a, b = (x[..., :length, :] for x in (a, b))
        np.testing.assert_allclose(a, b, atol=1e-9)


def test_stream_equals_generate_and_sessions_go_on():
    """test_drafters.py streams what is drawn."""
    decoder, session = exiting(), es.Session(max_len=56)
    options = {"max_new_tokens": NEW}
    want = decoder.generate([PROMPTS[0]], **options)
    pieces = list(decoder.stream(PROMPTS[0], **options, session=session))
    assert joined(pieces) == want.tokens[0] and session.stats == want.stats
    assert sum(p.num_accepted for p in pieces) == sum(want.stats.accepted_per_depth)
    turn = [*PROMPTS[0], *want.tokens[0], 5, 6, 7]
    second = joined(decoder.stream(turn, max_new_tokens=12, session=session))
    assert second == autoregressive().generate([turn], max_new_tokens=12).tokens[0]


# What it chooses, against a plain reference.


class Plain:
    """DEL step by step in numpy. It runs the base, and models cut behind each exit, over texts."""

    def __init__(self, decoder, width=64):
        base, self.exits = decoder.base, decoder.drafter.exits
        self.num_layers, self.gamma = base.config.num_layers, decoder.num_draft_tokens
        self.width, self.models = width, [*(self.cut(base, n) for n in self.exits), base]
        self.counts = np.zeros((len(self.exits), 2))  # mismatched, matched
        self.sums = np.zeros((len(self.exits), 2))
        self.exit, self.limit = 0, 1

    @staticmethod
    def cut(base, num_layers):
        params = base.params.replace(blocks=base.params.blocks[:num_layers])
        config = dataclasses.replace(base.config, num_layers=num_layers)
        return base.replace(params=params, config=config, partition=(1,) * num_layers)

    def guess(self, which, text):
        """Argmax and its probability behind every token of a text."""
        padded = text + [0] * (self.width - len(text))
        scores = np.asarray(all_logits(self.models[which], [padded])[0, : len(text)])
        p = np.exp(scores - scores.max(axis=1, keepdims=True))
        p /= p.sum(axis=1, keepdims=True)
        return p.argmax(axis=1), p.max(axis=1)

    def thresholds(self):
        with np.errstate(invalid="ignore", divide="ignore"):
            tau = (self.sums / self.counts).mean(axis=1)
        return np.where((self.counts > 0).all(axis=1), tau, 0.0)

    def absorb(self, text):
        """What a whole prompt says, but its last token."""
        end = len(text) - 1
        self.count(text, max(end - 32, 0), end)
        self.choose()

    def count(self, text, begin, end):
        """Add the positions begin .. end - 1."""
        truth = self.guess(-1, text)[0]
        for x in range(len(self.exits)):
            tokens, p = self.guess(x, text)
            for i in range(begin, end):
                self.counts[x, int(tokens[i] == truth[i])] += 1
                self.sums[x, int(tokens[i] == truth[i])] += p[i]

    def choose(self):
        """Exit and number of tokens for the next step."""
        best = -1.0
        for x, layers in enumerate(self.exits):
            a = self.counts[x, 1] / self.counts[x].sum()
            for g in range(self.gamma + 1):
                value = sum(a**i for i in range(g + 1)) / (g * layers + self.num_layers)
                if value > best + 1e-9:
                    best, self.exit, self.limit = value, x, g

    def step(self, text):
        """The draft behind `text`, and how many of its tokens are right."""
        draft, tau = [], self.thresholds()[self.exit]
        while len(draft) < self.limit:
            tokens, p = self.guess(self.exit, text + draft)
            draft.append(int(tokens[-1]))
            if p[-1] < tau:
                break
        last = len(text) - 1
        truth = self.guess(-1, text + draft)[0][last:]
        wrong = [i for i, token in enumerate(draft) if token != truth[i]]
        accepted = wrong[0] if wrong else len(draft)
        self.counts, self.sums = 0.95 * self.counts, 0.95 * self.sums
        self.count(text + draft, last, last + accepted + 1)
        self.choose()
        return draft, accepted


def check_statistics(found, plain):
    for got, want in (
        (found.mismatched, plain.counts[:, 0]),
        (found.matched, plain.counts[:, 1]),
        (found.mismatched_confidence, plain.sums[:, 0]),
        (found.matched_confidence, plain.sums[:, 1]),
        (found.threshold, plain.thresholds()),
    ):
        np.testing.assert_allclose(np.asarray(got), want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("make", "doubts"),
    [
        pytest.param(exiting, False, marks=pytest.mark.slow, id="bad exits"),
        pytest.param(functools.partial(fading, 0.1), True, id="fair exits"),
        pytest.param(fading, False, marks=pytest.mark.slow, id="good exits"),
    ],
)
def test_every_step_is_that_of_a_plain_reference(make, doubts):
    decoder = make()
    plain, text = Plain(decoder), list(PROMPTS[0])
    plain.absorb(text)
    run = started(decoder, [text], 40)
    lengths, stopped = [], 0
    while not bool(run.state.done[0]):
        state = run.state
        assert (int(state.draft.exit), int(state.draft.limit)) == (plain.exit, plain.limit)
        limit = plain.limit
        draft, accepted = plain.step(text)
        out = run.step()
        assert int(out.num_drafted[0]) == len(draft)
        assert int(out.num_accepted[0]) == accepted
        text += np.asarray(out.tokens)[0, : int(out.num_emitted[0])].tolist()
        check_statistics(run.state.draft.statistics, plain)
        lengths.append(len(draft))
        stopped += len(draft) < limit
    if make is fading:  # its prompt says so
        assert set(lengths) == {decoder.num_draft_tokens}
    else:
        assert len(set(lengths)) > 1
    assert stopped or not doubts  # confidence ended some drafts


def test_the_last_positions_of_a_prompt_are_counted(monkeypatch):
    """Whatever the pieces; one of fewer than 32 takes the place of as many."""
    monkeypatch.setattr(engine, "PREFILL_CHUNKS", (16, 64))
    config = dataclasses.replace(CONFIG, max_len=128)
    decoder = early(faded(model((1, 1), config=config), 1, 0.1))
    text = np.random.default_rng(0).integers(0, 61, 128).tolist()

    def absorbed(length, state=None, start=0):
        inputs = make_inputs(config, [text[:length]], 1, es.Sampling())
        request, state = decoder.begin(inputs, 128, state)
        return decoder.absorb(request, state, length, start)

    def check(state, plain):
        check_statistics(state.draft.statistics, plain)
        assert (int(state.draft.exit), int(state.draft.limit)) == (plain.exit, plain.limit)

    for length in (5, 40, 100):  # pieces of 4, 39, and 64 and 35
        plain, state = Plain(decoder, 128), absorbed(length)
        plain.absorb(text[:length])
        check(state, plain)
    assert 0.3 < float(state.draft.statistics.alpha.max()) < 1
    # Later turns: a piece that moves back to 64 to fit, and one to 112, which absorbs four again.
    plain, state = Plain(decoder, 128), absorbed(117, state, start=99)
    plain.absorb(text[:117])
    check(state, plain)
    plain.counts, plain.sums = plain.counts * 24 / 32, plain.sums * 24 / 32
    plain.count(text, 112, 120)
    plain.choose()
    check(absorbed(121, state, start=116), plain)
    assert exiting(exits=(2,), adaptive=False).drafter.taps == ()  # nothing to count


def test_token_per_layer_by_hand():
    value = exit_statistics.token_per_layer(
        jnp.array([0.0, 0.5, 1.0], jnp.float32), (1, 2, 4), 8, 2
    )
    want = [[1 / 8, 1 / 9, 1 / 10], [1 / 8, 1.5 / 10, 1.75 / 12], [1 / 8, 2 / 12, 3 / 16]]
    np.testing.assert_allclose(value, want, rtol=1e-6)


# What it is worth, and what it runs.


def test_a_model_that_exits_early_needs_fewer_layers():
    decoder = fading()
    out = decoder.generate([PROMPTS[0]], max_new_tokens=48)
    report = out.drafter_report
    assert out.tokens == es.Decoder(decoder.base).generate([PROMPTS[0]], max_new_tokens=48).tokens
    assert report["chosen"][0] > 0.9 * out.stats.steps  # behind the layer that does most
    assert out.stats.tokens_per_step > 2.5
    assert report["layer_passes_per_token"] < 0.6 * report["num_layers"]


def test_only_the_layers_that_are_counted_run(monkeypatch):
    """Each run of a layer, told by the device itself."""
    ran, run_blocks = [], early_exit.run_blocks

    def counting(base, x, caches, step, **options):
        jax.debug.callback(lambda: ran.append(len(caches)))
        return run_blocks(base, x, caches, step, **options)

    monkeypatch.setattr(early_exit, "run_blocks", counting)
    config = dataclasses.replace(CONFIG, num_layers=3)
    decoder = early(model((1, 1), config=config), (1, 2), gamma=2)
    report = decoder.generate([PROMPTS[2]], max_new_tokens=NEW).drafter_report
    jax.effects_barrier()
    assert sum(ran) == report["layer_passes"]
    assert sum(n > 0 for n in report["chosen"]) > 1 and report["num_drafted"] > 0


@pytest.mark.slow
def test_the_compiled_loop_copies_no_cache():
    """In optimised HLO: each of 3 layers is written once in each of 3 windows from its exit on,
    once while drafting below the last exit; no copies as large as an entry.
    """
    moved = cache_traffic(exiting(), 1)
    assert moved["dynamic-update-slice"] == 2 * (2 + 3 * 2)
    assert not {"copy", "transpose", "concatenate", "select", "convert"} & set(moved)


def test_one_compilation_whatever_is_chosen():
    decoder = exiting()
    decoder.warmup(1, 10, 20)
    before = compilations()
    for prompt in PROMPTS:
        decoder.generate([prompt], max_new_tokens=20)
    assert compilations() == before


def test_its_state_is_small_and_shared_weights_count_once():
    budget = exiting().memory(1, 16, max_new_tokens=16)
    assert budget["draft weights"] == 0
    assert budget["draft cache"] < budget["base cache"] / 4


def test_drafts_end_with_a_stop_id():
    decoder = exiting(exits=(2,), gamma=4, adaptive=False)
    draft, _ = Plain(decoder).step(PROMPTS[0])
    for eos, num in (([], 4), ([draft[0]], 1)):
        out = started(decoder, [PROMPTS[0]], eos_ids=eos).step()
        assert int(out.num_drafted[0]) == num


@pytest.mark.slow
def test_phases_can_be_timed():
    times = exiting().profile(1, 8, max_new_tokens=8, repeats=1)
    assert set(times) == {"prefill", "step", "calibrate", "draft", "verify", "commit"}


# Refusals: one sentence, before anything is allocated.


@pytest.mark.parametrize(
    ("exits", "message"),
    [
        ((), r"exits must be strictly rising numbers of layers in 1 .. 2, got \(\)"),
        ((0, 2), "strictly rising"),
        ((2, 2), "strictly rising"),
        ((3, 5), "strictly rising"),
        ((1.5,), "strictly rising"),
        (3, "strictly rising"),
    ],
)
def test_exits_that_are_none_are_refused(exits, message):
    with pytest.raises(ValueError, match=message):
        es.EarlyExitDrafter(model((1, 1)), exits=exits)


def test_what_cannot_work_is_refused():
    base = model((1, 1))
    drafter = es.EarlyExitDrafter(base)
    assert drafter.exits == (1, 2)
    for exits in (None, (1, 2)):
        with pytest.raises(ValueError, match="adaptive=False needs exactly one exit"):
            es.EarlyExitDrafter(base, exits=exits, adaptive=False)
    with pytest.raises(ValueError, match="layer after layer: load it with group_size=1"):
        es.EarlyExitDrafter(model((1, 1), group_size=GROUPS))
    with pytest.raises(ValueError, match="the very model that the Decoder gets"):
        es.Decoder(model((1, 1), seed=1), drafter)
    with pytest.raises(ValueError, match="tree_width must be 1, got 2"):
        es.Decoder(base, drafter, tree_width=2)
    for ask in ("generate", "warmup"):
        request = (PROMPTS,) if ask == "generate" else (3, 8)
        with pytest.raises(ValueError, match="one prompt at a time, got 3 prompts"):
            getattr(es.Decoder(base, drafter), ask)(*request, max_new_tokens=4)
    single = model((1, 1), config=dataclasses.replace(CONFIG, num_layers=1))
    with pytest.raises(ValueError, match="a base of one layer has no earlier exit"):
        es.EarlyExitDrafter(single)

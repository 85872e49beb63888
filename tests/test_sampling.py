"""Filters against sorting, verification by hand and against the distribution it must keep."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from decoders import surprise
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax
from jax.sharding import PartitionSpec as P
from mutation import mutate

from easyspec_jax import Sampling, make_mesh, sampling, verify
from easyspec_jax.sampling import Scores, make_filters, probabilities, sample
from easyspec_jax.verify import Proposal, accept_path


def sorted_filter(logits, s: Sampling):
    """The same filters the obvious way, in float64, by sorting; ties at a threshold are kept."""
    x = logits.astype(np.float64) / s.temperature
    p = np.exp(x - x.max())
    p /= p.sum()
    if s.top_k:
        p = np.where(p >= np.sort(p)[::-1][min(s.top_k, p.size) - 1], p, 0)
        p /= p.sum()
    if s.top_p < 1:
        order = np.sort(p)[::-1]
        last = np.searchsorted(np.cumsum(order), s.top_p)
        p = np.where(p >= order[min(last, p.size - 1)], p, 0)
        p /= p.sum()
    if s.min_p:
        p = np.where(p >= s.min_p * p.max(), p, 0)
        p /= p.sum()
    return p


filtered = {gpu: jax.jit(functools.partial(probabilities)) for gpu in (False, True)}


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    temperature=st.floats(0.1, 3),
    top_k=st.sampled_from([0, 1, 3, 17, 1000]),
    top_p=st.sampled_from([1.0, 0.999, 0.9, 0.5, 0.01]),
    min_p=st.sampled_from([0.0, 0.02, 0.3, 1.0]),
    gpu=st.booleans(),
)
def test_filters_equal_sorting(seed, temperature, top_k, top_p, min_p, gpu):
    """Also as GPUs find thresholds, several bits at a time."""
    logits = np.random.default_rng(seed).normal(size=(37,)).astype(np.float32) * 3
    s = Sampling(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    with pytest.MonkeyPatch.context() as patch:
        if gpu:
            patch.setattr(lax, "platform_dependent", lambda *x, cpu, default: default(*x))
        p = np.asarray(filtered[gpu](logits[None], make_filters(s)))[0]
    np.testing.assert_allclose(p, sorted_filter(logits, s), atol=2e-6)


def test_top_k_keeps_ties():
    logits = jnp.asarray([[2.0, 1.0, 1.0, 0.0]], jnp.float32)
    p = probabilities(logits, make_filters(Sampling(temperature=1.0, top_k=2)))
    np.testing.assert_array_equal(np.asarray(p)[0] > 0, [True, True, True, False])


def test_masked_logits_stay_impossible():
    logits = jnp.asarray([[0.0, -jnp.inf, 1.0, -jnp.inf]], jnp.float32)
    s = Sampling(temperature=2.0, top_k=3, top_p=0.99, min_p=0.01)
    p = np.asarray(probabilities(logits, make_filters(s)))[0]
    assert np.isfinite(p).all() and p[1] == p[3] == 0
    np.testing.assert_allclose(p.sum(), 1, atol=1e-6)


def test_logits_of_another_vocabulary_are_cut_or_padded_with_the_impossible():
    scores = jnp.asarray([[[1.0, 2.0]]], jnp.float32)
    assert Scores.of(scores).fit(3).whole().tolist() == [[[1.0, 2.0, -np.inf]]]
    assert Scores.of(scores).fit(1).whole().tolist() == [[[1.0]]]


@pytest.mark.parametrize("k", [1, 3, 12])
@pytest.mark.parametrize("vocab", [5, 16, 40], ids=["cut", "all", "padded"])
def test_the_likeliest_of_shares_are_those_of_all(vocab, k):
    """16 ids on 8 devices, many of them equal; of a cut vocabulary some devices have none left."""
    k, mesh, axes = min(k, vocab), make_mesh(4, 2), ("layer", "tensor")
    scores = np.random.default_rng(k).integers(4, size=(2, 6, 16)).astype(np.float32)

    def found(share):
        mine = Scores(share=share, axes=axes, vocab_size=16).fit(vocab)
        return *mine.likeliest(k), mine.argmax()

    got = jax.jit(
        jax.shard_map(found, mesh=mesh, in_specs=P(None, None, axes), out_specs=P())
    )(scores)  # fmt: skip
    whole = Scores.of(jnp.asarray(scores)).fit(vocab)
    want = (*whole.likeliest(k), whole.argmax())
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)


@pytest.mark.parametrize("vocab", [20, 64], ids=["cut", "all"])
def test_the_likeliest_of_ids_with_names_of_their_own(vocab):
    """16 ids of 64 on 8 devices; whatever is cut is never among them."""
    draw, axes = np.random.default_rng(0), ("layer", "tensor")
    scores = draw.permutation(2 * 6 * 16).reshape(2, 6, 16).astype(np.float32)
    ids = jnp.asarray(draw.permutation(64)[:16], jnp.int32)

    def found(share):
        mine = Scores(share=share, ids=ids, axes=axes, vocab_size=64).fit(vocab)
        return *mine.likeliest(4), mine.argmax()

    run = jax.shard_map(
        found, mesh=make_mesh(4, 2), in_specs=P(None, None, axes), out_specs=P()
    )  # fmt: skip
    one = Scores(share=jnp.asarray(scores), ids=ids, vocab_size=64).fit(vocab)
    whole = Scores.of(one.whole())
    want = (*whole.likeliest(4), whole.argmax())
    assert (np.asarray(ids) < vocab).sum() >= 4 and want[1].max() < vocab
    for got in (jax.jit(run)(scores), (*one.likeliest(4), one.argmax())):
        for a, b in zip(got, want, strict=True):
            np.testing.assert_allclose(a, b, atol=1e-6)


def test_a_wider_tree_than_a_vocabulary_has_impossible_nodes():
    """Of 16 ids on 8 devices the 20 likeliest: the rest is minus infinity."""

    def found(share):
        return Scores(share=share, axes=("layer", "tensor"), vocab_size=64).largest(20)[0]

    spec = P(None, None, ("layer", "tensor"))
    run = jax.shard_map(found, mesh=make_mesh(4, 2), in_specs=spec, out_specs=P())
    top = np.asarray(jax.jit(run)(jnp.ones((1, 1, 16), jnp.float32)))[0, 0]
    assert (top[:16] == 1).all() and (top[16:] == -np.inf).all()


@pytest.mark.parametrize("gpu", [False, True])
def test_a_draw_is_that_of_the_library(monkeypatch, gpu):
    if gpu:
        monkeypatch.setattr(lax, "platform_dependent", lambda *x, cpu, default: default(*x))
    p = jax.nn.softmax(jax.random.normal(jax.random.key(1), (3, 500), jnp.float32) * 3)
    p = p.at[0, 100:].set(0.0)
    for seed in range(20):
        key = jax.random.key(seed)
        expected = jax.random.categorical(key, jnp.log(p))
        np.testing.assert_array_equal(sample(key, p), expected)


@pytest.mark.parametrize("find", [sampling._largest_in_one, sampling._largest_in_two])
def test_the_first_of_equals_is_taken_and_what_is_no_number_wins(find):
    inf, nan = np.inf, np.nan
    rows = [[1, 3, 3, 2], [-inf] * 4, [0.0, -0.0, -1, 0], [1, nan, 5, nan], [-inf, inf, 0, inf]]
    top, index = find(jnp.asarray(rows, jnp.float32))
    np.testing.assert_array_equal(index, [[1], [0], [0], [1], [1]])
    np.testing.assert_array_equal(top[:, 0], [3, -inf, 0, nan, inf])
    assert index.dtype == jnp.int32


def test_sample_never_draws_a_zero():
    probs = jnp.tile(jnp.asarray([[0.0, 1e-30, 0.0, 1.0]], jnp.float32), (4096, 1))
    assert set(np.asarray(sample(jax.random.key(0), probs)).tolist()) <= {1, 3}


def chain(tokens, probs=None, valid=None):
    tokens = np.asarray(tokens, np.int32)
    parents = np.broadcast_to(np.arange(-1, tokens.shape[1] - 1, dtype=np.int32), tokens.shape)
    valid = np.ones(tokens.shape, bool) if valid is None else np.asarray(valid)
    depth = tokens.shape[1]
    return Proposal(tokens=tokens, parents=parents, valid=valid, probs=probs, depth=depth)


def accept(*args):
    """By a trace of its own: mutations are seen."""
    return jax.jit(functools.partial(accept_path))(*args)


GREEDY = make_filters(Sampling())
SAMPLED = make_filters(Sampling(temperature=1.0))


@pytest.mark.parametrize(
    ("drafted", "valid", "accepted", "next_token"),
    [
        ([1, 2, 3], [True] * 3, 3, 4),  # all right: the bonus token
        ([1, 2, 0], [True] * 3, 2, 3),
        ([0, 2, 3], [True] * 3, 0, 1),  # what follows a rejection does not count
        ([1, 2, 3], [True, False, True], 1, 2),  # an invalid node ends the chain
    ],
)
def test_greedy_by_hand(drafted, valid, accepted, next_token):
    logits = 5 * np.eye(6, dtype=np.float32)[None, [1, 2, 3, 4]]
    verdict = accept(logits, chain([drafted], valid=[valid]), GREEDY, jax.random.key(0))
    assert int(verdict.num_accepted[0]) == accepted
    assert int(verdict.next_token[0]) == next_token


def test_equal_distributions_accept_everything():
    """p = q accepts every draft token, and the bonus token is drawn from p itself."""
    logits = np.random.default_rng(0).normal(size=(4, 7)).astype(np.float32)
    logits = np.broadcast_to(logits, (8192, 4, 7))
    p = np.asarray(filtered[False](logits, SAMPLED))
    drafted = jax.jit(sample)(jax.random.key(1), p[:, :3])
    verdict = accept(logits, chain(drafted, p[:, :3]), SAMPLED, jax.random.key(2))
    assert (np.asarray(verdict.num_accepted) == 3).all()
    bonus = np.asarray(verdict.next_token).tolist()
    assert surprise(bonus, dict(enumerate(p[0, 3]))) < 5


ROWS, V = 40_000, 5


def emitted(kind, seed=0):
    """First two tokens that one step emits (-1: only one) from p, for drafts of `kind`; [ROWS, 2]
    and p rows [3, V].
    """
    rng = np.random.default_rng(seed)
    base = (
        rng.normal(size=(3, V)) * 1.5
    )  # independent of the drafted tokens: enumeration is a product
    logits = np.broadcast_to(base.astype(np.float32), (ROWS, 3, V))
    keys = jax.random.split(jax.random.key(seed), 2)
    if kind == "chosen":
        proposal = chain(np.tile([[1, 3]], (ROWS, 1)))
    else:
        q = np.exp(rng.normal(size=(2, V)) * 1.5).astype(np.float32)
        q = np.broadcast_to(q / q.sum(axis=-1, keepdims=True), (ROWS, 2, V))
        valid = np.tile([[True, kind != "invalid"]], (ROWS, 1))
        proposal = chain(jax.jit(sample)(keys[0], q), q, valid)
    verdict = accept(logits, proposal, SAMPLED, keys[1])
    m, last = np.asarray(verdict.num_accepted), np.asarray(verdict.next_token)
    drafted = np.asarray(proposal.tokens)
    first = np.where(m > 0, drafted[:, 0], last)
    second = np.where(m > 1, drafted[:, 1], np.where(m == 1, last, -1))
    return first, second, np.exp(base) / np.exp(base).sum(axis=-1, keepdims=True)


def step_surprise(kind):
    first, second, p = emitted(kind)
    one = surprise(first.tolist(), dict(enumerate(p[0])))
    second = second[second >= 0]
    # Whether a second token comes depends on the first alone: among those that came p[1] holds.
    two = surprise(second.tolist(), dict(enumerate(p[1])))
    return max(one, two)


@pytest.mark.parametrize("kind", ["drawn", "chosen", "invalid"])
def test_one_step_keeps_the_distribution(kind):
    assert step_surprise(kind) < 5


@pytest.mark.parametrize("kind", ["drawn", "chosen"])
@pytest.mark.parametrize("broken", ["accept all", "accept too easily", "no residual"])
def test_broken_rules_are_noticed(monkeypatch, kind, broken):
    if broken == "no residual" and kind == "drawn":
        mutate(
            monkeypatch, verify, "_accept_block", "rest.sum(axis=-1, keepdims=True) > 0", "False"
        )
    elif broken == "no residual":
        monkeypatch.setattr(verify, "_without_children", lambda p, proposal, last: p)
    else:
        uniform = jax.random.uniform
        bound = {"accept all": 0.0, "accept too easily": 0.5}[broken]
        monkeypatch.setattr(
            jax.random, "uniform", lambda key, shape, dtype: bound * uniform(key, shape, dtype)
        )
    assert step_surprise(kind) > 5


def test_residual_after_each_rejection_by_hand():
    """p = (.5, .5, 0), q = (0, .5, .5): token 2 is always rejected, then only 0 is left."""
    p = np.array([[[0.0, 0.0, -np.inf]] * 2] * 256, np.float32)  # logits
    q = np.array([[[0.0, 0.5, 0.5]]] * 256, np.float32)
    verdict = accept(p, chain([[2]] * 256, q), SAMPLED, jax.random.key(0))
    assert (np.asarray(verdict.num_accepted) == 0).all()
    assert (np.asarray(verdict.next_token) == 0).all()


def test_every_filter_combination_traces_once():
    """Values of filters are run-time; which are on is static."""
    traced = jax.jit(functools.partial(probabilities))
    logits = jnp.zeros((1, 8), jnp.float32)
    for on in itertools.product([False, True], repeat=3):
        for scale in (1, 2):
            s = Sampling(
                temperature=0.5 * scale,
                top_k=3 * scale * on[0],
                top_p=1 - 0.1 * scale * on[1],
                min_p=0.1 * scale * on[2],
            )
            traced(logits, make_filters(s))
    assert traced._cache_size() == 8

"""The law of what is emitted under block verification, by enumeration: every draft, every outcome,
several steps; no draw is made. And what it accepts against the rule of token by token.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from mutation import mutate

import easyspec_jax as es
from easyspec_jax import verify
from easyspec_jax.sampling import make_filters, probabilities
from easyspec_jax.verify import Proposal

V, DEPTH, LENGTH = 3, 3, 4  # ids, draft tokens of a step, tokens of a text
PREFIXES = [x for length in range(LENGTH) for x in itertools.product(range(V), repeat=length)]
DRAFTS = list(itertools.product(range(V), repeat=DEPTH))
PLAIN = es.Sampling(temperature=1.0)
FILTERED = es.Sampling(temperature=0.8, top_k=2)  # an id of three is impossible, another in p and q
ROUNDING = 1e-12


def tables(sampling, *, seed=3):
    """Next-token probabilities of base and draft behind every text, {prefix: f64[V]} each."""
    texts = [x for n in range(LENGTH + DEPTH) for x in itertools.product(range(V), repeat=n)]
    found = []
    for model in (1, 2):
        draws = (np.random.default_rng([seed, model, *x]).normal(size=V) for x in texts)
        logits = jnp.asarray(np.stack([1.5 * x for x in draws]), jnp.float32)
        p = np.asarray(probabilities(logits, make_filters(sampling)), np.float64)
        found.append(dict(zip(texts, p / p.sum(axis=-1, keepdims=True), strict=True)))
    return found


def proposals(base, draft, least=0.0):
    """Every draft behind every prefix: p f64[rows, DEPTH + 1, V] and the proposal. A draft stops
    behind a token whose path is less probable than `least`.
    """
    rows = list(itertools.product(PREFIXES, DRAFTS))
    p, q = (
        np.stack([[table[x + d[:i]] for i in range(DEPTH + 1)] for x, d in rows])
        for table in (base, draft)
    )
    tokens = np.array([d for _, d in rows], np.int32)
    path = np.take_along_axis(q[:, :-1], tokens[..., None], axis=-1)[..., 0].cumprod(axis=1)
    valid = np.pad(path[:, :-1] >= least, ((0, 0), (1, 0)), constant_values=True)
    parents = np.broadcast_to(np.arange(-1, DEPTH - 1, dtype=np.int32), tokens.shape)
    return p, Proposal(tokens=tokens, parents=parents, valid=valid, probs=q[:, :-1], depth=DEPTH)


def outcomes(p, proposal):
    """The rule as it is run: thresholds f64[rows, DEPTH] that decide, each by its own draw, whether
    a chain may end there (found by bisection), and what is left at each end, [rows, DEPTH + 1, V].
    """
    never = jnp.full(proposal.tokens.shape, 2.0)

    def run(p, proposal):
        def threshold(i):
            def halve(_, bounds):
                middle = bounds.mean(axis=0)
                verdict, _ = verify._accept_block(p, proposal, never.at[:, i].set(middle))
                taken = verdict.num_accepted == i + 1
                return jnp.where(jnp.stack([taken, ~taken]), middle[None], bounds)

            bounds = jnp.stack([jnp.zeros(len(p)), jnp.ones(len(p))])
            return jax.lax.fori_loop(0, 50, halve, bounds)[1]

        draws = [never, *(never.at[:, i].set(0.0) for i in range(DEPTH))]
        left = [verify._accept_block(p, proposal, u)[1] for u in draws]
        return jax.lax.map(threshold, jnp.arange(DEPTH, dtype=jnp.int32)).T, jnp.stack(left, axis=1)

    return map(np.asarray, jax.jit(run)(p, proposal))


def ends(thresholds):
    """Probability of every number of accepted tokens, f64[rows, DEPTH + 1]: the last that its draw
    allows.
    """
    h = np.pad(thresholds, ((0, 0), (1, 0)), constant_values=1.0)
    later = np.cumprod((1 - h)[:, ::-1], axis=1)[:, ::-1]
    return h * np.pad(later[:, 1:], ((0, 0), (0, 1)), constant_values=1.0)


def emitted(p, proposal, drawn_from):
    """The law of the texts of several steps, {text: probability}; drafts follow `drawn_from`."""
    thresholds, left = outcomes(p, proposal)
    left = left / left.sum(axis=-1, keepdims=True)
    share = (ends(thresholds)[..., None] * left).reshape(len(PREFIXES), len(DRAFTS), DEPTH + 1, V)
    law = {x: {x: 1.0} for x in itertools.product(range(V), repeat=LENGTH)}
    for b, prefix in reversed(list(enumerate(PREFIXES))):
        law[prefix] = dict.fromkeys(itertools.product(range(V), repeat=LENGTH), 0.0)
        for (j, d), m, y in itertools.product(enumerate(DRAFTS), range(DEPTH + 1), range(V)):
            q = np.prod([drawn_from[prefix + d[:i]][x] for i, x in enumerate(d)])
            if mass := q * share[b, j, m, y]:
                for text, more in law[(*prefix, *d[:m], y)[:LENGTH]].items():
                    law[prefix][text] += mass * more
    return law[()]


def distance(law, base):
    """Total variation between a law of texts and the base's."""
    want = {text: np.prod([base[text[:i]][x] for i, x in enumerate(text)]) for text in law}
    return sum(abs(law[text] - want[text]) for text in law) / 2


@functools.cache
def case(sampling, least):
    base, draft = tables(sampling)
    return base, draft, *proposals(base, draft, least)


def law_distance(sampling=PLAIN, least=0.0):
    base, draft, p, proposal = case(sampling, least)
    return distance(emitted(p, proposal, draft), base)


@pytest.mark.parametrize("least", [0.0, 0.2], ids=["whole", "stops early"])
@pytest.mark.parametrize("sampling", [PLAIN, FILTERED], ids=["plain", "filtered"])
def test_what_is_emitted_over_several_steps_follows_the_base(sampling, least):
    assert law_distance(sampling, least) < ROUNDING


BROKEN = {
    "weights of single tokens": (
        "_block_weights",
        "jnp.minimum(weights[-1] * ratio[:, i], 1.0)",
        "weights[-1] * jnp.minimum(ratio[:, i], 1.0)",
    ),
    "weights beyond 1": (
        "_block_weights", "jnp.minimum(weights[-1] * ratio[:, i], 1.0)", "weights[-1] * ratio[:, i]"
    ),
    "a residual that is not scaled": (
        "_accept_block", "_at(weight, num)[:, None] * _at(p, num)", "_at(p, num)"
    ),
    "p where a residual is due": ("_accept_block", "rest.sum(axis=-1, keepdims=True) > 0", "False"),
    "what is left one token before": ("_accept_block", "< left[:, 1:]", "< left[:, :-1]"),
    "a weight one token before": ("_accept_block", "- weight))[:, 1:]", "- weight))[:, :-1]"),
    "weights in place of thresholds": (
        "_accept_block", "u * (left + (1.0 - weight))[:, 1:] < left[:, 1:]", "u < weight[:, 1:]"
    ),
    "up to the first that may not end": (
        "_accept_block",
        "jnp.where(drafted & stops, node + 1, 0).max(axis=1)",
        "lax.cumprod((drafted & stops).astype(jnp.int32), axis=1).sum(axis=1, dtype=jnp.int32)",
    ),
}  # fmt: skip


@pytest.mark.parametrize("broken", BROKEN)
def test_broken_rules_are_noticed(monkeypatch, broken):
    mutate(monkeypatch, verify, *BROKEN[broken])
    assert law_distance() > 1e-3


def test_q_behind_the_end_of_a_draft_is_noticed(monkeypatch):
    mutate(monkeypatch, verify, "_q_ahead", "drafted[..., None]", "True")
    assert law_distance(PLAIN, 0.2) > 1e-3


def test_a_draft_from_another_q_is_noticed():
    """The rule is told of filters that the draft did not have."""
    base, _, p, proposal = case(FILTERED, 0.0)
    _, unfiltered = tables(PLAIN)
    assert distance(emitted(p, proposal, unfiltered), base) > 1e-3


def mean_accepted(p, proposal, probability):
    """Accepted tokens of a step, by block and token by token."""
    chance, _ = outcomes(p, proposal)
    block = (ends(chance) * np.arange(proposal.depth + 1)).sum(axis=1)
    p_x, q_x = (
        np.take_along_axis(x[:, : proposal.depth], proposal.tokens[..., None], axis=-1)[..., 0]
        for x in (p, proposal.probs)
    )
    single = np.cumprod(np.minimum(p_x / np.maximum(q_x, 1e-300), 1) * proposal.valid, axis=1)
    return (probability * block).sum(), (probability * single.sum(axis=1)).sum()


def test_the_papers_example_by_hand(monkeypatch):
    """p = (1/3, 2/3), q = (2/3, 1/3) wherever: 11/9 of two tokens, 10/9 token by token."""
    monkeypatch.setattr(f"{__name__}.DEPTH", 2)
    tokens = np.array(list(itertools.product(range(2), repeat=2)), np.int32)
    p, q = (np.broadcast_to(x, (4, n, 2)) for x, n in (([1 / 3, 2 / 3], 3), ([2 / 3, 1 / 3], 2)))
    parents, valid = np.broadcast_to(np.int32([-1, 0]), tokens.shape), np.ones((4, 2), bool)
    proposal = Proposal(tokens=tokens, parents=parents, valid=valid, probs=q, depth=2)
    chance = np.array([2 / 3, 1 / 3])[tokens].prod(axis=1)
    assert mean_accepted(p, proposal, chance) == pytest.approx((11 / 9, 10 / 9), abs=ROUNDING)


@pytest.mark.parametrize("seed", range(3))
def test_more_is_accepted_than_token_by_token(seed):
    base, draft = tables(PLAIN, seed=seed)
    p, proposal = proposals(base, draft)
    q = [np.prod([draft[x + d[:i]][t] for i, t in enumerate(d)]) for x in PREFIXES for d in DRAFTS]
    block, single = mean_accepted(p, proposal, np.array(q) / len(PREFIXES))
    assert single + 0.01 < block

"""The law of what is emitted under block verification, by enumeration: every draft, every outcome,
several steps; no draw is made. And what it accepts against the rule of token by token.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from mutation import BROKEN_RULES, mutate

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
slow = pytest.mark.slow


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


@pytest.mark.parametrize(
    ("sampling", "least"),
    [
        (PLAIN, 0.0),
        pytest.param(PLAIN, 0.2, marks=slow),
        pytest.param(FILTERED, 0.0, marks=slow),
        (FILTERED, 0.2),
    ],
)
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


@slow
@pytest.mark.parametrize("broken", BROKEN)
def test_broken_rules_are_noticed(monkeypatch, broken):
    mutate(monkeypatch, verify, *BROKEN[broken])
    assert law_distance() > 1e-3


@slow
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


@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=slow), pytest.param(2, marks=slow)])
def test_more_is_accepted_than_token_by_token(seed):
    base, draft = tables(PLAIN, seed=seed)
    p, proposal = proposals(base, draft)
    q = [np.prod([draft[x + d[:i]][t] for i, t in enumerate(d)]) for x in PREFIXES for d in DRAFTS]
    block, single = mean_accepted(p, proposal, np.array(q) / len(PREFIXES))
    assert single + 0.01 < block


# Trees: every one that stochastic beam search may grow.

TEXT = 3  # tokens of a text, of steps over trees of two levels
SHORT = [x for length in range(TEXT) for x in itertools.product(range(V), repeat=length)]


def grown(q, below, width):
    """Every tree of two levels and its probability, {((token, children), ...): probability}: the
    `width` tokens, and the leaves below them, that come first in a race of all leaves whose rates
    are their probabilities.
    """
    rates, found = {(a, b): q[a] * below[a][b] for a in range(V) for b in range(V)}, {}

    def race(leaves, chance):
        tokens = list(dict.fromkeys(a for a, _ in leaves))[:width]
        kept = [leaf for leaf in leaves if leaf[0] in tokens]
        # Only those count that may still be a node, or bring one.
        wanted = [a for a in range(V) if (a in tokens) == (len(tokens) == width)]
        wanted += tokens if len(kept) < width else []
        rest = {
            leaf: rate
            for leaf, rate in rates.items()
            if leaf not in leaves and leaf[0] in wanted and rate > 0
        }
        if not rest or (len(tokens) == width and len(kept) >= width):
            kept = kept[:width]
            tree = tuple((a, tuple(b for c, b in kept if c == a)) for a in tokens)
            found[tree] = found.get(tree, 0.0) + chance
        else:
            for leaf, rate in rest.items():
                race([*leaves, leaf], chance * rate / sum(rest.values()))

    race([], 1.0)
    return found


@functools.cache
def tree_rows(sampling, width):
    """Every tree behind every prefix: (prefix, tree, probability), p and the proposal."""
    base, draft = tables(sampling)
    rows, p, q, nodes = [], [], [], []
    for x in SHORT:
        for tree, chance in grown(draft[x], [draft[(*x, a)] for a in range(V)], width).items():
            level = [(-1, a, True) for a, _ in tree]
            level += [(-1, 0, False)] * (width - len(level))
            leaves = [(i, b, True) for i, (_, below) in enumerate(tree) for b in below]
            leaves += [(0, 0, False)] * (width - len(leaves))
            texts = [x, *((*x, a) for _, a, _ in level)]
            texts += [(*texts[1 + i], b) for i, b, _ in leaves]
            rows.append((x, tree, chance))
            nodes.append([*level, *leaves])
            p.append([base[text] for text in texts])
            q.append([draft[text] for text in texts[: 1 + width]])
    parents, tokens, valid = (np.array(x) for x in np.moveaxis(np.array(nodes), -1, 0))
    proposal = Proposal(
        tokens=tokens.astype(np.int32),
        parents=parents.astype(np.int32),
        valid=valid.astype(bool),
        probs=np.array(q),
        depth=2,
    )
    return rows, np.array(p), proposal


def tree_law(width, sampling=PLAIN):
    """The law of the texts of several steps, and the base's distributions."""
    base, _ = tables(sampling)
    rows, p, proposal = tree_rows(sampling, width)
    chance, left = jax.jit(functools.partial(verify._traverse))(p, proposal)
    chance, left = np.asarray(chance), np.concatenate(left, axis=1)
    left = left / np.maximum(left.sum(axis=-1, keepdims=True), 1e-300)
    law = {x: {x: 1.0} for x in itertools.product(range(V), repeat=TEXT)}
    for x in reversed(SHORT):
        law[x] = dict.fromkeys(itertools.product(range(V), repeat=TEXT), 0.0)
    for b, (x, tree, reach) in reversed(list(enumerate(rows))):
        ends, leaf = [], width  # leaves before their parents, the root at last
        for i, (a, below) in enumerate(tree):
            for token in below:
                ends.append((chance[b, leaf], leaf + 1, (a, token)))
                leaf += 1
            ends.append((chance[b, i], i + 1, (a,)))
        for here, node, path in [*ends, (1.0, 0, ())]:
            for y in range(V):
                for text, more in law[(*x, *path, y)[:TEXT]].items():
                    law[x][text] += reach * here * left[b, node, y] * more
            reach *= 1 - here
    return law[()], base


@pytest.mark.parametrize(
    ("sampling", "width"),
    [
        pytest.param(PLAIN, 2, marks=slow),
        pytest.param(FILTERED, 2, marks=slow),
        (PLAIN, 3),
        pytest.param(FILTERED, 3, marks=slow),
    ],
)
def test_what_trees_emit_over_several_steps_follows_the_base(sampling, width):
    law, base = tree_law(width, sampling)
    assert distance(law, base) < ROUNDING


BROKEN_TREES = {
    "q is not scaled": ("_reject_children", "jnp.where(there, q.sum(axis=-1), q_sum)", "q_sum"),
    "the weight it had": ("_reject_children", "jnp.where(reject, mass / total, weight)", "weight"),
    "weights of single tokens": ("_reject_children", "weight[..., None] * p", "p"),
    "weights before any was rejected": (
        "_traverse", "rest, own, weight =", "own = weight; rest, _, weight ="
    ),
    **{what: how for (kind, what), how in BROKEN_RULES.items() if kind == "drawn"},
}  # fmt: skip


@slow
@pytest.mark.parametrize("broken", BROKEN_TREES)
def test_broken_rules_of_trees_are_noticed(monkeypatch, broken):
    mutate(monkeypatch, verify, *BROKEN_TREES[broken])
    law, base = tree_law(2)
    assert distance(law, base) > 1e-3

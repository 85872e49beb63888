"""Trees: how they grow, whom they attend to, and the rules that accept a path of them."""

import collections
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from decoders import all_logits, entries, fresh_cache, model, self_drafting, started, surprise
from hypothesis import given, settings
from hypothesis import strategies as st
from mutation import BROKEN_RULES, mutate, repeat_siblings

import easyspec_jax as es
from easyspec_jax import loop, sampling, tree, verify
from easyspec_jax.sampling import make_filters
from easyspec_jax.verify import Proposal, accept_path, ancestry

GREEDY = make_filters(es.Sampling())
SAMPLED = make_filters(es.Sampling(temperature=1.0))


# The best of many.

largest = jax.jit(sampling.largest, static_argnums=1)
accept = jax.jit(accept_path)


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    size=st.sampled_from([1, 5, 127, 256, 257, 1000, 4096]),
    k=st.sampled_from([1, 3, 12]),
    levels=st.sampled_from([2, 50, 10**6]),  # few levels: many ties
)
def test_largest_equals_sorting(seed, size, k, levels):
    k = min(k, size)
    x = np.random.default_rng(seed).integers(0, levels, (2, 3, size)).astype(np.float32)
    x[0, 0] = -np.inf
    top, index = largest(jnp.asarray(x), k)
    np.testing.assert_array_equal(top, -np.sort(-x, axis=-1)[..., :k])
    np.testing.assert_array_equal(np.take_along_axis(x, np.asarray(index), axis=-1), top)
    assert all(len(set(row)) == k for row in np.asarray(index)[1].tolist())
    assert (
        np.asarray(index)[..., 0] == x.argmax(axis=-1)
    ).all()  # a chain takes the first of equals


# Growing.


def scores_of(seed, vocab):
    """Draft logits as a function of a path, f64[V]."""
    return lambda path: np.random.default_rng([seed, *path]).normal(size=vocab) * 2


@functools.partial(jax.jit, static_argnums=range(4), static_argnames="drawn")
def planted(rows, depth, width, vocab, *, drawn):
    return tree.plant(jnp.ones(rows, bool), depth, width, vocab, drawn=drawn)


def grown(scores, vocab, depth, width, filters, *, drawn=False, rows=1, seed=0, least=None):
    """A tree over `scores`, the same in every row but for what is drawn."""
    keys = jax.random.split(jax.random.key(seed), depth)
    new = planted(rows, depth, width, vocab, drawn=drawn)
    grow = jax.jit(functools.partial(tree.grow))  # a trace of its own: mutations are seen
    table = functools.cache(scores)
    for d in range(depth):
        paths = node_paths(new, d)
        logits = np.stack([[table(path) for path in row] for row in paths]).astype(np.float32)
        new = grow(new, d, logits, filters, keys[d], least)
    return new


def node_path(tree_or_proposal, b, i):
    """Tokens from the root of row b to its node i; () at the root itself, -1."""
    if i < 0:
        return ()
    parent = int(tree_or_proposal.parents[b, i])
    return (*node_path(tree_or_proposal, b, parent), int(tree_or_proposal.tokens[b, i]))


def node_paths(new, depth):
    """Tokens from the root to each node of level depth - 1, of every row; the root's at depth 0."""
    if depth == 0:
        return [[()]] * new.tokens.shape[0]
    host = jax.tree.map(np.asarray, new.proposal())
    level = range((depth - 1) * new.width, depth * new.width)
    return [[node_path(host, b, i) for i in level] for b in range(new.tokens.shape[0])]


def log_softmax(x):
    return x - np.log(np.exp(x - x.max()).sum()) - x.max()


@pytest.mark.parametrize(("vocab", "width"), [(7, 3), (3, 5), (300, 4), (9, 1)])
@pytest.mark.parametrize("filters", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_every_level_keeps_the_best_children(vocab, width, filters):
    scores, depth = scores_of(3, vocab), 4
    new = grown(scores, vocab, depth, width, filters)
    level = {(): 0.0}
    valid = np.asarray(new.valid).reshape(depth, width)
    for d in range(depth):
        children = {
            (*path, x): total + log_q
            for path, total in level.items()
            for x, log_q in enumerate(log_softmax(scores(path)))
        }
        best = sorted(children, key=children.get, reverse=True)[:width]
        level = {path: children[path] for path in best}
        got = [path for path, ok in zip(node_paths(new, d + 1)[0], valid[d], strict=True) if ok]
        assert got == best
    if width > 1:  # of a chain that nothing stops it is not kept
        logprob = np.asarray(new.logprob)[0, valid[-1]]
        np.testing.assert_allclose(logprob, list(level.values()), atol=1e-5)


def test_impossible_tokens_are_never_nodes():
    """Ids the draft lacks, or that a filter removes, are at most invalid nodes."""

    def scores(path):
        return np.array([0.0, -np.inf, 1.0, -np.inf, 0.5])

    filters = make_filters(es.Sampling(temperature=1.0, top_k=2))
    for drawn, f, allowed in [(False, GREEDY, {0, 2, 4}), (True, filters, {2, 4})]:
        new = grown(scores, 5, 3, 4, f, drawn=drawn, rows=64)
        assert set(np.asarray(new.tokens)[np.asarray(new.valid)].tolist()) == allowed
        first = np.asarray(new.valid)[:, :4].sum(axis=1)
        assert (first == len(allowed)).all()


def test_a_row_stops_below_the_least_probability():
    """The level that falls below it is kept; what follows is invalid, in this row alone."""
    sure, unsure = np.array([8.0, 0, 0, 0]), np.zeros(4)
    rows = np.stack([[sure] * 2, [unsure] * 2]).astype(np.float32)
    new, grow = planted(2, 3, 2, 4, drawn=False), jax.jit(tree.grow)
    for d in range(3):
        new = grow(new, d, rows[:, : 1 + (d > 0)], GREEDY, jax.random.key(0), np.float32(0.3))
    assert np.asarray(new.valid).tolist() == [[True] * 6, [True] * 2 + [False] * 4]
    assert np.asarray(new.stopped).tolist() == [False, True]


@pytest.mark.parametrize("width", [pytest.param(1, marks=pytest.mark.slow), 3])
def test_the_draft_is_the_beam_of_its_model(width):
    """What a model drafts, its own tree pass included: positions, ancestors, rows of a batch."""
    decoder, prompts = self_drafting((1, 1), 1, 4, width=width), [[1, 2, 3, 4, 5], [9, 8]]
    run = started(decoder, prompts, 10)

    @jax.jit
    def propose(drafter, request, state):
        recent, num = loop.window(state.tokens, state.absorbed, 5), state.length - state.absorbed
        at, key = state.absorbed, jax.random.key(0)
        return drafter.propose(state.draft, request, state.cache, recent, at, num, key)[0]

    proposal = propose(decoder.drafter, run.request, run.state)
    for b, prompt in enumerate(prompts):
        level = {(): 0.0}
        for d in range(4):
            texts = [[*prompt, *path] for path in level]
            log_q = [log_softmax(x) for x in all_logits(decoder.base, texts)[:, -1]]
            children = {
                (*path, x): total + log_q[i][x]
                for i, (path, total) in enumerate(level.items())
                for x in range(len(log_q[i]))
            }
            best = sorted(children, key=children.get, reverse=True)[:width]
            level = {path: children[path] for path in best}
            assert [node_path(proposal, b, d * width + r) for r in range(width)] == best


# Drawing without replacement: sequences come out as if drawn one by one from q (Kool et al. 2019).


def without_replacement(q, k):
    """Probability of every ordered draw of k different keys of the dictionary q, {tuple: p}."""
    table = {}
    for draw in itertools.permutations(q, k):
        left, p = 1.0, 1.0
        for key in draw:
            p, left = p * q[key] / left, left - q[key]
        table[draw] = p
    return table


def test_drawn_paths_are_a_sample_without_replacement():
    """Both levels of a tree of width 2."""
    scores = scores_of(5, 3)
    new = grown(scores, 3, 2, 2, SAMPLED, drawn=True, rows=6000)
    q = {(): 1.0}
    for d in range(2):
        q = {
            (*path, x): p * np.exp(log_q)
            for path, p in q.items()
            for x, log_q in enumerate(log_softmax(scores(path)))
        }
        draws = [tuple(row) for row in node_paths(new, d + 1)]
        assert surprise(draws, without_replacement(q, 2)) < 5
        by_rank = [draw[::-1] for draw in draws]  # the test can fail
        assert surprise(by_rank, without_replacement(q, 2)) > 5


@pytest.mark.parametrize("gap", [8.0, 8.65, 8.73])
def test_a_sibling_with_hardly_any_q_left_is_still_tried(gap):
    """At temperature 0.1 the second token has a q of about 1e-38: all that is left of q."""
    filters, rows = make_filters(es.Sampling(temperature=0.1)), 8000
    scores = np.broadcast_to(np.array([0.0, -gap, -30.0], np.float32), (rows, 1, 3))
    new = planted(rows, 1, 2, 3, drawn=True)
    proposal = jax.jit(tree.grow)(new, 0, scores, filters, jax.random.key(0)).proposal()
    p = np.array([1e-30, 0.4, 0.6], np.float32)
    logits = np.broadcast_to(np.log(p) * np.float32(0.1), (rows, 3, 3))
    first = first_tokens(accept(logits, proposal, filters, jax.random.key(1)), proposal)
    assert surprise(first, dict(enumerate(p))) < 5


def first_tokens(verdict, proposal):
    """The first token that every row emits."""
    taken = np.take_along_axis(np.asarray(proposal.tokens), np.asarray(verdict.path)[:, :1], axis=1)
    none = np.asarray(verdict.num_accepted) == 0
    return np.where(none, verdict.next_token, taken[:, 0]).tolist()


# Who is whose ancestor.

#        root          entries behind the root, and what each may see:
#       /    \
#      0      1         0: 0     1: 1
#     / \      \
#    2   3      4       2: 0 2   3: 0 3   4: 1 4
#        |      |
#        5      6       5: 0 3 5          6: 1 4 6
PARENTS = [-1, -1, 0, 0, 1, 3, 4]
SEEN = [{0}, {1}, {0, 2}, {0, 3}, {1, 4}, {0, 3, 5}, {1, 4, 6}]


def proposal_of(parents, tokens, *, depth, probs=None, valid=None):
    parents, tokens = (np.atleast_2d(np.asarray(x, np.int32)) for x in (parents, tokens))
    parents = np.broadcast_to(parents, tokens.shape)
    valid = np.ones(tokens.shape, bool) if valid is None else np.asarray(valid)
    return Proposal(tokens=tokens, parents=parents, valid=valid, probs=probs, depth=depth)


def test_ancestry_by_hand():
    got = np.asarray(jax.jit(ancestry)(proposal_of(PARENTS, range(7), depth=3)))[0]
    assert [set(np.flatnonzero(row).tolist()) for row in got] == SEEN


def test_placement_by_hand():
    """Root and nodes at entries 4 to 11: all see what is before, the root, and their ancestors."""

    @jax.jit
    def placed(start, proposal):
        placement = verify.verification_placement(start, proposal)
        return placement.positions, placement.mask(14)

    found = placed(np.array([4], np.int32), proposal_of(PARENTS, range(7), depth=3))
    positions, (mask,) = map(np.asarray, found)
    assert positions.tolist() == [[4, 5, 5, 6, 6, 6, 7, 7]]
    want = [{0, 1, 2, 3, 4}] + [{0, 1, 2, 3, 4} | {5 + i for i in seen} for seen in SEEN]
    assert [set(np.flatnonzero(row).tolist()) for row in mask] == want
    chain = proposal_of([-1, 0, 1], range(3), depth=3)
    assert verify.verification_placement(jnp.asarray([4], jnp.int32), chain) is None


@functools.partial(jax.jit, static_argnames="num")
def absorbed(base, text, num):
    """The cache behind `num` tokens of every row."""
    num = jnp.asarray(num, jnp.int32)
    return es.model.forward(base, text, fresh_cache(base, text.shape[0], 16), num=num)[1]


@pytest.mark.parametrize("batch", [1, 2])
def test_a_pass_over_a_tree_equals_passes_over_its_paths(batch):
    """Logits behind every node, and the cache once a path was kept."""
    base, rng = model((1, 1)), np.random.default_rng(0)
    prompt, nodes = rng.integers(0, 61, (batch, 4)), rng.integers(0, 61, (batch, 7))
    num = (4, 3)[:batch]  # committed tokens, the root last
    proposal = proposal_of(PARENTS, nodes, depth=3)
    root = np.array([prompt[b, n - 1] for b, n in enumerate(num)], np.int32)
    cache = absorbed(base, prompt.astype(np.int32), tuple(n - 1 for n in num))
    path = np.array([[0, 3, 5]] * batch, np.int32)

    @jax.jit
    def verified(base, cache):
        scores, cache, _ = verify.verify_in_one_pass(base, cache, root, proposal)
        return scores.whole(), cache.keep(np.array(num, np.int32), path)

    scores, kept = verified(base, cache)
    for b, i in itertools.product(range(batch), range(7)):
        text = [[*prompt[b, : num[b]], *(nodes[b, j] for j in sorted(SEEN[i]))]]
        np.testing.assert_allclose(
            np.asarray(scores)[b, i + 1], all_logits(base, text)[0, -1], atol=1e-9
        )
        if i == 5:  # the path that was kept
            fresh = absorbed(base, np.array(text, np.int32), (len(text[0]),))
            for got, want in zip(entries(kept), entries(fresh), strict=True):
                got, end = got.reshape(-1, batch, *got.shape[1:])[:, b], len(text[0])
                np.testing.assert_allclose(got[:, :end], want[:, :end], atol=1e-9)


def test_a_draft_that_stopped_early_is_verified_in_a_smaller_pass():
    """Logits behind the nodes of its levels are those of the whole pass; the others' are zero."""
    base, rng = model((1, 1)), np.random.default_rng(1)
    parents, n = [-1, -1, 0, 1, 2, 2, 4, 5, 7, 7], 10  # five levels of two
    proposal = proposal_of(parents, rng.integers(0, 61, n), depth=5)
    cache, root = absorbed(base, np.array([[3, 4, 5, 6]], np.int32), (3,)), np.array([6], np.int32)
    run = jax.jit(lambda *x: verify.verify_in_one_pass(*x)[0].share)
    whole = np.asarray(run(base, cache, root, proposal))
    sizes = verify.verification_sizes(5)
    assert sizes == (1, 2, 3, 5)
    for levels in range(6):
        share = np.asarray(run(base, cache, root, proposal.replace(levels=np.int32(levels))))
        verified = 1 + 2 * next(size for size in sizes if size >= levels)
        np.testing.assert_allclose(share[:, :verified], whole[:, :verified], atol=1e-9)
        assert not share[:, verified:].any()


# Acceptance by hand.


def scores_for(table, vocab, nodes):
    """Base logits that make `table[node]` (-1: root) the argmax there."""
    targets = [table.get(i, 0) for i in range(-1, nodes)]
    return 5 * np.eye(vocab, dtype=np.float32)[None, targets]


@pytest.mark.parametrize(
    ("table", "path", "next_token", "tries"),
    [
        ({-1: 2, 1: 5, 4: 7, 6: 3}, [1, 4, 6], 3, [2, 1, 1]),  # the longest path: a bonus token
        ({-1: 1, 0: 4, 3: 0}, [0, 3], 0, [1, 2, 1]),
        ({-1: 1, 0: 4, 3: 6, 5: 8}, [0, 3, 5], 8, [1, 2, 1]),
        ({-1: 6}, [], 6, [2, 0, 0]),
        ({-1: 1, 0: 3, 2: 8}, [0, 2], 8, [1, 1, 0]),  # a leaf before the last depth
    ],
)
def test_greedy_path_by_hand(table, path, next_token, tries):
    proposal = proposal_of(PARENTS, [1, 2, 3, 4, 5, 6, 7], depth=3)
    verdict = accept(scores_for(table, 9, 7), proposal, GREEDY, jax.random.key(0))
    assert int(verdict.num_accepted[0]) == len(path)
    assert np.asarray(verdict.path)[0, : len(path)].tolist() == path
    assert int(verdict.next_token[0]) == next_token
    assert np.asarray(verdict.tries)[0].tolist() == tries


def test_an_invalid_node_hides_its_children():
    proposal = proposal_of(PARENTS, range(1, 8), depth=3, valid=[[True, False] + [True] * 5])
    verdict = accept(scores_for({-1: 2, 1: 5}, 9, 7), proposal, GREEDY, jax.random.key(0))
    assert int(verdict.num_accepted[0]) == 0 and int(verdict.next_token[0]) == 2
    assert np.asarray(verdict.tries)[0].tolist() == [1, 0, 0]


# Acceptance keeps the distribution: one step over a tree, against enumerated probabilities.

ROWS, V, WIDTH, DEPTH = 30_000, 5, 3, 2


@functools.cache
def step_tree(drawn):
    """A tree for every row (drawn) or one for all (chosen), and base logits behind each node."""
    rows = ROWS if drawn else 1
    new = grown(scores_of(11, V), V, DEPTH, WIDTH, SAMPLED, drawn=drawn, rows=rows)
    base = functools.cache(scores_of(12, V))
    paths = [node_paths(new, d) for d in range(DEPTH + 1)]
    rows = [[base(path) for d in range(DEPTH + 1) for path in paths[d][b]] for b in range(rows)]
    logits = np.asarray(rows, np.float32)
    spread = lambda x: np.broadcast_to(x, (ROWS, *x.shape[1:]))  # noqa: E731
    return jax.tree.map(spread, jax.device_get(new.proposal())), spread(logits), base


def step_surprise(drawn):
    """First two tokens that a step emits, against p; a third for what came after two."""
    proposal, logits, base = step_tree(drawn)
    verdict = jax.jit(functools.partial(verify.accept_path))(
        logits, proposal, SAMPLED, jax.random.key(7)
    )
    m, last = np.asarray(verdict.num_accepted), np.asarray(verdict.next_token)
    path = np.take_along_axis(np.asarray(proposal.tokens), np.asarray(verdict.path), axis=1)
    texts = [(*path[b, : m[b]].tolist(), int(last[b])) for b in range(ROWS)]
    worst = 0.0
    for length in range(DEPTH + 1):
        # Whether a token comes depends on those before it alone: p holds among those that came.
        groups = collections.defaultdict(list)
        for text in texts:
            if len(text) > length:
                groups[text[:length]].append(text[length])
        for prefix, tokens in groups.items():
            if len(tokens) >= 200:
                p = np.exp(log_softmax(base(prefix)))
                worst = max(worst, surprise(tokens, dict(enumerate(p))))
    return worst


@pytest.mark.parametrize("drawn", [False, True], ids=["chosen", "drawn"])
def test_a_step_over_a_tree_keeps_the_distribution(drawn):
    """About 30 groups are looked at: a false alarm once in 3000 times."""
    assert step_surprise(drawn) < 5


@pytest.mark.parametrize(("kind", "broken"), BROKEN_RULES)
def test_broken_rules_are_noticed(monkeypatch, kind, broken):
    mutate(monkeypatch, verify, *BROKEN_RULES[kind, broken])
    assert step_surprise(kind == "drawn") > 5


def test_siblings_by_likelihood_would_be_noticed():
    """Drawn siblings tried by q instead of in drawing order bias the outcome."""
    proposal, logits, _ = step_tree(True)
    q = np.take_along_axis(
        np.asarray(proposal.probs),
        (np.asarray(proposal.parents) + 1)[..., None],
        axis=1,
    )
    own = np.take_along_axis(q, np.asarray(proposal.tokens)[..., None], axis=-1)[..., 0]
    order = np.argsort(-own[:, :WIDTH], axis=1, kind="stable")
    first = np.take_along_axis(np.asarray(proposal.tokens)[:, :WIDTH], order, axis=1)
    only = proposal_of([-1] * WIDTH, first, depth=1, probs=np.asarray(proposal.probs)[:, :1])
    fair = only.replace(tokens=np.asarray(proposal.tokens)[:, :WIDTH])
    p = dict(enumerate(np.exp(log_softmax(np.float64(logits[0, 0])))))

    def emitted(proposal):
        verdict = accept(logits[:, : WIDTH + 1], proposal, SAMPLED, jax.random.key(3))
        return first_tokens(verdict, proposal)

    assert surprise(emitted(fair), p) < 5 < surprise(emitted(only), p)


def test_a_duplicate_sibling_is_noticed(monkeypatch):
    """Should growing ever repeat a token among siblings, both rules would emit another text."""
    repeat_siblings(monkeypatch)
    step_tree.cache_clear()
    try:
        assert min(step_surprise(drawn) for drawn in (False, True)) > 5
    finally:
        step_tree.cache_clear()

"""Prompt lookup: places and trees against a slow reference, worked examples, losslessness."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from decoders import autoregressive, model, surprise
from hypothesis import given, settings
from hypothesis import strategies as st
from test_distribution import FILTERED, PLAIN, tiny_decoder, tiny_table

import easyspec_jax as es
from easyspec_jax.drafters import prompt_lookup

ROOM = 40  # S of the texts here
look_up = functools.partial(jax.jit, static_argnames=("max_ngram", "depth", "width"))(
    lambda tokens, length, *, max_ngram, depth, width: prompt_lookup.look_up(
        tokens, length, max_ngram, depth=depth, width=width
    )
)
share = jax.jit(prompt_lookup.share_prefixes)


def slow_chains(text, max_ngram, depth, width):
    """Chains of at most `depth` tokens, best first, by trying every place and every n."""
    places = []
    for j in range(1, len(text)):
        found = [n for n in range(1, max_ngram + 1) if n <= j and text[j - n : j] == text[-n:]]
        if found:
            places.append((max(found), min(len(text) - j, depth), j))
    chains = []
    for *_, j in sorted(places, reverse=True):
        chain = text[j : j + depth]
        if not any(old[: len(chain)] == chain for old in chains):
            chains.append(chain)
    return chains[:width]


def slow_tree(chains, depth, width):
    """{path of tokens: node} of the tree of these chains."""
    nodes = {}
    for r, chain in enumerate(chains):
        for d in range(len(chain)):
            nodes.setdefault(tuple(chain[: d + 1]), d * width + r)
    return nodes


def found(text, max_ngram=3, depth=3, width=1, scratch=0):
    """What `look_up` finds behind one text, scratch behind it, as arrays without the batch."""
    tokens = np.full((1, ROOM), scratch, np.int32)
    tokens[0, : len(text)] = text
    sizes = {"max_ngram": max_ngram, "depth": depth, "width": width}
    chains, known = look_up(tokens, np.array([len(text)], np.int32), **sizes)
    return np.asarray(chains)[0], np.asarray(known)[0], share(chains, known)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ([5, 1, 2, 3, 7, 8, 9, 1, 2, 3], [7, 8, 9]),  # what followed 1 2 3
        ([1, 2, 3, 7, 4, 9, 9, 2, 3, 8, 4, 9, 1, 2, 3], [7, 4, 9]),  # 3 tokens before a later 2
        ([2, 3, 7, 4, 9, 2, 3, 8, 4, 9, 2, 3], [8, 4, 9]),  # the most recent of two
        ([4, 6, 1, 5, 4, 2, 4], [6, 1, 5]),  # behind the later 4 only two tokens are known
        ([6, 6, 6, 6, 6, 6, 6], [6, 6, 6]),  # overlapping itself, 3 known
        ([6, 6], [6]),  # only one token is known
        ([1, 2, 1], [2, 1]),
        ([1, 2, 3], []),  # a new token: nothing
        ([1], []),
    ],
)
def test_what_followed_is_drafted(text, expected):
    chains, known, proposal = found(text, scratch=text[-1])  # scratch is no text
    assert chains[0][known[0]].tolist() == expected
    assert known[0].tolist() == [i < len(expected) for i in range(3)]
    assert proposal.depth == 3 and proposal.probs is None and proposal.levels is None
    assert proposal.parents.tolist() == [[-1, 0, 1]]
    assert proposal.valid[0].tolist() == known[0].tolist()


def test_chains_share_what_they_begin_with():
    """Behind 1: 2 3 4 (twice), 2 3 5 and 6 1 2; the nodes of the tree, level by level."""
    text = [1, 2, 3, 4, 1, 2, 3, 5, 1, 2, 3, 4, 1, 6, 1]
    chains, known, proposal = found(text, max_ngram=1, width=3)
    assert chains.tolist() == [[2, 3, 4], [2, 3, 5], [6, 1, 0]] and known.sum() == 8
    assert proposal.tokens.tolist() == [[2, 2, 6, 3, 3, 1, 4, 5, 0]]
    assert proposal.parents.tolist() == [[-1, -1, -1, 0, 0, 2, 3, 3, 5]]
    valid = [True, False, True, True, False, True, True, True, False]
    assert proposal.valid.tolist() == [valid]
    assert proposal.depth == 3


@settings(max_examples=300, deadline=None)
@given(
    text=st.lists(st.integers(0, 3), min_size=1, max_size=ROOM)
    | st.lists(st.integers(0, 1), min_size=1, max_size=ROOM)
    | st.builds(lambda m, n: (m * n)[:ROOM], st.lists(st.integers(0, 5), min_size=1), st.just(9)),
    max_ngram=st.sampled_from([1, 3]),
    width=st.sampled_from([1, 2, 3]),
)
def test_lookup_is_that_of_a_slow_reference(text, max_ngram, width):
    depth = 4
    chains, known, proposal = found(text, max_ngram, depth, width, scratch=text[-1])
    want = slow_chains(text, max_ngram, depth, width)
    assert [c[k].tolist() for c, k in zip(chains, known, strict=True) if k.any()] == want
    assert all(k.tolist() == sorted(k.tolist(), reverse=True) for k in known)
    tokens, parents, valid = (
        np.asarray(x)[0].tolist() for x in (proposal.tokens, proposal.parents, proposal.valid)
    )
    paths = {}
    for i, (token, parent) in enumerate(zip(tokens, parents, strict=True)):
        if valid[i]:
            path = ((*paths[parent], token)) if parent >= 0 else (token,)
            assert path not in paths.values()  # no two siblings with one token
            paths[i] = path
        assert (parent + width) // width == i // width  # on the level before, -1 at the first
    assert {path: i for i, path in paths.items()} == slow_tree(want, depth, width)


def test_rows_of_a_batch_are_looked_up_by_themselves():
    texts = [[1, 2, 3, 4, 1], [7], [5, 5, 5, 9, 5, 5]]
    tokens = np.zeros((3, ROOM), np.int32)
    for row, text in zip(tokens, texts, strict=True):
        row[: len(text)] = text
    lengths = np.array([len(t) for t in texts], np.int32)
    chains, known = look_up(tokens, lengths, max_ngram=3, depth=3, width=2)
    for b, text in enumerate(texts):
        alone = found(text, width=2)
        np.testing.assert_array_equal(known[b], alone[1])
        np.testing.assert_array_equal(np.where(known[b], chains[b], 0), alone[0] * alone[1])


def test_a_call_forgets_what_lies_behind_its_start():
    """State is addressed by position: a rejected draft and a longer earlier text leave nothing."""
    request = es.Request(
        filters=es.sampling.make_filters(es.Sampling()),
        eos_ids=jnp.full((1,), -1, jnp.int32),
        key=jax.random.key(0),
        num_draft_tokens=2,
        vocab_size=10,
    )
    drafter, i32 = es.PromptLookupDrafter(), functools.partial(jnp.asarray, dtype=jnp.int32)
    state = drafter.init(1, 16, request)
    text = i32([[1, 2, 3, 4, 3, 9, 3, 9]])
    state = jax.jit(drafter.prefill)(state, request, text, i32([0]), i32([8]), None)
    propose, base, key = jax.jit(drafter.propose), jnp.float32(7), jax.random.key(0)
    proposal, state, cache = propose(
        state, request, base, i32([[3, 0, 0]]), i32([2]), i32([1]), key
    )
    assert not proposal.valid.any() and cache == base  # 1 2 3, whatever stood behind it
    recent = i32([[7, 1, 2]]), i32([3]), i32([3])
    proposal, state, _ = propose(state, request, base, *recent, key)
    assert proposal.tokens.tolist() == [[3, 7]] and proposal.valid.all()


@functools.cache
def looking_up():
    drafter = es.PromptLookupDrafter(max_ngram=2)
    return es.Decoder(model((1, 1)), drafter, num_draft_tokens=3, tree_width=3)


# test_drafters.py has a few
@pytest.mark.slow
@settings(max_examples=20, deadline=None)
@given(
    motifs=st.lists(st.lists(st.integers(0, 60), min_size=1, max_size=6), min_size=2, max_size=2),
    repeats=st.integers(1, 5),
    new=st.integers(1, 30),
    eos=st.lists(st.integers(0, 60), max_size=3),
)
def test_greedy_text_of_repetitive_prompts_is_autoregressions(motifs, repeats, new, eos):
    prompts, options = [m * repeats for m in motifs], {"max_new_tokens": new, "eos_ids": eos}
    want = autoregressive().generate(prompts, **options)
    assert looking_up().generate(prompts, **options).tokens == want.tokens


def test_a_text_that_repeats_itself_takes_few_steps():
    """Left alone for long enough, greedy text of a small model goes round in circles."""
    prompts = [[30, 37, 59], [2, 46, 44]]
    loops = autoregressive().generate(prompts, max_new_tokens=60).tokens
    ends = [p + t for p, t in zip(prompts, loops, strict=True)]
    out = looking_up().generate(ends, max_new_tokens=20)
    assert out.tokens == autoregressive().generate(ends, max_new_tokens=20).tokens
    said = any(ends[0][i : i + 20] == out.tokens[0] for i in range(len(ends[0])))
    assert said and out.stats.rows[0].steps == 20 / (3 + 1)
    assert out.stats.nodes_drafted <= 9 * out.stats.steps


@functools.cache
def tiny_lookup(width):
    return es.Decoder(
        tiny_decoder().base, es.PromptLookupDrafter(), num_draft_tokens=2, tree_width=width
    )


@pytest.mark.slow
@pytest.mark.parametrize(("width", "s"), [(1, PLAIN), (2, FILTERED)])
def test_sampled_sequences_follow_the_base(width, s):
    """Drafts are likely behind this prompt: every token but one has occurred."""
    found, stats = lookup_surprise(tiny_lookup(width), s)
    assert found < 5
    assert stats.nodes_drafted > stats.steps and stats.nodes_accepted > 200


def lookup_surprise(decoder, s):
    prompt = (3, 1, 2, 0, 1, 2, 4, 1)  # behind 1: 2 4, and 2 0
    out = decoder.generate(np.tile([prompt], (4096, 1)), max_new_tokens=3, sampling=s, seed=5)
    return surprise(map(tuple, out.tokens), tiny_table(s, prompt)), out.stats


def test_an_ending_that_is_too_short_finds_nothing():
    text, length = jnp.array([[7, 8, 1, 2, 5, 6, 1, 2]], jnp.int32), jnp.array([8], jnp.int32)
    for least in (1, 2, 3):
        chains, known = prompt_lookup.look_up(text, length, 3, least, depth=2, width=1)
        assert known.all() if least < 3 else not known.any()
        assert least == 3 or chains.tolist() == [[[5, 6]]]


@pytest.mark.parametrize("min_ngram", [0, 4, 1.5, None])
def test_a_bad_min_ngram_is_refused(min_ngram):
    with pytest.raises(ValueError, match=r"min_ngram must be a whole number in 1 .. max_ngram=3,"):
        es.PromptLookupDrafter(min_ngram=min_ngram)


@pytest.mark.parametrize("max_ngram", [0, -1, 2.5, True, None, 65])
def test_a_bad_max_ngram_is_refused(max_ngram):
    with pytest.raises(ValueError, match=r"max_ngram must be a whole number in 1 .. 64, got"):
        es.PromptLookupDrafter(max_ngram=max_ngram)


def test_a_probability_to_stop_at_is_refused():
    decoder = es.Decoder(model((1, 1)), es.PromptLookupDrafter(), min_draft_probability=0.3)
    for ask in (decoder.memory, lambda: decoder.generate([[1]], max_new_tokens=2)):
        with pytest.raises(ValueError, match="prompt lookup has no probabilities that drafting"):
            ask()


def test_it_takes_hardly_any_memory():
    budget = looking_up().memory(batch=3, prompt_len=50, max_new_tokens=10)
    assert budget["draft weights"] == 0
    size = looking_up().capacity(60)
    assert 4 * 3 * size <= budget["draft cache"] < 4 * 3 * size + 64

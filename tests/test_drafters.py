"""What every way of drafting owes the decoding loop: the same tests for all of them."""

import functools
import itertools

import pytest
from decoders import CONFIG, NEW, PROMPTS, autoregressive, joined, model
from hypothesis import given, settings
from hypothesis import strategies as st

import easyspec_jax as es

# By name: what makes the drafter for a base, and a (γ, w) of each shape that it can draft.
DRAFTERS = {
    "prompt-lookup": (lambda base: es.PromptLookupDrafter(), [(4, 1), (3, 2)]),
}
CHAINS = [(name, shapes[0]) for name, (_, shapes) in DRAFTERS.items()]
SHAPES = [(name, shape) for name, (_, shapes) in DRAFTERS.items() for shape in shapes]
REPETITIVE = [[4, 9, 17, 4, 9, 33, 4, 9], [5, 6] * 6, [60]]


@functools.cache
def drafting(name, shape, mesh_shape=(1, 1)):
    base = model(mesh_shape)
    return es.Decoder(base, DRAFTERS[name][0](base), num_draft_tokens=shape[0], tree_width=shape[1])


@functools.cache
def expected(prompts, **options):
    prompts = [list(p) for p in prompts]
    return autoregressive().generate(prompts, max_new_tokens=NEW, **options).tokens


def frozen(prompts):
    return tuple(map(tuple, prompts))


@pytest.mark.parametrize("mesh_shape", [(1, 1), (4, 2)])
@pytest.mark.parametrize(("name", "shape"), SHAPES)
def test_greedy_text_is_autoregressions(name, shape, mesh_shape):
    decoder = drafting(name, shape, mesh_shape)
    for prompts in (PROMPTS, REPETITIVE):
        out = decoder.generate(prompts, max_new_tokens=NEW)
        assert out.tokens == expected(frozen(prompts))
        assert out.stats.emitted == NEW * len(prompts)
        assert out.stats.nodes_accepted <= out.stats.nodes_drafted
        assert out.stats.nodes_drafted <= shape[0] * shape[1] * out.stats.steps
    assert out.stats.nodes_accepted > 0  # or nothing was tested


@pytest.mark.parametrize(("name", "shape"), SHAPES)
@settings(max_examples=12, deadline=None)
@given(
    prompts=st.lists(st.lists(st.integers(0, 60), min_size=1, max_size=30), min_size=3, max_size=3),
    new=st.integers(1, 30),
    eos=st.lists(st.integers(0, 60), max_size=3),
)
def test_greedy_text_is_autoregressions_whatever_is_asked(name, shape, prompts, new, eos):
    options = {"max_new_tokens": new, "eos_ids": eos}
    want, got = (d.generate(prompts, **options) for d in (autoregressive(), drafting(name, shape)))
    assert got.tokens == want.tokens and got.stats.emitted == want.stats.emitted


@pytest.mark.parametrize(("name", "shape"), SHAPES)
def test_every_place_to_stop(name, shape):
    decoder, prompt = drafting(name, shape), [REPETITIVE[0]]
    (whole,) = autoregressive().generate(prompt, max_new_tokens=NEW).tokens
    for token in dict.fromkeys(whole):
        out = decoder.generate(prompt, max_new_tokens=NEW, eos_ids=[token])
        assert out.tokens[0] == whole[: whole.index(token) + 1]
        assert sum(out.stats.accepted_per_depth) <= out.stats.emitted == len(out.tokens[0])


@pytest.mark.parametrize(("name", "shape"), SHAPES)
def test_finished_rows_never_change(name, shape):
    decoder, whole = drafting(name, shape), expected(frozen(REPETITIVE))
    eos = whole[0][3]
    rows = decoder.generate(REPETITIVE, max_new_tokens=NEW, eos_ids=[eos]).tokens
    for row, long in zip(rows, whole, strict=True):
        assert row == (long[: long.index(eos) + 1] if eos in long else long)


@pytest.mark.parametrize(("name", "shape"), CHAINS)
def test_the_end_of_the_context_stops(name, shape):
    prompt = [[1] * 90]
    out = drafting(name, shape).generate(prompt, max_new_tokens=50)
    assert len(out.tokens[0]) == CONFIG.max_len - 90
    assert out.tokens == autoregressive().generate(prompt, max_new_tokens=50).tokens


@pytest.mark.parametrize(("name", "shape"), SHAPES)
@pytest.mark.parametrize("s", [es.Sampling(), es.Sampling(temperature=0.9, top_k=30)], ids=str)
def test_a_stream_is_what_generate_gives(name, shape, s):
    decoder, session = drafting(name, shape), es.Session()
    options = {"max_new_tokens": NEW, "sampling": s, "seed": 3}
    want = decoder.generate([REPETITIVE[0]], **options)
    pieces = list(decoder.stream(REPETITIVE[0], session=session, **options))
    assert joined(pieces) == want.tokens[0]
    assert session.stats == want.stats
    assert session.drafter_report == want.drafter_report
    assert sum(p.num_accepted for p in pieces) == sum(want.stats.accepted_per_depth)


@pytest.mark.parametrize("mesh_shape", [(1, 1), (4, 2)])
@pytest.mark.parametrize(("name", "shape"), CHAINS)
def test_a_session_continues_and_changes_its_conversation(name, shape, mesh_shape):
    """As a fresh start would, and from where an abandoned stream was left."""
    decoder, session = drafting(name, shape, mesh_shape), es.Session(max_len=80)
    assert session.drafter_report == {}
    pieces = decoder.stream(REPETITIVE[0], max_new_tokens=30, session=session)
    text = [*REPETITIVE[0], *joined(itertools.islice(pieces, 2))]
    for turn in ([*text, 4, 9], [*REPETITIVE[0][:5], 11, 12]):
        got = joined(decoder.stream(turn, max_new_tokens=12, session=session))
        assert got == autoregressive().generate([turn], max_new_tokens=12).tokens[0]

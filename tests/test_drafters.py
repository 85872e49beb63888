"""What every way of drafting owes the decoding loop: the same tests for all of them."""

import dataclasses
import functools
import itertools
import math
import pathlib
import tempfile
from collections.abc import Callable

import pytest
from decoders import CONFIG, GROUPS, NEW, PROMPTS, autoregressive, joined, model
from eagle_heads import frequent, write_published
from hypothesis import given, settings
from hypothesis import strategies as st

import easyspec_jax as es


@dataclasses.dataclass(frozen=True)
class Way:
    """One way to draft."""

    make: Callable[[es.Model], es.Drafter]  # for a base
    shapes: tuple[tuple[int, int], ...]  # (γ, w) to try, a chain first
    batches: bool = True  # whether it drafts for several rows at once
    slow: bool = False  # its own tests decode with it too


def mesh_of(base):
    return tuple(base.layout.mesh.shape.values())


def eagle(base):
    ids = frequent(expected(frozen(PROMPTS)) + expected(frozen(REPETITIVE)))
    with tempfile.TemporaryDirectory() as folder:
        return es.EagleDrafter.load(write_published(pathlib.Path(folder), base.config, ids), base)


WAYS = {
    "eagle": Way(eagle, ((3, 1), (2, 3)), slow=True),
    "fallback": Way(
        lambda base: es.FallbackDrafter(es.PromptLookupDrafter(min_ngram=2), eagle(base)),
        ((4, 1),),
        slow=True,
    ),
    "early-exit": Way(lambda base: es.EarlyExitDrafter(base), ((4, 1),), batches=False),
    "polybasic": Way(
        lambda base: es.PolybasicDrafter(
            model(mesh_of(base), seed=3),
            es.LayerParallelDrafter(model(mesh_of(base), group_size=GROUPS)),
            mu=3,
        ),
        ((5, 1),),
        slow=True,
    ),
    "prompt-lookup": Way(lambda base: es.PromptLookupDrafter(), ((4, 1), (3, 2))),
}
CHAINS = [(name, way.shapes[0]) for name, way in WAYS.items()]
SHAPES = [(name, shape) for name, way in WAYS.items() for shape in way.shapes]
BATCHED = [(name, shape) for name, shape in SHAPES if WAYS[name].batches]
DRAWN = es.Sampling(temperature=0.9, top_k=30)
GREEDY = es.Sampling(temperature=0.0)
STREAMS = [
    (name, way.shapes[-1], DRAWN if name == "prompt-lookup" else GREEDY)
    for name, way in WAYS.items()
]
REPETITIVE = [[4, 9, 17, 4, 9, 33, 4, 9], [5, 6] * 6, [60]]
LONG = REPETITIVE[0] * 9  # has room for NEW tokens


def of_ways(pairs):
    """Parameters of a test of several ways, (name, shape) and more each."""
    slow = {name: [pytest.mark.slow] * way.slow for name, way in WAYS.items()}
    return [pytest.param(*pair, marks=slow[pair[0]]) for pair in pairs]


@functools.cache
def drafting(name, shape, mesh_shape=(1, 1)):
    base = model(mesh_shape)
    return es.Decoder(base, WAYS[name].make(base), num_draft_tokens=shape[0], tree_width=shape[1])


def answers(name, decoder, prompts, **options):
    """The new tokens of every prompt, and the statistics of each call."""
    batches = [prompts] if WAYS[name].batches else [[p] for p in prompts]
    outs = [decoder.generate(batch, **options) for batch in batches]
    return [tokens for out in outs for tokens in out.tokens], [out.stats for out in outs]


@functools.cache
def expected(prompts):
    return autoregressive().generate(list(map(list, prompts)), max_new_tokens=NEW).tokens


def frozen(prompts):
    return tuple(map(tuple, prompts))


@pytest.mark.parametrize(
    ("name", "shape", "mesh_shape"),
    [
        # the others' own tests run them on a mesh
        *of_ways((*way, (1, 1)) for way in SHAPES),
        ("prompt-lookup", (3, 2), (4, 2)),
    ],
)
def test_greedy_text_is_autoregressions(name, shape, mesh_shape):
    decoder, accepted = drafting(name, shape, mesh_shape), 0
    for prompts in (PROMPTS, REPETITIVE):
        tokens, counted = answers(name, decoder, prompts, max_new_tokens=NEW)
        assert tokens == expected(frozen(prompts))
        assert sum(stats.emitted for stats in counted) == NEW * len(prompts)
        for stats in counted:
            assert stats.nodes_accepted <= stats.nodes_drafted <= stats.steps * math.prod(shape)
            accepted += stats.nodes_accepted
    assert accepted > 0  # or nothing was tested


@pytest.mark.parametrize(("name", "shape"), of_ways(SHAPES))
@settings(max_examples=12, deadline=None)
@given(
    prompts=st.lists(st.lists(st.integers(0, 60), min_size=1, max_size=20), min_size=3, max_size=3),
    new=st.integers(1, 30),
    eos=st.lists(st.integers(0, 60), max_size=3),
)
def test_greedy_text_is_autoregressions_whatever_is_asked(name, shape, prompts, new, eos):
    options = {"max_new_tokens": new, "eos_ids": eos}
    want = autoregressive().generate(prompts, **options).tokens
    tokens, counted = answers(name, drafting(name, shape), prompts, **options)
    assert tokens == want
    assert sum(stats.emitted for stats in counted) == sum(map(len, want))


@pytest.mark.parametrize(("name", "shape"), of_ways(SHAPES))
def test_every_place_to_stop(name, shape):
    """The end of the context too."""
    decoder = drafting(name, shape)
    (whole,) = autoregressive().generate([LONG], max_new_tokens=50).tokens
    assert decoder.generate([LONG], max_new_tokens=50).tokens == [whole]
    assert len(whole) == CONFIG.max_len - len(LONG) == NEW
    for token in dict.fromkeys(whole):
        out = decoder.generate([LONG], max_new_tokens=50, eos_ids=[token])
        assert out.tokens[0] == whole[: whole.index(token) + 1]
        assert sum(out.stats.accepted_per_depth) <= out.stats.emitted == len(out.tokens[0])


@pytest.mark.parametrize(("name", "shape"), of_ways(BATCHED))
def test_finished_rows_never_change(name, shape):
    decoder, whole = drafting(name, shape), expected(frozen(REPETITIVE))
    eos = whole[0][3]
    rows = decoder.generate(REPETITIVE, max_new_tokens=NEW, eos_ids=[eos]).tokens
    for row, long in zip(rows, whole, strict=True):
        assert row == (long[: long.index(eos) + 1] if eos in long else long)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "shape", "s"), STREAMS)
def test_a_stream_is_what_generate_gives(name, shape, s):
    decoder, session = drafting(name, shape), es.Session()
    options = {"max_new_tokens": NEW, "sampling": s, "seed": 3}
    want = decoder.generate([LONG], **options)
    pieces = list(decoder.stream(LONG, session=session, **options))
    assert joined(pieces) == want.tokens[0]
    assert session.stats == want.stats
    assert session.drafter_report == want.drafter_report
    assert sum(p.num_accepted for p in pieces) == sum(want.stats.accepted_per_depth)


@pytest.mark.parametrize(
    ("name", "shape", "mesh_shape"),
    [
        *of_ways((*way, (1, 1)) for way in CHAINS),
        # its state has those of others in it
        pytest.param("polybasic", (5, 1), (4, 2), marks=pytest.mark.slow),
    ],
)
def test_a_session_continues_and_changes_its_conversation(name, shape, mesh_shape):
    """As a fresh start would, and from where an abandoned stream was left."""
    decoder, session = drafting(name, shape, mesh_shape), es.Session(max_len=96)
    assert session.drafter_report == {}
    pieces = decoder.stream(REPETITIVE[0], max_new_tokens=30, session=session)
    text = [*REPETITIVE[0], *joined(itertools.islice(pieces, 2))]
    for turn in ([*text, 4, 9], [*REPETITIVE[0][:5], 11, 12]):
        got = joined(decoder.stream(turn, max_new_tokens=12, session=session))
        assert got == autoregressive().generate([turn], max_new_tokens=12).tokens[0]

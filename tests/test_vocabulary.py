"""Drafts with another tokenizer: which tokens are the same, and that the text stays the base's."""

import dataclasses
import functools
import json

import jax.numpy as jnp
import numpy as np
import pytest
from decoders import (
    CONFIG,
    NEW,
    PROMPTS,
    SMALL,
    autoregressive,
    model,
    surprise,
)
from test_distribution import FILTERED, PAIR, PLAIN, TINY, many_rows, tiny_decoder, tiny_table

import easyspec_jax as es
from easyspec_jax import vocabulary
from easyspec_jax.vocabulary import UNKNOWN, token_bytes

slow = pytest.mark.slow
CONTENTS = {"special": True, "single_word": False, "lstrip": False, "rstrip": False}


def description(vocab, decoder, added=(), **model):
    """What a tokenizer.json says; `added` are (content, special) by id."""
    tokens = [
        {"id": i, "content": text, **CONTENTS, "normalized": False, "special": special}
        for i, (text, special) in dict(added).items()
    ]
    model = {"type": "BPE", "vocab": vocab, "merges": [], **model}
    return {"version": "1.0", "model": model, "decoder": decoder, "added_tokens": tokens}


BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True}
PIECES = {
    "type": "Sequence",
    "decoders": [
        {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ],
}
METASPACE = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always"}


def test_the_bytes_of_byte_level_tokens():
    vocab = ["<|end|>", "Ġthe", "Ċ", "cafÃ©", "Ãģ", "  "]
    added = {0: ("<|end|>", True), 5: ("  ", False), 6: ("é", False)}
    about = description({t: i for i, t in enumerate(vocab)}, BYTE_LEVEL, added)
    assert token_bytes(about, "it") == {
        1: b" the", 2: b"\n", 3: "café".encode(), 4: b"\xc3\x81", 5: b"  ", 6: "é".encode(),
    }  # fmt: skip


@pytest.mark.parametrize("decoder", [PIECES, METASPACE])
def test_the_bytes_of_pieces(decoder):
    vocab = ["<unk>", "</s>", "<0x0A>", "<0xE2>", "▁the", "café", "▁▁", "<0x0>"]
    added = {1: ("</s>", True)}
    about = description({t: i for i, t in enumerate(vocab)}, decoder, added, unk_token="<unk>")
    want = {2: b"\n", 3: b"\xe2", 4: b" the", 5: "café".encode(), 6: b"  ", 7: b"<0x0>"}
    assert token_bytes(about, "it") == want
    scored = [[token, -1.0] for token in vocab]
    unigram = description(scored, decoder, added, type="Unigram", unk_id=0)
    assert token_bytes(unigram, "it") == want


def write(folder, about, **config):
    folder.mkdir()
    (folder / "tokenizer.json").write_text(json.dumps(about))
    llama = {"model_type": "llama", "hidden_size": 8, "num_attention_heads": 2, "vocab_size": 99}
    llama |= {"intermediate_size": 8, "num_hidden_layers": 1, "max_position_embeddings": 64}
    (folder / "config.json").write_text(json.dumps(llama | config))
    return folder


def listed(*tokens):
    return {token: i for i, token in enumerate(tokens)}


def test_tokens_are_shared_by_their_bytes_and_special_ones_by_what_they_do(tmp_path):
    base = write(
        tmp_path / "base",
        description(
            listed("<unk>", "<s>", "</s>", "<0x0A>", "<0x41>", "▁the", "A", "▁other", "ü", "<pad>"),
            PIECES,
            {i: (t, True) for i, t in ((0, "<unk>"), (1, "<s>"), (2, "</s>"), (9, "<pad>"))},
        ),
        bos_token_id=1,
        eos_token_id=2,
    )
    draft = write(
        tmp_path / "draft",
        description(
            listed("<end>", "Ġthe", "A", "Ċ", "er", "Ã", "<s>", "</s>", "<begin>", "her"),
            BYTE_LEVEL,
            {0: ("<end>", True), 6: ("<s>", True), 8: ("<begin>", True)},
        ),
        bos_token_id=8,
        eos_token_id=[0],
    )
    shared = es.shared_vocabulary(base, draft)
    assert (shared.base, shared.draft) == (None, None)  # no checkpoints, whose hashes are known
    # the end, the newline, " the", "A"; neither "A" as a byte nor <s>, which is only its name
    assert np.flatnonzero(shared.shared).tolist() == [2, 3, 5, 6]
    # " other" ends in "her"; nothing ends as "ü" does
    u = UNKNOWN
    assert shared.reading.tolist() == [u, 8, 0, 3, 2, 1, 2, 9, u, u]
    assert (shared.num_shared, shared.covered([5, 6, 7, 1000])) == (4, 0.5)


def test_what_cannot_be_compared_is_refused_in_a_sentence(tmp_path):
    words = {"type": "WordLevel", "vocab": {"a": 0, "[UNK]": 1}, "unk_token": "[UNK]"}
    about = {"version": "1.0", "model": words, "added_tokens": []}
    write(tmp_path / "words", about)
    numbers = [str(n) for n in range(100)]
    one, other = ([f"{n}{end}" for n in numbers] for end in "ab")
    write(tmp_path / "one", description(listed(*one, "x"), BYTE_LEVEL))
    write(tmp_path / "other", description(listed(*other, "x"), PIECES))
    (tmp_path / "none").mkdir()
    for draft, sentence in (
        ("words", "the tokens of .*words stand for no known bytes"),
        ("other", "share 1 of 101 tokens: nearly nothing could be drafted"),
        ("none", "has no tokenizer"),
    ):
        with pytest.raises(ValueError, match=sentence):
            es.shared_vocabulary(tmp_path / "one", tmp_path / draft)


def foreign(num_shared, size, base_size=CONFIG.vocab_size, seed=0, **hashes):
    """A made-up vocabulary: so many tokens of the base are the draft's, in another order."""
    rng = np.random.default_rng(seed)
    reading = rng.permutation(size)[:base_size].astype(np.int32)
    shared = np.zeros(base_size, bool)
    shared[rng.permutation(base_size)[:num_shared]] = True
    return es.SharedVocabulary(reading=reading, shared=shared, **hashes)


@functools.cache
def stranger(mesh_shape=(1, 1), *, gamma=2, width=1, num_shared=50, **options):
    draft = model(mesh_shape, group_size=2, seed=7, config=SMALL)
    drafter = es.LayerParallelDrafter(
        draft, vocabulary=foreign(num_shared, SMALL.vocab_size), **options
    )
    return es.Decoder(model(mesh_shape), drafter, num_draft_tokens=gamma, tree_width=width)


def translated(num_shared, config=CONFIG, **options):
    """The base as its own draft, but for its ids, of which there are six more."""
    base, size = model((1, 1), config=config), CONFIG.vocab_size + 6
    shared = foreign(num_shared, size)
    draft = model((1, 1), config=dataclasses.replace(config, vocab_size=size))
    at = shared.reading
    params = base.params.replace(
        embed=draft.params.embed.at[at].set(base.params.embed),
        lm_head=draft.params.lm_head.at[:, at].set(base.params.lm_head),
    )
    drafter = es.LayerParallelDrafter(draft.replace(params=params), vocabulary=shared)
    return es.Decoder(base, drafter, **options)


def test_the_base_in_another_writing_is_always_right():
    decoder = translated(CONFIG.vocab_size, num_draft_tokens=3)
    out = decoder.generate(PROMPTS, max_new_tokens=NEW)
    assert out.tokens == autoregressive().generate(PROMPTS, max_new_tokens=NEW).tokens
    assert out.stats.tokens_per_step == 4


@slow
def test_the_base_in_another_writing_drafts_the_same_trees():
    config, options = dataclasses.replace(CONFIG, num_layers=1), {"num_draft_tokens": 3}
    base = model((1, 1), config=config)
    plain = es.Decoder(base, es.LayerParallelDrafter(base), tree_width=2, **options)
    other = translated(CONFIG.vocab_size, config, tree_width=2, **options)
    want, got = (
        x.generate(PROMPTS, max_new_tokens=NEW, sampling=FILTERED, seed=2) for x in (plain, other)
    )
    assert got.tokens == want.tokens and got.stats == want.stats


@slow
def test_greedy_text_is_autoregressions():
    """A level has fewer tokens than nodes: at most two children of every node."""
    decoder = stranger((4, 2), gamma=2, width=3, num_shared=2)
    out = decoder.generate(PROMPTS, max_new_tokens=NEW)
    assert out.tokens == autoregressive().generate(PROMPTS, max_new_tokens=NEW).tokens
    assert out.stats.nodes_drafted == out.stats.steps * (2 + 3)


@slow
@pytest.mark.parametrize("kind", ["polybasic", "uncalibrated, stops early"])
def test_greedy_text_is_autoregressions_wherever_it_stands(kind):
    base = model((1, 1))
    draft = model((1, 1), seed=7, config=dataclasses.replace(SMALL, num_layers=2))
    drafter = es.LayerParallelDrafter(
        draft,
        vocabulary=foreign(50, SMALL.vocab_size),
        calibrate=kind == "polybasic",
    )
    options = {"num_draft_tokens": 5}
    if kind == "polybasic":
        drafter = es.PolybasicDrafter(model((1, 1), seed=3), drafter, mu=3)
    else:
        options |= {"min_draft_probability": 0.1, "tree_width": 2}
    out = es.Decoder(base, drafter, **options).generate(PROMPTS, max_new_tokens=NEW)
    assert out.tokens == autoregressive().generate(PROMPTS, max_new_tokens=NEW).tokens


@functools.cache
def tiny_foreign(width, candidates="sampled"):
    config = dataclasses.replace(TINY, vocab_size=7)
    draft = model((1, 1), config=config, seed=2, group_size=PAIR, dtype="float32")
    drafter = es.LayerParallelDrafter(
        draft, candidates=candidates, vocabulary=foreign(4, 7, TINY.vocab_size)
    )
    return es.Decoder(tiny_decoder().base, drafter, num_draft_tokens=2, tree_width=width)


@slow
@pytest.mark.parametrize(
    ("width", "candidates", "s"),
    [
        (1, "sampled", PLAIN),
        (5, "sampled", FILTERED),  # five children of four tokens
    ],
)
def test_sampled_sequences_follow_the_base(width, candidates, s):
    out = many_rows(tiny_foreign(width, candidates), s)
    assert surprise(map(tuple, out.tokens), tiny_table(s)) < 5
    assert out.stats.nodes_accepted > 500


def test_a_vocabulary_belongs_to_its_pair():
    base = model((1, 1)).replace(tokenizer="base")
    draft = model((1, 1), group_size=2, seed=7, config=SMALL).replace(tokenizer="draft")
    with pytest.raises(ValueError, match="different tokenizers"):
        es.Decoder(base, es.LayerParallelDrafter(draft))
    for hashes in ({"base": "base", "draft": "draft"}, {}):
        shared = foreign(50, SMALL.vocab_size, **hashes)
        es.Decoder(base, es.LayerParallelDrafter(draft, vocabulary=shared))
    for hashes in ({"base": "third", "draft": "draft"}, {"base": "base", "draft": "third"}):
        shared = foreign(50, SMALL.vocab_size, **hashes)
        with pytest.raises(ValueError, match="the vocabulary is that of other tokenizers than"):
            es.Decoder(base, es.LayerParallelDrafter(draft, vocabulary=shared))
    with pytest.raises(ValueError, match=r"a vocabulary is a shared_vocabulary\(base, draft\)"):
        es.LayerParallelDrafter(draft, vocabulary="folder")


def test_ids_that_the_draft_lacks_are_not_shared_and_read_as_unknown():
    shared = es.SharedVocabulary(
        reading=np.array([3, 9, UNKNOWN], np.int32), shared=np.array([True, True, False])
    ).on(es.make_mesh(1, 1), vocab_size=5)
    assert shared.shared.tolist() == [True, False, False]
    read = shared.read(jnp.array([[0, 1, 2, 7]], jnp.int32))
    assert read.tolist() == [[3, 9, UNKNOWN, UNKNOWN]]
    scores = vocabulary.Scores.of(jnp.arange(5.0)[None, None])
    assert shared.offer(scores, 4).whole().tolist() == [[[3.0, -jnp.inf, -jnp.inf, -jnp.inf]]]

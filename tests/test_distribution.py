"""I4: sampled sequences follow the base model, over several steps, and a broken rule is noticed."""

import dataclasses
import functools
import itertools

import jax
import numpy as np
import pytest
from decoders import NEW, PROMPTS, all_logits, model, self_drafting, surprise
from mutation import mutate

import easyspec_jax as es

# I4: the distribution of whole sequences, over several steps.

TINY = es.ModelConfig(
    vocab_size=6, embed_dim=8, mlp_dim=12, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=4,
    max_len=32,
)  # fmt: skip
PAIR = (2,)  # its layers at once
PLAIN = es.Sampling(temperature=1.0)
slow = pytest.mark.slow
FILTERED = es.Sampling(temperature=0.8, top_k=5, top_p=0.95, min_p=0.02)


def enumerate_sequences(base, prompt, s, length=3):
    """Probability of every sequence of `length` tokens under the base alone, {tuple: p}."""
    v = base.config.vocab_size
    sequences = list(itertools.product(range(v), repeat=length))
    logits = all_logits(base, [[*prompt, *sequence[:-1]] for sequence in sequences])
    p = es.sampling.probabilities(logits[:, -length:], es.sampling.make_filters(s))
    chosen = np.take_along_axis(np.asarray(p), np.array(sequences)[..., None], axis=-1)
    return dict(zip(sequences, chosen[..., 0].astype(np.float64).prod(axis=1), strict=True))


@functools.cache
def tiny_decoder(label="llama", *, candidates="sampled", gamma=2, width=1, **options):
    """`label` changes nothing but the key of jit's cache."""
    config = dataclasses.replace(TINY, family=label)
    base = model((1, 1), config=config, seed=1, dtype="float32")
    draft = model((1, 1), config=config, seed=2, group_size=PAIR, dtype="float32")
    drafter = es.LayerParallelDrafter(draft, candidates=candidates)
    return es.Decoder(base, drafter, num_draft_tokens=gamma, tree_width=width, **options)


@functools.cache
def tiny_table(s, prompt=(3, 1)):
    return enumerate_sequences(tiny_decoder().base, prompt, s)


ROWS = 2048


def many_rows(decoder, s, rows=ROWS, seed=5):
    """Three tokens behind one prompt, many times."""
    prompts = np.tile([[3, 1]], (rows, 1))
    return decoder.generate(prompts, max_new_tokens=3, sampling=s, seed=seed)


def sequence_surprise(decoder, s, rows=ROWS):
    return surprise(map(tuple, many_rows(decoder, s, rows).tokens), tiny_table(s))


# A surprise above 5 is a false alarm once in 100,000 times.
@pytest.mark.parametrize(
    "s", [pytest.param(PLAIN, marks=slow), FILTERED], ids=["plain", "filtered"]
)
def test_sampled_sequences_follow_the_base(s):
    assert sequence_surprise(tiny_decoder(), s) < 5
    if s == FILTERED:
        assert sequence_surprise(es.Decoder(tiny_decoder().base), s) < 5


@slow
@pytest.mark.parametrize(("candidates", "s"), [("best", PLAIN), ("sampled", FILTERED)])
def test_sampled_sequences_of_a_tree_follow_the_base(candidates, s):
    decoder = tiny_decoder(candidates=candidates, gamma=2, width=3)
    assert sequence_surprise(decoder, s) < 5


@slow
def test_drafting_that_stops_early_keeps_the_distribution():
    """Where to stop depends on what was drawn; what is accepted must not."""
    out = many_rows(tiny_decoder(min_draft_probability=0.3, gamma=3, width=2), PLAIN)
    assert surprise(map(tuple, out.tokens), tiny_table(PLAIN)) < 5
    assert 2 * out.stats.steps < out.stats.nodes_drafted < 5 * out.stats.steps


@slow
@pytest.mark.parametrize("broken", ["q of another temperature", "stale key"])
def test_broken_sampling_is_noticed(monkeypatch, broken):
    """test_sampling.py, test_tree.py and test_verify.py break every rule of one step."""
    decoder = tiny_decoder(broken)  # its weights are drawn before anything is broken
    if broken == "q of another temperature":
        mutate(monkeypatch, es.tree, "_best", "perturbed(key, log_q)", "perturbed(key, 3 * log_q)")
    else:
        monkeypatch.setattr(jax.random, "fold_in", lambda key, step: key)
    assert sequence_surprise(decoder, PLAIN) > 5


@slow
def test_sampling_is_the_same_on_a_mesh():
    """float64 logits agree to rounding, so one seed draws the same tokens on eight devices."""
    s = es.Sampling(temperature=0.9, top_k=40, top_p=0.95)
    options = {"max_new_tokens": NEW, "sampling": s, "seed": 4}
    want = self_drafting(width=4).generate(PROMPTS, **options)
    got = self_drafting((4, 2), width=4).generate(PROMPTS, **options)
    assert got.tokens == want.tokens and got.stats == want.stats
    other = self_drafting(width=4).generate(PROMPTS, **options | {"seed": 5})
    assert want.tokens != other.tokens


def test_rows_draw_independently_and_seeds_repeat():
    first, again, other = (
        many_rows(tiny_decoder(), FILTERED, seed=seed).tokens for seed in (0, 0, 1)
    )
    assert first == again != other
    assert len(set(map(tuple, first))) > 50  # of 216, most of them hardly likely
    assert sum(a == b for a, b in zip(first, other, strict=True)) < len(first) / 10

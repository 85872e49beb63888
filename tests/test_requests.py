"""Statistics, compilations, donation and refusals of the decoder."""

import collections
import dataclasses
import functools
import re

import jax
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
    compiled_text,
    lowered_loop,
    model,
    self_drafting,
    started,
)

import easyspec_jax as es
from easyspec_jax import loop, memory
from easyspec_jax.distributed import check_agreement
from easyspec_jax.engine import Engine
from easyspec_jax.profile import time_phase
from easyspec_jax.request import make_inputs
from easyspec_jax.stats import Counters, count

# Statistics.


def test_statistics_of_a_perfect_draft():
    """γ = 3, always right: 24 tokens in 6 steps of 4."""
    stats = self_drafting((1, 1), 1, 3).generate([PROMPTS[0]], max_new_tokens=24).stats
    assert (stats.steps, stats.emitted) == (6, 24)
    assert stats.accepted_histogram == (0, 0, 0, 6)
    assert stats.tokens_per_step == 4.0
    assert stats.acceptance_per_depth == (1.0, 1.0, 1.0)


def test_statistics_of_a_cut_step():
    """γ = 3, always right, 6 tokens: 4 in the first step, then 2, both of them accepted draft
    tokens.
    """
    stats = self_drafting((1, 1), 1, 3).generate([PROMPTS[0]], max_new_tokens=6).stats
    assert stats.accepted_histogram == (0, 0, 1, 1)
    assert stats.tried_per_depth == stats.accepted_per_depth == (2, 2, 1)
    assert stats.tokens_per_step == 3.0


def test_counts_of_a_tree_by_hand():
    """Three depths, siblings tried: the second, the first, three in vain; then a cut after one."""
    none = Counters.zeros(2, 3, 4)
    tries = np.array([[2, 1, 3], [3, 2, 0]], np.int32)
    accepted, drafted = np.array([2, 2], np.int32), np.array([12, 9], np.int32)
    once = count(none, accepted, tries, drafted, np.array([3, 1], np.int32), 3)
    assert once.tried.tolist() == [[1, 1, 1], [1, 0, 0]]
    assert once.accepted.tolist() == [[1, 1, 0], [1, 0, 0]]
    assert once.tried_by_rank.tolist() == [[3, 2, 1, 0], [1, 1, 1, 0]]
    assert once.accepted_by_rank.tolist() == [[1, 1, 0, 0], [0, 0, 1, 0]]
    assert once.histogram.tolist() == [[0, 0, 1, 0], [0, 1, 0, 0]]
    assert once.drafted.tolist() == [12, 9]
    same = count(once, accepted, tries, drafted, np.array([0, 0], np.int32), 3)  # finished rows
    assert jax.tree.map(np.ndarray.tolist, same) == jax.tree.map(np.ndarray.tolist, once)


@functools.cache
def answered():
    return self_drafting(width=4).generate(PROMPTS, max_new_tokens=NEW, logprobs=True)


def test_statistics_agree_with_themselves():
    stats = answered().stats
    assert stats.emitted == NEW * 3 and sum(stats.accepted_histogram) == stats.steps
    assert stats.steps == sum(row.steps for row in stats.rows)
    accepted = sum(i * n for i, n in enumerate(stats.accepted_histogram))
    assert accepted == sum(stats.accepted_per_depth) == sum(stats.accepted_per_rank)
    assert all(a <= t for a, t in zip(stats.accepted_per_depth, stats.tried_per_depth, strict=True))
    deeper = zip(stats.accepted_per_depth, stats.tried_per_depth[1:], strict=False)
    assert all(tried <= accepted for accepted, tried in deeper)
    assert 0 < stats.acceptance_rate < 1


def test_a_drafter_reports_its_own_counters(monkeypatch):
    drafter = es.LayerParallelDrafter
    monkeypatch.setattr(drafter, "report", lambda self, state: state.length.tolist())
    out = self_drafting((1, 1), 1, 3).generate([PROMPTS[0]], max_new_tokens=8)
    assert out.drafter_report == [len(PROMPTS[0]) + 4]  # what the second and last step absorbed
    assert autoregressive().generate([PROMPTS[0]], max_new_tokens=2).drafter_report == {}


def test_logprobs_are_the_bases():
    out = answered()
    for prompt, new, got in zip(PROMPTS, out.tokens, out.logprobs, strict=True):
        text = [*prompt, *new, *[0] * (8 - len(prompt))]  # all of one length
        scores = jax.nn.log_softmax(all_logits(model((1, 1)), [text])[0])
        want = np.asarray(scores)[np.arange(NEW) + len(prompt) - 1, new]
        np.testing.assert_allclose(got, want, atol=1e-5)


# I6: compilation and donation.


def test_one_compilation_per_bucket():
    decoder = self_drafting()
    decoder.warmup(3, 10, 20)
    before = compilations()
    for seed, (length, new) in enumerate([(3, 9), (16, 20), (10, 30)]):
        prompts = [[1] * length, [2] * (length - 1), [3]]
        decoder.generate(prompts, max_new_tokens=new, eos_ids=range(seed), seed=seed)
    assert compilations() == before
    decoder.warmup(3, 10, 20, sampling=es.Sampling(temperature=0.5, top_p=0.9))
    before = compilations()
    for temperature, top_p in [(0.7, 0.5), (1.3, 0.99)]:
        s = es.Sampling(temperature=temperature, top_p=top_p)
        decoder.generate([[1], [2], [3]], max_new_tokens=4, sampling=s)
    assert compilations() == before


def test_warmup_compiles_the_stream():
    decoder = self_drafting()
    decoder.warmup(1, 10, 20, stream=True)
    before = compilations()
    for _ in decoder.stream([1] * 12, max_new_tokens=9, eos_ids=[7]):
        pass
    assert compilations() == before


@pytest.mark.parametrize(
    ("batch", "width", "least"),
    [(1, 1, None), pytest.param(3, 3, 0.2, marks=pytest.mark.slow)],
)
def test_the_compiled_loop_copies_no_cache(batch, width, least):
    """In optimised HLO: writes in place, and neither copies nor transposes as large as an entry;
    nor does the path of a tree, gathered in the base's entries, cost one.
    """
    decoder = self_drafting(width=width, min_draft_probability=least)
    moved = cache_traffic(decoder, batch)
    writes = 3 if width == 1 else 4  # of a layer's keys: calibration, draft, verification, path
    assert moved["dynamic-update-slice"] + moved["scatter"] >= 2 * writes * CONFIG.num_layers
    assert not {"copy", "transpose", "concatenate", "select", "convert"} & set(moved)


@pytest.mark.slow
def test_the_compiled_loop_copies_no_cache_on_a_mesh():
    """Writes of keys and values: three layers verified, the draft's layer alone calibrated and
    drafted, two layers of a group calibrated, their one slot drafted.
    """
    moved = cache_traffic(self_drafting((4, 2)), 1)
    assert moved["dynamic-update-slice"] == 2 * (3 + 2 + 2 + 1)
    assert not {"copy", "transpose", "concatenate", "select", "convert"} & set(moved)


def cache_traffic(decoder, batch) -> collections.Counter:
    """Operations of the compiled loop whose result is as large as a device's part of an entry."""
    inputs = make_inputs(CONFIG, [[1, 2, 3]] * batch, 40)
    lowered, state = lowered_loop(decoder, inputs, 4096)  # only a cache entry has this shape
    entry = state.cache.blocks[0][0].v
    part = entry.sharding.shard_shape(entry.shape)
    shape = re.compile(r"= f64\[([\d,]+)\]\S* (\S+?)\(")
    return collections.Counter(
        op
        for dims, op in shape.findall(compiled_text(lowered))
        if sorted(n for n in map(int, dims.split(",")) if n > 1) == sorted(n for n in part if n > 1)
    )


def test_caches_are_donated(monkeypatch):
    """To the whole loop; test_decode.py has single steps, on every mesh."""
    seen = []
    compiled = Engine.compiled

    def spied(engine, function, *rows):
        def run(*args, **how):
            if function is loop.run_loop:
                seen.append(args[-1])
            return compiled(engine, function, *rows)(*args, **how)

        return run

    monkeypatch.setattr(Engine, "compiled", spied)
    self_drafting().generate(PROMPTS, max_new_tokens=NEW)
    caches = jax.tree.leaves((seen[0].cache.blocks, seen[0].draft.blocks))
    assert len(caches) >= 10 and all(leaf.is_deleted() for leaf in caches)


def test_a_finished_row_drafts_nothing():
    """So it never keeps the others from stopping early."""
    decoder = self_drafting(min_draft_probability=0.15)
    run = started(decoder, PROMPTS[:2], 9)
    run.finish_row(0)
    out = run.step()
    assert int(out.num_drafted[0]) == 0 < int(out.num_drafted[1])
    assert np.asarray(out.num_emitted).tolist()[0] == 0


# Refusals: one sentence, before anything is allocated.


@pytest.mark.parametrize(
    ("prompts", "options", "sentence"),
    [
        ([], {}, "no prompts given"),
        ([[1], []], {}, "prompt 1 is empty"),
        ([[1, 61]], {}, r"prompt 0 has token id 61, outside the base's 0 .. 60"),
        ([[-1]], {}, "prompt 0 has token id -1"),
        ([[0.5]], {}, "prompt 0 is not a list of token ids"),
        ([[1] * 96], {}, "prompt 0 has 96 tokens, but the base's context is 96"),
        ([1, 2, 3], {}, "prompt 0 is not a list of token ids: prompts are a list of such lists"),
        (7, {}, "prompts must be lists of token ids, got 7"),
        ([[1]], {"max_new_tokens": 0}, "max_new_tokens must be a whole number above 0, got 0"),
        ([[1]], {"max_new_tokens": 3.5}, "max_new_tokens must be a whole number above 0, got 3.5"),
        ([[1]], {"eos_ids": [61]}, r"eos_ids must be token ids in the base's 0 .. 60, got 61"),
        ([[1]], {"eos_ids": [2**40]}, "eos_ids must be token ids"),
        ([[1]], {"sampling": 0.8}, r"sampling must be a Sampling, got 0\.8"),
        ([[[1], [2, 3]]], {}, "prompt 0 is not a list of token ids"),
        ([[1]], {"eos_ids": None}, "eos_ids must be token ids .* got None"),
        ([[1]], {"seed": "a"}, "seed must be a whole number of 64 bits, got 'a'"),
        ([[1]], {"seed": 2**70}, "seed must be a whole number of 64 bits"),
    ],
)
def test_bad_requests_are_refused(monkeypatch, prompts, options, sentence):
    monkeypatch.setattr(es.engine, "zeros", lambda abstract: pytest.fail("allocated"))
    with pytest.raises(ValueError, match=sentence):
        self_drafting().generate(prompts, **{"max_new_tokens": 4, **options})


def test_bad_decoders_are_refused():
    base, draft = model((1, 1)), model((1, 1), group_size=GROUPS)
    drafter = es.LayerParallelDrafter(draft)
    with pytest.raises(ValueError, match=r"num_draft_tokens must be a whole .* got 0"):
        es.Decoder(base, num_draft_tokens=0)
    with pytest.raises(ValueError, match=r"tree_width must be a whole .* got None"):
        es.Decoder(base, drafter, tree_width=None)
    for number in (0, 2.5, True):
        with pytest.raises(ValueError, match=f"num_draft_tokens must be a whole .* got {number}"):
            es.Decoder(base, drafter, num_draft_tokens=number)
    with pytest.raises(ValueError, match="layer after layer: load it with group_size=1"):
        es.Decoder(draft)
    with pytest.raises(ValueError, match=r"LayerParallelDrafter\(draft\) say, got Model"):
        es.Decoder(base, draft)
    with pytest.raises(ValueError, match="tree_width must be a whole number above 0, got 0"):
        es.Decoder(base, drafter, tree_width=0)
    for least in (-0.1, 1.5, float("nan"), "0.1"):
        with pytest.raises(ValueError, match="min_draft_probability must be between 0 and 1, got"):
            es.Decoder(base, drafter, min_draft_probability=least)
    with pytest.raises(ValueError, match="candidates must be one of 'sampled', 'best', got 'lik"):
        es.LayerParallelDrafter(draft, candidates="likely")
    with pytest.raises(ValueError, match=r"parallel must be one of 'attention', .*, got 'mlp'"):
        es.LayerParallelDrafter(draft, parallel="mlp")
    with pytest.raises(ValueError, match="different meshes"):
        es.Decoder(model((4, 2)), drafter)
    with pytest.raises(ValueError, match="different tokenizers"):
        other = es.LayerParallelDrafter(draft.replace(tokenizer="b"))
        es.Decoder(base.replace(tokenizer="a"), other)
    with pytest.raises(ValueError, match=r"layout must be .* got 'both'"):
        es.random_model(CONFIG, es.make_mesh(1, 1), layout="both")


def test_sliding_window_is_kept_or_refused():
    windowed = es.random_model(
        es.ModelConfig(**{**vars(CONFIG), "sliding_window": 32}),
        es.make_mesh(1, 1),
        dtype="float64",
    )
    decoder = es.Decoder(windowed)
    want = autoregressive().generate([[1, 2]], max_new_tokens=30).tokens
    assert decoder.generate([[1, 2]], max_new_tokens=30).tokens == want
    with pytest.raises(ValueError, match="sliding window of 32"):
        decoder.generate([[1, 2]], max_new_tokens=31)


def test_too_little_memory_is_refused_with_the_budget(monkeypatch):
    monkeypatch.setattr(memory, "device_memory", lambda mesh: 100_000)
    monkeypatch.setattr(es.engine, "zeros", lambda abstract: pytest.fail("allocated"))
    with pytest.raises(
        ValueError,
        match=r"base cache .* draft cache .* beside base weights .* draft weights .* but a device",
    ):
        self_drafting().generate(PROMPTS, max_new_tokens=NEW)


def test_short_draft_context_warns_once_and_stays_lossless():
    config = dataclasses.replace(CONFIG, max_len=32)
    drafter = es.LayerParallelDrafter(model((1, 1), group_size=GROUPS, config=config))
    with pytest.warns(UserWarning, match="the draft's context of 32 tokens is shorter than the"):
        decoder = es.Decoder(model((1, 1)), drafter, num_draft_tokens=3)
    prompt = [[1] * 30]
    want = autoregressive().generate(prompt, max_new_tokens=NEW).tokens
    assert decoder.generate(prompt, max_new_tokens=NEW).tokens == want


def test_a_timed_step_leaves_its_row_where_it_was():
    """One that has reached its limit may do less: 2 x 4 steps of up to 4 tokens, room for 5."""
    decoder = self_drafting()
    run = started(decoder, [PROMPTS[0]], 5)
    length = int(run.state.length[0])
    _, state = time_phase("step", decoder, run.request, run.state, repeats=4)
    assert (int(state.length[0]), bool(state.done[0])) == (length, False)
    assert int(state.counters.steps[0]) == 8


def test_profile_names_every_phase():
    times = self_drafting().profile(batch=1, prompt_len=5, max_new_tokens=8, repeats=2)
    assert set(times) == {"prefill", "step", "calibrate", "draft", "verify", "commit"}
    assert all(times[name] > 0 for name in ("prefill", "step", "calibrate", "verify"))
    alone = autoregressive().profile(batch=1, prompt_len=5, max_new_tokens=8, repeats=2)
    assert alone["calibrate"] == alone["draft"] == 0 < alone["step"]


# Several processes, as far as one can tell alone.


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        (("host:1", 2, None), "coordinator, num_processes and process_id go together"),
        ((None, None, 0), "coordinator, num_processes and process_id go together"),
        (("host", 2, 0), "the coordinator must be \"host:port\" of process 0, got 'host'"),
        (("host:port", 2, 0), "the coordinator must be"),
        (("host:1", 0, 0), "num_processes must be a whole number above 0, got 0"),
        (("host:1", 2, 2), r"process_id must be in 0 .. 1, got 2"),
        (("host:1", 2, -1), r"process_id must be in 0 .. 1, got -1"),
    ],
)
def test_impossible_processes_are_refused(given, sentence):
    with pytest.raises(ValueError, match=sentence):
        es.initialize_distributed(*given)
    with pytest.raises(ValueError, match="timeout must be a whole number of seconds above 0"):
        es.initialize_distributed("host:1", 2, 0, timeout=0)


def test_a_process_alone_agrees_with_itself():
    assert check_agreement([1, "a"]) is None
    with pytest.raises(OSError, match="not there"):
        check_agreement((), OSError("not there"))

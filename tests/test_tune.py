"""Tuned partitions: stale passes, the search over a table, the file, the command."""

from __future__ import annotations

import functools
import json
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from decoders import PROMPTS, all_logits, model

import easyspec_jax as es
from easyspec_jax import cli, passes, tune, tune_command, tuned
from easyspec_jax.arguments import make_parser
from easyspec_jax.device import PRESETS
from easyspec_jax.loop import Specs
from easyspec_jax.partitions import (
    cheapest_partitions,
    expected_tokens,
    fastest_partitions,
    interpolate,
    neighbours,
    uniform_partitions,
)
from easyspec_jax.plan import Layout, Planner
from easyspec_jax.sharding import LAYOUTS

MODEL = functools.partial(model, layout="tensor")


def compositions(total, largest):
    """Every partition of `total` layers into blocks of at most `largest`."""
    if total == 0:
        return [()]
    return [
        (size, *rest)
        for size in range(1, min(total, largest) + 1)
        for rest in compositions(total - size, largest)
    ]


@functools.cache
def written():
    """A model, its text and the window of that."""
    m = MODEL((1, 1))
    text = passes.write_texts(m, [PROMPTS[0]], 7)[0]
    return m, text, passes.make_window(m, text, 9)


def stale(m, window, partition, recent=1):
    args = (m, window)
    found = tune._log_probs(*args, passes.staleness(partition), recent=recent, specs=Specs.of(args))
    return np.asarray(found[0, : window.size])


@functools.partial(jax.jit, static_argnames="run_block")
def forward(m, tokens, cache, run_block):
    hidden, cache = es.model.forward(m, tokens, cache, run_block=run_block)
    return jax.nn.log_softmax(es.model.logits(m, hidden)[0, -1]), cache


def drafted(partition, text, recent):
    """Log-probabilities behind each token of an answer, by the library's own groups: the text
    before it exactly, then the last `recent` tokens one after another in parallel passes.
    """
    exact, fuzzy = es.layer_parallel.run_exact, es.layer_parallel.run_fuzzy
    m = passes.regroup(MODEL((1, 1)), partition)
    rows = []
    for at in range(text.start - 1, text.end - 1):
        first = max(at - recent + 1, text.start - 1)
        abstract = es.cache.abstract_cache(m.config, m.layout, m.partition, 1, 64, m.dtype)
        cache = es.cache.zeros(abstract)
        _, cache = forward(m, jnp.asarray(text.tokens), cache, exact)
        cache = cache.rollback(jnp.array([first], jnp.int32))  # what lies behind is written again
        for place in range(first, at + 1):
            row, cache = forward(m, jnp.asarray(text.tokens[:, place : place + 1]), cache, fuzzy)
        rows.append(row)
    return np.asarray(rows)


def all_log_probs(m, text):
    """Of the ordinary model, behind each token that an answer's next one follows."""
    return jax.nn.log_softmax(all_logits(m, text.tokens)[0, text.start - 1 : text.end - 1])


@pytest.mark.parametrize(
    "partition",
    [(1, 3, 1), *(pytest.param(p, marks=pytest.mark.slow) for p in ((2, 3), (5,), (2, 1, 2)))],
)
def test_a_stale_pass_is_the_pass_of_the_grouped_model(partition):
    m, text, window = written()
    got, exact = stale(m, window, partition), stale(m, window, (1,) * 5)
    np.testing.assert_allclose(got, drafted(partition, text, 1), atol=1e-12)
    np.testing.assert_allclose(exact, all_log_probs(m, text), atol=1e-12)
    assert np.abs(got - exact).max() > 1e-2


def test_a_stale_pass_sees_recent_tokens_as_drafting_leaves_them():
    """Exact for one token; of more, the entries of the earlier ones were made seeing as many."""
    m, text, window = written()
    two, one = stale(m, window, (1, 3, 1), recent=2), stale(m, window, (1, 3, 1))
    want = drafted((1, 3, 1), text, 2)
    np.testing.assert_allclose(two[:2], want[:2], atol=1e-12)
    assert np.abs(two - want).mean() < np.abs(one - want).mean() / 2
    exact = (1,) * 5
    np.testing.assert_allclose(stale(m, window, exact, 4), stale(m, window, exact), atol=1e-12)


def test_a_stale_pass_on_several_devices_is_that_on_one():
    one, text, window = written()
    m = MODEL((2, 4))
    got = stale(m, passes.make_window(m, text, 9), (1, 3, 1))
    np.testing.assert_allclose(got, stale(one, window, (1, 3, 1)), atol=1e-12)


def test_a_window_needs_a_model_without_groups():
    m, text, _ = written()
    with pytest.raises(ValueError, match="a window needs the exact model"):
        passes.make_window(passes.regroup(m, 2), text, 11)


def test_the_cheapest_partitions_are_those_of_brute_force():
    rng = np.random.default_rng(0)
    costs = rng.random((7, 4))
    every = {}
    for partition in compositions(7, 4):
        cost = sum(costs[j, s] for j, s in enumerate(passes.staleness(partition)))
        every.setdefault(len(partition), []).append((cost, partition))
    found = cheapest_partitions(costs, 7, keep=3)
    assert found.keys() == every.keys() == set(range(2, 8))
    for num, ways in every.items():
        want = sorted(ways)[:3]
        assert [p for _, p in found[num]] == [p for _, p in want]
        np.testing.assert_allclose([c for c, _ in found[num]], [c for c, _ in want])
    assert cheapest_partitions(costs, 4)[4] == found[4][:1]
    assert max(cheapest_partitions(costs, 4)) == 4
    assert cheapest_partitions(costs, 1) == {}  # no block has 7 layers


def test_partitions_that_none_beats_in_cost_and_time():
    costs = np.array([[0, 9, 9], [0, 4, 9], [0, 1, 2], [0, 1, 3]], float)
    # each layer beyond two in a block takes another turn
    found = fastest_partitions(costs, 4, lambda p: sum(-(-size // 2) for size in p))
    # in 2, 3 and 4 turns; (1, 3), the cheapest of 2 blocks, takes 3 turns, as (1, 1, 2) does
    assert found == [(2, 2), (1, 1, 2), (1, 1, 1, 1)]
    assert fastest_partitions(costs, 2, len) == [(1, 3)]


def test_neighbours_and_uniform_partitions_by_hand():
    assert list(neighbours((1, 2, 3), 4)) == [(2, 1, 3), (1, 1, 4), (1, 3, 2)]
    assert list(neighbours((1, 2, 3), 3)) == [(2, 1, 3), (1, 3, 2)]
    assert uniform_partitions(8, 8, 8) == [
        (1,) * 8, (1, 2, 2, 2, 1), (1, 3, 3, 1), (1, 6, 1)
    ]  # fmt: skip
    assert uniform_partitions(8, 4, 3) == [(1, 3, 3, 1)]


def test_costs_between_measured_places_lie_on_lines():
    measured = {1: 2.0, 2: 3.0, 4: 7.0}
    np.testing.assert_allclose(interpolate(measured, 7), [0, 2, 3, 5, 7, 9, 11])
    np.testing.assert_allclose(interpolate({1: 2.0, 2: 1.0}, 5), [0, 2, 1, 0, 0])
    np.testing.assert_allclose(interpolate({}, 1), [0])


def test_expected_tokens_by_hand():
    a, b = np.full(9, 0.8), np.full(9, 0.5)
    assert expected_tokens(a, b, 3) == pytest.approx(1 + 0.8 * (1 + 0.5 + 0.25))
    assert expected_tokens(a, b, 1) == pytest.approx(1.8)
    first, later = np.array([1, 0, 1, 1]), np.array([0, 1, 1, 0])
    # from token 0: all three; from token 1: none
    assert expected_tokens(first, later, 3) == pytest.approx((4 + 1) / 2)
    assert expected_tokens(first[:2], later[:2], 3) == pytest.approx(
        3
    )  # cut, but there is no other


@functools.cache
def scorer(gamma=3):
    m = MODEL((1, 1))
    return tune.make_scorer(m, m, passes.write_texts(m, PROMPTS, 16), gamma)


def test_scores_are_of_the_exact_model_and_fall_with_groups():
    s = scorer()
    assert s.exact_acceptance == 1.0
    divergence, acceptance, predicted = s.score((1,) * 5)
    assert divergence == pytest.approx(0, abs=1e-12)
    assert (acceptance, predicted) == (1.0, pytest.approx(4))
    divergence, acceptance, predicted = s.score((5,))
    assert divergence > 0.01 and acceptance < 1 and predicted < 4


def test_above_temperature_zero_acceptance_is_the_overlap():
    m, _, window = written()
    base = tune._tempered(m, window, 0.7)
    s = tune.Scorer(m, [window], 4, 0.7, [base])
    assert s.exact_acceptance == pytest.approx(1, abs=1e-6)
    p, q = stale(m, window, (1,) * 5), stale(m, window, (1, 3, 1), recent=2)
    p, q = (np.exp(x / 0.7) / np.exp(x / 0.7).sum(-1, keepdims=True) for x in (p, q))
    assert s.score((1, 3, 1))[1] == pytest.approx(np.minimum(p, q).sum(-1).mean(), abs=1e-6)


@functools.cache
def sensitive(layer):
    """A model in which one layer's attention listens to the layer before it, and hardly any other
    layer does anything.
    """
    m = MODEL((1, 1))
    blocks = []
    for j, block in enumerate(m.params.blocks):
        gain = 8.0 if j == layer else 3.0 if j == layer - 1 else 0.05
        attention = block.attention[0].replace(wo=block.attention[0].wo * gain)
        mlp = block.mlp[0].replace(w_down=block.mlp[0].w_down * gain)
        blocks.append(block.replace(attention=(attention,), mlp=(mlp,)))
    return m.replace(params=m.params.replace(blocks=tuple(blocks)))


@pytest.mark.parametrize("layer", [pytest.param(2, marks=pytest.mark.slow), 4])
def test_a_sensitive_layer_begins_a_block(layer):
    m = sensitive(layer)
    found = tune.tune(
        m, m, PROMPTS, attention_steps=2, num_draft_tokens=3, max_new_tokens=16, num_verified=1
    )
    assert found.sensitivity[1:, 1].argmax() == layer - 1
    assert found.partition == (layer, 5 - layer)
    best = found.candidates[0]
    assert best.identical == 3 and best.tokens_per_step > 2.5
    assert (found.num_prompts, found.num_tokens) == (3, 48)


def test_uniform_partitions_are_verified_too_and_text_is_autoregressions():
    m = MODEL((1, 1))
    found = tune.tune(
        m, m, PROMPTS, attention_steps=3, num_draft_tokens=3, max_new_tokens=16, num_verified=1
    )
    assert (1, 3, 1) in {c.partition for c in found.candidates}
    tokens = [c.tokens_per_step for c in found.candidates]
    assert tokens == sorted(tokens, reverse=True) and all(
        c.identical == 3 for c in found.candidates
    )
    drafter = es.LayerParallelDrafter(passes.regroup(m, found.partition))
    out = es.Decoder(m, drafter, num_draft_tokens=3).generate(PROMPTS, max_new_tokens=16)
    assert out.tokens == es.Decoder(m).generate(PROMPTS, max_new_tokens=16).tokens
    assert out.stats.tokens_per_step == tokens[0]


@pytest.mark.slow
def test_several_devices_tune_as_one():
    found = [
        tune.tune(
            *(MODEL(shape),) * 2, PROMPTS, attention_steps=3, num_draft_tokens=3,
            max_new_tokens=16, num_verified=2,
        )
        for shape in ((1, 1), (2, 4))
    ]  # fmt: skip
    one, many = ([(c.partition, c.tokens_per_step) for c in f.candidates] for f in found)
    assert one == many and all(c.identical == 3 for f in found for c in f.candidates)
    one, many = (f.sensitivity for f in found)
    np.testing.assert_allclose(one, many, atol=1e-9)


@pytest.mark.slow
def test_tuning_above_temperature_zero():
    m, stranger = MODEL((1, 1)), model((1, 1), seed=3, layout="tensor")
    options = {"attention_steps": 2, "num_draft_tokens": 2, "max_new_tokens": 8, "num_verified": 1}
    found = tune.tune(m, m, PROMPTS, temperature=0.8, **options)
    assert found.exact_acceptance == pytest.approx(1)
    assert all(c.identical is None and c.tokens_per_step > 1 for c in found.candidates)
    found = tune.tune(m, stranger, PROMPTS, temperature=0.8, **options)
    assert 0 < found.exact_acceptance < 0.9


def test_with_a_time_for_steps_speed_decides():
    s, costs = scorer(), np.zeros((5, 5))
    free = tune.search(s, costs, 5, step_seconds=lambda partition: 1.0)
    assert free[0].partition == (1,) * 5  # as many tokens as there can be
    dear = tune.search(s, costs, 5, step_seconds=lambda partition: 10.0 ** len(partition))
    assert dear[0].partition == (5,) and dear[0].step_seconds == 10.0
    assert dear[0].speed(3.0) == 0.3
    assert fastest_partitions(costs + 1.0, 5, lambda p: max(p))[0] == (1,) * 5
    few = tune.search(s, costs, 4)
    assert {len(c.partition) for c in few if c.kind != "uniform"} == {4}


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ((5, None, None, False), "needs attention_steps, or step_seconds"),
        ((5, 0, None, False), "attention_steps must be in 1 .. 5, the draft's layers, got 0"),
        ((5, 6, None, True), "attention_steps must be in 1 .. 5, the draft's layers, got 6"),
        ((5, 2, 0, False), "max_group_size must be a whole number above 0, got 0"),
        ((5, 2, 2, False), "cover 4 of the draft's 5 layers: allow 3 steps or larger groups"),
    ],
)
def test_impossible_options_are_one_sentence(options, sentence):
    with pytest.raises(ValueError) as error:
        tune.check_options(*options)
    assert sentence in str(error.value)


def test_groups_worth_looking_at():
    assert tune.check_options(30, 9, None, False) == (9, 12)
    assert tune.check_options(30, 9, 4, False) == (9, 4)
    assert tune.check_options(30, None, None, True) == (30, 12)
    assert tune.check_options(5, 1, None, False) == (1, 5)


def test_the_file_is_read_as_written_and_replaced_whole(tmp_path):
    file = tuned.write_partition(tmp_path, (1, 2, 2), {"tuned_for": {"draft_weights": "aa"}})
    assert tuned.read_partition(tmp_path, 5) == (1, 2, 2)
    assert tuned.read_partition(tmp_path, 5, "aa") == (1, 2, 2)
    with pytest.warns(UserWarning, match="was found for other weights: run `easyspec tune"):
        tuned.read_partition(tmp_path, 5, "bb")
    with pytest.raises(TypeError):
        tuned.write_partition(tmp_path, (5,), {"candidates": object()})
    assert tuned.read_partition(tmp_path, 5) == (1, 2, 2)
    assert list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (None, "was not tuned: it has no partition.json; run `easyspec tune --draft"),
        ("{", "is damaged"),
        ('{"format": 1}', "is damaged"),
        ('{"format": 2, "partition": [5]}', "has format 2, but this version reads 1"),
        ('{"format": 1, "partition": [1, 3]}', "does not fit the checkpoint: a partition needs"),
        ('{"format": 1, "partition": [1, "4"]}', "does not fit the checkpoint: group_size must"),
        ('{"format": 1, "partition": [true, 4]}', "does not fit the checkpoint: group_size must"),
    ],
)
def test_a_bad_file_is_one_sentence(tmp_path, content, sentence):
    if content is not None:
        (tmp_path / "partition.json").write_text(content)
    with pytest.raises(ValueError) as error:
        tuned.read_partition(tmp_path, 5)
    assert sentence in str(error.value) and "\n" not in str(error.value)


def test_prompts_are_lines_or_fields(tmp_path):
    text = tmp_path / "a.txt"
    text.write_text("one\u2028part\r\n\n two\n")
    assert tune_command.read_prompts(text) == ["one\u2028part", " two"]
    lines = tmp_path / "a.jsonl"
    lines.write_text('{"prompt": "one\\ntwo", "id": 1}\n\n{"prompt": "three"}')
    assert tune_command.read_prompts(lines) == ["one\ntwo", "three"]


@pytest.fixture
def pair(checkpoints, tmp_path):
    """A draft's checkpoint of its own, and prompts."""
    shutil.copytree(checkpoints / "draft", tmp_path / "draft")
    (tmp_path / "prompts.txt").write_text("hello\nonce upon\n")
    return tmp_path


def test_the_command_tunes_and_others_use_what_it_found(easyspec, pair, monkeypatch):
    draft, options = pair / "draft", ("--prompts", pair / "prompts.txt", "--max-new-tokens", 12)
    command = ("tune", "--base", "base", "--draft", draft, *options, "--num-draft-tokens", 2)
    command = (*command, "--verify", 1, "--tensor", 1)
    results = []
    monkeypatch.setattr(tune_command, "tune", lambda *a, **o: results.append(tune.tune(*a, **o))
                        or results[-1])  # fmt: skip
    status, out, _ = easyspec(*command, "--attention-steps", 3, "--json")
    assert status == 0
    *lines, last = out.splitlines()
    found = json.loads(last)
    stored = json.loads((draft / "partition.json").read_text())
    assert stored == {"format": 1} | found and sum(found["partition"]) == 5
    assert f"written to {draft / 'partition.json'}; use it with --group-size tuned" in lines[-1]
    assert found["tuned_for"]["attention_steps"] == 3 and found["tuned_for"]["base"] == "base"
    assert found["tuned_for"]["draft_weights"] and str(pair) not in last
    assert all(c["identical"] == 2 for c in found["candidates"])
    partition = tuple(found["partition"])
    assert es.load_model(draft, es.make_mesh(1, 1), group_size="tuned").partition == partition
    shown = ",".join(map(str, partition))
    status, out, _ = easyspec("info", draft, "--group-size", "tuned")
    assert status == 0 and f"{shown}: {len(partition)} attention steps" in out
    with monkeypatch.context() as patch:
        patch.setattr(cli, "_load", lambda args, setup: pytest.fail(f"{args.group_size}"))
        with pytest.raises(pytest.fail.Exception, match=re.escape(str(partition))):
            easyspec(
                *("generate", "--base", "base", "--draft", draft, "--tensor", 1),
                *("--group-size", "tuned", "hello"),
            )
    # again: what is replaced is said; a dry run writes nothing
    monkeypatch.setattr(tune_command, "tune", lambda *a, **o: results[-1])
    before = (draft / "partition.json").read_text()
    status, out, _ = easyspec(*command, "--layer", 3, "--dry-run")
    assert status == 0 and "written" not in out and (draft / "partition.json").read_text() == before
    status, out, _ = easyspec(*command, "--layer", 3)
    assert status == 0 and f", which replaces {shown}; use it" in out


def test_times_of_partitions_are_the_planners():
    words = ["tune", "--draft", "d", "--prompts", "p", "--device", "h100", "--num-devices", "8"]
    config = es.ModelConfig(
        vocab_size=32000, embed_dim=2048, mlp_dim=8192, num_layers=9, num_heads=32, num_kv_heads=8,
        head_dim=64,
    )  # fmt: skip

    def times(*options):
        args = make_parser().parse_args([*words, *options])
        return tune_command.predict_times(args, config, config)

    seconds = times("--layer", "4")
    assert seconds((1, 4, 4)) < seconds((1, 3, 4, 1)) < seconds((1,) * 9)
    assert seconds((5, 3, 1)) > seconds((4, 4, 1))  # five layers on four devices take two turns
    planner = Planner(base=config, draft=config, device=PRESETS["h100"])
    place = {"layer": 4, "tensor": 2, "draft": "groups", "rules": LAYOUTS["layer"]}
    choice = planner.price(Layout(**place, group_size=(1, 4, 4)), 5)
    assert seconds((1, 4, 4)) == choice.cost.seconds
    assert times()((1, 8)) < seconds((1, 8))  # all eight side by side


def test_a_saved_model_does_not_take_a_partition_along(pair):
    draft = pair / "draft"
    tuned.write_partition(draft, (5,), {})
    m = es.load_model(draft, es.make_mesh(1, 1), group_size="tuned")
    assert m.partition == (5,)
    es.save_model(m, pair / "copy", like=draft)
    assert not (pair / "copy" / "partition.json").exists()
    with pytest.raises(ValueError, match="copy was not tuned"):
        es.load_model(pair / "copy", es.make_mesh(1, 1), group_size="tuned")


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ((), "tune needs --attention-steps or --layer"),
        (("--attention-steps", 6), "attention_steps must be in 1 .. 5, the draft's layers, got 6"),
        (("--attention-steps", 0), "attention_steps must be in 1 .. 5, the draft's layers, got 0"),
        (("--attention-steps", 2, "--layer", 2), "cover 4 of the draft's 5 layers"),
        (("--layer", 0), "--layer must be at least 1, got 0"),
        (("--layer", 2, "--verify", 0), "--verify must be at least 1, got 0"),
        (("--layer", 2, "--prompts", "nowhere.txt"), "there is no file of prompts at nowhere.txt"),
        (("--layer", 2, "--prompts", "base/tokenizer.json"), "prompt 0 has"),
        (("--layer", 2, "--prompts", "bad.jsonl"), "bad.jsonl, line 2: not a JSON object with a t"),
        (("--layer", 2, "--prompts", "empty.txt"), "empty.txt holds no prompts"),
        (("--layer", 2, "--num-prompts", 3), "--num-prompts asks for 3, but prompts.txt has 2"),
        (("--layer", 2, "--base", "foreign"), "have different tokenizers"),
        (("--layer", 2, "--draft", "hf-draft"), "is not a converted checkpoint"),
        (("--layer", 2, "--base", "mute", "--chat"), "mute has no chat template"),
        (("--layer", 2, "--temperature", -1), "temperature must be"),
        (("--device", "b300"), "unknown device 'b300'"),
        (("--layer", 2, "--num-devices", 4), "--num-devices needs --device"),
        (("--device", "h100", "--layer", 3, "--num-devices", 8), "--layer 3 does not divide"),
    ],
)
def test_the_command_refuses_before_weights_are_loaded(
    easyspec, checkpoints, monkeypatch, options, sentence
):
    (checkpoints / "prompts.txt").write_text("hello\nonce upon\n")
    (checkpoints / "bad.jsonl").write_text('{"prompt": "a"}\n{"prompt": 1}\n')
    (checkpoints / "empty.txt").write_text("\n \n")

    def load_model(*args, **options):
        raise AssertionError("loads weights")

    monkeypatch.setattr(es, "load_model", load_model)
    status, out, err = easyspec(
        "tune", "--base", "base", "--draft", "draft", "--prompts", "prompts.txt", *options
    )
    assert (status, out) == (1, "")
    assert err.startswith("error: ") and sentence in err and err.count("\n") == 1


@pytest.mark.parametrize("command", ["generate", "info"])
def test_a_checkpoint_that_was_not_tuned_is_refused(easyspec, monkeypatch, command):
    monkeypatch.setattr(es, "load_model", lambda *args, **options: pytest.fail("loads weights"))
    models = ("--base", "base", "hi") if command == "generate" else ("base",)
    status, _, err = easyspec(command, *models, "--draft", "draft", "--group-size", "tuned")
    assert status == 1 and "draft was not tuned: it has no partition.json" in err


def test_a_text_that_differs_is_reported(easyspec, pair, monkeypatch):
    original = es.Decoder.generate

    def wrong(self, *args, **options):
        out = original(self, *args, **options)
        out.tokens[1][2] += 1
        return out

    monkeypatch.setattr(es.Decoder, "generate", wrong)
    m = MODEL((1, 1))
    candidate = tune.Candidate((5,), "sum", 0.1, 0.5, 2.0)
    options = {
        "num_draft_tokens": 3,
        "max_new_tokens": 16,
        "eos_ids": (),
        "sampling": es.Sampling(),
    }
    expected = [
        text.tokens[0, text.counted].tolist() for text in passes.write_texts(m, PROMPTS, 16)
    ]
    expected[1][2] -= 1  # as it was
    found = tune.verify(m, m, candidate, PROMPTS, expected, **options)
    assert found.identical == 2
    result = tune.Tuning((5,), (found,), 1.0, np.zeros((5, 5)), 3, 48)
    monkeypatch.setattr(tune_command, "tune", lambda *args, **options: result)
    status, out, err = easyspec(
        *("tune", "--draft", pair / "draft", "--prompts", pair / "prompts.txt"),
        *("--attention-steps", 1, "--tensor", 1, "--dry-run"),
    )
    assert status == 1 and "5: 1 of 3 answers differ from autoregression's" in err
    assert "best: 5, and no uniform one has so few groups" in out

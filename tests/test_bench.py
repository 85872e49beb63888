"""The benchmark: what it counts, by hand and on a tiny pair."""

from __future__ import annotations

import importlib
import json
import pathlib
import sys

import jax
import numpy as np
import pytest
from decoders import all_logits, model
from hf_models import run as convert
from hf_models import tiny_config, write_hf_folder

import easyspec_jax as es

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "experiments"))  # scripts, no package
bench = importlib.import_module("bench")
ceiling = importlib.import_module("ceiling")
draws = importlib.import_module("draws")
few_rows = importlib.import_module("few_rows")


def stats(steps, emitted, tried, accepted):
    return es.Stats(
        steps=steps,
        emitted=emitted,
        accepted_histogram=(0, steps),
        tried_per_depth=tried,
        accepted_per_depth=accepted,
        tried_per_rank=(sum(tried),),
        accepted_per_rank=(sum(accepted),),
        nodes_drafted=2 * steps,
    )


def answer(seconds, tokens, counted=None):
    return {"seconds": seconds, "tokens": tokens, "stats": counted}


def test_a_speedup_is_total_tokens_over_total_time():
    runs = [
        {
            "a": answer(4.0, [1, 2, 3, 4]),
            "b": answer(1.0, [1, 2, 3, 4], stats(2, 4, (2, 1), (2, 0))),
        },
        {"a": answer(2.0, [5, 6]), "b": answer(2.0, [5, 7], stats(2, 2, (2, 0), (0, 0)))},
    ]
    for run in runs:
        bench.compare(run, "a")
    assert [run["b"]["divergence"] for run in runs] == [None, 1]
    records = bench.summarise(runs, "a", temperature=0.0)
    assert records["a"]["speedup"] == 1.0 and records["a"]["identical"] == 2
    b = records["b"]
    assert (b["tokens"], b["seconds"], b["ms_per_token"]) == (6, 3.0, 500.0)
    assert b["speedup"] == 2.0  # 6 tokens in 6 s against 6 in 3 s; by prompt 4 and 1
    assert b["speedup_quartiles"] == [1.75, 2.5, 3.25]
    assert b["identical"] == 1
    assert b["tokens_per_step"] == 1.5  # 6 / 4
    assert b["base_passes_per_token"] == round(4 / 6, 4)
    assert b["acceptance_rate"] == 0.4  # 2 / 5
    assert b["acceptance_per_depth"] == [0.5, 0.0]
    assert records["a"]["tokens_per_step"] is None and records["a"]["acceptance_per_depth"] == []
    assert "identical" not in bench.summarise(runs, "a", temperature=0.8)["b"]


def test_tokens_per_step_of_each_set():
    runs = [
        {"a": answer(1.0, [1] * n, stats(steps, n, (steps, 0), (0, 0))), "peer": answer(1.0, [1])}
        for steps, n in ((2, 4), (1, 3), (3, 3))
    ]
    sets = bench.rates_by_set(["one", "other", "one"], runs)
    assert sets == {"one": {"a": 1.4, "peer": None}, "other": {"a": 3.0, "peer": None}}


def test_a_shorter_answer_diverges_where_it_ends():
    run = {"a": answer(1.0, [1, 2, 3]), "b": answer(1.0, [1, 2])}
    bench.compare(run, "a")
    assert (run["a"]["divergence"], run["b"]["divergence"]) == (None, 2)


def test_an_arm_that_changes_its_mind_stops_the_run():
    tokens = iter([[1], [2]])
    arms = {"fickle": bench.Arm(lambda ids, seed: (next(tokens), None))}
    with pytest.raises(RuntimeError, match="fickle gave other tokens when it was asked again"):
        bench.answer_all(arms, [1], 0, repeats=2)


@pytest.mark.parametrize("shape", [(1, 1), (4, 2)])
def test_the_gap_of_the_two_best_tokens(shape):
    ids = [1, 5, 9]
    best = np.sort(np.asarray(all_logits(model((1, 1)), [ids])[0, -1]))
    gap = ceiling.top_gap(model(shape), ids)
    assert gap == pytest.approx(best[-1] - best[-2], abs=1e-9)


def test_an_embedding_is_not_streamed():
    base = model((1, 1))
    whole = sum(x.nbytes for x in jax.tree.leaves(base.params))
    assert ceiling.streamed_bytes(base) == whole - base.params.embed.nbytes


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A folder with base, draft (as converted and as they came) and a file of prompts."""
    root = tmp_path_factory.mktemp("bench")
    for name, layers in (("base", 2), ("draft", 3)):
        config = tiny_config("llama", vocab_size=90, num_hidden_layers=layers, eos_token_id=0)
        convert(write_hf_folder(root / f"hf-{name}", config, seed=layers), root / name)
    (root / "lines.txt").write_text("hello\nyou there\nand more\n")
    return root


def arguments(root, *more, draft="draft"):
    places = {"--base": "base", "--draft": draft, "--prompts": "lines.txt"}
    places = {name: place for name, place in places.items() if place is not None}
    argv = [part for name, place in places.items() for part in (name, str(root / place))]
    argv += ["--num-prompts", "2", "--max-new-tokens", "8", "--num-draft-tokens", "2"]
    return [*argv, "--group-size", "2", "--tensor", "1", "--phases", "1", *more]


@pytest.mark.slow
def test_a_run_prints_and_keeps_what_it_measured(tiny, capsys):
    out = tiny / "out.jsonl"
    bench.main(arguments(tiny, "--arms", "autoregression,calibrated", "--out", str(out)))
    document = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert list(document["arms"]) == ["autoregression", "calibrated"]
    for name, arm in document["arms"].items():
        assert (arm["tokens"], arm["prompts"], arm["identical"]) == (16, 2, 2)
        assert arm["seconds"] > 0 and arm["first_divergence"] is None
        assert arm["tokens_per_step"] >= 1.0 and set(arm["phase_ms"]) >= {"verify", "step"}
        assert (arm["acceptance_rate"] is None) == (name == "autoregression")
    assert document["arms"]["autoregression"]["tokens_per_step"] == 1.0
    assert document["card"]["kv_bytes_per_token"] == 2 * 2 * 2 * 8 * 4
    header, *prompts, summary = map(json.loads, out.read_text().splitlines())
    assert header | summary == document and str(tiny) not in out.read_text()
    assert [(p["set"], p["index"]) for p in prompts] == [("text", 0), ("text", 1)]
    first = prompts[0]["arms"]
    assert all(arm["tokens"] == first["autoregression"]["tokens"] for arm in first.values())
    assert sum(first["calibrated"]["accepted_histogram"]) == first["calibrated"]["steps"]


@pytest.mark.slow
def test_prompt_lookup_needs_no_draft(tiny, capsys):
    arms = ("--arms", "autoregression,prompt-lookup", "--max-ngram", "2")
    bench.main(arguments(tiny, *arms, draft=None))
    document = json.loads(capsys.readouterr().out.splitlines()[-1])
    alone, lookup = document["arms"].values()
    assert (lookup["identical"], lookup["tokens"]) == (2, 16)
    assert alone["base_passes_per_token"] == 1.0 >= lookup["base_passes_per_token"] > 0
    assert set(lookup["phase_ms"]) == {"prefill", "step", "calibrate", "draft", "verify", "commit"}
    per_step = document["sets"]["text"]
    assert per_step == {n: a["tokens_per_step"] for n, a in document["arms"].items()}


def test_other_drafters_are_arms(tiny, monkeypatch):
    """Each is made with its options, and drafts no trees."""
    made = {}

    def drafter(kind):
        def make(*models, **options):
            made[kind] = ([getattr(m, "config", m) for m in models], options)
            return es.PromptLookupDrafter()

        return make

    monkeypatch.setattr(es, "EarlyExitDrafter", drafter("early-exit"), raising=False)
    monkeypatch.setattr(es, "PolybasicDrafter", drafter("polybasic"), raising=False)
    middle = ("--middle", str(tiny / "draft"), "--mu", "4", "--exits", "1,2")
    widths = ("--arms", "early-exit,prompt-lookup,polybasic", "--tree-width", "1,2", *middle)
    args = bench.parse(arguments(tiny, *widths))
    base = es.load_model(args.base, es.make_mesh(1, 1))
    arms = bench.own_arms(args, base)
    assert {name: arm.decoder.tree_width for name, arm in arms.items()} == {
        "early-exit": 1, "prompt-lookup, width 1": 1, "prompt-lookup, width 2": 2, "polybasic": 1,
    }  # fmt: skip
    depths = [arm.decoder.num_draft_tokens for arm in arms.values()]
    assert depths == [2, 2, 2, 2 + 4]  # beside polybasic's buffer
    assert made["early-exit"] == ([base.config], {"exits": (1, 2)})
    (config, lightest), options = made["polybasic"]
    assert (config.num_layers, options) == (3, {"mu": 4})
    assert isinstance(lightest, es.LayerParallelDrafter) and set(lightest.draft.partition) == {1}


@pytest.mark.slow
def test_sizes_and_widths_are_arms_of_their_own(tiny, capsys):
    arms = ("--arms", "uncalibrated,exact", "--tree-width", "1,2", "--group-size", "2,3")
    bench.main(arguments(tiny, *arms, "--phases", "0"))
    document = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert document["reference"] == "uncalibrated, group 2, width 1"
    assert list(document["arms"]) == [
        "uncalibrated, group 2, width 1", "uncalibrated, group 2, width 2",
        "uncalibrated, group 3, width 1", "uncalibrated, group 3, width 2",
        "exact, width 1", "exact, width 2",
    ]  # fmt: skip
    assert all(arm["identical"] == 2 and "phase_ms" not in arm for arm in document["arms"].values())


@pytest.mark.slow
def test_sampled_arms_are_not_compared_token_by_token(tiny, capsys):
    bench.main(
        arguments(tiny, "--arms", "autoregression,exact", "--temperature", "0.8", "--phases", "0")
    )
    document = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert all("identical" not in arm for arm in document["arms"].values())


@pytest.mark.slow
def test_transformers_arms_give_the_same_greedy_text(tiny, capsys, monkeypatch):
    pytest.importorskip("torch")
    from transformers.generation import candidate_generator

    peers = ("--base-hf", str(tiny / "hf-base"), "--draft-hf", str(tiny / "hf-draft"))
    generator = candidate_generator.AssistedCandidateGenerator
    asked, plain = [], generator.get_candidates

    def spy(self, ids, *args, **kwargs):
        asked.append((self.num_assistant_tokens, self.assistant_confidence_threshold))
        return plain(self, ids, *args, **kwargs)

    monkeypatch.setattr(generator, "get_candidates", spy)
    bench.main(
        arguments(tiny, *peers, "--arms", "autoregression,transformers,assisted,assisted-constant")
    )
    document = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert all(arm["identical"] == 2 for arm in document["arms"].values())
    assert document["arms"]["assisted"]["tokens_per_step"] is None
    assert (2, 0.0) in asked and any(number != 2 for number, _ in asked)  # constant, and not


def test_draws_by_one_pass_and_by_two_are_timed(capsys, tmp_path, monkeypatch):
    out = tmp_path / "draws.jsonl"
    argv = ["--vocab", "300", "--rounds", "3", "--out", str(out)]
    draws.main(argv)
    document = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert document == json.loads(out.read_text()) and document["options"]["vocab"] == 300
    found = [(x["what"], x["passes"]) for x in document["times"]]
    assert found == [("draw", "one"), ("choice", "one"), ("draw", "two"), ("choice", "two")]
    assert all(0 < x["minimum_ms"] <= x["median_ms"] for x in document["times"])

    def another(x):
        values, tokens = draws.sampling._largest_in_two(x)
        return values, tokens + 1

    monkeypatch.setitem(draws.PASSES, "two", another)
    with pytest.raises(ValueError, match="find another draw"):
        draws.main(argv)


def test_a_few_rows_are_timed_in_all_ways(tiny, capsys, monkeypatch):
    out = tiny / "rows.jsonl"
    argv = ["--base", str(tiny / "base"), "--rounds", "2", "--max-len", "40", "--out", str(out)]
    load = es.load_model

    def kept(path, mesh, dtype=None):  # as where a CPU is quick, and the checkpoint of bfloat16
        return load(path, mesh, dtype=dtype, matrix_dtype=None if dtype else "bfloat16")

    monkeypatch.setattr(es, "load_model", kept)
    few_rows.main([*argv, "--rows", "2,33"])
    document = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert document == json.loads(out.read_text()) and document["options"]["base"] == "base"
    found = [(one["matrices"], one["rows"], one["compiled"]) for one in document["passes"]]
    plain = [(1, "default"), (2, "default"), (2, "asked"), (33, "default")]
    both = [("float32", *one) for one in plain] + [("bfloat16", n, "default") for n in (1, 2, 33)]
    assert sorted(found) == sorted(both)
    first = {one["matrices"]: one["minimum_ms"] for one in document["passes"] if one["rows"] == 1}
    for one in document["passes"]:
        assert 0 < one["minimum_ms"] <= one["median_ms"]
        assert one["ratio"] == one["minimum_ms"] / first[one["matrices"]]
    with pytest.raises(SystemExit):
        few_rows.main([*argv, "--rows", "41"])
    assert "--rows must be of 1 to --max-len tokens" in capsys.readouterr().err


def test_no_arm_compiles_while_it_is_timed():
    """Prompts between the shortest and the longest have shapes of their own."""
    prompts = [[1] * n for n in (3, 20, 50, 70)]
    decoder = es.Decoder(model((1, 1)))

    def run(ids, seed):
        out = decoder.generate([ids], max_new_tokens=8, seed=seed)
        return out.tokens[0], out.stats

    arms = {"own": bench.Arm(run, decoder), "peer": bench.Arm(lambda ids, seed: (ids, None))}
    bench.warm_up(arms, prompts, 8)
    assert arms["own"].compile_seconds > 0
    compiled = []
    listen = lambda event, *_, **__: compiled.append(event)  # noqa: E731
    jax.monitoring.register_event_duration_secs_listener(listen)
    for ids in prompts:
        bench.answer_all(arms, ids, 0, repeats=1)
    jax.monitoring.unregister_event_duration_listener(listen)
    assert "/jax/core/compile/backend_compile_duration" not in compiled


def test_peers_are_compared_with_float32_on_the_cpu_alone(tiny):
    more = ("--arms", "autoregression,transformers", "--base-hf", "x", "--dtype", "bfloat16")
    with pytest.raises(ValueError, match=r"run on the CPU in float32: .* not in bfloat16 on cpu"):
        bench.main(arguments(tiny, *more))


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        (("--arms", "exact,fast"), "--arms takes each of autoregression, exact"),
        (("--arms", "exact,exact"), "at most once, got exact,exact"),
        (("--arms", "transformers"), "the arms of transformers need --base-hf"),
        (("--arms", "assisted", "--base-hf", "x"), "assisted generation needs --draft-hf"),
        (("--arms", "polybasic"), "the arm polybasic, and no other, needs --middle or"),
        (("--middle-bits", "4"), "the arm polybasic, and no other, needs --middle or"),
        (
            ("--arms", "polybasic", "--middle-bits", "4", "--middle", "x"),
            "--middle and --middle-bits are two ways",
        ),
        (("--num-prompts", "0"), "--num-prompts must be at least 1"),
    ],
)
def test_impossible_runs_are_refused(tiny, capsys, more, sentence):
    with pytest.raises(SystemExit):
        bench.main(arguments(tiny, *more))
    assert sentence in capsys.readouterr().err

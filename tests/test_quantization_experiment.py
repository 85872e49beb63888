"""The experiment that says what rounding costs: its means by hand, and a run on tiny models."""

import importlib
import json
import math
import pathlib

import pytest


@pytest.fixture
def script(monkeypatch):
    """experiments/quantization.py."""
    monkeypatch.syspath_prepend(pathlib.Path(__file__).parents[1] / "experiments")
    return importlib.import_module("quantization")


def test_means_are_over_tokens_and_errors_over_texts(script):
    # Three tokens at 1 and one at 3; texts are 3 * -0.5 and 1 * 1.5 away from the mean.
    mean, stderr = script.pooled([1.0, 3.0], [3, 1])
    assert mean == pytest.approx(1.5)
    assert stderr == pytest.approx(math.sqrt((1.5**2 + 1.5**2) * 2) / 4)


@pytest.mark.slow
def test_the_experiment_runs_on_texts_and_on_a_draft(checkpoints, tmp_path, script, capsys):
    out = tmp_path / "out.jsonl"
    (tmp_path / "prompts.txt").write_text("a b c a\nc a b\n")
    base, draft = str(checkpoints / "base"), str(checkpoints / "draft")
    shared = ["--base", base, "--set", f"text={tmp_path / 'prompts.txt'}", "--num-prompts", "2"]
    shared += ["--kinds", "int8,int4:8", "--out", str(out)]
    script.main(shared)
    script.main([*shared, "--draft", draft, "--tokens", "6", "--group-sizes", "2"])
    texts, drafts = map(json.loads, out.read_text().splitlines())
    assert texts["options"]["base"] == "base" and texts["options"]["set"] == ["text=prompts.txt"]
    bits = texts["bits"]
    assert bits["float"] == 16 > bits["int8"] > 8 and 8 > bits["int4:8"] > 4
    exact, *found = texts["arms"]
    assert (exact["kl"], exact["more_nats"], exact["argmax_agreement"]) == (0, 0, 1)
    for arm in found:
        gone = math.log(arm["perplexity"] / exact["perplexity"])
        assert arm["more_nats"] == pytest.approx(gone, abs=1e-3)
    assert 0 < found[0]["kl"] < found[1]["kl"]
    arms = drafts["arms"]
    assert [arm["kind"] for arm in arms] == ["float", "int8", "int4:8"]
    for arm in arms:
        assert arm["identical"] == 2 and sum(arm["emitted"]) == 12
        assert all(0 < steps <= 6 for steps in arm["steps"])
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.startswith(("| int8 |", "| int4:8 |")) for line in lines) == 4


def test_groups_that_do_not_divide_are_refused_before_anything_is_measured(
    checkpoints, tmp_path, script
):
    (tmp_path / "prompts.txt").write_text("a b\nb a\n")
    out = tmp_path / "out.jsonl"
    models = ["--base", str(checkpoints / "base"), "--set", f"text={tmp_path / 'prompts.txt'}"]
    with pytest.raises(ValueError, match="group_size 7 does not divide the"):
        script.main([*models, "--num-prompts", "2", "--kinds", "int4:7", "--out", str(out)])
    assert not out.exists()

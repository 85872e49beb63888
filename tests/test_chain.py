"""The times of chains of models by hand, and the experiment that measures them."""

import importlib
import json
import pathlib

import pytest


@pytest.fixture
def experiment(monkeypatch):
    """Imports a module of experiments/."""
    monkeypatch.syspath_prepend(pathlib.Path(__file__).parents[1] / "experiments")
    return importlib.import_module


def test_the_lemma_by_hand(experiment):
    chain_seconds = experiment("lemma").chain_seconds
    # A token costs half a pass of the base, and half of four passes of the draft.
    assert chain_seconds([0.1, 0.01], [2.0], 4) == pytest.approx(0.05 + 0.02)
    # A middle lengthens what the base accepts to 5, and itself accepts 2.5.
    three = chain_seconds([0.1, 0.02, 0.01], [5.0, 2.5], 4)
    assert three == pytest.approx(0.02 + 0.008 + 0.016)


def test_the_conditions_by_hand(experiment):
    lemma = experiment("lemma")
    # Above: 0.1 (1 / 2 - 1 / 5) = 30 ms a token are saved for 1 / 2.5 of the middle's pass.
    for seconds, pays in ((0.074, True), (0.076, False)):
        assert lemma.saves_above(seconds, 0.1, (2.5, 2.0, 5.0)) == pays
    # Below: 4 (0.01 / 2 - 0.01 / 2.5) = 4 ms a token are saved for the same.
    for seconds, pays in ((0.009, True), (0.011, False)):
        assert lemma.saves_drafting(seconds, 0.01, (2.5, 2.0), 4) == pays


@pytest.mark.slow
def test_the_experiment_measures_all_arms_and_compares(checkpoints, tmp_path, experiment):
    script, out = experiment("chain"), tmp_path / "out.jsonl"
    (tmp_path / "prompts.txt").write_text("a b\nc a b\n")
    models = ["--base", str(checkpoints / "base"), "--draft", str(checkpoints / "draft")]
    few = "--num-prompts 2 --max-new-tokens 9 --mu 2 --num-draft-tokens 4 --repeats 1 --rounds 1"
    prompts = ["--prompts", str(tmp_path / "prompts.txt"), "--out", str(out)]
    script.main([*models, *few.split(), *prompts])
    record = json.loads(out.read_text())
    for name, arm in record["arms"].items():
        assert arm["identical"] == (None if name == "middle over draft" else 2)
    chain, used = record["arms"]["chain"], record["arms"]["chain"]["passes"]
    assert used["base"] * chain["tokens_per_step"] == pytest.approx(1)
    assert used["middle"] * chain["emitted"] == pytest.approx(chain["middle_passes"])
    timing = record["timing"]
    seconds, lengths = timing["seconds"], timing["accepted"]
    without = seconds["base"] / lengths["base"] + 2 * seconds["draft"] / lengths["base"]
    assert timing["predicted"]["without"] == pytest.approx(without)
    assert min(timing["measured"].values()) > 0

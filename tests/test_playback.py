"""Automatic depth played back: what texts take by hand, and a run; and the table of timed ones."""

import importlib
import json
import pathlib
import types

import numpy as np
import pytest
import scipy.special


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(pathlib.Path(__file__).parents[1] / "experiments")
    return importlib.import_module("playback")


def test_texts_by_hand(script):
    costs = (1, 1.1, 1.2, 1.3, 1.5, 1.8)
    assert script.taken("110111", 0, 1) == 1 and script.taken("110111", 0, 8) == 2
    assert script.taken("110111", 3, 8) == 3 and script.taken("110111", 2, 8) == 0
    assert script.fixed("110111", costs, 0) == 6
    assert script.fixed("110111", costs, 2) == pytest.approx(2 * 1.2)  # 3 tokens each
    assert script.fixed("000", costs, 8) == pytest.approx(3 * 1.8)
    easy, hard = "1" * 90, "0" * 90
    assert script.automatic(easy, costs) < 90 * 1.8 / 9 * 1.3  # soon the deepest
    assert 90 < script.automatic(hard, costs) < 90 * 1.03  # soon none
    assert script.compare([easy], costs) <= 1 and 0.97 < script.compare([hard], costs) < 1


def test_a_table_of_timed_runs_compares_with_the_best_fixed_depth(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(pathlib.Path(__file__).parents[1] / "experiments")
    auto = importlib.import_module("auto")

    def file(name, seconds, counted):
        steps = {"alone": 12, "2": 6, "8": 6, "auto": 8}
        arms = {a: {"seconds": s, "new_tokens": 12, "steps": steps[a]} for a, s in seconds.items()}
        arms["auto"] |= counted
        if name == "one":
            for arm, least in (("alone", 9), ("2", 6), ("auto", 5)):
                arms[arm]["least"] = least
        header = {"machine": {}, "commit": "c", "options": {"case": name}, "prompt_tokens": {}}
        line = {"set": "text", "prompt": 0, "temperature": 0.0, "arms": arms}
        (tmp_path / name).write_text(f"{json.dumps(header)}\n{json.dumps(line)}\n")
        return tmp_path / name

    # By costs: alone 12 steps of 1 s, 2 tokens 6 of 1.5 s, automatic depth 4 of both.
    counted = {"depths": [0, 2], "costs": [[1.0, 1.5]], "steps_per_depth": [[4, 0, 4]]}
    one = file("one", {"alone": 10, "2": 8, "auto": 10}, counted)
    two = file("two", {"alone": 10, "8": 20, "auto": 12}, counted | {"costs": [[1.0], [1.0]]})
    rows = [line.split(" | ") for line in auto.table([one, two]).splitlines()]
    assert rows[0][4:6] == ["2 tokens", "8 tokens"]
    assert rows[2][4:] == ["1.25", "-", "1.00", "0.800", "1.200", "0.900 |"]
    assert rows[3][4:] == ["-", "0.50", "0.83", "0.833", "-", "- |"]


@pytest.mark.parametrize("temperature", [0.8, 1.7])
def test_a_drawn_token_was_drafted_as_often_as_the_rule_accepts(script, monkeypatch, temperature):
    draw = np.random.default_rng(0)
    logits = {name: draw.normal(size=(64, 5)).astype(np.float32) * 2 for name in ("p", "q")}
    monkeypatch.setattr(script.es, "logits", lambda model, texts: logits[model.name][None])
    p_model, q_model = (
        types.SimpleNamespace(name=name, config=types.SimpleNamespace(max_len=20)) for name in "pq"
    )
    p, q = (scipy.special.softmax(x[2] / temperature) for x in (logits["p"], logits["q"]))
    behind = [script.chances_of(p_model, q_model, [0, 1, 2], [x], temperature)[0] for x in range(5)]
    np.testing.assert_allclose(p * behind, np.minimum(p, q), rtol=1e-6)
    assert 0.05 < (p * behind).sum() < 0.95
    long = script.chances_of(p_model, q_model, [0, 1, 2], [4] * 30, temperature)
    assert long.shape == (17,) and long[0] == behind[4]  # as far as the draft's context goes
    hits = script.drawn(np.asarray([0.0, 1.0, 0.25]), 4000, 0)
    assert {x[:2] for x in hits} == {"01"} and 0.2 < np.mean([x[2] == "1" for x in hits]) < 0.3


@pytest.mark.slow
def test_a_run_plays_what_the_draft_would_have_said(script, checkpoints, tmp_path, capsys):
    (tmp_path / "lines.txt").write_text("a b\nc a b\nhello\n")
    out = tmp_path / "out.jsonl"
    argv = ["--base", str(checkpoints / "base"), "--draft", str(checkpoints / "base")]
    argv += ["--set", f"text={tmp_path / 'lines.txt'}", "--num-prompts", "2", "--skip", "1"]
    script.main([*argv, "--max-new-tokens", "9", "--out", str(out)])
    _, *lines = map(json.loads, out.read_text().splitlines())
    assert [line["hits"] for line in lines] == ["1" * 9] * 2  # it drafts for itself
    assert [line["prompt"] for line in lines] == [1, 2] and str(tmp_path) not in out.read_text()
    shown, whole = capsys.readouterr().out, out.read_text()
    out.write_text("\n".join(whole.splitlines()[:2]) + "\n")  # killed within the set
    script.main([*argv, "--max-new-tokens", "9", "--out", str(out)])
    assert out.read_text() == whole and capsys.readouterr().out == shown
    script.main(["--table", str(out)])
    assert capsys.readouterr().out == shown and "| text, first 48 |" in shown
    other = tmp_path / "drawn.jsonl"
    argv += ["--temperature", "0.8", "--draws", "3", "--max-new-tokens", "9", "--out", str(other)]
    script.main(argv)
    _, *lines = map(json.loads, other.read_text().splitlines())
    assert [line["hits"] for line in lines] == [["1" * 9] * 3] * 2

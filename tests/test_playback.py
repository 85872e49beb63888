"""Automatic depth played back: what texts take by hand, and a run."""

import importlib
import json
import pathlib

import pytest


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

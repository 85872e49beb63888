"""The experiment on tuned partitions: paired intervals, its table, and a whole run."""

from __future__ import annotations

import importlib
import json
import pathlib
import sys

import jax
import numpy as np
import pytest

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "experiments"))  # scripts, no package
tuned = importlib.import_module("tuned")


def arm(kind, partition, emitted, steps, identical):
    of = {"arm": kind, "attention_steps": len(partition), "partition": partition}
    return of | {"emitted": emitted, "steps": steps, "identical": identical}


def test_arms_are_compared_prompt_by_prompt():
    other = arm("uniform", [1, 3, 1], [8, 8, 12], [4, 4, 6], 3)
    mine = arm("tuned", [2, 1, 2], [9, 9, 12], [3, 3, 4], 3)  # 1.5 times as many on all prompts
    found = tuned.compare(mine, other)
    assert found == {
        "mine": [3.0, 3.0, 3.0],
        "other": [2.0, 2.0, 2.0],
        "difference": [1.0, 1.0, 1.0],
        "ratio": [1.5, 1.5, 1.5],
    }
    rng = np.random.default_rng(0)
    steps = rng.integers(10, 30, 400)
    noisy = arm(
        "tuned", [2, 1, 2], (steps * 2 + rng.integers(0, 9, 400)).tolist(), steps.tolist(), 3
    )
    other = arm("uniform", [1, 3, 1], (steps * 2).tolist(), steps.tolist(), 3)
    value, low, high = tuned.compare(noisy, other)["difference"]
    residual = np.array(noisy["emitted"]) - (2 + value) * steps
    stderr = residual.std() / steps.mean() / 400**0.5
    assert (high - low) / 2 == pytest.approx(1.96 * stderr, rel=0.1) and low < value < high


def test_the_table_names_what_is_not_identical():
    options = {"base": "big", "draft": "small", "num_draft_tokens": 5, "max_new_tokens": 64}
    header = {"options": options, "held_out_tokens": [3, 4], "tuning_tokens": [5]}
    arms = [
        {"arm": "layers"},
        arm("uniform", [1, 3, 1], [8, 8], [4, 4], 2),
        arm("tuned", [2, 1, 2], [9, 9], [3, 3], 1),
    ]
    lines = tuned.format_results(header, arms).splitlines()
    assert lines[0].startswith("small drafts 5 deep for big: tokens per step on 2 held-out prompts")
    assert lines[4:] == [
        "| 3 | uniform: 1,3,1 | 2.00 (2.00, 2.00) |  |  |",
        "| 3 | tuned: 2,1,2 | 3.00 (3.00, 3.00) (1 of 2 identical) | 1.00 (1.00, 1.00) "
        "| 1.50 (1.50, 1.50) |",
    ]


@pytest.mark.slow
def test_a_run_keeps_every_prompts_figures(checkpoints, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(jax, "clear_caches", lambda: None)  # other tests' programs are there too
    (tmp_path / "lines.txt").write_text("hello\nyou\nthere\nand now\n")
    out = tmp_path / "out.jsonl"
    tuned.main(
        [
            *(
                "--base",
                f"{checkpoints}/base",
                "--draft",
                f"{checkpoints}/draft",
                "--out",
                str(out),
            ),
            *("--set", f"text={tmp_path}/lines.txt"),
            *("--tuning-per-set", "2"),
            *("--held-out-per-set", "2", "--max-new-tokens", "8", "--num-draft-tokens", "2"),
            *("--attention-steps", "3,4", "--fit", "3", "--verify", "1"),
        ]
    )
    header, layers, *arms = map(json.loads, out.read_text().splitlines())
    assert str(tmp_path) not in json.dumps(header) and header["options"]["base"] == "base"
    assert (len(header["tuning_tokens"]), len(header["held_out_tokens"])) == (2, 2)
    assert [len(row) for row in layers["nats_by_layers_back"]] == [1, 2, 3, 4, 5]
    assert [(a["arm"], a["attention_steps"]) for a in arms] == [
        ("uniform", 3), ("tuned", 3), ("tuned, no larger", 3), ("uniform", 4), ("tuned", 4)
    ]  # fmt: skip
    for one in arms:
        assert one["emitted"] == [8, 8] and one["identical"] == 2 and sum(one["partition"]) == 5
        assert len(one["partition"]) == one["attention_steps"]
    assert max(arms[2]["partition"]) <= 3
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["arms"][1:] == arms
    tuned.main(["--table", str(out)])
    assert capsys.readouterr().out.count("| tuned: ") == 2

"""The experiment on drafts of the base's own layers: its bound by hand, and a run."""

import argparse
import importlib
import json
import pathlib

import jax.numpy as jnp
import pytest
from decoders import CONFIG, model


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(pathlib.Path(__file__).parents[1] / "experiments")
    return importlib.import_module("skipping")


def test_the_bound_by_hand(script):
    assert script.bound(0.5, 0.25) == 1.5 / 1.25  # one token; two bring 1.75 for 1.5 passes
    assert script.bound(1.0, 0.5) == 9 / 5
    assert script.bound(0.0, 0.5) == 1 / 1.5


@pytest.mark.slow
def test_a_layer_that_does_nothing_is_left_out_first(script):
    base = model((1, 1))
    block = base.params.blocks[1]
    (attention,), (mlp,) = block.attention, block.mlp
    idle = block.replace(
        attention=(attention.replace(wo=jnp.zeros_like(attention.wo)),),
        mlp=(mlp.replace(w_down=jnp.zeros_like(mlp.w_down)),),
    )
    blocks = (base.params.blocks[0], idle, base.params.blocks[2])
    base = base.replace(params=base.params.replace(blocks=blocks))
    args = argparse.Namespace(max_new_tokens=12, most=0.7)
    found = script.measure(base, [3, 1, 4, 1, 5], args)
    assert CONFIG.num_layers == 3 and found["left_out"][0] == 1 and len(found["left_out"]) == 2
    first, second = found["agreement_and_bound"]
    assert first == [1.0, round(9 / (1 + 8 * 2 / 3), 4)] and second[0] < 1


@pytest.mark.slow
def test_a_run_goes_on_where_it_ended(script, checkpoints, tmp_path, capsys):
    (tmp_path / "lines.txt").write_text("a b\nc a b\n")
    out = tmp_path / "out.jsonl"
    argv = ["--base", str(checkpoints / "base"), "--set", f"text={tmp_path / 'lines.txt'}"]
    argv += ["--num-prompts", "2", "--max-new-tokens", "6", "--most", "0.4", "--out", str(out)]
    script.main(argv)
    whole = out.read_text()
    header, *lines = map(json.loads, whole.splitlines())
    assert [line["prompt"] for line in lines] == [0, 1] and str(tmp_path) not in whole
    shown = capsys.readouterr().out
    out.write_text("\n".join(whole.splitlines()[:2]) + "\n")
    script.main(argv)
    assert out.read_text() == whole
    script.main(["--table", str(out)])
    assert script.table(header, lines) in shown

"""Tuned partitions: the file that keeps one, the command that finds one, those that use it."""

from __future__ import annotations

import argparse
import json
import re
import shutil

import numpy as np
import pytest
from decoders import PROMPTS, model

import easyspec_jax as es
from easyspec_jax import checkpoint
from easyspec_jax.cli import answering
from easyspec_jax.cli import tune as tune_command
from easyspec_jax.cli.main import make_parser
from easyspec_jax.planner.device import PRESETS
from easyspec_jax.planner.plan import Deployment, Planner
from easyspec_jax.sharding import LAYOUTS
from easyspec_jax.text import Tokenizer
from easyspec_jax.tuner import search, stale_passes, tune


def test_the_file_is_read_as_written_and_replaced_whole(tmp_path):
    file = checkpoint.write_partition(tmp_path, (1, 2, 2), {"tuned_for": {"draft_weights": "aa"}})
    assert checkpoint.read_partition(tmp_path, 5) == (1, 2, 2)
    assert checkpoint.read_partition(tmp_path, 5, "aa") == (1, 2, 2)
    with pytest.warns(UserWarning, match="was found for other weights: run `easyspec tune"):
        checkpoint.read_partition(tmp_path, 5, "bb")
    with pytest.raises(TypeError):
        checkpoint.write_partition(tmp_path, (5,), {"candidates": object()})
    assert checkpoint.read_partition(tmp_path, 5) == (1, 2, 2)
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
        checkpoint.read_partition(tmp_path, 5)
    assert sentence in str(error.value) and "\n" not in str(error.value)


@pytest.fixture
def pair(checkpoints, tmp_path):
    """A draft's checkpoint of its own, and prompts."""
    shutil.copytree(checkpoints / "draft", tmp_path / "draft")
    (tmp_path / "prompts.txt").write_text("hello\nonce upon\n")
    return tmp_path


@pytest.mark.slow
def test_the_command_tunes_and_others_use_what_it_found(easyspec, pair, monkeypatch):
    draft, options = pair / "draft", ("--prompts", pair / "prompts.txt", "--max-new-tokens", 12)
    command = ("tune", "--base", "base", "--draft", draft, *options, "--num-draft-tokens", 2)
    command = (*command, "--verify", 1, "--tensor", 1)
    results = []
    search = tune.tune
    monkeypatch.setattr(tune, "tune", lambda *a, **o: results.append(search(*a, **o))
                        or results[-1])  # fmt: skip
    status, out, _ = easyspec(*command, "--attention-steps", 2, "--json")
    assert status == 0
    *lines, last = out.splitlines()
    found = json.loads(last)
    stored = json.loads((draft / "partition.json").read_text())
    assert stored == {"format": 1} | found and sum(found["partition"]) == 5
    assert f"written to {draft / 'partition.json'}; use it with --group-size tuned" in lines[-1]
    assert found["tuned_for"]["attention_steps"] == 2 and found["tuned_for"]["base"] == "base"
    assert found["tuned_for"]["draft_weights"] and str(pair) not in last
    assert all(c["identical"] == 2 for c in found["candidates"])
    partition = tuple(found["partition"])
    assert es.load_model(draft, es.make_mesh(1, 1), group_size="tuned").partition == partition
    shown = ",".join(map(str, partition))
    status, out, _ = easyspec("info", draft, "--group-size", "tuned")
    assert status == 0 and f"{shown}: {len(partition)} attention steps" in out
    with monkeypatch.context() as patch:
        patch.setattr(answering, "Engine", lambda args, setup: pytest.fail(f"{args.group_size}"))
        with pytest.raises(pytest.fail.Exception, match=re.escape(str(partition))):
            easyspec(
                *("generate", "--base", "base", "--draft", draft, "--tensor", 1),
                *("--group-size", "tuned", "hello"),
            )
    # again: what is replaced is said; a dry run writes nothing; a device is kept by its name
    monkeypatch.setattr(tune, "tune", lambda *a, **o: results[-1])
    before = (draft / "partition.json").read_text()
    status, out, _ = easyspec(*command, "--layer", 3, "--dry-run")
    assert status == 0 and "written" not in out and (draft / "partition.json").read_text() == before
    measured = pair / "measured.json"
    measured.write_text('{"name": "mine", "bandwidth": 1e11, "flops": 1e12}')
    status, out, _ = easyspec(*command, "--layer", 3, "--device", measured)
    assert status == 0 and f", which replaces {shown}; use it" in out
    stored = (draft / "partition.json").read_text()
    assert json.loads(stored)["tuned_for"]["device"] == "mine" and str(pair) not in stored


def test_each_prompt_of_a_chat_is_a_conversation_of_its_own(checkpoints, tmp_path):
    (tmp_path / "prompts.txt").write_text("hi\nhello\n")
    files = {"base": checkpoints / "base", "prompts": tmp_path / "prompts.txt"}
    args = argparse.Namespace(**files, num_prompts=None, chat=True)
    tokenizer = Tokenizer(checkpoints / "base")
    texts = tune_command._encode(args, tune_command._read_texts(args))
    texts = [tokenizer.decode(ids) for ids in texts]
    assert texts == ["user: hiassistant: ", "user: helloassistant: "]


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
    place = {"layer": 4, "tensor": 2, "draft": "groups", "rules": LAYOUTS["grouped"]}
    choice = planner.price(Deployment(**place, group_size=(1, 4, 4)), 5)
    assert seconds((1, 4, 4)) == choice.cost.seconds
    assert times()((1, 8)) < seconds((1, 8))  # all eight side by side
    fewer = Planner(
        base=config, draft=config, device=PRESETS["h100"], draft_codes=es.Quantization("int4"),
        kv_dtype="int8",
    )  # fmt: skip
    choice = fewer.price(Deployment(**place, group_size=(1, 4, 4)), 5)
    codes = {"draft_codes": es.Quantization("int4")}
    args = make_parser().parse_args([*words, "--layer", "4", "--kv-dtype", "int8"])
    seconds = tune_command.predict_times(args, config, config, **codes)
    assert seconds((1, 4, 4)) == choice.cost.seconds


def test_a_pair_is_tuned_in_the_codes_it_runs_in(checkpoints):
    """Each model in its own; one model where both are the same."""

    def load(*options):
        draft = str(checkpoints / "draft")
        words = ["tune", "--draft", draft, "--base", draft, "--prompts", "p", "--tensor", "1"]
        args = make_parser().parse_args([*words, *options])
        about = checkpoint.read_metadata(draft)[1]
        return tune_command._load(args, **tune_command._codes(args, about, about))

    base, draft = load("--kv-dtype", "int8")
    assert base is draft and base.layout.kv_codes == "int8"
    base, draft = load("--draft-quantization", "int8")
    ours, theirs = (m.params.blocks[0].mlp[0].w_down for m in (base, draft))
    assert not np.array_equal(ours, theirs)
    np.testing.assert_allclose(ours, theirs, atol=np.abs(ours).max() / 127)


def test_a_saved_model_does_not_take_a_partition_along(pair):
    draft = pair / "draft"
    checkpoint.write_partition(draft, (5,), {})
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
        (("--layer", 0), "--layer must be in 1 .. 1024, got 0"),
        (("--layer", 2, "--verify", 0), "--verify must be at least 1, got 0"),
        (("--layer", 2, "--prompts", "nowhere.txt"), "there is no file of prompts at nowhere.txt"),
        (("--layer", 2, "--prompts", "base/tokenizer.json"), "prompt 0 has"),
        (("--layer", 2, "--prompts", "bad.jsonl"), "bad.jsonl, line 2"),
        (("--layer", 2, "--prompts", "empty.txt"), "empty.txt holds no prompts"),
        (("--layer", 2, "--num-prompts", 3), "--num-prompts asks for 3, but prompts.txt has 2"),
        (("--layer", 2, "--base", "foreign"), "have different tokenizers"),
        (("--layer", 2, "--draft", "draft/layers"), "draft/layers is no model"),
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


@pytest.mark.slow
def test_a_text_that_differs_is_reported(easyspec, pair, monkeypatch):
    original = es.Decoder.generate

    def wrong(self, *args, **options):
        out = original(self, *args, **options)
        out.tokens[1][2] += 1
        return out

    monkeypatch.setattr(es.Decoder, "generate", wrong)
    m = model((1, 1), layout="tensor")
    candidate = search.Candidate((3,), "sum", 0.1, 0.5, 2.0)
    options = {
        "num_draft_tokens": 3,
        "max_new_tokens": 16,
        "eos_ids": (),
        "sampling": es.Sampling(),
    }
    expected = [
        text.tokens[0, text.counted].tolist() for text in stale_passes.write_texts(m, PROMPTS, 16)
    ]
    expected[1][2] -= 1  # as it was
    found = tune.confirm(m, m, candidate, PROMPTS, expected, **options)
    assert found.identical == 2
    result = tune.Tuning((3,), (found,), 1.0, np.zeros((3, 3)), 3, 48)
    monkeypatch.setattr(tune, "tune", lambda *args, **options: result)
    status, out, err = easyspec(
        *("tune", "--draft", pair / "draft", "--prompts", pair / "prompts.txt"),
        *("--attention-steps", 1, "--tensor", 1),
    )
    assert not (pair / "draft" / "partition.json").exists()
    assert status == 1 and "3: 1 of 3 answers differ from autoregression's" in err
    assert "best: 3, and no uniform one has so few groups" in out

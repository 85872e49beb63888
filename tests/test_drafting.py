"""The command line's choice of a drafter: what each takes, refuses and reports."""

from __future__ import annotations

import json

import jax
import numpy as np
import pytest
from eagle_heads import write_published

import easyspec_jax as es
from easyspec_jax.checkpoint import read_metadata
from easyspec_jax.cli import drafting
from easyspec_jax.cli.main import make_parser
from easyspec_jax.cli.report import _listed

PROMPT = "so it goes and so it goes"


def generate(easyspec, *options, command="generate"):
    base = (command, "--base", "base", "--max-new-tokens", 12, "--tensor", 1)
    return easyspec(*base, *options, PROMPT)


@pytest.fixture
def others(monkeypatch):
    """Prompt lookup in the place of the drafters that are made of the base; what they were asked
    for, in order.
    """
    seen = []

    def early_exit(base, *, exits=None):
        seen.append(("early-exit", exits))
        return es.PromptLookupDrafter()

    def polybasic(middle, drafter, *, mu=8):
        seen.append(("polybasic", type(drafter).__name__, middle.config.num_layers, mu))
        return es.PromptLookupDrafter()

    def quantize_model(model, kind):
        seen.append(("quantised", kind))
        return model

    monkeypatch.setattr(es, "EarlyExitDrafter", early_exit)
    monkeypatch.setattr(es, "PolybasicDrafter", polybasic)
    monkeypatch.setattr(es, "quantize_model", quantize_model)
    return seen


@pytest.mark.slow
def test_a_head_drafts_the_same_text(easyspec, checkpoints, tmp_path, caplog):
    config = read_metadata(checkpoints / "base")[0]
    head = write_published(tmp_path / "head", config, range(0, 90, 2))
    _, want, _ = generate(easyspec)
    how = ("--drafter", "eagle", "--head", head, "--tree-width", 2)
    how += ("--draft-quantization", "int8")
    status, out, err = generate(easyspec, *how)
    assert (status, out) == (0, want) and "acceptance rate" in err
    assert "int8 weights are rounded" in caplog.text  # the base's are not
    status, _, err = generate(easyspec, "--drafter", "eagle")
    assert status == 1 and "--drafter eagle needs --head" in err
    (head / "model.safetensors").unlink()
    status, _, err = generate(easyspec, *how)
    assert status == 1 and "has neither model.safetensors nor model.safetensors.index.json" in err


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "counter"),
    [
        (("early-exit", "--exits", "1,2", "--num-draft-tokens", 3), "layer_passes"),
        (("polybasic", "--draft", "draft", "--middle-bits", 4, "--mu", 2), "middle_passes"),
        (("prompt-lookup+layer-parallel", "--draft", "draft", "--min-ngram", 2), "second_steps"),
    ],
)
def test_other_drafters_write_the_same_text_and_say_how(easyspec, options, counter):
    _, want, _ = generate(easyspec)
    status, out, err = generate(easyspec, "--drafter", *options, "--json")
    *text, last = out.splitlines(keepends=True)
    assert status == 0 and "".join(text) == want
    assert json.loads(last)["drafter_report"][counter] > 0
    assert counter.replace("_", " ") in err


def test_prompt_lookup_changes_the_statistics_and_not_the_text(easyspec):
    _, want, _ = generate(easyspec)
    for options in (
        ("--num-draft-tokens", 3, "--tree-width", 2, "--max-ngram", 2, "--json", "--no-stats"),
        ("--show-draft",),
    ):
        status, out, err = generate(easyspec, "--drafter", "prompt-lookup", *options)
        assert status == 0
        if "--json" in options:
            text, _, stats = out.strip().rpartition("\n")
            assert (text + "\n", err) == (want, "")
            stats = json.loads(stats)
            assert len(stats["acceptance_per_rank"]) == 2 and stats["nodes_drafted"] > 0
            assert "drafter_report" not in stats
        else:
            assert out.replace("[", "").replace("]", "") == want
            assert "accepted draft tokens:steps  0:" in err


def test_chat_with_prompt_lookup(easyspec):
    command = ("chat", "--base", "base", "--max-new-tokens", 6, "--tensor", 1, "--max-len", 120)
    turns = "hi hi hi\nyou\n"
    (_, want, _), (status, out, err) = (
        easyspec(*command, *more, stdin=turns) for more in ((), ("--drafter", "prompt-lookup"))
    )
    assert (status, out) == (0, want) and err.count("acceptance rate") == 2


def test_layer_parallel_is_the_default_of_a_draft(easyspec, monkeypatch):
    """And --drafter says the same."""
    _, out, err = generate(easyspec, "--draft", "draft", "--drafter", "layer-parallel")
    assert "acceptance rate" in err
    made = []
    drafter = es.LayerParallelDrafter
    monkeypatch.setattr(
        es, "LayerParallelDrafter", lambda *a, **k: made.append(k) or drafter(*a, **k)
    )
    assert generate(easyspec, "--draft", "draft")[:2] == (0, out)
    assert len(made) == 2  # planned, then loaded


@pytest.mark.slow
def test_a_draft_with_another_tokenizer_drafts_what_both_know(easyspec):
    _, want, _ = generate(easyspec)
    options = ("--draft", "foreign", "--other-tokenizer", "--num-draft-tokens", 3)
    status, out, err = generate(easyspec, *options)
    assert (status, out) == (0, want)
    assert "another tokenizer: 88 of 90 tokens shared, 100% of the prompt's" in err


def test_early_exit_gets_its_exits(easyspec, others):
    _, want, _ = generate(easyspec)
    assert generate(easyspec, "--drafter", "early-exit", "--exits", "1,2")[:2] == (0, want)
    assert generate(easyspec, "--drafter", "early-exit", "--num-draft-tokens", 9)[0] == 0
    assert others == [("early-exit", exits) for exits in ((1, 2), (1, 2), None, None)]


def test_polybasic_gets_its_models(easyspec, others):
    _, want, _ = generate(easyspec)
    how = ("--drafter", "polybasic", "--draft", "draft")
    assert generate(easyspec, *how, "--middle", "draft", "--mu", 4)[:2] == (0, want)
    assert others == [("polybasic", "LayerParallelDrafter", 5, 4)] * 2
    others.clear()
    assert generate(easyspec, *how, "--middle-bits", 4)[:2] == (0, want)
    of_base = ("polybasic", "LayerParallelDrafter", 3, 8)
    assert others == [of_base, ("quantised", "int4"), of_base]  # planned without a copy, then made


@pytest.mark.parametrize(
    ("options", "depth"),
    [
        (("--draft", "draft"), 5),
        (("--draft", "draft", "--drafter", "polybasic", "--middle", "draft", "--mu", "4"), 4 + 5),
        (("--draft", "draft", "--num-draft-tokens", "3"), 3),
        ((), 0),
    ],
)
def test_a_drafter_drafts_as_deep_as_it_likes_unless_told(checkpoints, monkeypatch, options, depth):
    monkeypatch.chdir(checkpoints)
    args = make_parser().parse_args(["generate", "--base", "base", *options, "hi"])
    drafting.check_options(args)
    drafting.check_drafter(args, None)

    def planned(path, **options):
        return es.abstract_model(read_metadata(path)[0], es.make_mesh(1, 1), **options)

    assert drafting.make_decoder(args, planned).num_draft_tokens == depth


def test_a_drafters_own_counters_are_printed(easyspec, monkeypatch):
    report = {"middle_passes": np.int32(3), "per_exit": [1, 2], "rates": {"1": 0.5}}
    monkeypatch.setattr(es.PromptLookupDrafter, "report", lambda self, state: report)
    status, out, err = generate(easyspec, "--drafter", "prompt-lookup", "--json")
    assert status == 0
    own = json.loads(out.splitlines()[-1])["drafter_report"]
    assert own == {"middle_passes": 3, "per_exit": [1, 2], "rates": {"1": 0.5}}
    assert "\nmiddle passes 3, per exit 1 2, rates 1:0.5\n" in err
    assert err.splitlines()[-1].startswith("load ")


def test_counters_in_words():
    assert (
        _listed({"a_b": 1, "c": 0.123456, "d": [0.5, 2], "e": "x"})
        == "a b 1, c 0.123, d 0.5 2, e x"
    )


def test_every_option_is_taken_by_a_drafter():
    taken = {name for kind in drafting.KINDS.values() for name in kind.options}
    assert taken | {"num_draft_tokens", "show_draft"} == drafting.OPTIONS.keys()


LOOKUP = ("--drafter", "prompt-lookup")
BOTH = "prompt-lookup+layer-parallel"
EXIT = ("--drafter", "early-exit")
POLYBASIC = ("--drafter", "polybasic", "--draft", "draft")


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (("--drafter", "layer-parallel"), "--drafter layer-parallel needs --draft"),
        (("--max-ngram", 2), "--max-ngram needs --drafter prompt-lookup"),
        (("--draft", "foreign"), "use a draft of the same family, or --other-tokenizer"),
        (("--drafter", BOTH), f"--drafter {BOTH} needs --draft"),
        (("--drafter", BOTH, "--draft", "draft", "--tree-width", 2), "not take --tree-width"),
        ((*LOOKUP, "--min-ngram", 4), "min_ngram must be a whole number in 1 .. max_ngram=3"),
        (("--exits", "1"), "--exits needs --drafter early-exit"),
        (("--mu", 4), "--mu needs --drafter polybasic"),
        (("--num-draft-tokens", 4), "--num-draft-tokens needs --draft"),
        (("--draft", "draft", "--mu", 4), "--drafter layer-parallel does not take --mu"),
        ((*LOOKUP, "--draft", "draft"), "--drafter prompt-lookup does not take --draft"),
        ((*LOOKUP, "--group-size", 2), "--drafter prompt-lookup does not take --group-size"),
        ((*LOOKUP, "--candidates", "best"), "prompt-lookup does not take --candidates"),
        ((*LOOKUP, "--min-draft-probability", 0.1), "does not take --min-draft-probability"),
        ((*LOOKUP, "--no-calibrate"), "prompt-lookup does not take --no-calibrate"),
        ((*LOOKUP, "--max-ngram", 0), "--max-ngram must be at least 1, got 0"),
        ((*EXIT, "--draft", "draft"), "--drafter early-exit does not take --draft"),
        ((*EXIT, "--max-ngram", 3), "--drafter early-exit does not take --max-ngram"),
        ((*EXIT, "--tree-width", 2), "--drafter early-exit does not take --tree-width"),
        (("--drafter", "polybasic", "--middle-bits", 4), "--drafter polybasic needs --draft"),
        (POLYBASIC, "--drafter polybasic needs --middle or --middle-bits"),
        (
            (*POLYBASIC, "--middle", "base", "--middle-bits", 4),
            "--drafter polybasic needs --middle or --middle-bits, not both",
        ),
        ((*POLYBASIC, "--middle", "nowhere"), "nowhere is no model"),
        ((*POLYBASIC, "--middle", "foreign"), "have different tokenizers"),
        (
            (*POLYBASIC, "--middle-bits", 4, "--quantization", "int8"),
            "--middle-bits makes codes of a base of floats: name a --middle instead",
        ),
        ((*POLYBASIC, "--middle-bits", 4, "--mu", 0), "--mu must be at least 1, got 0"),
        ((*POLYBASIC, "--middle-bits", 4, "--exits", "1"), "polybasic does not take --exits"),
        ((*POLYBASIC, "--middle-bits", 4, "--tree-width", 2), "does not take --tree-width"),
    ],
)
def test_refusals_are_one_sentence_before_weights_are_loaded(
    easyspec, monkeypatch, options, sentence
):
    def load_model(*args, **options):
        raise AssertionError("loads weights")

    monkeypatch.setattr(es, "load_model", load_model)
    status, out, err = generate(easyspec, *options)
    assert (status, out) == (1, "")
    assert err.splitlines()[-1].startswith("error: ") and sentence in err
    assert err.count("error: ") == 1 and "Traceback" not in err


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (("--drafter", "oracle"), "invalid choice: 'oracle'"),
        ((*EXIT, "--exits", "1,two"), "'1,two' is no list of numbers like 1,2,4"),
        ((*POLYBASIC, "--middle-bits", 5), "invalid choice: 5"),
    ],
)
def test_what_is_no_option_is_a_usage_error(easyspec, capsys, options, sentence):
    with pytest.raises(SystemExit) as end:
        generate(easyspec, *options)
    assert end.value.code == 2 and sentence in capsys.readouterr().err


@pytest.mark.parametrize(
    "how",
    [
        ("--drafter", "layer-parallel", "--draft", "draft"),
        LOOKUP,
        EXIT,
        (*POLYBASIC, "--middle-bits", 8),
    ],
    ids=lambda how: how[1],
)
def test_a_lack_of_memory_is_refused_before_weights_are_loaded(easyspec, others, monkeypatch, how):
    from easyspec_jax import memory

    monkeypatch.setattr(memory, "device_memory", lambda mesh: 1000)
    monkeypatch.setattr(es, "load_model", None)
    status, _, err = generate(easyspec, *how)
    assert status == 1 and "error: needs 0.00 GiB on each device (base weights" in err
    assert not any(isinstance(x, jax.Array) for call in others for x in call)

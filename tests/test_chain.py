"""The times of chains by hand, and `easyspec plan --chain`."""

import importlib
import json
import pathlib

import pytest

from easyspec_jax.chain import ChainModel, chain_seconds, insertion_pays, plan_chain

BASE = ChainModel(name="base", seconds=0.1, accepted=2.0)
DRAFT = ChainModel(name="draft", seconds=0.01)
MIDDLE = ChainModel(name="middle", seconds=0.02, accepted=2.5)


def test_the_lemma_by_hand():
    # A token costs half a pass of the base, and half of four passes of the draft.
    assert chain_seconds([BASE, DRAFT], 4) == pytest.approx(0.05 + 0.02)
    above = ChainModel(name="base", seconds=0.1, accepted=5.0)
    three = chain_seconds([above, MIDDLE, DRAFT], 4)
    assert three == pytest.approx(0.1 / 5 + 0.02 / 2.5 + 4 * 0.01 / 2.5)


def test_both_conditions_by_hand():
    result = insertion_pays([BASE, DRAFT], MIDDLE, 5.0, 4)
    assert result.before == pytest.approx(0.07) and result.after == pytest.approx(0.044)
    assert result.upper.ratio == pytest.approx(0.2)
    assert result.upper.bound == pytest.approx(2.5 * (1 / 2 - 1 / 5))
    assert result.lower.ratio == pytest.approx(2.0)
    assert result.lower.bound == pytest.approx(4 * (2.5 / 2 - 1))
    assert result.upper.holds and not result.lower.holds and result.pays


@pytest.mark.parametrize("seconds", [0.001, 0.011, 0.03, 0.07, 0.2])
@pytest.mark.parametrize("accepted", [1.2, 2.0, 3.5, 6.0])
@pytest.mark.parametrize("above", [1.5, 3.0, 8.0])
def test_the_conditions_are_what_each_saving_allows(seconds, accepted, above):
    """Time saved = saving above + saving below - cost, each condition one saving > the cost."""
    new = ChainModel(name="new", seconds=seconds, accepted=accepted)
    result = insertion_pays([BASE, DRAFT], new, above, 4)
    cost = seconds / accepted
    saved_above, saved_below = 0.1 * (1 / 2 - 1 / above), 4 * 0.01 * (1 / 2 - 1 / accepted)
    assert result.before - result.after == pytest.approx(saved_above + saved_below - cost)
    assert result.upper.holds == (saved_above > cost)
    assert result.lower.holds == (saved_below > cost)
    if result.upper.holds and result.lower.holds:
        assert result.pays


def test_a_model_higher_up_saves_no_drafting():
    above = ChainModel(name="base", seconds=0.1, accepted=5.0)
    models = [above, MIDDLE, DRAFT]
    new = ChainModel(name="new", seconds=0.05, accepted=5.5)
    result = insertion_pays(models, new, 20.0, 4, after="base")
    assert result.lower is None
    saved = 0.1 * (1 / 5 - 1 / 20) - 0.05 / 5.5
    assert result.before - result.after == pytest.approx(saved)
    assert insertion_pays(models, new, 20.0, 4).lower is not None  # above the drafter


@pytest.mark.parametrize(
    ("models", "passes", "message"),
    [
        ([DRAFT], 4, "at least two models"),
        ([DRAFT, DRAFT], 4, "accepted of draft is missing"),
        ([BASE, BASE], 4, "base is the last of the chain"),
        ([BASE, DRAFT], 0, "draft_passes must be a number above 0, got 0"),
    ],
)
def test_chains_that_are_none_are_refused(models, passes, message):
    with pytest.raises(ValueError, match=message):
        chain_seconds(models, passes)


def test_models_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match="seconds of x must be a number above 0, got -1"):
        ChainModel(name="x", seconds=-1)
    with pytest.raises(ValueError, match=r"accepted of x must be at least 1, .* got 0.5"):
        ChainModel(name="x", seconds=1, accepted=0.5)
    with pytest.raises(ValueError, match="accepted_above must be at least 1"):
        insertion_pays([BASE, DRAFT], MIDDLE, float("nan"), 4)
    with pytest.raises(ValueError, match="after one of base, not after 'draft'"):
        insertion_pays([BASE, DRAFT], MIDDLE, 5.0, 4, after="draft")
    with pytest.raises(ValueError, match="accepted of draft is missing"):
        insertion_pays([BASE, DRAFT], DRAFT, 5.0, 4)


FILE = {
    "models": [
        {"name": "base", "seconds": 0.1, "accepted": 2.0},
        {"name": "draft", "seconds": 0.01},
    ],
    "draft_passes": 4,
    "new": {"name": "middle", "seconds": 0.02, "accepted": 2.5, "accepted_above": 5.0},
}


@pytest.fixture
def plan(easyspec, tmp_path):
    def run(document, *more):
        path = tmp_path / "chain.json"
        path.write_text(document if isinstance(document, str) else json.dumps(document))
        return easyspec("plan", "--chain", path, *more)

    return run


def test_plan_says_whether_it_pays(plan):
    status, out, err = plan(FILE)
    assert (status, err) == (0, "")
    for words in ("without middle   70 ms", "with middle      44 ms", "0.2 < 0.75 holds",
                  "2 < 1 fails", "middle pays: 1.59 times"):  # fmt: skip
        assert words in out
    status, out, _ = plan(FILE, "--json")
    document = json.loads(out)
    assert document["pays"] and document["seconds_with_new"] == pytest.approx(0.044)
    assert document["condition_drafter"] == {"ratio": 2.0, "bound": 1.0, "holds": False}
    dear = FILE | {"new": FILE["new"] | {"seconds": 0.2}}
    assert "middle does not pay: 0.60 times" in plan(dear)[1]
    alone = {name: FILE[name] for name in ("models", "draft_passes")}
    assert plan(alone)[1] == "70 ms a token: base > draft\n"


@pytest.mark.parametrize(
    ("document", "more", "message"),
    [
        ("{", (), "is no JSON file of a chain"),
        ({"models": []}, (), 'must hold "models", "draft_passes"'),
        (FILE | {"models": 3}, (), '"models" must be a list'),
        (FILE | {"models": [{"name": "x"}]}, (), 'a model has "name", "seconds"'),
        (FILE | {"new": {"name": "x", "seconds": 1, "accepted": 2}}, (), '"accepted_above"'),
        (FILE, ("--device", "h100"), "leave out --device"),
        (FILE, ("--measure",), "leave out --measure"),
        (FILE, ("--batch", "4"), "leave out --batch"),
        (
            FILE | {"models": [{"name": 3, "seconds": 1, "accepted": 2}, FILE["models"][-1]]},
            (),
            "the name of a model must be a text",
        ),
        (
            FILE | {"models": [FILE["models"][0], *FILE["models"]]},
            (),
            "need names of their own",
        ),
    ],
)
def test_plan_refuses_in_one_sentence(plan, document, more, message):
    status, out, err = plan(document, *more)
    assert status != 0 and out == "" and message in err and len(err.splitlines()) == 1


def test_plan_needs_a_pair_or_a_chain(easyspec):
    status, _, err = easyspec("plan", "--device", "h100")
    assert status != 0 and "name a --base and a --draft, or a --chain" in err


@pytest.mark.slow
def test_the_experiment_measures_all_arms_and_compares(checkpoints, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(pathlib.Path(__file__).parents[1] / "experiments")
    script, out = importlib.import_module("chain"), tmp_path / "out.jsonl"
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
    (tmp_path / "chain.json").write_text(json.dumps(timing["chain"]))
    again = json.loads(plan_chain(str(tmp_path / "chain.json"), as_json=True))
    assert again["seconds_with_new"] == timing["predicted"]["with"]
    assert min(timing["measured"].values()) > 0

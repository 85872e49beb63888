"""The experiment that compares rules of acceptance: both, by what they make of tiny models."""

import importlib
import pathlib

import numpy as np
import pytest
from decoders import GROUPS, PROMPTS, model

import easyspec_jax as es


@pytest.fixture
def script(monkeypatch):
    """experiments/verification.py."""
    monkeypatch.syspath_prepend(pathlib.Path(__file__).parents[1] / "experiments")
    return importlib.import_module("verification")


def sums(script, draft, width):
    """What both rules accept of three levels, by level, and the steps of it."""
    drafter = script.WatchedDrafter(draft, temperature=0.8)
    decoder = es.Decoder(model((1, 1)), drafter, num_draft_tokens=3, tree_width=width)
    sampling = es.Sampling(temperature=0.8)
    out = decoder.generate(PROMPTS[:1], max_new_tokens=40, sampling=sampling)
    found = out.drafter_report
    return np.array(found["block"]), np.array(found["single"]), out.stats.steps


@pytest.mark.slow
@pytest.mark.parametrize("width", [1, 2])
def test_both_rules_accept_all_of_a_draft_that_is_the_base(script, width):
    block, single, steps = sums(script, model((1, 1)), width)
    np.testing.assert_allclose(block, steps, rtol=1e-4)
    np.testing.assert_allclose(single, steps, rtol=1e-4)


def test_a_block_accepts_more_of_a_chain(script):
    block, single, steps = sums(script, model((1, 1), group_size=GROUPS), 1)
    assert block[0] == pytest.approx(single[0])  # of one token both rules are the same
    assert (block[1:] >= single[1:] - 1e-6).all() and block.sum() > single.sum() + 1e-3
    assert (np.diff(block) <= 1e-6).all() and block[0] <= steps

"""Drafting while the base verifies: rounds by simulation and by hand, limits, memory."""

from __future__ import annotations

import dataclasses
import importlib
import itertools
import json
import math
import pathlib
import sys

import numpy as np
import pytest

import easyspec_jax as es
from easyspec_jax.planner.acceptance import Acceptance
from easyspec_jax.planner.device import Device
from easyspec_jax.planner.plan import Deployment, Planner
from easyspec_jax.sharding import LAYOUTS

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "experiments"))  # scripts, no package
ahead = importlib.import_module("ahead")

BASE = es.ModelConfig(
    vocab_size=64, embed_dim=64, mlp_dim=128, num_layers=4, num_heads=8, num_kv_heads=4,
    head_dim=8, max_len=256,
)  # fmt: skip
DRAFT = es.ModelConfig(**{**vars(BASE), "embed_dim": 32, "mlp_dim": 64, "num_layers": 9})
ALONE = Deployment(layer=1, tensor=1, draft="one device", rules=LAYOUTS["replicated"])


def split(*, handover=0.0, guess=None, sibling=0.3, **costs):
    costs = {"name": "test", "bandwidth": math.inf, "flops": math.inf, **costs}
    acceptance = Acceptance(stale_loss=0.0, sibling=sibling)
    planner = Planner(
        base=BASE, draft=DRAFT, device=Device(**costs), acceptance=acceptance, max_len=64
    )
    return ahead.Split(planner=planner, handover=handover, guess=guess)


def rounds(first, later, gamma, number=40_000):
    """PEARL's rounds, played: whether each verified a window, and how many tokens it brought."""
    rng = np.random.default_rng(gamma)
    chances = np.array([first] + [later] * (gamma - 1))
    pending, played = [], []
    for _ in range(number):
        window = list(rng.random(gamma) < chances)
        judged = [*pending[1:], window[0]]  # the first of what is pending was judged before
        accepted = [*judged, False].index(False)
        whole = accepted == len(judged)
        played.append((bool(pending), accepted if whole else accepted + 1))
        pending = window if whole else []
    return np.array(played).T


@pytest.mark.parametrize(
    ("first", "later", "gamma"), [(0.8, 0.8, 1), (0.6, 0.6, 4), (0.9, 0.7, 3), (0.5, 0.95, 6)]
)
def test_pearls_chain_is_what_playing_it_gives(first, later, gamma):
    post, tokens = rounds(first, later, gamma)
    found = ahead.pearl(first, later, gamma)
    assert found[0] == pytest.approx(post.mean(), abs=0.015)
    assert found[1] == pytest.approx(tokens.mean(), rel=0.015)


def test_a_round_takes_the_slower_of_base_and_draft(monkeypatch):
    """Seconds by playing rounds of 3 (one token), 5 (a window), 7 (a tree), of 2 that are drafted
    again and as many ahead as said.
    """
    monkeypatch.setattr(ahead, "_verify", lambda *_: (3.0, 5.0, 7.0))
    one = split(handover=0.25, step=0.5)
    post, tokens = rounds(0.7, 0.7, 4)
    for draft in (1.0, 4.0, 9.0):
        monkeypatch.setattr(ahead, "_drafting", lambda *_, draft=draft: (2.0, draft))
        (found,) = one.price(1, ALONE, (4, 1, 0), [0.7])
        seconds = np.where(post, max(5.0, draft), max(3.0, draft)) + 0.75
        assert found.token_seconds == pytest.approx(seconds.sum() / tokens.sum(), rel=0.02)
        (found,) = one.price(1, ALONE, (4, 1, 8), [0.7])
        assert found.seconds == pytest.approx(max(7.0, draft) + 2 * (1 - found.ready) + 0.75)
        assert found.tokens == pytest.approx(1 + 0.7 + 0.49 + 0.343 + 0.2401)
        assert found.ready == ahead.fan_out((0.7, 0.7), 4, 1, 8, bonus=0.7, guess=0.3)[1]


@pytest.mark.parametrize(("rate", "size", "guess"), [(0.6, 5, 0.3), (0.9, 7, 0.3), (0.8, 6, 1.0)])
def test_guesses_stand_where_they_hit_most(rate, size, guess):
    """Of all ways to spread guesses over the outcomes of a chain of 3."""
    reached = [1 - rate, rate * (1 - rate), rate**2 * (1 - rate), rate**3]

    def hit(fan):
        behind = [p * (1 - (1 + n) ** -guess) for p, n in zip(reached[:3], fan[:3], strict=True)]
        bonus = reached[3] * (1 - (1 - rate) * fan[3] ** -guess) if fan[3] else 0.0
        return sum(behind) + bonus

    fans = (f for f in itertools.product(range(size + 1), repeat=4) if sum(f) == size)
    best = max(fans, key=hit)
    fan, found = ahead.fan_out((rate, rate), 3, 1, size, bonus=rate, guess=guess)
    assert hit(fan) == pytest.approx(hit(best)) and sum(fan) == size
    assert found == pytest.approx(hit(best))


def test_every_node_of_a_level_has_the_guesses_of_the_level():
    fan, found = ahead.fan_out((0.0, 0.0), 2, 4, 3, bonus=0.0, guess=0.5)
    assert fan == (3, 0, 0)  # nothing is accepted: three tokens behind the four that were refused
    assert found == pytest.approx(1 - (7 / 4) ** -0.5)
    # All is accepted: one guess behind each of the last level's four nodes, none left over.
    assert ahead.fan_out((1.0, 1.0), 2, 4, 7, bonus=1.0, guess=0.5) == ((0, 0, 1), 1.0)
    assert ahead.fan_out((1.0, 1.0), 2, 4, 3, bonus=1.0, guess=0.5)[1] == 0.0


def test_places_go_where_each_brings_most():
    """Each behind the root 0.1, 0.07, 0.05, 0.04; four for the four nodes behind it 0.25."""
    fan, found = ahead.fan_out((0.5, 0.5), 1, 4, 4, bonus=0.5, guess=1.0)
    assert fan == (4, 0) and found == pytest.approx(0.5 * (1 - 4 / 8))


def test_limits():
    """A draft that costs nothing and is always or never right; a set that holds every outcome."""
    free = split()
    free = dataclasses.replace(free, handover=1.0)  # all that a round costs
    pearl_never, pearl_always = free.price(1, ALONE, (4, 1, 0), [0.0, 1.0])
    assert (pearl_never.ready, pearl_never.tokens, pearl_never.seconds) == (0.0, 1.0, 1.0)
    assert (pearl_always.ready, pearl_always.tokens, pearl_always.seconds) == (1.0, 4.0, 1.0)
    never, always = free.price(1, ALONE, (4, 1, 2), [0.0, 1.0])
    assert (never.tokens, always.tokens, always.ready) == (1.0, 5.0, 1.0)
    # Two guesses behind a whole window, one elsewhere, of a base that never says a third thing:
    # only the first draft waits for nothing.
    costs = {"handover": 0.0, "guess": 1e3, "kernel": 1.0}
    sure, unsure = (split(**costs).price(1, ALONE, (4, 1, n), [0.8])[0] for n in (6, 5))
    assert sure.ready == pytest.approx(1.0)
    assert sure.seconds == pytest.approx(max(sure.verify, sure.drafting))
    assert unsure.ready == pytest.approx(1 - 0.8**4 * 0.2)


def test_passes_by_hand():
    """Kernels count passes, scores of a vocabulary of 64 the tokens whose logits are wanted."""
    kernels, scores = split(kernel=1.0).planner, split(logit=1 / 64).planner
    one = 9 * (Device.attention_kernels + Device.mlp_kernels) + Device.pass_kernels
    assert ahead._drafting(kernels, ALONE, 3, 2, 0) == (3 * one, 3 * one)
    assert ahead._drafting(kernels, ALONE, 3, 1, 4) == (3 * one, 4 * one)
    assert ahead._drafting(scores, ALONE, 3, 1, 0) == (3, 3)
    again, drafted = ahead._drafting(scores, ALONE, 3, 2, 8)
    assert again == 1 + 2 * 2  # behind the base's token, then levels of two
    assert drafted == (3 * 2 + 1) + 8 + 2 * (8 * 2)  # the window, the guesses, levels behind each
    assert ahead._verify(scores, 1, 3, 2) == (1, 3, 7)
    assert ahead._verify(scores, 4, 3, 2) == (1 / 4, 3 / 4, 7 / 4)


def test_a_draft_in_groups_stands_on_its_own_devices():
    """Two layers' attentions at once; calibration exactly, one behind the other."""
    rules = LAYOUTS["grouped"]
    groups = Deployment(layer=2, tensor=1, draft="groups", rules=rules, group_size=2)
    planner = split(kernel=1.0).planner
    attention, mlp, ends = Device.attention_kernels, Device.mlp_kernels, Device.pass_kernels
    exact, fuzzy = 9 * (attention + mlp) + ends, 6 * attention + 9 * mlp + ends
    assert ahead._drafting(planner, groups, 3, 1, 0) == (exact + 2 * fuzzy,) * 2
    assert ahead._drafting(planner, groups, 3, 1, 4) == (exact + 2 * fuzzy, 2 * exact + 2 * fuzzy)
    loss = Acceptance(stale_loss=0.5)
    one = dataclasses.replace(split(), planner=dataclasses.replace(planner, acceptance=loss))
    (found,) = one.price(1, groups, (3, 1, 0), [0.8])
    partition = es.make_partition(9, 2)
    assert found.tokens == ahead.pearl(*Acceptance(stale_loss=0.5).rates(partition), 3)[1]


def test_what_devices_do_not_divide_is_filled_up():
    large = dataclasses.replace(BASE, num_heads=32, num_kv_heads=4, vocab_size=100, mlp_dim=128)
    six = ahead.padded(large, 6)
    sizes = (six.num_heads, six.num_kv_heads, six.mlp_dim, six.vocab_size)
    assert sizes == (48, 6, 132, 102)
    assert ahead.padded(large, 4) == large


def test_what_does_not_fit_is_no_choice(monkeypatch):
    monkeypatch.setattr(ahead, "COUNTS", [(2, 1, 0), (2, 1, 4)])
    monkeypatch.setattr(ahead, "GAMMAS", (2,))
    roomy = split(kernel=1.0, collective=1.0, dtype="float32").planner
    wide_base = {"base": dataclasses.replace(BASE, mlp_dim=4096)}
    wide_draft = {"draft": dataclasses.replace(DRAFT, mlp_dim=4096)}

    def within(memory, models):
        device = dataclasses.replace(roomy.device, memory=memory)
        return ahead.Split(planner=dataclasses.replace(roomy, device=device, **models))

    where = ahead._on(roomy, 1)[1]
    base = ahead._needs(dataclasses.replace(roomy, **wide_base), where, 2, "draft")
    draft = ahead._needs(dataclasses.replace(roomy, **wide_draft), ALONE, 2, "base")
    assert min(base, draft) > 2 * ahead._needs(roomy, ALONE, 128, "base")
    assert within(base, wide_base).fits(1, ALONE, (2, 1, 0))
    assert not within(base - 1, wide_base).fits(1, ALONE, (2, 1, 0))
    assert within(base - 1, wide_base).fits(2, ALONE, (2, 1, 0))
    assert within(draft, wide_draft).fits(1, ALONE, (2, 1, 0))
    assert not within(draft - 1, wide_draft).fits(1, ALONE, (2, 1, 0))
    assert not within(draft, wide_draft).fits(1, ALONE, (2, 1, 64))  # a set has 128 nodes
    # Taking turns fits on both devices, and no split: the base does not stand on one of them.
    (record,) = ahead.compare(within(base - 1, wide_base), 2, [0.8])
    assert record["gain"] is None and "pearl" not in record and "static" not in record
    planner = dataclasses.replace(
        within(base, wide_base).planner,
        draft=dataclasses.replace(DRAFT, num_layers=1),
        acceptance=Acceptance(rate=0.7, stale_loss=0.0),
    )
    choices = planner.plan(2, num_draft_tokens=(2,)).choices
    again = dataclasses.replace(planner, acceptance=Acceptance(rate=0.9, stale_loss=0.0))
    (record,) = ahead.compare(ahead.Split(planner=again), 2, [0.7])
    assert record["turns"]["token_seconds"] == choices[0].token_seconds
    chains = (one.token_seconds for one in choices if one.tree_width == 1)
    assert record["turns_chain"] == min(chains) > choices[0].token_seconds
    assert record["gain"] == pytest.approx(
        record["turns"]["token_seconds"]
        / min(record[rule]["token_seconds"] for rule in ("pearl", "static"))
    )
    assert (record["pearl"]["base_devices"], record["pearl"]["draft_devices"]) == (1, 1)
    with pytest.raises(ValueError, match="the base needs"):
        ahead.compare(within(1, {}), 2, [0.8])
    with pytest.raises(ValueError, match="for one text, got a batch of 2"):
        ahead.Split(planner=dataclasses.replace(roomy, batch=2))


def test_the_fastest_is_found(monkeypatch):
    monkeypatch.setattr(ahead, "COUNTS", [(1, 1, 0), (2, 1, 0), (6, 1, 0)])
    one = split(kernel=1.0, logit=1.0)
    every = [one.price(1, ALONE, counts, [0.5])[0] for counts in ahead.COUNTS]
    assert one.fastest(2, [0.5]) == [{"pearl": min(every, key=lambda one: one.token_seconds)}]
    assert len({one.token_seconds for one in every}) == 3


def test_the_command_writes_a_record_for_each_rate(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(ahead, "COUNTS", [(2, 1, 0), (2, 1, 4)])
    monkeypatch.setattr(ahead, "GAMMAS", (2,))
    out = tmp_path / "ahead.jsonl"
    pairs = ("Llama-3 70B + 8B", "Llama-3 8B + 1B")
    options = ["--device", "h200", "--num-devices", "1", "2", "--out", str(out)]
    ahead.main(["--pair", *pairs, *options])
    header, *records = map(json.loads, out.read_text().splitlines())
    assert header["options"]["device"] == ["h200"] and "out" not in header["options"]
    refused, *large = (r for r in records if r["pair"] == pairs[0])
    assert "the base needs" in refused["refused"] and refused["num_devices"] == 1
    assert all(r["num_devices"] == 2 and r["gain"] is None for r in large)  # a draft beside none
    small = [r for r in records if r["pair"] == pairs[1]]
    assert [r["acceptance"] for r in small] == 2 * list(ahead.RATES)
    assert [r["gain"] is None for r in small] == 4 * [True] + 4 * [False]
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(records) and lines[-1].count("|") == 10

"""The cost model against what is compiled and what can be said by hand, and the planner on it."""

from __future__ import annotations

import collections
import dataclasses
import json
import math

import jax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import easyspec_jax as es
from easyspec_jax.cli.drafting import draft_layout
from easyspec_jax.cli.main import make_parser
from easyspec_jax.planner import measure
from easyspec_jax.planner.acceptance import (
    Acceptance,
    chain_tokens,
    fit_acceptance,
    mean_staleness,
    read_acceptance,
)
from easyspec_jax.planner.cost import Pass, step_costs
from easyspec_jax.planner.device import PRESETS, Device, read_device
from easyspec_jax.planner.plan import Choice, Deployment, Planner, abstract_mesh, deployments
from easyspec_jax.program.collectives import collectives
from easyspec_jax.sharding import LAYOUTS

BASE = es.ModelConfig(
    vocab_size=64, embed_dim=64, mlp_dim=128, num_layers=4, num_heads=8, num_kv_heads=8,
    head_dim=8, max_len=256,
)  # fmt: skip
DRAFT = es.ModelConfig(**{**vars(BASE), "embed_dim": 32, "mlp_dim": 64, "num_layers": 9})
LARGE, SMALL = (
    es.ModelConfig(
        vocab_size=128256, embed_dim=d, mlp_dim=f, num_layers=n, num_heads=h, num_kv_heads=8,
        head_dim=128, max_len=8192,
    )
    for d, f, n, h in ((8192, 28672, 80, 64), (4096, 14336, 32, 32))
)  # fmt: skip
FREE = {"bandwidth": math.inf, "flops": math.inf}  # nothing costs anything


def device(**costs):
    return Device(**{"name": "test", **FREE, **costs})


def pair(layout, *, mesh, partition=(1, 4, 3, 1), gamma=3, width=2):
    draft = es.abstract_model(DRAFT, mesh, group_size=partition, layout=layout, dtype="float32")
    base = es.abstract_model(BASE, mesh, dtype="float32")
    drafter = es.LayerParallelDrafter(draft)
    return es.Decoder(base, drafter, num_draft_tokens=gamma, tree_width=width)


@pytest.mark.parametrize(
    ("layout", "partition"),
    [
        pytest.param("tensor", (1,) * 9, marks=pytest.mark.slow),
        ("grouped", (1, 4, 3, 1)),
        pytest.param(
            es.LayoutRules(heads=("tensor",), group="layer", mlp=()),
            (1, 6, 1, 1),
            marks=pytest.mark.slow,
        ),
    ],
)
def test_collectives_are_those_of_the_compiled_program(layout, partition):
    """With one second for each collective, whatever its bytes, seconds count them."""
    found = collectives(pair(layout, mesh=es.make_mesh(4, 2), partition=partition))
    want = collections.Counter(one.phase for one in found)
    decoder = pair(layout, mesh=abstract_mesh(4, 2), partition=partition)
    costs = step_costs(decoder, device(collective=1.0), entries=64)
    assert costs["calibrate"].seconds == want["calibrate"]
    assert costs["draft"].seconds == 2 * want["draft"]
    assert costs["verify"].seconds == want["verify"]
    assert want["verify"] > 0
    # and with a second for each byte that a device receives, those bytes
    alone = [f"block_{i}" for i, size in enumerate(partition) if size == 1]
    received = dict.fromkeys(want, 0.0)
    for one in found:
        n = 8
        if layout not in ("tensor", "grouped") and one.phase != "verify" and one.part in alone:
            n = 2  # heads over "tensor", MLPs whole
        times = 2 if one.kind == "all-reduce" else 1
        received[one.phase] += times * (n - 1) / n * one.bytes
    costs = step_costs(decoder, device(link=1.0), entries=64)
    if layout != "grouped":  # whose layers alone sum over two devices and over eight
        assert costs["calibrate"].seconds == pytest.approx(received["calibrate"])
        assert costs["draft"].seconds == pytest.approx(2 * received["draft"])
        assert costs["verify"].seconds == pytest.approx(received["verify"])


def test_costs_of_other_drafters_are_not_guessed():
    base = es.abstract_model(BASE, abstract_mesh(1, 1), dtype="float32")
    with pytest.raises(ValueError, match="LayerParallelDrafter or of none, got a PromptLookup"):
        step_costs(es.Decoder(base, es.PromptLookupDrafter()), device(), entries=64)


def test_a_pass_by_hand():
    """Two layers and a head on one device; what each constant counts."""
    config = es.ModelConfig(**{**vars(BASE), "num_layers": 2, "num_kv_heads": 2})
    model = es.abstract_model(config, abstract_mesh(1, 1), dtype="float32")
    d, f, h = 64, 128, 8
    attention = d * (8 + 2 + 2) * h + 8 * h * d + d
    layer = attention + 3 * d * f + d

    def cost(**costs):
        return Pass(model, device(**costs), rows=6, heads=2, batch=1, entries=64).cost()

    read = 4 * (2 * layer + d * 64)
    assert cost(bandwidth=10.0).weights == pytest.approx(read / 10)
    assert cost(bandwidth=10.0).attention == pytest.approx(2 * 2 * 2 * h * 4 * 64 / 10)
    assert cost(flops=1e3).weights == pytest.approx(2 * (6 * 2 * layer + 2 * d * 64) / 1e3)
    assert cost(score=1.0).attention == 2 * 6 * 8 * 64
    assert cost(logit=1.0).sampling == 2 * 64
    kernels = 2 * (Device.attention_kernels + Device.mlp_kernels) + Device.pass_kernels
    assert cost(kernel=1.0).kernels == kernels
    assert cost(collective=1.0).seconds == 0  # one device


def test_groups_share_one_attention():
    """4 layers on 4 devices cost one attention, 4 MLPs, 5 sums; exactly they cost 4 of each."""
    mesh = abstract_mesh(4, 1)
    draft = es.abstract_model(DRAFT, mesh, group_size=(1, 4, 3, 1), dtype="float32")
    only = device(kernel=1.0, collective=100.0)
    block = draft.params.blocks[1]

    def cost(way):
        return Pass(draft, only, rows=1, heads=1, batch=1, entries=64, run=way).block(block)

    assert cost("attention").kernels == Device.attention_kernels + 4 * Device.mlp_kernels
    assert cost("attention").collectives == 500
    assert cost("indirect") == cost("layer") and cost("layer").collectives == 200
    assert cost("exact").kernels == 4 * (Device.attention_kernels + Device.mlp_kernels)
    assert cost("exact").collectives == 800


def test_a_host_that_launches_hides_what_the_device_does():
    model = es.abstract_model(BASE, abstract_mesh(1, 1), dtype="float32")
    slow = device(kernel=1.0, bandwidth=1e6, overlapped=True)
    cost = Pass(model, slow, rows=1, heads=1, batch=1, entries=64).cost()
    assert cost.weights == cost.attention == 0
    assert cost.kernels == cost.seconds == 4 * 11 + 6


def test_products_are_read_off_the_roofline_or_what_was_measured():
    roof = device(bandwidth=100.0, flops=1000.0)
    assert roof.product(400, rows=1, itemsize=4) == 4.0
    assert roof.product(400, rows=20, itemsize=4) == 4.0
    assert roof.product(400, rows=40, itemsize=4) == 8.0
    measured = device(products=((1, 1.0, 5.0), (3, 2.0, 7.0), (5, 8.0, 7.0)))
    assert measured.product(10, rows=1, itemsize=4) == 15.0
    assert measured.product(10, rows=2, itemsize=4, count=2) == 15.0 + 12.0
    assert measured.product(10, rows=7, itemsize=4) == 10 * 14.0 + 7.0
    noisy = device(products=((64, 1.02, 5.0), (128, 1.0, 0.0)))
    assert noisy.product(10, rows=128, itemsize=4) == noisy.product(10, rows=4000, itemsize=4) == 10
    assert device(products=((4, 1.0, 0.0),)).product(10, rows=9, itemsize=4) == 10.0


def test_collectives_by_hand():
    link = device(collective=5.0, hop=2.0, link=10.0)
    assert link.exchange(80, 1, rounds=2) == 0.0
    assert link.exchange(80, 2, rounds=2) == 5.0 + 8.0
    assert link.exchange(80, 4, rounds=2) == 5.0 + 4.0 + 12.0
    assert link.exchange(80, 4, rounds=1) == 5.0 + 4.0 + 6.0


def test_devices_are_read_from_files(tmp_path):
    measured = dataclasses.replace(PRESETS["h100"], products=((1, 1e-12, 0.0), (8, 2e-12, 1e-6)))
    file = tmp_path / "device.json"
    file.write_text(json.dumps({"device": measured.as_dict(), "choices": []}))
    assert read_device(str(file)) == measured


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{", "cannot be read"),
        ("[1]", "is not a JSON object"),
        ('{"name": "x", "bandwidth": 1}', "describes no device"),
        ('{"name": "x", "bandwidth": 1, "flops": 1, "colour": 2}', "unknown fields: colour"),
        ('{"name": "x", "bandwidth": "fast", "flops": 1}', "bandwidth of a device must be"),
        (
            '{"name": "x", "bandwidth": 1' + "0" * 400 + ', "flops": 1}',
            "bandwidth of a device must be a number above 0",
        ),
        ('{"name": "x", "bandwidth": 1e400, "flops": 1}', "bandwidth must be finite"),
        ('{"name": "x", "bandwidth": 1, "flops": 1, "hop": NaN}', "hop of a device must be"),
        ('{"name": 3, "bandwidth": 1, "flops": 1}', "name of a device must be a text"),
        ('{"name": "x", "bandwidth": 1, "flops": 1, "overlapped": 1}', "must be true or false"),
        ('{"name": "x", "bandwidth": 1, "flops": 1, "dtype": "int4"}', "dtype of a device must"),
        ("[" * 10**5, "cannot be read"),
        (
            '{"name": "x", "bandwidth": 0, "flops": 1}',
            "bandwidth of a device must be a number above 0",
        ),
        ('{"name": "x", "bandwidth": 1, "flops": 1, "kernel": -1}', "kernel of a device"),
        ('{"name": "x", "bandwidth": 1, "flops": 1, "products": [[1]]}', "products of a device"),
        ('{"name": "x", "bandwidth": 1, "flops": 1, "products": 3}', "products of a device"),
        ('{"name": "x", "bandwidth": 1, "flops": 1, "products": [[2,1,0],[1,1,0]]}', "rising"),
    ],
)
def test_files_that_describe_no_device_are_refused(tmp_path, text, reason):
    file = tmp_path / "device.json"
    file.write_text(text)
    with pytest.raises(ValueError, match=reason):
        read_device(str(file))
    with pytest.raises(ValueError, match="unknown device 'b300'"):
        read_device("b300")


def test_chain_tokens_by_hand():
    assert chain_tokens(0.5, 0.9, 0) == 1.0
    assert chain_tokens(0.5, 0.25, 1) == 1.5
    assert chain_tokens(0.5, 0.25, 3) == pytest.approx(1 + 0.5 * (1 + 0.25 + 0.0625))
    assert mean_staleness((1, 1, 1)) == 0.0
    assert mean_staleness((1, 4, 1)) == 1.0
    half = Acceptance(rate=0.8, stale_loss=0.5, sibling=0.5)
    assert half.rates((1, 4, 1)) == pytest.approx((0.8, 0.4))
    assert half.rates((2, 4, 1, 1)) == pytest.approx((0.8, 0.8 * 0.5 ** (7 / 8)))
    assert half.rates((1, 4, 1), 4) == pytest.approx((0.9, 0.7))
    assert Acceptance(rate=1.0).tokens_per_step((1,), 5) == 6.0
    assert Acceptance(rate=0.0).tokens_per_step((1,), 5) == 1.0


@settings(max_examples=25, deadline=None)
@given(
    rate=st.floats(0.05, 0.95), loss=st.floats(0.0, 0.3), sibling=st.floats(0.05, 0.8),
    gamma=st.integers(2, 8), num_layers=st.integers(5, 40),
)  # fmt: skip
def test_acceptance_is_found_again_from_what_it_predicts(rate, loss, sibling, gamma, num_layers):
    true = Acceptance(rate=rate, stale_loss=loss, sibling=sibling)
    found = fit_acceptance([{"options": {}}, *arms(true, gamma, num_layers)], num_layers)
    assert found.rate == pytest.approx(rate, abs=1e-6)
    assert found.stale_loss == pytest.approx(loss, abs=1e-4)
    assert found.sibling == pytest.approx(sibling, abs=1e-3)


def arms(true, gamma, num_layers):
    """What `experiments/acceptance.py` would record of a pair with these rates."""
    return [
        {
            "temperature": 0.0, "tree_width": width, "group_size": size, "calibrate": True,
            "tried_per_depth": [1] * gamma,
            "tokens_per_step": true.tokens_per_step(
                es.make_partition(num_layers, size), gamma, width
            ),
        }
        for size in (1, 2, 4)
        for width in (1, 4)
    ]  # fmt: skip


def test_what_groups_cost_a_small_model_is_about_what_was_measured():
    """SmolLM2 drafting for itself, γ 5, group sizes 2, 4, 6; the fit knows 2 and 4."""

    def partition(size):
        return es.make_partition(30, size)

    measured = {1: 6.0, 2: 4.71, 4: 3.75, 6: 3.31}
    rows = [
        {
            "temperature": 0, "tree_width": 1, "group_size": size, "calibrate": None,
            "tried_per_depth": [9] * 5, "tokens_per_step": measured[size],
        }
        for size in (1, 2, 4)
    ]  # fmt: skip
    found = fit_acceptance(rows, 30)
    for size, tokens in measured.items():
        assert found.tokens_per_step(partition(size), 5) == pytest.approx(tokens, rel=0.12)


def test_acceptance_is_read_as_number_object_or_records(tmp_path):
    assert read_acceptance("0.7", 9) == Acceptance(rate=0.7)
    file = tmp_path / "a.json"
    file.write_text('{\n"rate": 0.6,\n"sibling": 0.2\n}')
    assert read_acceptance(str(file), 9) == Acceptance(rate=0.6, sibling=0.2)
    for text, reason in (("1.5", "rate must be in 0 .. 1"), ("high", "neither a number nor a")):
        with pytest.raises(ValueError, match=reason):
            read_acceptance(text, 9)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{", "no JSON"),
        ("[" * 10**5, "no JSON"),
        ('{"speed": 1}\n{}', "no arm of group size 1"),
        ('{"rate": 0.5}\n[1]', "not a JSON object on every line"),
        ('{"options": {}}\n{"options": {}}', "holds several runs"),
        ('{"temperature": 0, "group_size": 1}', "an arm needs group_size, tree_width"),
        ('{"temperature": 0, "group_size": [1], "tree_width": 1}', "an arm needs group_size"),
        (
            '{"temperature": 0, "group_size": 1, "tree_width": 1, "tried_per_depth": [1], '
            '"tokens_per_step": null}',
            "an arm needs",
        ),
    ],
)
def test_records_of_another_kind_are_refused(tmp_path, text, reason):
    file = tmp_path / "a.jsonl"
    file.write_text(text)
    with pytest.raises(ValueError, match=reason):
        read_acceptance(str(file), 9)


def test_options_of_a_deployment_are_read_back_as_it():
    """What the planner prints is what `easyspec generate` makes of it."""
    seen = set()
    for one in deployments(8, (1, 2, 3, 4, 8), 32):
        if one.draft == "none":
            continue
        costs = {"num_draft_tokens": 3, "tree_width": 2, "phases": {}, "tokens_per_step": 1.0}
        options = Choice(deployment=one, **costs).options()
        words = ["generate", "x", "--base", "b", "--draft", "d", *options.split()]
        args = make_parser().parse_args(words)
        assert (args.num_draft_tokens, args.tree_width) == (3, 2)
        assert (args.layer, args.tensor) == (one.layer, one.tensor)
        assert args.group_size == one.group_size
        rules = draft_layout(args)
        for name in ("heads", "mlp", "vocab"):  # up to axes of one device
            axes = [a for a in getattr(rules, name) if vars(one)[a] > 1]
            assert axes == [a for a in getattr(one.rules, name) if vars(one)[a] > 1], one
        assert rules.group == one.rules.group
        assert one not in seen
        seen.add(one)
    assert {one.devices for one in seen} == {1, 2, 4, 8}


def test_group_sizes_that_come_to_the_same_groups_are_one_choice():
    sizes = {one.group_size for one in deployments(4, (1, 2, 3, 4, 5, 8), 6)}
    assert sizes == {1, 2, 3, 4}


def test_a_plan_is_ranked_and_holds_autoregression():
    planner = Planner(base=BASE, draft=DRAFT, device=PRESETS["h100"], max_len=128)
    plan = planner.plan(4, num_draft_tokens=(2, 4), tree_widths=(1, 2), group_sizes=(1, 2, 3))
    times = [choice.token_seconds for choice in plan.choices]
    assert times == sorted(times) and plan.refused == 0
    assert plan.autoregression.tokens_per_step == 1.0
    one, *_ = plan.choices
    again = planner.price(one.deployment, one.num_draft_tokens, one.tree_width)
    assert again == one  # passes that were priced before change nothing
    never = dataclasses.replace(planner, acceptance=Acceptance(rate=0.0))
    assert never.plan(2, group_sizes=(1, 2)).best.deployment.draft == "none"


def test_what_does_not_fit_is_left_out():
    planner = Planner(base=LARGE, draft=SMALL, device=PRESETS["a100"])
    counts = [(5, 1), (5, 8)]
    one = Deployment(layer=1, tensor=2, draft="one device", rules=LAYOUTS["replicated"])
    assert planner.fitting(one, counts) == []
    assert planner.fitting(dataclasses.replace(one, tensor=4), counts) == counts
    needed = r"the base needs 132.* GiB on each of 1 devices \(base weights 131.42, base cache"
    with pytest.raises(ValueError, match=needed + ".*may use 55.88 GiB there"):
        planner.plan(1, num_draft_tokens=(5,), tree_widths=(1,), group_sizes=(1,))


def test_launch_bound_devices_want_the_papers_layout():
    """EasySpec's setting: base over all 8, attention of the draft on one GPU each, groups of about
    4. With captured launches and collectives of 5 us the draft wants several GPUs for a layer.
    """
    chain = {"tree_widths": (1,), "num_draft_tokens": (4, 5)}
    eager = Planner(base=LARGE, draft=SMALL, device=PRESETS["a100-eager"]).plan(8, **chain)
    best = eager.best.deployment
    assert (best.draft, best.draft_devices, best.devices) == ("groups", 1, 8)
    assert best.group_size in (4, 5, 6)
    of_four = next(c for c in eager.choices if c.deployment.group_size == 4)
    assert of_four.token_seconds < 1.01 * eager.best.token_seconds
    assert eager.best.bound == "kernels"
    assert eager.autoregression.deployment.devices == 8
    one, sharded = (eager.fastest(kind).token_seconds for kind in ("one device", "tensor parallel"))
    assert one < sharded
    device = dataclasses.replace(PRESETS["a100"], collective=5e-6, hop=0.0)
    captured = Planner(base=LARGE, draft=SMALL, device=device).plan(8, **chain)
    one, sharded, groups = (
        captured.fastest(kind) for kind in ("one device", "tensor parallel", "groups")
    )
    assert groups.token_seconds < sharded.token_seconds < one.token_seconds
    assert groups.deployment.draft_devices > 1 and sharded.deployment.draft_devices == 8
    assert captured.best.bound == "weights"


@pytest.mark.slow
def test_micro_benchmarks_give_positive_costs(monkeypatch):
    """Of few and small arrays."""
    products = measure.product_costs
    monkeypatch.setattr(measure, "product_costs", lambda *args: products(*args[:2], 2**20))
    for name, small in (("ROWS", (1, 3)), ("_SMALL", (32, 48)), ("_ENTRIES", 16), ("_HEADS", 2)):
        monkeypatch.setattr(measure, name, small)
    found = measure.measure_device()
    assert (found.name, found.dtype) == (jax.devices()[0].device_kind, "float32")
    assert [rows for rows, *_ in found.products] == [1, 3]
    for _, per_byte, beside in found.products:
        assert 1e-14 < per_byte < 1e-6 and 0 <= beside < 1
    assert found.bandwidth * found.products[0][1] == pytest.approx(1) and found.flops > 0
    assert 0 <= found.score < 1e-5 and 0 <= found.logit < 1e-5
    assert found.collective > 0 and found.hop >= 0 and found.link > 0
    assert 0 <= found.kernel < 1 and 0 <= found.step < 1


CONFIG = {
    "model_type": "llama", "vocab_size": 512, "hidden_size": 256, "intermediate_size": 512,
    "num_attention_heads": 8, "num_key_value_heads": 4, "rms_norm_eps": 1e-5,
    "max_position_embeddings": 4096,
}  # fmt: skip


@pytest.fixture
def configs(tmp_path):
    paths = []
    for name, layers in (("base", 8), ("draft", 4)):
        paths.append(tmp_path / f"{name}.json")
        paths[-1].write_text(json.dumps(CONFIG | {"num_hidden_layers": layers}))
    return ["--base", str(paths[0]), "--draft", str(paths[1])]


def test_the_command_prints_a_plan(configs, easyspec):
    options = ("plan", *configs, "--device", "h200", "--num-devices", "4")
    status, out, _ = easyspec(*options, "--top", "3")
    assert status == 0
    assert "h200" in out and "the fastest of each kind" in out
    assert "It is bound by " in out
    document = json.loads(easyspec(*options, "--json")[1].splitlines()[-1])
    times = [choice["token_seconds"] for choice in document["choices"]]
    assert times == sorted(times) and len(times) == 10
    first = document["choices"][0]
    phases = [sum(terms.values()) for terms in first["phases"].values()]
    assert sum(phases) == pytest.approx(first["step_seconds"])
    assert Device(**{**document["device"], "products": ()}) == PRESETS["h200"]


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ([], "name a --device, or --measure"),
        (["--device", "h100", "--measure"], "name a --device, or --measure"),
        (["--device", "tpu"], "unknown device 'tpu'"),
        (["--device", "h100", "--num-devices", "0"], "--num-devices must be in 1 .. 1024, got 0"),
        (["--device", "h100", "--tree-width", "0,1"], "--tree-width must be at least 1"),
        (["--device", "h100", "--acceptance", "2"], "rate must be in 0 .. 1"),
        (["--device", "h100", "--max-len", "5000"], "--max-len must be in 2 .. 4096"),
        (["--device", "h100", "--dtype", "float32"], "--dtype needs --measure"),
        (["--device", "h100", "--device-memory", "-1"], "--device-memory must be a size above 0"),
        (["--device", "h100", "--batch", "100000"], "--batch must be in 1 .. 1024, got 100000"),
        (["--measure", "--num-devices", "9"], "--measure finds 8 devices here"),
    ],
)
def test_the_command_refuses(configs, easyspec, options, reason):
    status, _, err = easyspec("plan", *configs, *options)
    assert status == 1
    assert reason in err and err.count("\n") == 1

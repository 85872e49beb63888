"""The GPU suite on the CPU: what it counts, what it sets, and that nothing it misses stays unsaid;
never what it times.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import json
import os
import pathlib
import subprocess
import sys
from importlib import metadata

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from decoders import CONFIG, EMITTERS, all_logits, model

from easyspec_jax.verify import Proposal

ROOT = pathlib.Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "experiments"))  # scripts, no package
ceiling = importlib.import_module("ceiling")
gpu_parts = importlib.import_module("gpu.parts")
gpu_setup = importlib.import_module("gpu.setup")
gpu_suite = importlib.import_module("gpu.suite")
kernels = importlib.import_module("gpu.kernels")
records = importlib.import_module("records")

# Launches: 3 of the body, 2 of the inner loop in each of 4 trips, 1 of the larger branch, 1 of the
# called computation. Large copies: a fusion's root, a transpose in the inner loop.
HLO = """\
HloModule jit_run, is_scheduled=true

%fused.copy (p: bf16[8,64]) -> (bf16[8,64], f32[]) {
  %p = bf16[8,64]{1,0} parameter(0)
  %copied = bf16[8,64]{0,1} copy(%p)
  %viewed = bf16[512]{0} bitcast(%copied)
  %sum = f32[] constant(0)
  ROOT %both = (bf16[512]{0}, f32[]) tuple(%viewed, %sum)
}

%fused.write (p.1: bf16[8,64], q: bf16[1,64]) -> bf16[8,64] {
  %p.1 = bf16[8,64]{1,0} parameter(0)
  %q = bf16[1,64]{1,0} parameter(1)
  %again = bf16[8,64]{1,0} copy(%p.1)
  ROOT %written = bf16[8,64]{1,0} dynamic-update-slice(%again, %q)
}

%inner_body (s: (s32[], f32[700])) -> (s32[], f32[700]) {
  %s = (s32[], f32[700]{0}) parameter(0)
  %x = f32[700]{0} get-tuple-element(%s), index=1
  %turned = f32[700]{0} transpose(%x), dimensions={0}
  %small = f32[7]{0} copy(%x)
  ROOT %t = (s32[], f32[700]{0}) tuple(%turned, %turned)
}

%branch.1 (b: f32[]) -> f32[] {
  ROOT %b = f32[] parameter(0)
}

%branch.2 (c: f32[]) -> f32[] {
  %c = f32[] parameter(0)
  ROOT %d = f32[] add(%c, %c)
}

%called (e: f32[4]) -> f32[4] {
  %e = f32[4]{0} parameter(0)
  ROOT %all-reduce = f32[4]{0} all-reduce(%e), to_apply=%branch.2
}

%body (state: (s32[], bf16[8,64])) -> (s32[], bf16[8,64]) {
  %state = (s32[], /*index=1*/bf16[8,64]{1,0}) parameter(0)
  %y = bf16[8,64]{1,0} get-tuple-element(%state), index=1
  %f.1 = (bf16[512]{0}, f32[]) fusion(%y), kind=kLoop, calls=%fused.copy
  %f.2 = bf16[8,64]{1,0} fusion(%y), kind=kLoop, calls=%fused.write, backend_config={"n":"1"}
  %dot = f32[8]{0} custom-call(%y), custom_call_target="__cublas$gemm", api_version=API_VERSION
  %w = (s32[], f32[700]{0}) while(%y), condition=%cond, body=%inner_body, \
backend_config={"known_trip_count":{"n":"4"},"init":"1"}
  %if = f32[] conditional(%y), branch_computations={%branch.1, %branch.2}
  %call = f32[4]{0} call(%y), to_apply=%called
  ROOT %out = (s32[], bf16[8,64]{1,0}) tuple(%y, %y)
}

%cond (state.1: (s32[], bf16[8,64])) -> pred[] {
  %state.1 = (s32[], bf16[8,64]{1,0}) parameter(0)
  ROOT %less = pred[] compare(%state.1, %state.1), direction=LT
}

ENTRY %main (arg: bf16[8,64]) -> bf16[8,64] {
  %arg = bf16[8,64]{1,0} parameter(0)
  %kept = bf16[8,64]{1,0} copy(%arg)
  %counted = (s32[], f32[700]{0}) while(%kept), condition=%cond, body=%inner_body
  %loop = (s32[], bf16[8,64]{1,0}) while(%kept), condition=%cond, body=%body
  ROOT %end = bf16[8,64]{1,0} get-tuple-element(%loop), index=1
}
"""


def test_launches_are_counted_in_the_largest_loop():
    found = kernels.step_launches(HLO, (512, 1024))
    assert found == {
        "launches": 13,
        "kinds": {"transpose": 4, "copy": 4, "fusion": 2, "custom-call": 1, "add": 1}
        | {"all-reduce": 1},
        "custom_calls": {"__cublas$gemm": 1},
        "inner_loops": [{"trips": 4, "launches": 8}],  # in all trips
        "large_copies": {"copy of 512": 1, "transpose of 700": 4},
        "cache_copies": 1,
    }
    unknown = HLO.replace('"known_trip_count":{"n":"4"},', "")
    found = kernels.step_launches(unknown, (701,))
    assert found["inner_loops"] == [{"trips": None, "launches": 2}] and found["launches"] == 7
    assert found["large_copies"] == {} and found["cache_copies"] == 0
    with pytest.raises(ValueError, match="the module has no loop at its top"):
        kernels.step_launches(HLO.replace(" while(", " custom-call("), (512,))


def test_a_loop_that_copies_its_cache_is_noticed():
    def run(cache, kept):
        def body(state):
            i, cache, before = state
            new = jax.lax.dynamic_update_slice(cache, cache[:1] + 1, (i, jnp.int32(0)))
            return i + 1, new, cache if kept else before

        start = (jnp.int32(0), cache, cache if kept else cache[:1])
        return jax.lax.while_loop(lambda s: s[1][0, 0] < 10, body, start)

    abstract = jax.ShapeDtypeStruct((4096, 8), jnp.float32)
    jitted = jax.jit(run, static_argnums=1, donate_argnums=0)
    for kept in (False, True):
        hlo = jitted.lower(abstract, kept).compile().as_text()
        assert (kernels.step_launches(hlo, (4096 * 8,))["cache_copies"] > 0) == kept


def test_agreed_nodes_are_the_argmax_behind_their_parents_and_no_others():
    proposal = Proposal(
        tokens=jnp.array([[3, 1, 2, 5, 5]]),
        parents=jnp.array([[-1, -1, -1, 1, 0]]),
        valid=jnp.array([[True, True, True, True, False]]),
        depth=2,
    )
    scores = jnp.zeros((1, 6, 6), jnp.float32).at[0, 2, 5].set(9.0).at[0, 1, 5].set(7.0)
    agreed = jnp.array([[False, True, True, False, True]])
    got = gpu_setup.agree(scores, proposal, agreed)
    assert got[0, 0].argmax() == 1  # the second and third siblings: the second is tried first
    assert got[0, 2].argmax() != 5 and got[0, 1].argmax() == 5  # an invalid node changes nothing
    np.testing.assert_array_equal(got[0, 3:], scores[0, 3:])
    np.testing.assert_array_equal(got[0, 1], scores[0, 1])


def test_draws_are_uniform_and_independent():
    position = jnp.arange(4000, dtype=jnp.int32)
    u = np.stack([gpu_setup.draws(jnp.int32(seed), position, 6) for seed in range(3)])
    assert u.min() >= 0 and u.max() < 1
    hits = u < 0.3
    assert abs(hits.mean() - 0.3) < 0.01
    for axis in range(3):
        pairs = np.moveaxis(hits, axis, 0)
        both = (pairs[1:] & pairs[:-1]).mean()
        assert abs(both - 0.09) < 0.01


@pytest.fixture(scope="module")
def suite():
    return gpu_setup.Suite(gpu_setup.TINY, budget_seconds=1e9)


@pytest.fixture(scope="module")
def pair(suite):
    return suite.model("tiny-base"), suite.model("tiny-draft")


@pytest.mark.parametrize("width", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_the_acceptance_is_what_is_set(suite, pair, width):
    arm = gpu_setup.Arm("tiny-base", "tiny-draft", 3, width)
    decoder = suite.decoder(arm, *pair)
    steps = {}
    for rate, seeds in [(1.0, 1), (0.0, 1), (0.5, 30)]:
        runs = [decoder.drafter.replace(**suite.dice(rate, seed)) for seed in range(seeds)]
        steps[rate] = np.mean([suite.run(arm, decoder, drafter)[1] for drafter in runs])
    assert 6 <= steps[1.0] < steps[0.5] < steps[0.0] == 24
    if width == 1:
        assert steps[1.0] == 6
        assert abs(24 / steps[0.5] - 1.875) < 0.15  # 1 + 1/2 + 1/4 + 1/8 but for the last step


@pytest.mark.slow
def test_a_step_of_the_library_copies_no_cache_entry(suite, monkeypatch):
    compile_ = jax.stages.Lowered.compile
    monkeypatch.setattr(jax.stages.Lowered, "compile", lambda lowered: compile_(lowered, EMITTERS))
    arms = [gpu_setup.Arm("tiny-base"), gpu_setup.Arm("tiny-base", "tiny-draft", 3, 1)]
    alone, both = (suite._compile(arm).launches for arm in arms)
    assert alone["cache_copies"] == both["cache_copies"] == 0
    assert alone["inner_loops"] == [] and 0 < alone["launches"] < both["launches"]
    assert [inner["trips"] for inner in both["inner_loops"]] == [2]  # levels behind the first


def test_how_close_the_two_likeliest_tokens_were():
    text, one = [1, 2, 3, 4, 5], model((1, 1), config=dataclasses.replace(CONFIG, num_layers=1))
    scores = np.sort(np.asarray(all_logits(one, [text])[0]))
    for end in (1, 5):
        want = scores[end - 1, -1] - scores[end - 1, -2]
        assert ceiling.top_gap(one, text[:end]) == pytest.approx(want, rel=1e-6)


@pytest.mark.parametrize(("gap", "wrong"), [(1e-6, False), (0.5, True)])
def test_other_tokens_in_float32_are_an_error_unless_two_were_as_likely(
    suite, monkeypatch, gap, wrong
):
    def compare(suite, dtype):
        apart = [{"row": 3, "at": 7, "gap": gap if dtype == "float32" else 0.5}]
        arm = {"rows": 4, "identical": 3, "divergences": apart, "first_divergence": apart[0]}
        return {"new_tokens": 8, "arms": {"width 1": arm}}

    monkeypatch.setattr(gpu_parts, "_compare", compare)
    found = gpu_parts.correctness(suite)
    problem = "in float32 other tokens than autoregression's: width 1 row 3"
    assert found.get("problem") == (problem if wrong else None)


@pytest.mark.parametrize(
    ("kind", "rate"),
    [
        ("NVIDIA H100 80GB HBM3", 3.35e12),
        ("NVIDIA H200", 4.8e12),
        ("NVIDIA A100-SXM4-80GB", 2.04e12),
        ("NVIDIA A100-SXM4-40GB", None),
        ("NVIDIA H100 PCIe", None),
        ("NVIDIA GH200 480GB", None),
        ("cpu", None),
    ],
)
def test_only_known_devices_are_in_the_bandwidth_table(kind, rate):
    assert gpu_parts.bandwidth(kind) == rate


@pytest.mark.slow
def test_a_failed_part_is_recorded_and_the_others_run(monkeypatch, tmp_path, capsys):
    def breaks(suite):
        raise RuntimeError("\n  out of memory\n  in many lines")

    parts = {
        "first": lambda suite: {"figure": 1},
        "second": breaks,
        "third": lambda suite: {"figure": 3, "problem": "the figure is wrong"},
        "fourth": lambda suite: {"figure": 4},
    }
    for module in (gpu_suite, gpu_parts):
        monkeypatch.setattr(module, "PARTS", parts)
    out = tmp_path / "out.jsonl"
    argv = ["--preset", "tiny", "--out", str(out)]
    assert gpu_suite.main(argv) == 1
    document = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert document == json.loads(out.read_text()) and str(tmp_path) not in out.read_text()
    assert document["errors"] == {
        "second": "RuntimeError: out of memory",
        "third": "the figure is wrong",
    }
    assert {name: part["figure"] for name, part in document["parts"].items()} == {
        "first": 1,
        "third": 3,
        "fourth": 4,
    }
    assert document["device"]["platform"] == "cpu" and document["versions"]["jax"]
    assert document["options"]["preset"] == "tiny" and document["skipped"] == []
    assert gpu_suite.main([*argv, "--parts", "fourth,first"]) == 0
    assert list(json.loads(out.read_text().splitlines()[1])["parts"]) == ["first", "fourth"]


def test_what_the_budget_does_not_allow_is_said(capsys):
    argv = ["--preset", "tiny", "--budget-seconds", "0", "--parts", "kernels,draft"]
    assert gpu_suite.main(argv) == 0
    document = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert document["skipped"] == ["kernels", "draft"] and document["parts"] == {}


def test_a_part_names_the_arms_it_had_no_time_for(monkeypatch, suite):
    tight = gpu_setup.Suite(gpu_setup.TINY, budget_seconds=1e9)
    tight.programs = suite.programs
    times = iter([True, False])
    monkeypatch.setattr(
        gpu_setup.Suite, "elapsed", property(lambda self: 0 if next(times, False) else 2e9)
    )
    monkeypatch.setattr(tight, "say", lambda text: None)
    found = gpu_parts.verification(tight)
    assert tight.skipped == ["verification of 7 tokens"]
    assert list(found["ms_by_tokens"]) == [1]


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (["--parts", "kernels,nothing"], "unknown part 'nothing': choose of correctness, auto"),
        (["--repeats", "0"], "must be a whole number above 0, got '0'"),
    ],
)
def test_bad_options_are_one_sentence(capsys, argv, sentence):
    with pytest.raises(SystemExit):
        gpu_suite.parse(argv)
    assert sentence in capsys.readouterr().err
    assert isinstance(gpu_suite.parse([]), argparse.Namespace)


def test_a_machine_without_transformers_is_described_too(monkeypatch):
    def version(name):
        if name == "transformers":
            raise metadata.PackageNotFoundError(name)
        return "1.2"

    monkeypatch.setattr(records.metadata, "version", version)
    found = records.machine()
    assert found["jax"] == "1.2" and "transformers" not in found and found["python"]


@pytest.mark.slow
def test_everything_runs_without_packages_that_only_checkpoints_need(tmp_path):
    """The whole tiny preset in a fresh process where importing transformers and the like fails."""
    (tmp_path / "run.py").write_text(
        "import sys\n"
        "for name in ('transformers', 'orbax', 'torch', 'tokenizers', 'safetensors', 'tqdm'):\n"
        "    sys.modules[name] = None\n"
        "from gpu import suite\n"
        f"sys.exit(suite.main(['--preset', 'tiny', '--out', {str(tmp_path / 'out')!r}]))\n"
    )
    paths = os.pathsep.join((str(ROOT), str(ROOT / "experiments")))
    run = subprocess.run(
        [sys.executable, str(tmp_path / "run.py")],
        env=os.environ | {"PYTHONPATH": paths, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr[-2000:]
    document = json.loads((tmp_path / "out").read_text())
    assert json.loads(run.stdout.splitlines()[-1]) == document
    parts = document["parts"]
    assert list(parts) == list(gpu_parts.PARTS) and not document["skipped"]
    for arm in parts["correctness"]["float32"]["arms"].values():
        assert arm["rows"] == arm["identical"] + len(arm["divergences"]) == 4
        assert 1 < arm["tokens_per_step"] <= 4
    alone, chain, tree = parts["loop"]["arms"]
    assert alone["tokens_per_step"] == alone["over_autoregression"] == 1
    assert chain["acceptance"] == 0.8 and 1.5 < chain["tokens_per_step"] <= 4
    assert tree["width"] == 2 and tree["tokens_per_second"]["median"] > 0
    assert set(parts["autoregression"]["models"]) == {"tiny-draft", "tiny-base"}
    read = parts["autoregression"]["models"]["tiny-base"]["weight_bytes_per_token"]
    layer = 32 + 32 * 2 * 4 * 10 + 2 * 2 * 10 * 32 + 32 + 3 * 32 * 48
    assert read == 4 * (2 * layer + 32 + 300 * 32)
    assert len(parts["compile"]) == 5 and parts["kernels"]["tiny-base"]["launches"] > 0
    assert set(parts["draft"]["group_sizes"]) == {"1", "2"}
    assert set(parts["verification"]["ms_by_tokens"]) == {"1", "7"}
    questions = parts["questions"]["tiny-base"]
    assert set(questions["left_out"]) == {"cuDNN attention", "XLA attention"}  # on a CPU
    assert {*questions["ms"], *questions["left_out"]} == set(gpu_parts.ANSWERS)
    assert "counted_ms" in parts["host_gap"]["tiny-base"]

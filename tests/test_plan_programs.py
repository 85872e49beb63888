"""The planner's counts against programs that were compiled for GPUs and kept."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import json
import pathlib
import sys

import pytest

from easyspec_jax.planner.cost import Counts, step_counts
from easyspec_jax.planner.device import PRESETS
from easyspec_jax.planner.plan import abstract_mesh

EXPERIMENTS = pathlib.Path(__file__).parents[1] / "experiments"
sys.path.insert(0, str(EXPERIMENTS))  # scripts, no package
programs = importlib.import_module("gpu.programs")

# Of the engines that the records are of, by whose kernels attend: cuDNN's are two fewer a layer.
H200 = PRESETS["h200"]
ENGINES = {
    "outputs-first": H200,
    "cudnn": dataclasses.replace(H200, attention_kernels=H200.attention_kernels - 2),
}
CASES = tuple(programs.CASES)


@functools.cache
def records(engine):
    """By case."""
    lines = (EXPERIMENTS / "results" / "gpu_programs.jsonl").read_text().splitlines()
    found = [record for record in map(json.loads, lines) if record["program"] == engine]
    return {record["case"]: record for record in found}


@pytest.mark.parametrize("engine", ENGINES)
def test_every_case_is_kept(engine):
    assert set(records(engine)) == set(CASES) and len(CASES) >= 12


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", CASES)
def test_a_step_is_counted_as_it_was_compiled(name, engine):
    """Launches and bytes within 5 %, sums between devices exactly."""
    case, record = programs.CASES[name], records(engine)[name]
    step = record["step"]
    decoder = programs.decoder(case, abstract_mesh(case.layer, case.tensor))
    counts = step_counts(decoder, ENGINES[engine], entries=record["entries"])
    total = sum(counts.values(), Counts())
    assert total.launches == pytest.approx(step["launches"], rel=0.05)
    assert total.bytes == pytest.approx(step["read"] + step["written"], rel=0.05)
    assert total.collectives == step["collectives"]

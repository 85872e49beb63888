"""The planner's counts against programs that were compiled for GPUs and kept."""

from __future__ import annotations

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

ENGINE = "outputs-first"  # the one that the records are of
CASES = tuple(programs.CASES)


@functools.cache
def records():
    """Of this engine, by case."""
    lines = (EXPERIMENTS / "results" / "gpu_programs.jsonl").read_text().splitlines()
    found = [record for record in map(json.loads, lines) if record["program"] == ENGINE]
    return {record["case"]: record for record in found}


def test_every_case_is_kept():
    assert set(records()) == set(CASES) and len(CASES) >= 12


@pytest.mark.parametrize("name", CASES)
def test_a_step_is_counted_as_it_was_compiled(name):
    """Launches and bytes within 5 %, sums between devices exactly."""
    case, step = programs.CASES[name], records()[name]["step"]
    decoder = programs.decoder(case, abstract_mesh(case.layer, case.tensor))
    counts = step_counts(decoder, PRESETS["h200"], entries=records()[name]["entries"])
    total = sum(counts.values(), Counts())
    assert total.launches == pytest.approx(step["launches"], rel=0.05)
    assert total.bytes == pytest.approx(step["read"] + step["written"], rel=0.05)
    assert total.collectives == step["collectives"]

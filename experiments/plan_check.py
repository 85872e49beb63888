"""Is the planner right here? Predicted against measured seconds of a step, setting by setting.

    python experiments/plan_check.py --base CKPT --draft CKPT --out FILE

The device is measured as by `easyspec plan --measure`; no figure of either model goes into the
prediction. Rounds of micro-benchmarks and of all settings alternate, so that both meet the same
machine, and medians over rounds count. Steps run in a compiled loop of their own, as
`Decoder.profile` runs them. The last line of stdout is one JSON document.
"""

from __future__ import annotations

import argparse
import pathlib
import statistics
import warnings
from typing import Any

import jax
import numpy as np
from records import append, commit, machine, without_places
from tqdm import tqdm

import easyspec_jax as es
from easyspec_jax.planner.cost import step_costs
from easyspec_jax.planner.measure import measure_device
from easyspec_jax.profile import time_phase
from easyspec_jax.request import make_inputs

SETTINGS = [  # (group_size, γ, w); γ 0: autoregression
    (1, 0, 1), (1, 1, 1), (1, 3, 1), (1, 5, 1), (1, 8, 1), (1, 3, 4), (1, 5, 8),
    (2, 3, 1), (2, 5, 4), (4, 3, 1), (4, 5, 1), (4, 8, 1), (4, 3, 4), (4, 5, 2), (4, 5, 4),
    (4, 5, 8),
]  # fmt: skip
PROMPT, NEW = 64, 64  # tokens


class Arm:
    """One setting: its decoder and the state that its compiled steps pass on."""

    def __init__(self, base: es.Model, draft: es.Model | None, gamma: int, width: int):
        drafter = None if draft is None else es.LayerParallelDrafter(draft)
        options = {"num_draft_tokens": gamma, "tree_width": width} if drafter else {}
        self.decoder = es.Decoder(base, drafter, **options)
        inputs = make_inputs(base.config, np.zeros((1, PROMPT), np.int32), NEW)
        self.request, self.state = jax.block_until_ready(self.decoder.prefill(inputs))
        self.seconds: list[float] = []
        self.predicted: list[float] = []

    def time(self, repeats: int) -> None:
        """Time a step."""
        run = (self.decoder, self.request, self.state)
        seconds, self.state = time_phase("step", *run, repeats=repeats)
        self.seconds.append(seconds)

    def predict(self, device: Any) -> None:
        """Predict a step."""
        entries = self.decoder.capacity(PROMPT + NEW)
        costs = step_costs(self.decoder, device, entries=entries)
        self.predicted.append(sum(cost.seconds for cost in costs.values()))


def measure(args: argparse.Namespace) -> list[dict[str, Any]]:
    """A record for each setting."""
    mesh = es.make_mesh(1, 1)
    measured = jax.numpy.float32 if mesh.devices.flat[0].platform == "cpu" else None
    base = es.load_model(args.base, mesh, dtype=measured)
    drafts = {
        size: es.load_model(args.draft, mesh, group_size=size, layout="grouped", dtype=measured)
        for size in sorted({size for size, _, _ in SETTINGS})
    }
    arms = {
        (size, gamma, width): Arm(base, drafts[size] if gamma else None, gamma, width)
        for size, gamma, width in tqdm(SETTINGS, unit="setting")
    }
    for _ in tqdm(range(args.rounds), unit="round"):
        device = measure_device()
        for arm in arms.values():
            arm.time(args.repeats)
            arm.predict(device)
    return [
        {
            "group_size": size,
            "num_draft_tokens": gamma,
            "tree_width": width,
            "measured": statistics.median(arm.seconds),
            "predicted": statistics.median(arm.predicted),
            "error": statistics.median(arm.predicted) / statistics.median(arm.seconds) - 1,
            "rounds": [list(pair) for pair in zip(arm.seconds, arm.predicted, strict=True)],
        }
        for (size, gamma, width), arm in arms.items()
    ]


def main(argv: list[str] | None = None) -> None:
    """Measure, print a table, append the record."""
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--base", required=True, help="converted checkpoint")
    p.add_argument("--draft", required=True, help="converted checkpoint")
    p.add_argument("--rounds", type=int, default=3)
    p.add_argument("--repeats", type=int, default=5, help="steps in one compiled loop")
    p.add_argument("--out", type=pathlib.Path, help="JSONL file to append the document to")
    args = p.parse_args(argv)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="the draft's context")
        rows = measure(args)
    print("| group size | gamma | w | measured, ms | predicted, ms | error |")
    print("| --- | --- | --- | --- | --- | --- |")
    for row in rows:
        names = ("group_size", "num_draft_tokens", "tree_width")
        times = (f"{1e3 * row[name]:.1f}" for name in ("measured", "predicted"))
        cells = [*(str(row[name]) for name in names), *times, f"{row['error']:+.0%}"]
        print(f"| {' | '.join(cells)} |")
    errors = sorted(abs(row["error"]) for row in rows)
    median, worst = statistics.median(errors), errors[-1]
    print(f"\n{len(rows)} settings: median error {median:.1%}, largest {worst:.1%}")
    options = without_places(vars(args))
    record = {"machine": machine(), "commit": commit(), "options": options, "settings": rows}
    print(append(args.out, record | {"median_error": median, "largest_error": worst}))


if __name__ == "__main__":
    main()

"""Tuned against uniform partitions on prompts that no tuning has seen, at equal attention steps.

    python experiments/tuned.py --base CKPT --draft CKPT --set text=FILE --attention-steps 3,4,5 \
        --tuning-per-set 16 --held-out-per-set 16 --num-draft-tokens 3 --out FILE
    python experiments/tuned.py --table FILE [--base CKPT --draft CKPT --device h100 --layer 4
        --num-devices 8]

For each number of attention steps, the uniform partition with as many (or, where there is none, the
most below) and a tuned one; with --fit also one whose groups are no larger than the uniform one's,
so that it fits the same devices. All decode the same held-out prompts. Every prompt's tokens and
steps are kept; with a device, --table also compares at equal predicted time of a step there.
Nothing here is timed.
"""

from __future__ import annotations

import argparse
import json
import pathlib
from typing import Any

import jax
import numpy as np
import prompt_sets
from records import append, commit, machine, without_places

import easyspec_jax as es
from easyspec_jax.checkpoint import read_metadata
from easyspec_jax.cli.tune import predict_times
from easyspec_jax.text import Tokenizer, read_generation_config, stop_ids
from easyspec_jax.tuner import search, tune
from easyspec_jax.tuner.partitions import Partition, uniform_partitions
from easyspec_jax.tuner.search import StepSeconds
from easyspec_jax.tuner.stale_passes import answer, regroup, write_texts

Record = dict[str, Any]
RESAMPLES = 10_000


class Bench:
    """Two models, prompts to tune on, prompts held out, and what was measured of them."""

    def __init__(self, args: argparse.Namespace, tuning: list, held_out: list):
        """Load, write the base's answers and measure the draft's layers."""
        mesh = es.make_mesh(1, 1)
        self.args, self.tuning, self.held_out = args, tuning, held_out
        self.base = es.load_model(args.base, mesh)
        self.draft = self.base if args.draft == args.base else es.load_model(args.draft, mesh)
        eos_ids = stop_ids(read_generation_config(args.base), self.base.config)
        self.options = {"max_new_tokens": args.max_new_tokens, "eos_ids": eos_ids}
        texts = write_texts(self.base, tuning, **self.options)
        self.expected = [text.tokens[0, text.counted].tolist() for text in texts]
        self.scorer = search.make_scorer(self.base, self.draft, texts, args.num_draft_tokens)
        self.num_layers = self.draft.config.num_layers
        largest = min(3 * -(-self.num_layers // min(args.attention_steps)), self.num_layers)
        self.costs = search.measure_sensitivity(self.scorer, largest, progress=True)
        self.written = [row for out in self._decode(None) for row in out.tokens]
        self.decoded: dict[Partition, Record] = {}

    def _decode(self, partition: Partition | None) -> list[es.Generation]:
        """The held-out prompts, answered."""
        drafter = None
        if partition is not None:
            drafter = es.LayerParallelDrafter(regroup(self.draft, partition))
        gamma = self.args.num_draft_tokens
        decoder = es.Decoder(self.base, drafter, num_draft_tokens=gamma)
        outs = list(answer(decoder, self.held_out, **self.options))
        jax.clear_caches()  # no other arm runs its programs, which are 100 MB and more
        return outs

    def arm(self, kind: str, steps: int, partition: Partition, tuning: Record) -> Record:
        """One partition on the held-out prompts."""
        if partition not in self.decoded:
            outs = self._decode(partition)
            rows = [row for out in outs for row in out.stats.rows]
            tokens = [row for out in outs for row in out.tokens]
            same = [a == b for a, b in zip(tokens, self.written, strict=True)]
            self.decoded[partition] = {
                "partition": partition,
                "emitted": [row.emitted for row in rows],
                "steps": [row.steps for row in rows],
                "identical": sum(same),
            }
        of = {"arm": kind, "attention_steps": steps}
        return of | self.decoded[partition] | {"tuning": tuning}

    def tuned(self, steps: int, most: int | None) -> tuple[Partition, Record]:
        """What `tuner.tune` would choose, and its figures on the tuning prompts."""
        k, largest = tune.check_options(self.num_layers, steps, most, False)
        candidates = search.search(self.scorer, self.costs[:, :largest], k, progress=True)
        confirmed = tune.confirm_best(
            self.base,
            self.draft,
            candidates,
            self.tuning,
            self.expected,
            num_confirmed=self.args.verify,
            num_draft_tokens=self.args.num_draft_tokens,
            sampling=es.Sampling(),
            **self.options,
        )
        jax.clear_caches()
        rows = [
            {
                "partition": c.partition,
                "kind": c.kind,
                "predicted": round(c.predicted, 4),
                "tokens_per_step": round(c.tokens_per_step, 4),
            }
            for c in confirmed
        ]
        return confirmed[0].partition, {"considered": len(candidates), "verified": rows}


def measure(bench: Bench):
    """Yield a record of the draft's layers, then one of each arm when it is done."""
    finite = [[round(float(x), 5) for x in row if np.isfinite(x)] for row in bench.costs]
    exact = round(bench.scorer.exact_acceptance, 4)
    yield {"arm": "layers", "exact_acceptance": exact, "nats_by_layers_back": finite}
    for steps in bench.args.attention_steps:
        uniform = uniform_partitions(bench.num_layers, steps, bench.num_layers)[0]
        predicted = round(bench.scorer.score(uniform)[2], 4)
        yield bench.arm("uniform", steps, uniform, {"predicted": predicted})
        yield bench.arm("tuned", steps, *bench.tuned(steps, None))
        if steps in bench.args.fit:
            yield bench.arm("tuned, no larger", steps, *bench.tuned(steps, max(uniform)))


def compare(arm: Record, other: Record, seed: int = 0) -> Record:
    """Tokens per step of two arms on the same prompts, and of the first minus and over the other;
    with 95 % intervals of a bootstrap over prompts, the same draws for both.
    """
    counts = np.array([[a["emitted"], a["steps"]] for a in (arm, other)], np.float64)
    n = counts.shape[-1]
    draws = np.random.default_rng(seed).integers(0, n, (RESAMPLES, n))
    sums = counts[..., draws].sum(axis=-1)  # [2 arms, 2 counts, RESAMPLES]
    mine, theirs = sums[:, 0] / sums[:, 1]
    (a, b), (c, d) = counts.sum(axis=-1)
    found = {"mine": (a / b, mine), "other": (c / d, theirs)}
    found["difference"] = (a / b - c / d, mine - theirs)
    found["ratio"] = (a / b / (c / d), mine / theirs)
    return {
        name: [round(float(x), 4) for x in (value, *np.quantile(drawn, (0.025, 0.975)))]
        for name, (value, drawn) in found.items()
    }


def format_results(header: Record, arms: list[Record]) -> str:
    """A Markdown table."""
    o = header["options"]
    lines = [
        f"{o['draft']} drafts {o['num_draft_tokens']} deep for {o['base']}: tokens per step on "
        f"{len(header['held_out_tokens'])} held-out prompts, {o['max_new_tokens']} tokens each, "
        f"tuned on {len(header['tuning_tokens'])} others; 95 % intervals over prompts, paired.",
        "",
        "| attention steps | partition | tokens per step | more than uniform | ratio |",
        "| --- | --- | --- | --- | --- |",
    ]
    uniform: Record = {}
    for arm in arms:
        if arm["arm"] == "layers":
            continue
        uniform = arm if arm["arm"] == "uniform" else uniform
        found = {name: _interval(*values) for name, values in compare(arm, uniform).items()}
        cells = [str(len(arm["partition"])), f"{arm['arm']}: {tune_name(arm)}", found["mine"]]
        cells += ["", ""] if arm is uniform else [found["difference"], found["ratio"]]
        if arm["identical"] != len(arm["steps"]):
            cells[2] += f" ({arm['identical']} of {len(arm['steps'])} identical)"
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def format_times(arms: list[Record], seconds: StepSeconds) -> str:
    """A Markdown table at equal predicted time: each uniform partition and, of the tuned ones whose
    steps take no longer, that which gave most on the tuning prompts.
    """
    lines = [
        "| uniform | step, ms | tuned, no slower | step, ms | tokens per step, ratio | speed |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    decoded = [arm for arm in arms if arm["arm"] != "layers"]
    time = {tune_name(arm): seconds(tuple(arm["partition"])) for arm in decoded}
    for uniform in (arm for arm in decoded if arm["arm"] == "uniform"):
        most = 1.001 * time[tune_name(uniform)]
        able = [a for a in decoded if a["arm"] != "uniform" and time[tune_name(a)] <= most]
        if not able:
            continue
        best = max(able, key=lambda arm: arm["tuning"]["verified"][0]["tokens_per_step"])
        ratio = compare(best, uniform)["ratio"]
        both = [time[tune_name(arm)] for arm in (uniform, best)]
        cells = [
            tune_name(uniform),
            f"{1e3 * both[0]:.3f}",
            tune_name(best),
            f"{1e3 * both[1]:.3f}",
        ]
        cells += [_interval(*ratio), f"{ratio[0] * both[0] / both[1]:.2f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def tune_name(arm: Record) -> str:
    """Its partition, as --group-size takes it."""
    return ",".join(map(str, arm["partition"]))


def _interval(value: float, low: float, high: float) -> str:
    return f"{value:.2f} ({low:.2f}, {high:.2f})"


def read_results(path: pathlib.Path) -> list[tuple[Record, list[Record]]]:
    """Every run of a results file: its header and its arms."""
    runs: list[tuple[Record, list[Record]]] = []
    for line in path.read_text().splitlines():
        record = json.loads(line)
        if "arm" in record:
            runs[-1][1].append(record)
        else:
            runs.append((record, []))
    return runs


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""

    def numbers(text):
        return sorted({int(n) for n in text.split(",")})

    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--tuning-per-set", type=int, default=2, help="the first prompts of each set")
    p.add_argument("--held-out-per-set", type=int, default=3, help="those behind them")
    p.add_argument("--attention-steps", type=numbers, default=[7, 8, 9, 12, 16])
    p.add_argument("--fit", type=numbers, default=[], help="of these, also no larger groups")
    p.add_argument("--verify", type=int, default=3, help="decoded with before one is chosen")
    p.add_argument("--device", help="with --table: as for easyspec plan, to compare equal times")
    p.add_argument("--num-devices", type=int, help="how many of them")
    p.add_argument("--layer", type=int, help="of them for the layers of a group")
    return prompt_sets.parse(p, argv, max_tokens=150)


def main(argv: list[str] | None = None) -> None:
    """Measure, append to the file and print a table; or print a file's."""
    args = parse(argv)
    if args.table:
        runs = read_results(args.table)
        print("\n\n".join(format_results(*run) for run in runs))
        if args.device:
            configs = [read_metadata(path)[0] for path in (args.base, args.draft)]
            seconds = predict_times(args, *configs)
            names = [pathlib.Path(path).name for path in (args.base, args.draft)]
            for header, arms in runs:
                if [header["options"][name] for name in ("base", "draft")] == names:
                    args.num_draft_tokens = header["options"]["num_draft_tokens"]
                    print("\n" + format_times(arms, seconds))
        return
    num, limit = args.tuning_per_set, args.max_prompt_tokens
    total = num + args.held_out_per_set
    sets = prompt_sets.read_prompts(Tokenizer(args.base), args.set, total, limit, chat=args.chat)
    tuning = [ids for found in sets.values() for ids in found[:num]]
    held_out = [ids for found in sets.values() for ids in found[num:]]
    own = ("table", "device", "num_devices", "layer")
    options = without_places({k: v for k, v in vars(args).items() if k not in own})
    header = {
        "machine": machine(),
        "commit": commit(),
        "options": options,
        "tuning_tokens": [len(ids) for ids in tuning],
        "held_out_tokens": [len(ids) for ids in held_out],
    }
    append(args.out, header)
    arms = []
    for record in measure(Bench(args, tuning, held_out)):
        append(args.out, record)
        arms.append(record)
    print(format_results(header, arms))
    print(json.dumps(header | {"arms": arms}))


if __name__ == "__main__":
    main()

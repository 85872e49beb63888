"""Depth chosen step by step against every fixed depth and the base alone: time and tokens a step.

    python experiments/auto.py --case lookup --base CKPT --set summaries=FILE --out FILE
    python experiments/auto.py --table FILE [FILE ...]

A case is a drafter: "draft" (--draft, in groups of --group-size), "lookup" (prompt lookup), "head"
(lookup, else the package's or another --head) and "random" (a draft of random weights). Arms are
the base alone, each γ of --gammas, and "auto"; all answer a prompt before any sees the next one, in
an order drawn anew each time, after a warm-up that compiles and measures. A second --then text is
put behind the first answer and answered in the same session. FILE gets a header and a line a
prompt; started again, the script keeps what is there.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import json
import pathlib
import random
import statistics
import time
from collections.abc import Callable
from importlib import resources
from typing import Any

import prompt_sets
from acceptance import open_results, read_results
from records import append, commit, machine, without_places
from tqdm import tqdm

import easyspec_jax as es
from easyspec_jax.engine import PREFILL_CHUNKS
from easyspec_jax.text import Tokenizer

GAMMAS = [1, 2, 3, 5, 8]
ALONE, AUTO = "alone", "auto"
Record = dict[str, Any]


def make_drafter(args: argparse.Namespace, base: es.Model) -> es.Drafter:
    """The drafter of the case."""
    mesh = base.layout.mesh
    if args.case == "draft":
        return es.LayerParallelDrafter(es.load_model(args.draft, mesh, group_size=args.group_size))
    if args.case == "random":
        small = dataclasses.replace(base.config, num_layers=4, embed_dim=256, mlp_dim=512)
        return es.LayerParallelDrafter(es.random_model(small, mesh, seed=1, dtype=base.dtype))
    if args.case == "lookup":
        return es.PromptLookupDrafter()
    head = args.head or resources.files("easyspec_jax") / "heads" / "smollm2-135m-instruct"
    return es.FallbackDrafter(
        es.PromptLookupDrafter(min_ngram=3), es.EagleDrafter.load(str(head), base)
    )


def make_arms(args: argparse.Namespace) -> dict[str, es.Decoder]:
    """A decoder of each arm, the base alone first."""
    base = es.load_model(args.base, es.make_mesh())
    drafter = make_drafter(args, base)
    arms = {ALONE: es.Decoder(base)}
    for gamma in args.gammas:
        arms[str(gamma)] = es.Decoder(base, drafter, num_draft_tokens=gamma)
    arms[AUTO] = es.Decoder(base, drafter, num_draft_tokens=AUTO)
    return arms


def answer(
    decoder: es.Decoder, ids: list[int], then: list[int], args: argparse.Namespace, t: float
) -> tuple[float, list[int], list[es.Stats]]:
    """Seconds, prompts included; all new tokens; and statistics of each turn."""
    options = {"sampling": es.Sampling(temperature=t), "seed": args.seed}
    if not then:
        start = time.perf_counter()
        out = decoder.generate([ids], max_new_tokens=args.max_new_tokens, **options)
        return time.perf_counter() - start, out.tokens[0], [out.stats]
    room = len(ids) + len(then) + 2 * args.max_new_tokens
    session, text, new, stats, seconds = es.Session(max_len=room), list(ids), [], [], 0.0
    for more in ([], then):
        text += more
        start = time.perf_counter()
        stream = decoder.stream(
            text, max_new_tokens=args.max_new_tokens, session=session, **options
        )
        turn = [token for piece in stream for token in piece]
        seconds += time.perf_counter() - start
        text, new = text + turn, new + turn
        stats.append(session.stats)
    return seconds, new, stats


def measure(args: argparse.Namespace, sets, then: list[int], lines, keep: Callable) -> None:
    """Every prompt that no line has yet, answered by every arm."""
    done = {(line["set"], line["prompt"], line["temperature"]) for line in lines}
    wanted = [
        (t, name, i)
        for t in args.temperatures
        for i in range(args.num_prompts)
        for name in sets
        if (name, args.skip + i, t) not in done
    ]
    arms, warm = make_arms(args) if wanted else {}, set()
    for turn, (t, name, i) in enumerate(tqdm(wanted, desc=args.case)):
        ids, shuffle = sets[name][args.skip + i], random.Random(turn)
        order = list(arms.items())
        found: Record = {}
        for arm, decoder in order:
            room = len(ids) + args.max_new_tokens
            room += len(then) + args.max_new_tokens if then else 0
            piece = sum(len(ids) - 1 > chunk for chunk in PREFILL_CHUNKS)
            shapes = (arm, decoder.capacity(room), piece, t > 0)
            if then or shapes not in warm:  # compiles, and measures what depths cost
                answer(decoder, ids, then, args, t)
                warm.add(shapes)
        runs: dict[str, list] = {arm: [] for arm in arms}
        for _ in range(args.repeats):
            # Anew each time, so that none always follows the same one.
            for arm, decoder in shuffle.sample(order, len(order)):
                runs[arm].append(answer(decoder, ids, then, args, t))
        for arm in arms:
            _, tokens, stats = runs[arm][0]
            seconds = [run[0] for run in runs[arm]]
            found[arm] = {
                "seconds": round(statistics.median(seconds), 4),
                "least": round(min(seconds), 4),
                "new_tokens": len(tokens),
                "steps": sum(s.steps for s in stats),
                "identical": tokens == runs[ALONE][0][1],
            }
            if arm == AUTO:
                found[arm]["steps_per_depth"] = [s.steps_per_depth for s in stats]
                costs = arms[arm].found_costs[1, t == 0]
                found[arm]["depths"] = arms[arm].depths
                found[arm]["costs"] = [[round(float(x), 5) for x in row] for row in costs.seconds]
        keep({"set": name, "prompt": args.skip + i, "temperature": t, "arms": found})


def ratios(lines: list[Record], clock: str = "seconds") -> dict[str, float] | None:
    """Tokens a second of every arm over those of the base alone: medians of the answers' seconds,
    or the least ones ("least"), which a clock that strays upwards spoils less. None: not kept.
    """
    if clock not in lines[0]["arms"][ALONE]:
        return None

    def speed(arm):
        found = [x["arms"][arm] for x in lines]
        return sum(x["new_tokens"] for x in found) / sum(x[clock] for x in found)

    return {arm: speed(arm) / speed(ALONE) for arm in lines[0]["arms"]}


def priced(lines: list[Record]) -> dict[str, float] | None:
    """The same with every step at what one of its depth was measured to take before the first
    answer: what the choice is worth on a clock that does not stray. None: there are several kinds,
    or an arm has a depth that was not measured.
    """
    seconds = collections.Counter()
    for x in lines:
        arms, auto = x["arms"], x["arms"][AUTO]
        if len(auto.get("costs", ())) != 1:
            return None
        cost = dict(zip(auto["depths"], auto["costs"][0], strict=True))
        if not {int(arm) for arm in arms if arm not in (ALONE, AUTO)} <= cost.keys():
            return None
        for arm, found in arms.items():
            if arm == AUTO:
                turns = [enumerate(turn) for turn in found["steps_per_depth"]]
                taken = sum(n * cost[depth] for turn in turns for depth, n in turn if n)
            else:
                taken = found["steps"] * cost[0 if arm == ALONE else int(arm)]
            seconds[arm] += taken / found["new_tokens"]
    return {arm: seconds[ALONE] / taken for arm, taken in seconds.items()}


def table(files: list[pathlib.Path]) -> str:
    """A row for each case, set and temperature; a column for each γ that any of them has."""
    read = [read_results(file) for file in files]
    arms = {arm for _, lines in read for x in lines for arm in x["arms"]} - {ALONE, AUTO}
    fixed = sorted(arms, key=int)
    heads = [
        "case",
        "set",
        "T",
        "prompts",
        *(f"{g} tokens" for g in fixed),
        AUTO,
        "auto / best fixed",
        "by the least seconds",
        "by measured costs",
    ]
    rows = [heads, ["---"] * len(heads)]
    for header, lines in read:
        keys = dict.fromkeys((line["set"], line["temperature"]) for line in lines)
        for name, t in keys:
            here = [x for x in lines if (x["set"], x["temperature"]) == (name, t)]
            found = ratios(here) or {}
            row = [header["options"]["case"], name, f"{t:g}", str(len(here))]
            row += [f"{found[arm]:.2f}" if arm in found else "-" for arm in (*fixed, AUTO)]
            for speeds in (found, ratios(here, "least"), priced(here)):
                best = max(speeds[arm] for arm in speeds if arm != AUTO) if speeds else 0.0
                row.append(f"{speeds[AUTO] / best:.3f}" if speeds else "-")
            rows.append(row)
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--case", choices=("draft", "lookup", "head", "random"))
    p.add_argument("--base", help="converted checkpoint")
    p.add_argument("--draft", help="converted checkpoint")
    p.add_argument("--head", help="folder of a head")
    p.add_argument("--group-size", type=int, default=1)
    p.add_argument("--set", action="append", default=[], metavar="NAME=PATH")
    p.add_argument("--then", help="text that is put behind the first answer")
    p.add_argument("--chat", action="store_true", help="each prompt is a user's message")
    p.add_argument("--num-prompts", type=int, default=4, help="of each set")
    p.add_argument("--skip", type=int, default=0, help="the first prompts of each set")
    p.add_argument("--max-prompt-tokens", type=int, default=700, help="longer ones are skipped")
    p.add_argument("--max-new-tokens", type=int, default=96)
    p.add_argument("--temperatures", type=lambda s: [float(t) for t in s.split(",")], default=[0.0])
    p.add_argument("--repeats", type=int, default=1)
    p.add_argument("--gammas", type=lambda s: [int(g) for g in s.split(",")], default=GAMMAS)
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--out", type=pathlib.Path)
    p.add_argument("--table", type=pathlib.Path, nargs="+", help="only print these files")
    args = p.parse_args(argv)
    if not args.table and not all((args.case, args.base, args.set, args.out)):
        p.error("--case, --base, --set and --out are needed, or --table")
    return args


def main(argv: list[str] | None = None) -> None:
    """Measure what is missing in the file, print it all; or print files."""
    args = parse(argv)
    if args.table:
        print(table(args.table))
        return
    tokenizer = Tokenizer(args.base)
    sets = prompt_sets.read_prompts(
        tokenizer, args.set, args.skip + args.num_prompts, args.max_prompt_tokens, chat=args.chat
    )
    then = tokenizer.encode(args.then, add_special_tokens=False) if args.then else []
    left_out = {"table", "num_prompts", "temperatures"}  # more of them may be asked for later
    options = without_places({k: v for k, v in vars(args).items() if k not in left_out})
    header = {"machine": machine(), "commit": commit(), "options": options, "prompt_tokens": {}}
    header, lines = open_results(args.out, header)

    def keep(line):
        append(args.out, line)
        lines.append(line)

    measure(args, sets, then, lines, keep)
    print(table([args.out]))
    print(json.dumps(header | {"lines": lines}))


if __name__ == "__main__":
    main()

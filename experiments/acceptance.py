"""Tokens per step by tree width, group size, calibration, temperature and kind of candidates.

    python experiments/acceptance.py --base CKPT --draft CKPT --set gsm8k=PATH --set mmlu=PATH \
        --prompts-per-set 2 --tree-widths 1,4,8 --group-sizes 1,2,4 --temperatures 0,0.8 --out FILE
    python experiments/acceptance.py --table FILE

Every arm of the grid answers the same prompts to the last token asked for. FILE gets a header, then
a line as soon as an arm is done: started again with the same options, the script keeps the arms
that are there and measures the others. The last line of stdout is one JSON document. Nothing here
is a timing.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import pathlib
import sys
from typing import Any

import jax
import prompt_sets
from records import append, commit, machine, without_places
from tqdm import tqdm

import easyspec_jax as es
from easyspec_jax.text import Tokenizer

Record = dict[str, Any]  # one line of the results


@dataclasses.dataclass(frozen=True)
class Arm:
    """One way to draft; None where there is no choice."""

    temperature: float
    tree_width: int
    group_size: int
    calibrate: bool | None  # None for group_size 1: both are the same computation
    candidates: str | None  # None for chains and at temperature 0


def make_grid(args: argparse.Namespace) -> list[Arm]:
    """Every arm that the options ask for, each computation once."""
    return [
        Arm(temperature, width, size, calibrate, candidates)
        for temperature in args.temperatures
        for width in args.tree_widths
        for candidates in (("best", "sampled") if temperature > 0 and width > 1 else (None,))
        for size in args.group_sizes
        for calibrate in ((True, False) if size > 1 else (None,))
    ]


def answer(decoder: es.Decoder, temperature: float, prompts, args, progress):
    """Tokens and statistics of every prompt, `--batch` of them decoded at once."""
    tokens, stats = [], []
    for i in range(0, len(prompts), args.batch):
        out = decoder.generate(
            prompts[i : i + args.batch],
            max_new_tokens=args.max_new_tokens,
            sampling=es.Sampling(temperature=temperature),
            seed=args.seed + i,
        )
        tokens += out.tokens
        stats += out.stats.rows
        progress.update(len(out.tokens))
    return tokens, stats


def pool(stats: list[es.Stats]) -> es.Stats:
    """The statistics of all prompts together."""

    def total(counts):
        if isinstance(counts[0], tuple):
            return tuple(sum(column) for column in zip(*counts, strict=True))
        return sum(counts)

    names = [field.name for field in dataclasses.fields(es.Stats) if field.name != "rows"]
    return es.Stats(**{name: total([getattr(s, name) for s in stats]) for name in names})


def summarise(stats: list[es.Stats]) -> Record:
    """Rates and counts over all prompts; the error is that of a ratio of sums, linearised."""
    n, pooled = len(stats), pool(stats)
    squares = sum((s.emitted - pooled.tokens_per_step * s.steps) ** 2 for s in stats)
    stderr = math.sqrt(squares * n / (n - 1)) / pooled.steps if n > 1 else None
    return {
        "tokens_per_step": round(pooled.tokens_per_step, 4),
        "tokens_per_step_stderr": round(stderr, 4) if stderr is not None else None,
        "acceptance_rate": round(pooled.acceptance_rate, 4),
        "accepted_per_depth": pooled.accepted_per_depth,
        "tried_per_depth": pooled.tried_per_depth,
        "accepted_per_rank": pooled.accepted_per_rank,
        "tried_per_rank": pooled.tried_per_rank,
        "nodes_drafted": pooled.nodes_drafted,
        "nodes_accepted": pooled.nodes_accepted,
    }


def measure(args: argparse.Namespace, prompts: list[list[int]], arms: list[Arm]):
    """Yield the record of each arm when it is done."""
    mesh = es.make_mesh(1, 1)
    base = es.load_model(args.base, mesh)
    longest = max(map(len, prompts)) + args.max_new_tokens
    if longest > base.config.context:  # its answer would be cut short
        raise ValueError(f"the base's context is {base.config.context}, but {longest} are needed")
    drafts = {
        size: es.load_model(args.draft, mesh, group_size=size, layout="grouped")
        for size in {arm.group_size for arm in arms}
    }
    vocabulary = es.shared_vocabulary(args.base, args.draft) if args.other_tokenizer else None
    greedy = any(arm.temperature == 0 for arm in arms)
    with tqdm(total=len(prompts) * (len(arms) + greedy), unit="prompt") as progress:
        expected = answer(es.Decoder(base), 0.0, prompts, args, progress)[0] if greedy else None
        for arm in arms:
            calibrate = arm.calibrate is not False
            drafter = es.LayerParallelDrafter(
                drafts[arm.group_size],
                calibrate=calibrate,
                candidates=arm.candidates or "sampled",
                vocabulary=vocabulary,
            )
            decoder = es.Decoder(
                base, drafter, num_draft_tokens=args.num_draft_tokens, tree_width=arm.tree_width
            )
            tokens, stats = answer(decoder, arm.temperature, prompts, args, progress)
            identical = None
            if arm.temperature == 0:
                identical = sum(a == b for a, b in zip(tokens, expected, strict=True))
            yield {
                **dataclasses.asdict(arm),
                **summarise(stats),
                "identical": identical,
                "prompts": len(prompts),
            }
            jax.clear_caches()  # no other arm runs its programs, which are 100 MB and more


def make_header(args: argparse.Namespace, prompts: dict[str, list[list[int]]]) -> Record:
    """What is measured on what: names of checkpoints and files, not places on one machine."""
    options = without_places({k: v for k, v in vars(args).items() if k != "table"})
    lengths = {name: [len(ids) for ids in found] for name, found in prompts.items()}
    header = {"machine": machine(), "commit": commit(), "options": options}
    if options.get("other_tokenizer"):  # not every script has that option
        shared = es.shared_vocabulary(args.base, args.draft)
        ids = [i for found in prompts.values() for row in found for i in row]
        header["shared"] = {
            "tokens": shared.num_shared,
            "of": len(shared.shared),
            "of_the_prompts": round(shared.covered(ids), 4),
        }
    return header | {"prompt_tokens": lengths}


def open_run(args: argparse.Namespace) -> tuple[list[list[int]], Record, list[Record]]:
    """The prompts of all sets, and header and lines of the file, for a script with a line a prompt;
    arguments of `prompt_sets.parse`.
    """
    sets = prompt_sets.read_prompts(
        Tokenizer(args.base), args.set, args.prompts_per_set, args.max_prompt_tokens, chat=args.chat
    )
    prompts = [ids for found in sets.values() for ids in found]
    return prompts, *open_results(args.out, make_header(args, sets))


def read_results(path: pathlib.Path) -> tuple[Record, list[Record]]:
    """Header and arms of a results file; a last line that was cut off is left out."""
    lines = path.read_text().split("\n")[:-1]
    if not lines or not lines[0].startswith('{"machine": '):
        raise ValueError(f"{path} holds no results of this script")
    header, *arms = map(json.loads, lines)
    return header, arms


def open_results(path: pathlib.Path, header: Record) -> tuple[Record, list[Record]]:
    """Header and arms of the file, which now ends with a whole line; a new file has this header.

    Raises:
      ValueError: the file holds results of other options or prompts.
    """
    if not path.exists() or not path.stat().st_size:
        append(path, header)
    found, arms = read_results(path)
    for part in ("options", "prompt_tokens"):
        names = [name for name in header[part] if header[part][name] != found[part].get(name)]
        if names:
            raise ValueError(f"{path} was measured with other {', '.join(names)}: choose another")
    os.truncate(path, path.read_bytes().rindex(b"\n") + 1)
    if arms:
        tqdm.write(f"{path} has {len(arms)} arms of commit {found['commit']}", file=sys.stderr)
    return found, arms


def format_table(arms: list[Record]) -> list[str]:
    """Lines of a Markdown table: group size and calibration by tree width."""
    widths, cells = sorted({r["tree_width"] for r in arms}), {}
    words = {True: ", calibrated", False: ", not calibrated", None: ""}
    for r in sorted(arms, key=lambda r: (r["group_size"], r["calibrate"] is False)):
        cell = f"{r['tokens_per_step']:.2f}"
        if r["tokens_per_step_stderr"] is not None:
            cell += f" ± {r['tokens_per_step_stderr']:.2f}"
        if r["identical"] not in (None, r["prompts"]):
            cell += f" ({r['identical']} of {r['prompts']} identical)"
        row = f"{r['group_size']}{words[r['calibrate']]}"
        cells.setdefault(row, {})[r["tree_width"]] = cell
    rows = [["group size", *(f"width {w}" for w in widths)], ["---"] * (len(widths) + 1)]
    rows += [[name, *(found.get(w, "-") for w in widths)] for name, found in cells.items()]
    return [f"| {' | '.join(row)} |" for row in rows]


def format_results(header: Record, arms: list[Record]) -> str:
    """Markdown: a table per temperature and kind of candidates; chains stand in both kinds'."""
    options = header["options"]
    lines = [
        f"Tokens per step ± standard error over prompts: {options['draft']} drafts "
        f"{options['num_draft_tokens']} deep for {options['base']}, {options['max_new_tokens']} "
        f"tokens, {options['prompts_per_set']} prompts of each set ({', '.join(options['set'])}). "
        "A greedy arm says so where its tokens are not autoregression's."
    ]
    for temperature in sorted({r["temperature"] for r in arms}):
        here = [r for r in arms if r["temperature"] == temperature]
        for kind in sorted({r["candidates"] for r in here} - {None}) or [None]:
            title = f"Temperature {temperature:g}" + (f", candidates {kind}" if kind else "")
            lines += ["", f"{title}:", ""]
            lines += format_table([r for r in here if r["candidates"] in (kind, None)])
    return "\n".join(lines)


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""

    def numbers(kind):
        return lambda text: sorted({kind(n) for n in text.split(",")})

    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--prompts-per-set", type=int, default=2)
    p.add_argument("--tree-widths", type=numbers(int), default=[1, 4, 8])
    p.add_argument("--group-sizes", type=numbers(int), default=[1, 2, 4])
    p.add_argument("--temperatures", type=numbers(float), default=[0.0, 0.8])
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--batch", type=int, default=1, help="prompts decoded at once (default 1)")
    other = "the draft's tokenizer is not the base's: draft what they share"
    p.add_argument("--other-tokenizer", action="store_true", help=other)
    return prompt_sets.parse(p, argv, max_tokens=256)


def main(argv: list[str] | None = None) -> None:
    """Measure what is missing in the file, print it all; or print a file."""
    args = parse(argv)
    if args.table:
        print(format_results(*read_results(args.table)))
        return
    tokenizer, limit = Tokenizer(args.base), args.max_prompt_tokens
    sets = prompt_sets.read_prompts(
        tokenizer, args.set, args.prompts_per_set, limit, chat=args.chat
    )
    header, arms = open_results(args.out, make_header(args, sets))
    done = {Arm(**{f.name: r[f.name] for f in dataclasses.fields(Arm)}) for r in arms}
    missing = [arm for arm in make_grid(args) if arm not in done]
    if missing:
        for record in measure(args, [ids for found in sets.values() for ids in found], missing):
            append(args.out, record)
            arms.append(record)
    print(format_results(header, arms))
    print(json.dumps(header | {"arms": arms}))


if __name__ == "__main__":
    main()

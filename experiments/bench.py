"""Own decoding beside its peers: arms on the same prompts, interleaved in one run, as ratios.

    python experiments/bench.py --base CKPT --draft CKPT --set gsm8k=PATH --num-prompts 5 \
        --group-size 4 --tree-width 1,4 --arms autoregression,exact,calibrated --out FILE

Arms are autoregression, the speculative ones exact, calibrated and uncalibrated (the draft layer
after layer, or in groups with and without calibration), prompt-lookup, fallback (that, else
calibrated), eagle and lookup-eagle (a head, alone and behind lookup; with --head), early-exit and
polybasic (whose draft runs layer after layer), and transformers'
generate and assisted generation in float32 (transformers, assisted, assisted-constant; with
--base-hf and --draft-hf). Every arm answers a prompt before any sees the next one, after a warm-up
that compiles; none stops before --max-new-tokens. A speed-up is total tokens over total time, by
the same code for all arms, against autoregression (the first arm where that is left out). FILE
gets a header, a line per prompt and a summary; the last line of stdout is one JSON document. An
error stops the run.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import resource
import statistics
import time
from typing import Any

import jax
from arms import ARMS, HEADS, NEED_DRAFT, PEERS, Arm, check_peers, own_arms, peer_arms
from ceiling import device_bandwidth, streamed_bytes, top_gap
from prompt_sets import FILES, read_prompts
from records import append, commit, machine, without_places
from tqdm import tqdm

import easyspec_jax as es
from easyspec_jax.cli.demo import divergence
from easyspec_jax.memory import device_bytes
from easyspec_jax.text import Tokenizer


def card(args: argparse.Namespace, base: es.Model, bandwidth: float) -> dict[str, Any]:
    """What is known before anything is timed: sizes, and autoregression's speed if it did nothing
    but read its weights at the device's bandwidth.
    """
    c, size = base.config, base.dtype.itemsize
    streamed = streamed_bytes(base)
    return {
        "base": pathlib.Path(args.base).name,
        "draft": pathlib.Path(args.draft).name if args.draft else None,
        "dtype": base.dtype.name,
        "matrix_dtype": base.layout.matrix_dtype(base.dtype).name,
        "mesh": dict(base.layout.mesh.shape),
        "weight_bytes_per_device": device_bytes(base.params),
        "streamed_bytes_per_token": streamed,
        "kv_bytes_per_token": 2 * c.num_layers * c.num_kv_heads * c.head_dim * size,
        "bandwidth_gb_per_s": round(bandwidth / 1e9, 2),
        "tokens_per_second_at_bandwidth": round(bandwidth / streamed, 2),
    }


def warm_up(arms: dict[str, Arm], prompts: list[list[int]], max_new_tokens: int) -> None:
    """Every arm has answered a prompt of every shape that it compiles for, the shortest and the
    longest at least; compilation is timed.
    """
    ends = [min(prompts, key=len), max(prompts, key=len)]
    for arm in arms.values():
        seconds = []
        listen = lambda event, s, seconds=seconds, **_: (  # noqa: E731
            seconds.append(s) if event.startswith("/jax/core/compile/") else None
        )
        jax.monitoring.register_event_duration_secs_listener(listen)
        shapes = {arm.shape(ids, max_new_tokens): ids for ids in reversed([*ends, *prompts])}
        for ids in shapes.values():
            arm.run(ids, 0)
        jax.monitoring.unregister_event_duration_listener(listen)
        arm.compile_seconds = sum(seconds)


def answer_all(
    arms: dict[str, Arm], ids: list[int], seed: int, repeats: int
) -> dict[str, dict[str, Any]]:
    """Every arm's answer to one prompt: its tokens, the median seconds of `repeats`, statistics.
    Whose turn is first depends on the seed.
    """
    seen: dict[str, list] = {name: [] for name in arms}
    turns = list(arms.items())
    for i in range(repeats):
        first = (seed + i) % len(turns)
        for name, arm in turns[first:] + turns[:first]:
            start = time.perf_counter()
            tokens, stats = arm.run(ids, seed)
            seen[name].append((time.perf_counter() - start, tokens, stats))
    answers = {}
    for name, runs in seen.items():
        _, tokens, stats = runs[0]
        if any(run[1] != tokens for run in runs):
            raise RuntimeError(f"{name} gave other tokens when it was asked again")
        seconds = statistics.median(run[0] for run in runs)
        answers[name] = {"seconds": seconds, "tokens": tokens, "stats": stats}
    return answers


def compare(answers: dict[str, dict[str, Any]], reference: str) -> None:
    """Every answer says where it first leaves the reference's tokens; None where it does not."""
    expected = answers[reference]["tokens"]
    for answer in answers.values():
        answer["divergence"] = divergence(expected, answer["tokens"])


def prompt_record(name: str, index: int, ids: list[int], answers: dict) -> dict[str, Any]:
    """The line of one prompt: wall time, new tokens and accepted counts of every arm."""
    arms = {}
    for arm, answer in answers.items():
        stats = answer["stats"]
        arms[arm] = {
            "wall_time": round(answer["seconds"], 5),
            "new_tokens": len(answer["tokens"]),
            "tokens": answer["tokens"],
            "steps": stats.steps if stats else None,
            "accepted_histogram": stats.accepted_histogram if stats else None,
            "divergence": answer["divergence"],
        }
    return {"set": name, "index": index, "prompt_tokens": len(ids), "arms": arms}


def summarise(
    runs: list[dict[str, dict[str, Any]]], reference: str, temperature: float
) -> dict[str, dict[str, Any]]:
    """One record per arm over all prompts; ratios are against the reference on the same prompts.

    Args:
      runs: of every prompt, every arm's answer.
    """

    def pace(answer):
        return answer["seconds"] / len(answer["tokens"])

    records = {}
    expected = [run[reference] for run in runs]
    paces = [sum(a["seconds"] for a in expected), sum(len(a["tokens"]) for a in expected)]
    for name in runs[0]:
        mine = [run[name] for run in runs]
        seconds, tokens = (sum(a["seconds"] for a in mine), sum(len(a["tokens"]) for a in mine))
        ratios = [pace(r) / pace(a) for r, a in zip(expected, mine, strict=True)]
        stats = [a["stats"] for a in mine if a["stats"] is not None]
        records[name] = {
            "tokens": tokens,
            "seconds": round(seconds, 3),
            "ms_per_token": round(1e3 * seconds / tokens, 2),
            "speedup": round((paces[0] / paces[1]) / (seconds / tokens), 3),
            "speedup_quartiles": [
                round(q, 3) for q in statistics.quantiles(ratios, n=4, method="inclusive")
            ]
            if len(ratios) > 1
            else None,
            "prompts": len(mine),
            **rates(stats),
        }
        if temperature == 0:
            records[name]["identical"] = sum(a["divergence"] is None for a in mine)
    return records


def rates(stats: list[es.Stats]) -> dict[str, Any]:
    """Tokens per step and acceptance over all prompts; None for arms that do not count."""
    steps = sum(s.steps for s in stats)
    depths = (
        zip(*([(s.accepted_per_depth, s.tried_per_depth) for s in stats]), strict=True)
        if stats
        else ((), ())
    )
    accepted, tried = ([sum(column) for column in zip(*d, strict=True)] for d in depths)
    return {
        "tokens_per_step": round(sum(s.emitted for s in stats) / steps, 4) if steps else None,
        "base_passes_per_token": round(steps / sum(s.emitted for s in stats), 4) if steps else None,
        "acceptance_rate": round(sum(accepted) / sum(tried), 4) if sum(tried) else None,
        "acceptance_per_depth": [
            round(a / t, 4) if t else 0.0 for a, t in zip(accepted, tried, strict=True)
        ],
    }


def rates_by_set(names: list[str], runs: list[dict]) -> dict[str, dict[str, float | None]]:
    """Tokens per step of every arm on the prompts of each set (`names`: each prompt's)."""
    sets: dict[str, dict[str, list]] = {}
    for name, run in zip(names, runs, strict=True):
        for arm, answer in run.items():
            counted = sets.setdefault(name, {}).setdefault(arm, [])
            counted += [answer["stats"]] if answer["stats"] is not None else []
    return {
        name: {arm: rates(stats)["tokens_per_step"] for arm, stats in arms.items()}
        for name, arms in sets.items()
    }


def add_divergences(records, runs, prompts, arms, base, reference) -> None:
    """Each greedy record says where its first divergence is, and how near the two best tokens of
    the base were there.
    """
    for name, record in records.items():
        found = [(i, run[name]["divergence"]) for i, run in enumerate(runs)]
        i, at = next(((i, at) for i, at in found if at is not None), (None, None))
        record["first_divergence"] = None
        if i is not None:
            agreed = prompts[i] + runs[i][reference]["tokens"][:at]
            gap = top_gap(base, agreed)
            record["first_divergence"] = {"prompt": i, "token": at, "top_two_gap": round(gap, 6)}


def add_phases(records: dict[str, dict], arms: dict[str, Arm], args: argparse.Namespace) -> None:
    """Each of our records has the milliseconds of a step's phases and what compiling took."""
    sampling = es.Sampling(temperature=args.temperature)
    for name, arm in arms.items():
        records[name]["compile_seconds"] = round(arm.compile_seconds, 2)
        if arm.decoder is not None and args.phases:
            times = arm.decoder.profile(sampling=sampling, repeats=args.phases)
            records[name]["phase_ms"] = {k: round(1e3 * t, 3) for k, t in times.items()}


def peak_bytes() -> int:
    """Most memory held so far: of the first device where it says so, else of this process."""
    stats = jax.local_devices()[0].memory_stats() or {}
    own = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(stats.get("peak_bytes_in_use", own))


def format_table(records: dict[str, dict[str, Any]]) -> list[str]:
    """Lines for people."""
    lines = [
        f"{'arm':34}{'ms/token':>9}{'speed-up':>10}{'quartiles':>18}{'tok/step':>9}"
        f"{'accepted':>9}  identical"
    ]
    for name, r in records.items():
        quartiles = " ".join(f"{q:.2f}" for q in r["speedup_quartiles"] or [])
        step = f"{r['tokens_per_step']:.2f}" if r["tokens_per_step"] else "-"
        rate = f"{r['acceptance_rate']:.3f}" if r["acceptance_rate"] is not None else "-"
        same = f"{r['identical']}/{r['prompts']}" if "identical" in r else "-"
        gap = r.get("first_divergence")
        if gap:
            same += f", first at prompt {gap['prompt']}, token {gap['token']}: the two best "
            same += f"tokens are {gap['top_two_gap']:.2g} apart"
        lines.append(
            f"{name:34}{r['ms_per_token']:9.2f}{r['speedup']:9.2f}x{quartiles:>18}{step:>9}"
            f"{rate:>9}  {same}"
        )
    for name, r in records.items():
        if "phase_ms" in r:
            parts = ", ".join(f"{phase} {ms:.2f}" for phase, ms in r["phase_ms"].items())
            lines.append(f"ms of {name}: {parts}")
    return lines


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""

    def numbers(text):
        return [int(n) for n in text.split(",")]

    def layers(text):
        return tuple(numbers(text))

    def group_sizes(text):
        return [n if n == "tuned" else int(n) for n in text.split(",")]

    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--base", required=True, help="converted checkpoint")
    p.add_argument("--draft", help="converted checkpoint; the base's own for self-drafting")
    p.add_argument("--base-hf", help="the base as a Hugging Face folder, for transformers' arms")
    p.add_argument("--draft-hf", help="the draft likewise, for assisted generation")
    sets = f"repeatable: {', '.join(FILES)}; specbench:CATEGORY=PATH is one of its categories"
    p.add_argument("--set", action="append", default=[], metavar="NAME=PATH", help=sets)
    p.add_argument("--prompts", help="text file, one prompt a line (or a folder of such)")
    p.add_argument("--num-prompts", type=int, default=5, help="of each set")
    p.add_argument("--max-prompt-tokens", type=int, default=512, help="longer ones are skipped")
    p.add_argument("--chat", action="store_true", help="each prompt is a user's message")
    p.add_argument("--max-new-tokens", type=int, default=64)
    p.add_argument("--num-draft-tokens", type=int, default=5)
    sizes = 'numbers; "tuned" is what `easyspec tune` has found for the draft'
    p.add_argument("--group-size", type=group_sizes, default=[4], metavar="S[,S]", help=sizes)
    p.add_argument("--tree-width", type=numbers, default=[1], metavar="W[,W]")
    p.add_argument("--min-draft-probability", type=float, help="stop a draft model early")
    p.add_argument("--max-ngram", type=int, default=3, help="of the arm prompt-lookup")
    p.add_argument("--head", help="folder of an EAGLE-3 head, of the arms eagle and lookup-eagle")
    p.add_argument("--exits", type=layers, metavar="L,L,..", help="layers, of the arm early-exit")
    p.add_argument("--middle", help="converted checkpoint, of the arm polybasic")
    p.add_argument("--middle-bits", type=int, choices=(4, 8), help="or the base in so many bits")
    more = "of the arm polybasic, which drafts --num-draft-tokens for each pass of the middle"
    p.add_argument("--mu", type=int, default=8, help=more)
    p.add_argument("--temperature", type=float, default=0.0)
    p.add_argument("--seed", type=int, default=0)
    default = "autoregression,exact,uncalibrated,calibrated"
    arms = f"of {', '.join(ARMS)} (default {default})"
    p.add_argument("--arms", type=lambda s: s.split(","), default=default.split(","), help=arms)
    p.add_argument("--repeats", type=int, default=1, help="medians of so many answers")
    p.add_argument("--phases", type=int, default=5, help="steps timed per phase; 0: none")
    p.add_argument("--layer", type=int, default=1, help="devices for the layers of a group")
    p.add_argument("--tensor", type=int, help="devices for heads (default: all others)")
    p.add_argument("--dtype", help="of weights; default float32 on CPU, else bfloat16")
    p.add_argument(
        "--bandwidth", type=float, help="GB/s of a device; default: as sold, else measured"
    )
    p.add_argument("--out", type=pathlib.Path, help="JSONL file to append to")
    args = p.parse_args(argv)
    _check(p, args)
    return args


def _check(p: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    unknown = [arm for arm in args.arms if arm not in ARMS]
    if unknown or len(set(args.arms)) < len(args.arms):
        p.error(f"--arms takes each of {', '.join(ARMS)} at most once, got {','.join(args.arms)}")
    if not args.set and not args.prompts:
        p.error("--set or --prompts is needed")
    needing = [arm for arm in args.arms if arm in NEED_DRAFT]
    if not args.draft and needing:
        p.error(f"arms with a draft model need --draft, {needing[0]} too")
    if bool(set(args.arms) & {*HEADS}) != bool(args.head):
        p.error("the arms eagle and lookup-eagle, and no other, need --head")
    if ("polybasic" in args.arms) != bool(args.middle or args.middle_bits):
        p.error("the arm polybasic, and no other, needs --middle or --middle-bits")
    if args.middle and args.middle_bits:
        p.error("--middle and --middle-bits are two ways to say the same: give one")
    if set(args.arms) & {*PEERS} and not args.base_hf:
        p.error("the arms of transformers need --base-hf")
    if set(args.arms) & {*PEERS[1:]} and not args.draft_hf:
        p.error("assisted generation needs --draft-hf")
    if args.repeats < 1 or args.num_prompts < 1 or args.phases < 0:
        p.error("--repeats and --num-prompts must be at least 1, --phases at least 0")


def main(argv: list[str] | None = None) -> None:
    """Measure, print the card and a table, append the records."""
    args = parse(argv)
    if args.dtype == "float32":  # else GPUs compute its products in TF32
        jax.config.update("jax_default_matmul_precision", "float32")
    options = args.set + ([f"text={args.prompts}"] if args.prompts else [])
    found = read_prompts(
        Tokenizer(args.base), options, args.num_prompts, args.max_prompt_tokens, chat=args.chat
    )
    base = es.load_model(args.base, es.make_mesh(args.layer, args.tensor), dtype=args.dtype)
    check_peers(args, base)
    bandwidth = 1e9 * args.bandwidth if args.bandwidth else device_bandwidth()
    shown = card(args, base, bandwidth)
    header = {"machine": machine(), "commit": commit(), "card": shown}
    lines = header["machine"] | {"commit": header["commit"]} | shown
    print("\n".join(f"{name:26} {value}" for name, value in lines.items()), flush=True)
    header |= {"options": without_places(vars(args))}
    append(args.out, header)
    arms = own_arms(args, base) | peer_arms(args)
    reference = "autoregression" if "autoregression" in arms else next(iter(arms))
    prompts = [(name, i, ids) for name, rows in found.items() for i, ids in enumerate(rows)]
    warm_up(arms, [ids for _, _, ids in prompts], args.max_new_tokens)
    runs = []
    for number, (name, i, ids) in enumerate(tqdm(prompts, unit="prompt")):
        answers = answer_all(arms, ids, args.seed + number, args.repeats)
        compare(answers, reference)
        append(args.out, prompt_record(name, i, ids, answers))
        runs.append(answers)
    records = summarise(runs, reference, args.temperature)
    if args.temperature == 0:
        add_divergences(records, runs, [ids for _, _, ids in prompts], arms, base, reference)
    add_phases(records, arms, args)
    print("\n".join(format_table(records)))
    sets = rates_by_set([name for name, *_ in prompts], runs)
    for name, arms_of in sets.items() if len(sets) > 1 else ():
        rated = ", ".join(f"{arm} {n:.2f}" for arm, n in arms_of.items() if n is not None)
        print(f"tokens per step of {name}: {rated}")
    summary = {"reference": reference, "peak_bytes": peak_bytes(), "arms": records, "sets": sets}
    append(args.out, summary)
    print(json.dumps(header | summary))


if __name__ == "__main__":
    main()

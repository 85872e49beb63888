"""Own decoding beside transformers', same weights, same prompts, arms interleaved in one run.

    python experiments/compare.py --base CKPT --base-hf FOLDER --draft CKPT --draft-hf FOLDER \
        --prompts FILE --num-draft-tokens 3 --group-sizes 1,2,4 --out FILE

Every arm answers a prompt before any arm sees the next one, after a warm-up that compiles, so that
all meet the same machine. A speed-up is the ratio of total times for the same number of tokens.
With --uncalibrated each group size also runs without calibration; without --base-hf the
transformers arms are left out. The last line of stdout is one JSON document.
"""

from __future__ import annotations

import argparse
import itertools
import pathlib
import statistics
import time
from collections.abc import Callable

from records import append, machine, without_places
from tqdm import tqdm

import easyspec_jax as es

Arm = Callable[[list[int]], tuple[list[int], es.Stats | None]]


def own_arms(args: argparse.Namespace) -> dict[str, Arm]:
    """Autoregression, and one speculative arm per group size, calibration, tree width and rule of
    stopping early.
    """
    mesh = es.make_mesh(1, 1)
    base = es.load_model(args.base, mesh)
    decoders = {"autoregression": es.Decoder(base)}
    for size in args.group_sizes:
        draft = es.load_model(args.draft, mesh, group_size=size, layout="layer")
        ways = itertools.product(
            (True, False) if args.uncalibrated else (True,),
            args.tree_widths,
            [None] if args.min_draft_probability is None else [None, args.min_draft_probability],
        )
        for calibrate, width, least in ways:
            name = f"group_size {size}" + ("" if calibrate else ", not calibrated")
            name += f", tree_width {width}" if width > 1 else ""
            name += f", stops below {least}" if least is not None else ""
            decoders[name] = es.Decoder(
                base,
                es.LayerParallelDrafter(draft, calibrate=calibrate),
                num_draft_tokens=args.num_draft_tokens,
                tree_width=width,
                min_draft_probability=least,
            )

    def arm(decoder):
        def run(ids):
            out = decoder.generate([ids], max_new_tokens=args.max_new_tokens)
            return out.tokens[0], out.stats

        return run

    return {name: arm(decoder) for name, decoder in decoders.items()}


def transformers_arms(args: argparse.Namespace) -> dict[str, Arm]:
    """`generate` of transformers in float32, alone and assisted by the draft."""
    import torch
    from transformers import AutoModelForCausalLM

    def load(folder):
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    base = load(args.base_hf)
    arms = {"transformers": {}}
    if args.draft_hf:
        draft = load(args.draft_hf)
        arms["transformers assisted"] = {"assistant_model": draft}
        arms[f"transformers assisted, {args.num_draft_tokens} constant"] = {
            "assistant_model": draft,
            "num_assistant_tokens": args.num_draft_tokens,
            "num_assistant_tokens_schedule": "constant",
            "assistant_confidence_threshold": 0.0,
        }

    def arm(options):
        def run(ids):
            x = torch.tensor([ids])
            n = args.max_new_tokens
            with torch.inference_mode():
                out = base.generate(
                    x, attention_mask=torch.ones_like(x), do_sample=False, max_new_tokens=n,
                    min_new_tokens=n, pad_token_id=0, temperature=None, top_p=None, top_k=None,
                    **options,
                )  # fmt: skip
            return out[0, len(ids) :].tolist(), None

        return run

    return {name: arm(options) for name, options in arms.items()}


def read_prompts(args: argparse.Namespace) -> list[list[int]]:
    """Token ids of each line of the prompt file; with --chat as a user's message."""
    from easyspec_jax.text import Tokenizer

    tokenizer = Tokenizer(args.base)
    lines = [line for line in args.prompts.read_text().splitlines() if line.strip()]
    if args.chat:
        return [
            tokenizer.encode(
                tokenizer.render([{"role": "user", "content": line}]), add_special_tokens=False
            )
            for line in lines
        ]
    return [tokenizer.encode(line) for line in lines]


def measure(arms: dict[str, Arm], prompts: list[list[int]], repeats: int) -> dict[str, list]:
    """Per arm: (seconds, tokens, stats) of the fastest of `repeats` runs of every prompt."""
    for arm in arms.values():
        for ids in (min(prompts, key=len), max(prompts, key=len)):
            arm(ids)
    runs = {name: [] for name in arms}
    for ids in tqdm(prompts, unit="prompt"):
        fastest = {}
        for _ in range(repeats):
            for name, arm in arms.items():
                start = time.perf_counter()
                tokens, stats = arm(ids)
                seconds = time.perf_counter() - start
                if name not in fastest or seconds < fastest[name][0]:
                    fastest[name] = (seconds, tokens, stats)
        for name, run in fastest.items():
            runs[name].append(run)
    return runs


def summarise(runs: dict[str, list]) -> dict[str, dict]:
    """One record per arm; ratios are against own autoregression on the same prompts."""
    reference = runs["autoregression"]
    records = {}
    for name, arm in runs.items():
        seconds = sum(run[0] for run in arm)
        tokens = sum(len(run[1]) for run in arm)
        ratios = [
            (r[0] / len(r[1])) / (a[0] / len(a[1])) for r, a in zip(reference, arm, strict=True)
        ]
        stats = [run[2] for run in arm if run[2] is not None]
        steps = sum(s.steps for s in stats)
        records[name] = {
            "tokens": tokens,
            "seconds": round(seconds, 3),
            "ms_per_token": round(1e3 * seconds / tokens, 2),
            "speedup": round(sum(r[0] for r in reference) / seconds, 3),
            "speedup_quartiles": [round(q, 3) for q in statistics.quantiles(ratios, n=4)],
            "identical": sum(a[1] == r[1] for r, a in zip(reference, arm, strict=True)),
            "prompts": len(arm),
            "tokens_per_step": round(sum(s.emitted for s in stats) / steps, 3) if steps else None,
        }
    return records


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--base", required=True, help="converted checkpoint")
    p.add_argument(
        "--draft", required=True, help="converted checkpoint; the base's own for self-drafting"
    )
    p.add_argument("--base-hf", help="the base as a Hugging Face folder, for the transformers arms")
    p.add_argument("--draft-hf", help="the draft likewise, for assisted generation")
    p.add_argument(
        "--prompts", type=pathlib.Path, required=True, help="text file, one prompt a line"
    )
    p.add_argument("--chat", action="store_true", help="each prompt is a user's message")
    p.add_argument("--num-draft-tokens", type=int, default=5)
    p.add_argument(
        "--group-sizes", type=lambda s: [int(n) for n in s.split(",")], default=[1, 2, 4]
    )
    p.add_argument("--tree-widths", type=lambda s: [int(n) for n in s.split(",")], default=[1])
    p.add_argument(
        "--min-draft-probability", type=float, help="run each arm with this early stop too"
    )
    p.add_argument(
        "--uncalibrated", action="store_true", help="run each group size without calibration too"
    )
    p.add_argument("--max-new-tokens", type=int, default=64)
    p.add_argument("--repeats", type=int, default=1)
    p.add_argument("--out", type=pathlib.Path, help="JSONL file to append the document to")
    return p.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Measure, print a table, append the record."""
    args = parse(argv)
    arms = own_arms(args) | (transformers_arms(args) if args.base_hf else {})
    prompts = read_prompts(args)
    records = summarise(measure(arms, prompts, args.repeats))
    print(f"{'arm':48} {'ms/token':>9} {'speed-up':>9} {'quartiles':>22} {'tok/step':>9} identical")
    for name, r in records.items():
        quartiles = " ".join(f"{q:.2f}" for q in r["speedup_quartiles"])
        per_step = f"{r['tokens_per_step']:.2f}" if r["tokens_per_step"] else "-"
        print(
            f"{name:48} {r['ms_per_token']:9.2f} {r['speedup']:8.2f}x {quartiles:>22} "
            f"{per_step:>9} {r['identical']}/{r['prompts']}"
        )
    options = without_places(vars(args))
    print(append(args.out, {"machine": machine(), "options": options, "arms": records}))


if __name__ == "__main__":
    main()

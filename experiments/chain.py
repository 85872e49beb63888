"""A chain of three models: acceptance and passes of each, and whether theory foresees its speed.

    python experiments/chain.py --base CKPT --draft CKPT --prompts experiments/prompts/stories.txt \
        --num-prompts 3 --max-new-tokens 48 --mu 4 --num-draft-tokens 7 --out FILE

The middle is the base's own copy in 4 bits, unless --middle names another. Measured first are the
pairs that the theory (arXiv 2510.26527) speaks of: base over draft, middle over draft and base over
middle; seconds of a pass are `Decoder.profile`'s. From these the lemma predicts seconds per token
with and without the middle, and its two conditions; then both are generated and timed. --no-times
leaves out all timing. The last line of stdout is one JSON document.
"""

from __future__ import annotations

import argparse
import pathlib
import statistics
import time
from typing import Any

from lemma import chain_seconds, saves_above, saves_drafting
from prompt_sets import read_prompts
from records import append, commit, machine, without_places

import easyspec_jax as es
from easyspec_jax.text import Tokenizer, read_generation_config, stop_ids

Record = dict[str, Any]


def make_decoders(args: argparse.Namespace) -> dict[str, es.Decoder]:
    """Every arm, by name."""
    mesh = es.make_mesh(1, 1)
    base = es.load_model(args.base, mesh)
    if args.middle is None:
        middle = es.quantize_model(base, f"int{args.bits}")
    else:
        middle = es.load_model(args.middle, mesh)
    draft = es.LayerParallelDrafter(es.load_model(args.draft, mesh, group_size=args.group_size))
    inner, gamma = args.num_draft_tokens - args.mu, args.num_draft_tokens
    over_middle = es.LayerParallelDrafter(middle)
    between = (args.mu + gamma) // 2  # a buffer holds from mu to gamma tokens
    chain = es.PolybasicDrafter(middle, draft, mu=args.mu)
    return {
        "autoregression": es.Decoder(base),
        "base over draft": es.Decoder(base, draft, num_draft_tokens=inner),
        "middle over draft": es.Decoder(middle, draft, num_draft_tokens=inner),
        "base over middle": es.Decoder(base, over_middle, num_draft_tokens=between),
        "chain": es.Decoder(base, chain, num_draft_tokens=gamma),
    }


def decode(decoder: es.Decoder, prompts: list[list[int]], options: Record) -> Record:
    """Tokens, counts and seconds of all prompts, one by one."""
    start = time.perf_counter()
    outs = [decoder.generate([prompt], **options) for prompt in prompts]
    seconds = time.perf_counter() - start
    emitted, steps = (sum(getattr(out.stats, n) for out in outs) for n in ("emitted", "steps"))
    reports = [out.drafter_report for out in outs]
    counted = ("middle_passes", "buffered_tokens", "inner_drafts", "inner_draft_tokens",
               "middle_catch_up_passes", "inner_catch_up_passes")  # fmt: skip
    return {
        "tokens": [out.tokens[0] for out in outs],
        "emitted": emitted,
        "steps": steps,
        "tokens_per_step": emitted / steps,
        "seconds": seconds,
        **{name: sum(r[name] for r in reports) for name in counted if name in reports[0]},
    }


def passes(chain: Record) -> dict[str, float]:
    """Passes of each model per token of the chain's text, and acceptance lengths of both stages."""
    emitted, drafted = chain["emitted"], chain["inner_draft_tokens"]
    return {
        "base": chain["steps"] / emitted,
        "middle": chain["middle_passes"] / emitted,
        "draft": (drafted + chain["inner_catch_up_passes"]) / emitted,
        "tokens_per_base_pass": chain["tokens_per_step"],
        "tokens_per_middle_pass": chain["buffered_tokens"] / chain["inner_drafts"],
        "buffer_accepted": (emitted - chain["steps"]) / chain["buffered_tokens"],
    }


def pass_seconds(decoder: es.Decoder, args: argparse.Namespace) -> tuple[float, float]:
    """Median seconds of a pass of the verifying model, and of one of its drafter."""
    options = {"prompt_len": 32, "max_new_tokens": args.max_new_tokens, "repeats": args.repeats}
    times = [decoder.profile(**options) for _ in range(args.rounds)]
    verifying = statistics.median(t["verify"] + t["commit"] for t in times)
    drafting = statistics.median(t["calibrate"] + t["draft"] for t in times)
    return verifying, drafting / decoder.num_draft_tokens


def predict(arms: Record, decoders: dict[str, es.Decoder], args: argparse.Namespace) -> Record:
    """Times and lengths of the chain's models, and what the lemma makes of them."""
    base, draft = pass_seconds(decoders["base over draft"], args)
    middle, _ = pass_seconds(decoders["middle over draft"], args)
    of_base, of_middle, over_middle = (
        arms[name]["tokens_per_step"]
        for name in ("base over draft", "middle over draft", "base over middle")
    )
    beta, used = args.num_draft_tokens - args.mu, arms["chain"]["passes"]
    seconds = {"base": base, "middle": middle, "draft": draft}
    without = chain_seconds((base, draft), (of_base,), beta)
    with_middle = chain_seconds((base, middle, draft), (over_middle, of_middle), beta)
    return {
        "seconds": seconds,
        "accepted": {"base": of_base, "middle": of_middle, "base over middle": over_middle},
        "draft_passes": beta,
        "predicted": {
            "without": without,
            "with": with_middle,
            "pays": with_middle < without,
        },
        "conditions": {
            "above": saves_above(middle, base, (of_middle, of_base, over_middle)),
            "drafter": saves_drafting(middle, draft, (of_middle, of_base), beta),
        },
        "by_passes": sum(used[name] * seconds[name] for name in seconds),
    }


def compare(decoders: dict[str, es.Decoder], prompts: list, options: Record, rounds: int) -> Record:
    """Median seconds per token over rounds in which the arms alternate."""
    names, seen = ("autoregression", "base over draft", "chain"), {}
    for _ in range(rounds):
        for name in names:
            arm = decode(decoders[name], prompts, options)
            seen.setdefault(name, []).append(arm["seconds"] / arm["emitted"])
    return {name: statistics.median(values) for name, values in seen.items()}


def describe(arms: Record, timing: Record | None) -> str:
    """The outcome, line by line."""
    lines = [
        f"{name:<18} {arm['tokens_per_step']:5.2f} tokens a step"
        + (
            f", {arm['identical']} of {arm['prompts']} texts identical"
            if arm["identical"] is not None
            else ""
        )
        for name, arm in arms.items()
    ]
    used = arms["chain"]["passes"]
    lines.append(
        "chain, passes a token: " + ", ".join(f"{name} {n:.3f}" for name, n in used.items())
    )
    if timing is not None:
        predicted, measured = timing["predicted"], timing["measured"]
        with_middle, without = measured["chain"], measured["base over draft"]
        lines += [
            f"predicted {1e3 * predicted['without']:.1f} ms a token without the middle, "
            f"{1e3 * predicted['with']:.1f} with it "
            f"({1e3 * timing['by_passes']:.1f} by its passes)",
            f"measured  {1e3 * without:.1f} and {1e3 * with_middle:.1f} "
            f"({1e3 * measured['autoregression']:.1f} by autoregression)",
            f"conditions {timing['conditions']}, pays by prediction: {predicted['pays']}, "
            f"by measurement: {with_middle < without}",
        ]
    return "\n".join(lines)


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--base", required=True, help="converted checkpoint")
    p.add_argument("--draft", required=True, help="converted checkpoint")
    p.add_argument("--middle", help="converted checkpoint (default: the base in --bits)")
    p.add_argument("--bits", type=int, default=4, choices=(4, 8))
    p.add_argument("--group-size", type=int, default=1, help="draft layers that run at once")
    p.add_argument("--prompts", type=pathlib.Path, required=True, help="one a line")
    p.add_argument("--num-prompts", type=int, default=3)
    p.add_argument("--max-new-tokens", type=int, default=48)
    p.add_argument("--mu", type=int, default=4, help="tokens that make the base verify")
    p.add_argument("--num-draft-tokens", type=int, default=7, help="capacity of the buffer")
    p.add_argument("--repeats", type=int, default=10, help="steps in one compiled loop")
    p.add_argument("--rounds", type=int, default=3)
    p.add_argument("--no-times", action="store_true", help="acceptance and passes only")
    p.add_argument("--out", type=pathlib.Path, help="JSONL file to append the document to")
    return p.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Decode every arm, predict, measure, print, append the record."""
    args = parse(argv)
    decoders = make_decoders(args)
    prompts = read_prompts(
        Tokenizer(args.base), [f"text={args.prompts}"], args.num_prompts, 512, chat=False
    )
    prompts = [prompt for found in prompts.values() for prompt in found]
    base = decoders["autoregression"].base
    eos_ids = stop_ids(read_generation_config(args.base), base.config)
    options = {"max_new_tokens": args.max_new_tokens, "eos_ids": eos_ids}
    arms = {name: decode(decoder, prompts, options) for name, decoder in decoders.items()}
    want = arms["autoregression"].pop("tokens")
    for name, arm in arms.items():
        tokens = arm.pop("tokens", want)
        arm.pop("seconds")  # with compilation
        reference = name != "middle over draft"  # that writes the middle's text
        same = sum(a == b for a, b in zip(tokens, want, strict=True)) if reference else None
        arm |= {"prompts": len(prompts), "identical": same}
    arms["chain"]["passes"] = passes(arms["chain"])
    timing = None
    if not args.no_times:
        timing = predict(arms, decoders, args)
        timing["measured"] = compare(decoders, prompts, options, args.rounds)
    print(describe(arms, timing))
    head = {"machine": machine(), "commit": commit(), "options": without_places(vars(args))}
    print(append(args.out, head | {"arms": arms, "timing": timing}))


if __name__ == "__main__":
    main()

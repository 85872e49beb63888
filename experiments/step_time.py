"""Milliseconds of a step and of its phases against tree width: what a wider tree costs.

    python experiments/step_time.py --base CKPT --draft CKPT --num-draft-tokens 5 --group-size 4 \
        --tree-widths 1,2,4,8 --out FILE

Phases are timed by `Decoder.profile`, each in a compiled loop of its own; rounds of all widths
alternate, so that all meet the same machine, and the median over rounds counts. A wider tree pays
where its tokens per step (`acceptance.py`) grow by more than its step time. The last line of stdout
is one JSON document.
"""

from __future__ import annotations

import argparse
import pathlib
import statistics

from records import append, machine, without_places
from tqdm import tqdm

import easyspec_jax as es

PHASES = ("calibrate", "draft", "verify", "commit", "step")


def measure(args: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Median seconds of every phase: {"autoregression": .., "width 1": .., ...}."""
    mesh = es.make_mesh(1, 1)
    base = es.load_model(args.base, mesh)
    draft = es.load_model(args.draft, mesh, group_size=args.group_size, layout="layer")
    drafter = es.LayerParallelDrafter(draft, candidates=args.candidates)
    decoders = {"autoregression": es.Decoder(base)}
    for width in args.tree_widths:
        decoders[f"width {width}"] = es.Decoder(
            base, drafter, num_draft_tokens=args.num_draft_tokens, tree_width=width
        )
    sampling = es.Sampling(temperature=args.temperature)
    seen: dict[str, list[dict[str, float]]] = {name: [] for name in decoders}
    turns = [name for _ in range(args.rounds) for name in decoders]
    for name in tqdm(turns, unit="profile"):
        seen[name].append(decoders[name].profile(sampling=sampling, repeats=args.repeats))
    return {
        name: {phase: statistics.median(t[phase] for t in times) for phase in PHASES}
        for name, times in seen.items()
    }


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--base", required=True, help="converted checkpoint")
    p.add_argument("--draft", required=True, help="converted checkpoint")
    p.add_argument("--num-draft-tokens", type=int, default=5)
    p.add_argument("--group-size", type=int, default=4)
    p.add_argument(
        "--tree-widths", type=lambda s: [int(n) for n in s.split(",")], default=[1, 2, 4, 8]
    )
    p.add_argument("--temperature", type=float, default=0.0)
    p.add_argument("--candidates", choices=("sampled", "best"), default="sampled")
    p.add_argument("--repeats", type=int, default=10, help="steps in one compiled loop")
    p.add_argument("--rounds", type=int, default=5)
    p.add_argument("--out", type=pathlib.Path, help="JSONL file to append the document to")
    return p.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Measure, print a table, append the record."""
    args = parse(argv)
    arms = measure(args)
    first = arms[f"width {args.tree_widths[0]}"]["step"]
    print("".join(f"{title:>16}" for title in ("ms", *PHASES, "of the first")))
    for name, times in arms.items():
        cells = [f"{1e3 * times[phase]:.1f}" for phase in PHASES]
        print("".join(f"{cell:>16}" for cell in (name, *cells, f"{times['step'] / first:.2f}")))
    options = without_places(vars(args))
    print(append(args.out, {"machine": machine(), "options": options, "seconds": arms}))


if __name__ == "__main__":
    main()

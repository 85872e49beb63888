"""What a draft's layout costs in memory and in collectives, from configurations alone.

    python experiments/layouts.py --base configs/llama3-70b.json --draft configs/llama3-8b.json \
        --layer 4 --tensor 2 --group-size 4 --out FILE

The step of every layout is compiled at full size for as many CPU devices, from shapes: nothing is
allocated, so any pair can be looked at anywhere. Bytes are those of float32, as CPU programs send
them; weights and caches are counted in bfloat16. Nothing is timed. The last line of stdout is one
JSON document.
"""

from __future__ import annotations

import argparse
import pathlib
from typing import Any

import jax
from records import append, machine, without_places
from tqdm import tqdm

import easyspec_jax as es
from easyspec_jax.cli.info import read_config
from easyspec_jax.planner.program import collectives

PHASES = ("calibrate", "draft", "verify")


def layouts(group_size: int) -> dict[str, tuple[Any, int]]:
    """Arms: name -> layout and group size of the draft."""
    layer = {"heads": ("tensor",), "group": "layer"}
    return {
        "tensor parallel": ("tensor", 1),
        "one device": ("replicated", 1),
        "groups, by turns": (es.LayoutRules(**layer), group_size),
        "groups, second copy": (es.LayoutRules(**layer, exact="copy"), group_size),
        "groups, MLPs over tensor": (es.LayoutRules(**layer, mlp=("tensor",)), group_size),
        "groups, MLPs whole": (es.LayoutRules(**layer, mlp=()), group_size),
    }


def look(args: argparse.Namespace, layout: Any, group_size: int) -> dict[str, Any]:
    """Memory and collectives of one layout."""
    mesh = es.make_mesh(args.layer, args.tensor)
    big, small = (read_config(path)[0] for path in (args.base, args.draft))

    def decoder(dtype):
        base = es.abstract_model(big, mesh, dtype=dtype)
        draft = es.abstract_model(small, mesh, group_size=group_size, dtype=dtype, layout=layout)
        options = {"num_draft_tokens": args.num_draft_tokens, "tree_width": args.tree_width}
        return es.Decoder(base, es.LayerParallelDrafter(draft), **options)

    found = collectives(decoder("float32"))
    return {
        "bytes_per_device": decoder("bfloat16").memory(1, 1, max_new_tokens=args.max_len - 1),
        "collectives": {p: sum(one.phase == p for one in found) for p in PHASES},
        "collective_bytes": {p: sum(one.bytes for one in found if one.phase == p) for p in PHASES},
        "kinds": sorted({one.kind for one in found}),
    }


def table(arms: dict[str, dict[str, Any]], num_draft_tokens: int) -> str:
    """A Markdown table of all arms."""
    lines = [
        "| draft | its weights, GiB | its cache | calibrate | each level | verify | a step |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, arm in arms.items():
        held, number = arm["bytes_per_device"], arm["collectives"]
        gib = [f"{held[part] / 2**30:.2f}" for part in ("draft weights", "draft cache")]
        step = number["calibrate"] + (num_draft_tokens - 1) * number["draft"] + number["verify"]
        cells = [name, *gib, *(str(number[phase]) for phase in PHASES), str(step)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--base", required=True, help="config.json or checkpoint")
    p.add_argument("--draft", required=True, help="config.json or checkpoint")
    p.add_argument("--layer", type=int, default=4)
    p.add_argument("--tensor", type=int, default=2)
    p.add_argument("--group-size", type=int, default=4)
    p.add_argument("--num-draft-tokens", type=int, default=5)
    p.add_argument("--tree-width", type=int, default=1)
    p.add_argument("--max-len", type=int, default=4096, help="tokens that the caches hold")
    p.add_argument("--out", type=pathlib.Path, help="JSONL file to append the document to")
    return p.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Compile every layout, print a table, append the record."""
    args = parse(argv)
    arms = {
        name: look(args, layout, size)
        for name, (layout, size) in tqdm(layouts(args.group_size).items(), unit="layout")
    }
    print(table(arms, args.num_draft_tokens))
    options = without_places(vars(args))
    print(append(args.out, {"machine": machine(), "options": options, "arms": arms}))


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", parse().layer * parse().tensor)
    main()

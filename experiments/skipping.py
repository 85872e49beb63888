"""Would it pay to draft with fewer of the base's own layers? At best, from what those agree with.

    python experiments/skipping.py --base CKPT --set text=FILE --chat --out FILE
    python experiments/skipping.py --table FILE

As CLaSp (arXiv 2505.24196) and SWIFT (arXiv 2410.06916) do, layers are left out that the text needs
least, chosen anew for every prompt: one after another the layer without which the last hidden
states of the prompt stay closest, by cosine, to the whole model's. Then every token of the base's
own greedy answer is drafted so, over the exact entries of all tokens before it. What that can bring
is bounded: a draft of L - n layers costs (L - n) / L of a pass, its head nothing, and a
verification of any length one pass; the best number of draft tokens up to 8 is taken, as if each
agreed as often as the first.
"""

from __future__ import annotations

import argparse
import functools
import json
import pathlib
import statistics
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import prompt_sets
from acceptance import open_results, read_results
from inspect_layers import cosine, exact_pass
from records import append, commit, machine, without_places
from tqdm import tqdm

import easyspec_jax as es
from easyspec_jax.cache import KVCache
from easyspec_jax.model import Model, Placement, forward, logits, run_layer
from easyspec_jax.text import Tokenizer
from easyspec_jax.tuner.stale_passes import Text

DEEPEST = 8
Record = dict[str, Any]


@jax.jit
def _skipped(model: Model, tokens, cache: KVCache, kept):
    """Hidden states and likeliest tokens with the layers of bool[L] alone; each position sees the
    exact entries of those before it, and its own.
    """
    t = tokens.shape[1]
    seen = jnp.concatenate((jnp.tri(t, k=-1, dtype=bool), jnp.eye(t, dtype=bool)), axis=1)
    placement = Placement(
        origin=jnp.zeros((1,), jnp.int32),
        positions=jnp.arange(t, dtype=jnp.int32)[None],
        ancestors=seen[None],
    )
    numbers = iter(range(model.config.num_layers))

    def run(model, block, x, kv, step):
        new, kv = run_layer(model, block, x, kv, step)
        return jnp.where(kept[next(numbers)], new, x), kv

    hidden, _ = forward(model, tokens, cache, placement=placement, run_block=run)
    return hidden[0], jnp.argmax(logits(model, hidden)[0], axis=-1)


def order_of_need(run, num_layers: int, exact: np.ndarray, most: int) -> list[int]:
    """The layers to leave out, first those whose absence changes least.

    Args:
      run: bool[L] of layers to hidden states of the prompt, [T, D].
      exact: those of the whole model.
      most: so many.
    """
    left: list[int] = []
    for _ in range(most):
        near = {}
        for layer in set(range(num_layers)) - {*left}:
            kept = np.ones(num_layers, bool)
            kept[[*left, layer]] = False
            near[layer] = cosine(run(kept), exact).mean()
        left.append(max(near, key=lambda layer: near[layer]))
    return left


def bound(agreement: float, share: float) -> float:
    """Times autoregression's speed, at best: `share` of the layers agree with the base so often."""
    tokens = np.cumsum(agreement ** np.arange(DEEPEST + 1))
    return float(max(n / (1 + depth * share) for depth, n in enumerate(tokens) if depth))


def measure(base: es.Model, prompt: list[int], args: argparse.Namespace) -> Record:
    """A line: layers in the order in which they are left out, and what the others agree with."""
    new = es.Decoder(base).generate([prompt], max_new_tokens=args.max_new_tokens).tokens[0]
    length = len(prompt) + len(new)
    tokens = np.zeros((1, -(-length // 64) * 64), np.int32)
    tokens[0, :length] = prompt + new
    cache = exact_pass(base, Text(tokens, len(prompt), length)).cache
    cache = cache.replace(length=jnp.full((1,), tokens.shape[1], jnp.int32))
    run = functools.partial(_skipped, base, tokens, cache)
    count = base.config.num_layers
    whole, best = run(np.ones(count, bool))
    answer = slice(len(prompt) - 1, length - 1)
    assert (np.asarray(best)[answer] == new).all()

    def of_prompt(kept):
        return np.asarray(run(kept)[0][: len(prompt)], np.float64)

    exact = np.asarray(whole[: len(prompt)], np.float64)
    left = order_of_need(of_prompt, count, exact, int(args.most * count))
    found = []
    for n in range(1, len(left) + 1):
        kept = np.ones(count, bool)
        kept[left[:n]] = False
        agreement = float((np.asarray(run(kept)[1])[answer] == new).mean())
        found.append([round(agreement, 4), round(bound(agreement, 1 - n / count), 4)])
    return {"new_tokens": len(new), "left_out": left, "agreement_and_bound": found}


def table(header: Record, lines: list[Record]) -> str:
    """A row for each number of layers that were left out: means over prompts."""
    rows = ["| left out | agree | at best |", "| --- | --- | --- |"]
    for n, pairs in enumerate(zip(*(x["agreement_and_bound"] for x in lines), strict=True), 1):
        agreement, speed = (statistics.mean(column) for column in zip(*pairs, strict=True))
        rows.append(f"| {n} | {agreement:.3f} | {speed:.3f} |")
    about = f"{header['options']['base']}, {len(lines)} prompts"
    return "\n".join([about, "", *rows])


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--base", help="converted checkpoint")
    p.add_argument("--set", action="append", default=[], metavar="NAME=PATH")
    p.add_argument("--chat", action="store_true", help="each prompt is a user's message")
    p.add_argument("--num-prompts", type=int, default=4, help="of each set")
    p.add_argument("--max-prompt-tokens", type=int, default=100, help="longer ones are skipped")
    p.add_argument("--max-new-tokens", type=int, default=64)
    p.add_argument("--most", type=float, default=0.5, help="share of layers that are left out")
    p.add_argument("--out", type=pathlib.Path)
    p.add_argument("--table", type=pathlib.Path, help="only print this file")
    args = p.parse_args(argv)
    if not args.table and not all((args.base, args.set, args.out)):
        p.error("--base, --set and --out are needed, or --table")
    return args


def main(argv: list[str] | None = None) -> None:
    """Measure what is missing in the file and print it all; or print a file."""
    args = parse(argv)
    if args.table:
        print(table(*read_results(args.table)))
        return
    sets = prompt_sets.read_prompts(
        Tokenizer(args.base), args.set, args.num_prompts, args.max_prompt_tokens, chat=args.chat
    )
    options = without_places({k: v for k, v in vars(args).items() if k != "table"})
    header = {"machine": machine(), "commit": commit(), "options": options, "prompt_tokens": {}}
    header, lines = open_results(args.out, header)
    prompts = [(name, i) for name, found in sets.items() for i in range(len(found))]
    base = es.load_model(args.base, es.make_mesh(1, 1))
    for name, i in tqdm(prompts[len(lines) :], unit="prompt"):
        line = {"set": name, "prompt": i} | measure(base, sets[name][i], args)
        append(args.out, line)
        lines.append(line)
    print(table(header, lines))
    print(json.dumps(header | {"lines": lines}))


if __name__ == "__main__":
    main()

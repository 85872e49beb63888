"""What do a draw and a greedy choice of a vocabulary take, by one pass over it and by two?

    python experiments/draws.py --vocab 49152 --rounds 200 --out FILE

One pass keeps the index beside the largest number, two find the largest and then its first place;
`sampling.largest` takes two on CPUs. All take turns in one process. The last line of stdout is one
JSON document.
"""

from __future__ import annotations

import argparse
import pathlib
import statistics
import time

import jax
import jax.numpy as jnp
from records import append, commit, machine, without_places

from easyspec_jax import sampling

PASSES = {"one": sampling._largest_in_one, "two": sampling._largest_in_two}


def measure(vocab: int, rounds: int) -> list[dict]:
    """A record for each of a draw and a choice, by one and by two passes, which all agree."""
    key = jax.random.key(1)
    log_p = jax.nn.log_softmax(3 * jax.random.normal(key, (1, vocab), jnp.float32))
    arms = {}
    for name, find in PASSES.items():
        arms["draw", name] = jax.jit(lambda x, f=find: f(sampling.perturbed(jax.random.key(2), x)))
        arms["choice", name] = jax.jit(lambda x, f=find: f(x))
    tokens = {arm: int(run(log_p)[1][0, 0]) for arm, run in arms.items()}
    for what in ("draw", "choice"):
        if tokens[what, "one"] != tokens[what, "two"]:
            raise ValueError(f"one pass and two find another {what}: {tokens}")
    ms: dict = {arm: [] for arm in arms}
    for _ in range(rounds):
        for arm, run in arms.items():
            start = time.perf_counter()
            jax.block_until_ready(run(log_p))
            ms[arm].append(1e3 * (time.perf_counter() - start))
    return [
        {"what": what, "passes": name, "minimum_ms": min(x), "median_ms": statistics.median(x)}
        for (what, name), x in ms.items()
    ]


def main(argv: list[str] | None = None) -> None:
    """Measure, print a table, append the record."""
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--vocab", type=int, default=49152)
    p.add_argument("--rounds", type=int, default=200)
    p.add_argument("--out", type=pathlib.Path, help="JSONL file to append the document to")
    args = p.parse_args(argv)
    if min(args.vocab, args.rounds) < 1:
        p.error("--vocab and --rounds must be at least 1")
    found = measure(args.vocab, args.rounds)
    print("| | passes | minimum, ms | median, ms |\n| --- | --- | --- | --- |")
    for x in found:
        print("| {what} | {passes} | {minimum_ms:.2f} | {median_ms:.2f} |".format(**x))
    record = {"machine": machine(), "commit": commit(), "options": without_places(vars(args))}
    print(append(args.out, record | {"times": found}))


if __name__ == "__main__":
    main()

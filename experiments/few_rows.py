"""What do a few rows cost against one? A pass of a model alone, by rows and by how it is compiled.

    python experiments/few_rows.py --base CKPT --rounds 20 --out FILE

A pass runs T tokens of a text whose cache they fill, and takes the likeliest token behind each. It
is compiled by default and, where `CompileOptions` asks for more at so many rows, with that as well;
of a checkpoint whose matrices this CPU keeps in bfloat16, that too. All take turns in one process,
so that they meet the same machine. Ratios are of minima, to one row by default of the same
matrices. The last line of stdout is one JSON document.
"""

from __future__ import annotations

import argparse
import pathlib
import statistics
import time

import jax
import numpy as np
from records import append, commit, machine, without_places

import easyspec_jax as es
from easyspec_jax.model import forward, score
from easyspec_jax.sharding import mesh_jit, replicate, zeros


@mesh_jit(out=(None, "cache"), donate="cache")
def one_pass(base, tokens, cache):
    """The likeliest token behind each, and the cache as long as it was."""
    hidden, after = forward(base, tokens, cache)
    return score(base, hidden).argmax(), after.replace(length=cache.length)


class Arm:
    """So many rows, compiled with such options, and the cache that its passes pass on."""

    def __init__(self, base: es.Model, rows: int, max_len: int, options: tuple):
        cache = zeros(base.abstract_cache(1, max_len))
        self.cache = cache.replace(length=cache.length + np.int32(max_len - rows))
        self.tokens = replicate(np.full((1, rows), 7, np.int32), base.layout.mesh)
        self.base, self.run, self.ms = base, one_pass.using(options), []

    def time(self) -> None:
        """Time a pass."""
        start = time.perf_counter()
        _, self.cache = jax.block_until_ready(self.run(self.base, self.tokens, self.cache))
        self.ms.append(1e3 * (time.perf_counter() - start))


def measure(args: argparse.Namespace) -> list[dict]:
    """A record for each number of rows and way to compile; one row by default is the first."""
    mesh, arms = es.make_mesh(1, 1), {}
    kept = es.load_model(args.base, mesh)
    base = es.load_model(args.base, mesh, dtype="float32") if kept.layout.bf16_matrices else kept
    for rows in args.rows:
        asked = es.CompileOptions().on(mesh, rows)
        for options in dict.fromkeys(((), asked)):
            name = "asked" if options else "default"
            arms["float32", rows, name] = Arm(base, rows, args.max_len, options)
        if kept.layout.bf16_matrices:
            arms["bfloat16", rows, "default"] = Arm(kept, rows, args.max_len, ())
    for _ in range(2 + args.rounds):  # two compile and warm
        for arm in arms.values():
            arm.time()
    least = {key: min(arm.ms[2:]) for key, arm in arms.items()}
    return [
        {"matrices": matrices, "rows": rows, "compiled": name, "minimum_ms": ms,
         "ratio": ms / least[matrices, 1, "default"],
         "median_ms": statistics.median(arms[matrices, rows, name].ms[2:])}
        for (matrices, rows, name), ms in least.items()
    ]  # fmt: skip


def main(argv: list[str] | None = None) -> None:
    """Measure, print a table, append the record."""
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--base", required=True, help="converted checkpoint")
    p.add_argument("--rows", type=lambda s: sorted({1, *map(int, s.split(","))}),
                   default="1,2,4,8,16,32", help="T, always 1 among them")  # fmt: skip
    p.add_argument("--rounds", type=int, default=10)
    p.add_argument("--max-len", type=int, default=256, help="tokens that the cache holds")
    p.add_argument("--out", type=pathlib.Path, help="JSONL file to append the document to")
    args = p.parse_args(argv)
    if min(args.rows[0], args.rounds) < 1 or args.rows[-1] > args.max_len:
        p.error("--rows must be of 1 to --max-len tokens, and --rounds at least 1")
    passes = measure(args)
    print("| matrices | rows | compiled | minimum, ms | times one row | median, ms |")
    print("|" + 6 * " --- |")
    for *names, least, ratio, median in (one.values() for one in passes):
        figures = (f"{n:.2f}" for n in (least, ratio, median))
        print("| " + " | ".join((*map(str, names), *figures)) + " |")
    record = {"machine": machine(), "commit": commit(), "options": without_places(vars(args))}
    print(append(args.out, record | {"passes": passes}))


if __name__ == "__main__":
    main()

"""What storing weights in fewer bits would bring: pairs on one to eight GPUs, priced, not timed.

    python experiments/bits.py --out FILE

For each kind of codes (base and draft alike, or the draft's alone) and each number of devices: the
planner's best way to speculate beside autoregression, or what does not fit. Then a chain: the base
in bfloat16, its own int4 copy as the middle model, and the draft, by the lemma of polybasic
decoding (`lemma.py`). No clock is read.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import pathlib
from typing import Any

from ahead import CONFIGS, PAIRS
from lemma import chain_seconds
from records import append, commit, versions, without_places

from easyspec_jax.planner.acceptance import Acceptance, chain_tokens
from easyspec_jax.planner.device import PRESETS
from easyspec_jax.planner.plan import Planner
from easyspec_jax.quantized import Quantization
from easyspec_jax.sources import read_config

PRICED = ["Llama-3 70B + 8B", "Llama-3 8B + 1B"]
KINDS = ((None, None), ("int8", None), ("int8", "int8"), ("int4", None), ("int4", "int4"))
MU, GAMMA = (
    (4, 6, 8, 12, 16),
    (2, 3, 4, 5),
)  # that the middle collects, and that it verifies at once


def codes(kind: str | None) -> Quantization | None:
    """A kind as the planner has it."""
    return None if kind is None else Quantization(kind)


def best(planner: Planner, num_devices: int) -> dict[str, Any]:
    """The fastest way on at most so many devices, in seconds a token; or why there is none."""
    try:
        plan = planner.plan(num_devices)
    except ValueError as error:
        return {"refused": str(error).partition(" (")[0]}
    return {
        "alone": plan.autoregression.token_seconds,
        "speculating": plan.best.token_seconds,
        "how": plan.best.options(),
        "bound": plan.best.bound,
    }


def chain(planner: Planner, num_devices: int, agreement: float) -> dict[str, Any]:
    """The best chain whose middle is the base's int4 copy, of whose tokens the base accepts
    `agreement`; its draft is placed as where the pair is fastest.
    """
    where = planner.plan(num_devices).best.deployment
    middle = dataclasses.replace(planner, base_codes=codes("int4"))
    least: dict[str, Any] = {}
    for mu, gamma in itertools.product(MU, GAMMA):
        top = planner.price(where, mu + gamma).phases["verify"].seconds
        price = middle.price(where, gamma)
        drafting = price.drafting / gamma
        of_middle = price.tokens_per_step
        of_base = chain_tokens(agreement, agreement, mu)
        seconds = chain_seconds(
            (top, price.phases["verify"].seconds, drafting), (of_base, of_middle), gamma
        )
        if not least or seconds < least["chain"]:
            least = {"chain": seconds, "mu": mu, "num_draft_tokens": gamma, "how": where.options()}
    return {"agreement": agreement} | least


def main(argv: list[str] | None = None) -> None:
    """Price, print a line each, append the records."""
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--pair", nargs="+", choices=PAIRS, default=PRICED)
    p.add_argument("--device", choices=PRESETS, default="h200")
    p.add_argument("--num-devices", nargs="+", type=int, default=[1, 2, 4, 8])
    p.add_argument("--rate", type=float, default=0.8, help="of the draft's tokens accepted")
    p.add_argument("--agreement", nargs="*", type=float, default=[0.9, 0.95], help="of the copy's")
    p.add_argument("--out", type=pathlib.Path, help="JSONL file to append the records to")
    args = p.parse_args(argv)
    options = without_places(vars(args))
    append(args.out, {"versions": versions("jax"), "commit": commit(), "options": options})
    for pair, n in itertools.product(args.pair, args.num_devices):
        base, draft = (read_config(CONFIGS / f"{m}.json")[0] for m in PAIRS[pair])
        planner = Planner(
            base=base,
            draft=draft,
            device=PRESETS[args.device],
            acceptance=Acceptance(rate=args.rate),
        )
        rows: list[dict[str, Any]] = []
        for first, second in KINDS:
            how = {"base_codes": codes(first), "draft_codes": codes(second)}
            kinds = {"base": first or "bfloat16", "draft": second or "bfloat16"}
            rows.append(kinds | best(dataclasses.replace(planner, **how), n))
        if "refused" not in rows[0]:
            rows += [chain(planner, n, agreement) for agreement in args.agreement]
        for row in rows:
            record = {"pair": pair, "device": args.device, "num_devices": n, **row}
            append(args.out, record)
            print("  ".join(map(_shown, record.values())), flush=True)


def _shown(value: Any) -> str:
    """A word, a number, or a time in ms."""
    return f"{1e3 * value:.2f} ms" if isinstance(value, float) and value < 0.5 else f"{value}"


if __name__ == "__main__":
    main()

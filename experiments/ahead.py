"""Would drafting while the base verifies pay, on a mesh that is split for it? Priced, not built.

    python experiments/ahead.py --out FILE

The base stands on M of N devices in tensor parallelism, the draft on others of them, placed as the
planner would; a round takes as long as the slower of the two. Two rules of what is drafted
meanwhile: PEARL's, and a static set of outcomes. Each at its best is held against the planner's
best on all N devices, where base and draft take turns. No clock is read.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import itertools
import pathlib
from collections.abc import Sequence
from typing import Any

from records import append, commit, versions, without_places

from easyspec_jax.config import ModelConfig
from easyspec_jax.layer_parallel import make_partition
from easyspec_jax.planner.acceptance import Acceptance, chain_tokens
from easyspec_jax.planner.cost import Pass
from easyspec_jax.planner.device import PRESETS
from easyspec_jax.planner.plan import GROUP_SIZES, Choice, Deployment, Planner, deployments
from easyspec_jax.sharding import LAYOUTS
from easyspec_jax.sources import read_config

CONFIGS = pathlib.Path(__file__).parent / "configs"
PAIRS = {
    "Llama-3 70B + 8B": ("llama3-70b", "llama3-8b"),
    "Qwen2 72B + 7B": ("qwen2-72b", "qwen2-7b"),
    "Llama-3 70B + 1B": ("llama3-70b", "llama3.2-1b"),
    "Llama-3 8B + 1B": ("llama3-8b", "llama3.2-1b"),
}
RATES = (0.6, 0.7, 0.8, 0.9)
GAMMAS = (1, 2, 3, 4, 5, 6, 8, 10, 12)
WIDTHS = (1, 2, 4)  # of the trees that follow an outcome
SIZES = (2, 4, 8, 16, 32, 64)  # outcomes that are prepared for
MAX_ROWS = 128  # that a level of all of them has
HANDOVER = 3e-5  # seconds; an assumption: as much as a preset's host takes between two steps


Counts = tuple[int, int, int]  # γ, w, and outcomes of a static set, or 0: PEARL's rule, of chains
COUNTS: list[Counts] = [(gamma, 1, 0) for gamma in GAMMAS]
COUNTS += [
    (gamma, width, size)
    for gamma, width, size in itertools.product(GAMMAS, WIDTHS, SIZES)
    if size * width <= MAX_ROWS
]


def pearl(first: float, later: float, gamma: int) -> tuple[float, float]:
    """Share of PEARL's rounds that verify windows, and tokens that a round brings.

    Algorithm of arXiv 2408.11850. In both kinds of rounds the draft makes the next γ tokens while
    the base passes what stands. Pre-verify: the base passes one token and so decides on the first
    of the window being drafted; that one or the base's own in its place is the round's only token.
    If it was accepted, post-verify follows: the base decides on the other γ - 1 tokens and on the
    first of the window that is being drafted behind them. All accepted: γ tokens, no bonus, and
    post-verify again. Otherwise those accepted and one of the base's, and the window is lost.

    Args:
      first, later: chances that the first token of a window is accepted, and each other one behind
        an accepted one. A chain of two states: pre -> post with `first`, post -> post with
        first · later^(γ - 1).
    """
    stays = first * later ** (gamma - 1)
    post = first / (1 - stays + first)
    return post, 1 - post + post * sum(later**i for i in range(gamma))


@functools.cache
def fan_out(
    rates: tuple[float, float], gamma: int, width: int, size: int, *, bonus: float, guess: float
) -> tuple[tuple[int, ...], float]:
    """How many next tokens are guessed behind each number of accepted ones, and the chance that the
    true outcome is among the guesses: what SSD (arXiv 2603.03251) calls a cache hit.

    An outcome is the node that was accepted last and the base's token behind it. Misses fall with
    the guesses as a power, as the planner has it of trees and SSD of its fan-out: F more candidates
    miss behind the `width` that were refused with (1 + F / width)^-guess, F behind a whole window
    with (1 - bonus) F^-guess. Which node of a level is the accepted one is not guessed: every one
    of a tree's gets F. Places go where they bring most, which is SSD's geometric fan-out.

    Args:
      rates: chances of a window's first level and of the others, as `Acceptance.rates` gives them.
      size: outcomes in all.
      bonus: chance that the draft's likeliest token behind a whole window is the base's.
    """
    first, later = rates
    reached = [1.0, *(first * later**i for i in range(gamma))]  # so many tokens or more
    chances = [a - b for a, b in itertools.pairwise([*reached, 0.0])]
    nodes = [1] + [width] * gamma

    def hit(accepted: int, guesses: int) -> float:
        if not guesses:
            return 0.0
        if accepted == gamma:
            return 1 - (1 - bonus) * guesses**-guess
        return 1 - (1 + guesses / width) ** -guess

    fan = [0] * (gamma + 1)
    while True:
        gains = {
            i: chances[i] * (hit(i, fan[i] + 1) - hit(i, fan[i])) / nodes[i]
            for i in range(gamma + 1)
            if nodes[i] <= size
        }
        if not gains or max(gains.values()) <= 0:
            return tuple(fan), sum(chances[i] * hit(i, n) for i, n in enumerate(fan))
        best = max(gains, key=gains.__getitem__)
        fan[best] += 1
        size -= nodes[best]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ahead:
    """One way to draft while the base verifies, and what is predicted of it."""

    rule: str  # "pearl" or "static"
    base_devices: int
    draft: Deployment
    num_draft_tokens: int  # γ
    tree_width: int
    outcomes: int  # that are prepared for
    ready: float  # share of rounds that find their window drafted
    verify: float  # seconds of the base's pass over a window
    drafting: float  # of what the draft does meanwhile
    seconds: float  # of a round
    tokens: float  # of a round

    @property
    def token_seconds(self) -> float:
        """Seconds per token."""
        return self.seconds / self.tokens

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        values = dict(vars(self)) | {"token_seconds": self.token_seconds}
        return values | {"draft": self.draft.options(), "draft_devices": self.draft.devices}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Split:
    """Prices drafting ahead, of one text, for a planner's pair, devices and caches.

    Calibration is the draft's exact pass over the window that the base verifies at the same time,
    on the draft's own devices: it holds up the draft, and the base where the draft is the slower.

    Args:
      handover: seconds of every round in which base and draft tell each other their tokens, some
        bytes, beside what the host takes in any step (`Device.step`). An assumption.
      guess: how misses fall with guesses (`fan_out`); None: as the planner has it of siblings.
    """

    planner: Planner
    handover: float = HANDOVER
    guess: float | None = None

    def __post_init__(self):
        if self.planner.batch != 1:
            raise ValueError(
                f"drafting ahead is priced for one text, got a batch of {self.planner.batch}: use "
                "batch 1"
            )

    def price(
        self, devices: int, draft: Deployment, counts: Counts, rates: Sequence[float]
    ) -> list[Ahead]:
        """What a round costs and brings with the base on so many devices, for each rate at which
        the exact draft's tokens are accepted. Where a set misses, the base waits for a draft.
        """
        planner, (gamma, width, size) = self.planner, counts
        partition = make_partition(planner.draft.num_layers, draft.group_size)
        one, window, tree = _verify(planner, devices, gamma, width)
        again, ahead = _drafting(planner, draft, *counts)
        guess = planner.acceptance.sibling if self.guess is None else self.guess

        def at(rate: float) -> Ahead:
            chances = dataclasses.replace(planner.acceptance, rate=rate).rates(partition, width)
            if size:
                _, ready = fan_out(chances, gamma, width, size, bonus=rate, guess=guess)
                tokens = chain_tokens(*chances, gamma)
                seconds = max(tree, ahead) + (1 - ready) * again
            else:
                ready, tokens = pearl(*chances, gamma)
                seconds = ready * max(window, ahead) + (1 - ready) * max(one, ahead)
            return Ahead(
                rule="static" if size else "pearl",
                base_devices=devices,
                draft=draft,
                num_draft_tokens=gamma,
                tree_width=width,
                outcomes=size,
                ready=ready,
                verify=tree if size else window,
                drafting=ahead,
                seconds=seconds + self.handover + planner.device.step,
                tokens=tokens,
            )

        return [at(rate) for rate in rates]

    def fits(self, devices: int, draft: Deployment, counts: Counts) -> bool:
        """Whether the base's devices have the memory for the base, and the draft's for the draft
        and every node that it makes ahead.
        """
        gamma, width, size = counts
        held = _holds(self.planner, draft, gamma * width * max(size, 1), "base")
        return held and _holds(*_on(self.planner, devices), gamma * width, "draft")

    def fastest(self, num_devices: int, rates: Sequence[float]) -> list[dict[str, Ahead]]:
        """For each rate the fastest choice of each rule; no entry where no split has the memory."""
        found: list[dict[str, Ahead]] = [{} for _ in rates]
        for draft, counts in itertools.product(_placed(self.planner, num_devices - 1), COUNTS):
            for devices in range(1, num_devices - draft.devices + 1):
                if not self.fits(devices, draft, counts):
                    continue
                for kept, one in zip(found, self.price(devices, draft, counts, rates), strict=True):
                    best = kept.setdefault(one.rule, one)
                    kept[one.rule] = min(best, one, key=_token_seconds)
        return found


@functools.cache
def _placed(planner: Planner, most: int) -> tuple[Deployment, ...]:
    """Every way to place a draft on up to so many devices, once."""
    ways = (deployments(n, GROUP_SIZES, planner.draft.num_layers) for n in range(1, most + 1))
    return tuple(dict.fromkeys(d for d in itertools.chain(*ways) if d.draft != "none"))


def padded(config: ModelConfig, devices: int) -> ModelConfig:
    """The configuration with heads, MLPs and vocabulary filled up so that so many devices divide
    them: a layout keeps whole what they do not, and 3, 5, 6 or 7 devices would be of little use.
    """
    names = ("num_kv_heads", "mlp_dim", "vocab_size")
    sizes = {name: -(-getattr(config, name) // devices) * devices for name in names}
    heads = config.num_heads // config.num_kv_heads * sizes["num_kv_heads"]
    return dataclasses.replace(config, num_heads=heads, **sizes)


@functools.cache
def _on(planner: Planner, devices: int) -> tuple[Planner, Deployment]:
    """The base on so many devices; a draft stands there for its shapes alone."""
    rules = LAYOUTS["replicated"]
    where = Deployment(layer=1, tensor=devices, draft="one device", rules=rules)
    return dataclasses.replace(planner, base=padded(planner.base, devices)), where


def _holds(planner: Planner, where: Deployment, nodes: int, other: str) -> bool:
    """Whether the devices have the memory for one model and so many draft tokens, or somewhat more,
    the other model left out.
    """
    return _needs(planner, where, 1 << (nodes - 1).bit_length(), other) <= planner.device.memory


@functools.cache
def _needs(planner: Planner, where: Deployment, nodes: int, other: str) -> int:
    needed = planner.memory(where, 1, nodes)
    return sum(size for name, size in needed.items() if not name.startswith(other))


@functools.cache
def _verify(planner: Planner, devices: int, gamma: int, width: int) -> tuple[float, float, float]:
    """Seconds of the base's pass over one token, over γ, and over a tree and its root."""
    planner, where = _on(planner, devices)
    nodes = gamma * width + 1
    entries = _entries(planner, where, gamma, width)
    model = planner.decoder(where).base
    passes = ((1, False), (gamma, False), (nodes, width > 1))
    one, window, tree = (
        Pass(model, planner.device, rows, rows, 1, entries, keeps=keeps).cost().seconds
        for rows, keeps in passes
    )
    return one, window, tree


@functools.cache
def _drafting(
    planner: Planner, where: Deployment, gamma: int, width: int, size: int
) -> tuple[float, float]:
    """Seconds of a draft that the base waits for, and of all that is drafted ahead.

    Ahead, PEARL's: an exact pass over the last window, whose last scores are the first of the next,
    and γ - 1 levels. A static set's: an exact pass over the window and its root, whose scores give
    the guesses, an exact pass over those, and γ - 1 levels behind all of them at once.
    """
    nodes, rows = gamma * width + 1, max(size, 1) * width
    entries = _entries(planner, where, gamma, rows)

    def level(rows: int) -> float:
        return (gamma - 1) * _pass(planner, where, rows, rows, entries, "attention", width)

    again = _pass(planner, where, 1, 1, entries, "exact", width) + level(width)
    if not size:
        return again, _pass(planner, where, gamma, 1, entries, "exact", 1) + level(1)
    guesses = _pass(planner, where, nodes, nodes, entries, "exact", size)
    guesses += _pass(planner, where, size, size, entries, "exact", width)
    return again, guesses + level(rows)


@functools.cache
def _pass(
    planner: Planner, where: Deployment, rows: int, heads: int, entries: int, run: str, best: int
) -> float:
    model = planner.decoder(where, 1).drafter.draft
    return Pass(model, planner.device, rows, heads, 1, entries, run, best).cost().seconds


@functools.cache
def _entries(planner: Planner, where: Deployment, gamma: int, width: int) -> int:
    """Of the caches, with room for so many drafts."""
    return planner.decoder(where, gamma, width).capacity(planner.max_len)


def compare(split: Split, num_devices: int, rates: Sequence[float]) -> list[dict[str, Any]]:
    """A record for each rate: taking turns on all devices, and drafting ahead on a split of them.

    Raises:
      ValueError: not even the base fits.
    """
    choices = split.planner.plan(num_devices, num_draft_tokens=GAMMAS).choices
    records = []
    for rate, ahead in zip(rates, split.fastest(num_devices, rates), strict=True):
        turns = sorted((_at(one, split.planner, rate) for one in choices), key=_token_seconds)
        best = min(map(_token_seconds, ahead.values()), default=None)
        records.append(
            {
                "num_devices": num_devices,
                "acceptance": rate,
                "autoregression": min(c.token_seconds for c in turns if not c.num_draft_tokens),
                "turns": {k: v for k, v in turns[0].as_dict().items() if k != "phases"},
                "turns_chain": min(c.token_seconds for c in turns if c.tree_width == 1),
                **{rule: one.as_dict() for rule, one in ahead.items()},
                "gain": best and turns[0].token_seconds / best,
            }
        )
    return records


def _at(choice: Choice, planner: Planner, rate: float) -> Choice:
    """The choice with so many of the exact draft's tokens accepted."""
    acceptance = dataclasses.replace(planner.acceptance, rate=rate)
    partition = make_partition(planner.draft.num_layers, choice.deployment.group_size)
    brings = acceptance.tokens_per_step(partition, choice.num_draft_tokens, choice.tree_width)
    return dataclasses.replace(choice, tokens_per_step=brings)


def _token_seconds(one: Choice | Ahead) -> float:
    return one.token_seconds


def row(record: dict[str, Any]) -> str:
    """A line of Markdown: milliseconds a token, and of drafting ahead devices of the base and of
    the draft, gamma, w, outcomes, and how often a window is ready.
    """
    cells = [str(record[name]) for name in ("pair", "device", "num_devices", "acceptance")]
    cells.append(f"{1e3 * record['autoregression']:.2f}")
    cells.append(f"{1e3 * record['turns']['token_seconds']:.2f}")
    for one in (record.get("pearl"), record.get("static")):
        if one is None:
            cells.append("-")
            continue
        names = ("num_draft_tokens", "tree_width", "outcomes")
        counts = ", ".join(str(one[name]) for name in names)
        where = f"{one['base_devices']} + {one['draft_devices']}"
        cells.append(f"{1e3 * one['token_seconds']:.2f} ({where}; {counts}; {one['ready']:.2f})")
    cells.append("-" if record["gain"] is None else f"{record['gain']:.2f}x")
    return f"| {' | '.join(cells)} |"


def main(argv: list[str] | None = None) -> None:
    """Price, print a table, append the records."""
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--pair", nargs="+", choices=PAIRS, default=list(PAIRS))
    p.add_argument("--device", nargs="+", choices=PRESETS, default=["h100", "h200", "a100"])
    p.add_argument("--num-devices", nargs="+", type=int, default=[2, 4, 8])
    p.add_argument("--handover", type=float, default=HANDOVER, help="seconds a round")
    p.add_argument("--guess", type=float, help="how misses fall with guesses")
    p.add_argument("--out", type=pathlib.Path, help="JSONL file to append the records to")
    args = p.parse_args(argv)
    options = without_places(vars(args))
    append(args.out, {"versions": versions("jax"), "commit": commit(), "options": options})
    for pair, name in itertools.product(args.pair, args.device):
        base, draft = (read_config(CONFIGS / f"{m}.json")[0] for m in PAIRS[pair])
        planner = Planner(base=base, draft=draft, device=PRESETS[name], acceptance=Acceptance())
        split = Split(planner=planner, handover=args.handover, guess=args.guess)
        for num_devices in args.num_devices:
            try:
                records = compare(split, num_devices, RATES)
            except ValueError as error:
                records = [{"num_devices": num_devices, "refused": str(error)}]
            for record in ({"pair": pair, "device": name, **r} for r in records):
                append(args.out, record)
                print(record.get("refused") or row(record), flush=True)


if __name__ == "__main__":
    main()

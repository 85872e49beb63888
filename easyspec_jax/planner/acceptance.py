"""How many tokens a step is expected to bring, from three rates that a few measured runs give.

With calibration a step's first level comes from the exact draft, each further one from its groups:

    tokens per step = 1 + a (1 + b + b² + ... + b^(γ - 1))

a = chance that the exact draft's token is accepted, b = that of the grouped draft's behind it.
"""

from __future__ import annotations

import dataclasses
import json
import math
import pathlib
from collections.abc import Sequence
from typing import Any

from easyspec_jax.config import is_integer, is_number
from easyspec_jax.layer_parallel import make_partition


@dataclasses.dataclass(frozen=True, kw_only=True)
class Acceptance:
    """What drafts of a pair are worth.

    The defaults are no measurement: `rate` is common for pairs of one family, `stale_loss` is what
    the paper's headline allows (groups of 4, acceptance at most 7 % lower), `sibling` lies between
    what trees brought a good and a poor draft here.
    """

    rate: float = 0.8  # a chain's token of the exact draft is accepted
    stale_loss: float = 0.05  # share of that lost by each layer that the mean attention reads back
    sibling: float = 0.3  # a tree of width w misses w ** -sibling times as often as a chain

    def __post_init__(self):
        for name, least, most in (("rate", 0, 1), ("stale_loss", 0, 1), ("sibling", 0, math.inf)):
            value = getattr(self, name)
            if not is_number(value) or not least <= value <= most:
                raise ValueError(f"{name} must be in {least} .. {most}, got {value!r}")

    def rates(self, partition: Sequence[int], tree_width: int = 1) -> tuple[float, float]:
        """Chances that a level behind an accepted one brings an accepted token: the first, exact
        level, and the others.
        """
        fuzzy = self.rate * (1 - self.stale_loss) ** mean_staleness(partition)
        missed = tree_width**-self.sibling
        return 1 - (1 - self.rate) * missed, 1 - (1 - fuzzy) * missed

    def tokens_per_step(
        self, partition: Sequence[int], num_draft_tokens: int, tree_width: int = 1
    ) -> float:
        """Expected tokens of a step, the base's own included; in [1, γ + 1]."""
        return chain_tokens(*self.rates(partition, tree_width), num_draft_tokens)


def mean_staleness(partition: Sequence[int]) -> float:
    """Layers that an attention of the partition reads back, on average."""
    return sum(size * (size - 1) / 2 for size in partition) / sum(partition)


def chain_tokens(first: float, later: float, num_draft_tokens: int) -> float:
    """Tokens of a step whose levels are accepted with these chances, and the base's own."""
    if num_draft_tokens == 0:
        return 1.0
    return 1 + first * sum(later**i for i in range(num_draft_tokens))


def read_acceptance(text: str, num_layers: int) -> Acceptance:
    """Acceptance from a number (the exact draft's rate), a JSON object of its fields, or the
    records that `experiments/acceptance.py` writes, to which it is fitted.

    Args:
      num_layers: of the draft that the records are of.

    Raises:
      ValueError: none of these.
    """
    try:
        return Acceptance(rate=float(text))
    except ValueError as error:
        path = pathlib.Path(text)
        if not path.is_file():
            reason = error if "rate" in str(error) else "neither a number nor a file"
            raise ValueError(f"acceptance {text!r}: {reason}") from None
    rows = _read_json(path)
    names = {field.name for field in dataclasses.fields(Acceptance)}
    if len(rows) == 1 and isinstance(rows[0], dict) and rows[0].keys() <= names:
        return Acceptance(**rows[0])
    return fit_acceptance(rows, num_layers, str(path))


def _read_json(path: pathlib.Path) -> list[Any]:
    """The document of a file, or one for each of its lines."""
    try:
        text = path.read_text("utf-8")
        try:
            return [json.loads(text)]
        except json.JSONDecodeError:
            return [json.loads(line) for line in text.split("\n") if line.strip()]
    except (ValueError, RecursionError) as error:  # of UTF-8 and of JSON, both ValueErrors
        raise ValueError(f"{path} is no JSON") from error


@dataclasses.dataclass(frozen=True)
class _Arm:
    """One measured way to draft."""

    group_size: int
    tree_width: int
    num_draft_tokens: int
    tokens_per_step: float


def fit_acceptance(rows: Sequence[Any], num_layers: int, where: str = "the records") -> Acceptance:
    """The rates that give the tokens per step of one run's arms at temperature 0.

    Args:
      rows: a header, and arms with group_size, tree_width, calibrate, temperature, tokens_per_step
        and tried_per_depth, whose length is γ. Arms that are not calibrated do not count.
      num_layers: of the draft.

    Raises:
      ValueError: rows of another kind, of several runs, or no exact chain to start from.
    """
    arms = _read_arms(rows, where)
    exact = next((a for a in arms if a.group_size == a.tree_width == 1), None)
    if exact is None:
        raise ValueError(f"{where} has no arm of group size 1 and width 1 at temperature 0")
    rate = _solve(lambda a, n: chain_tokens(a, a, n), exact)
    losses, exponents = [], []
    for arm in (a for a in arms if a.tree_width == 1 and a.group_size > 1 and rate > 0):
        fuzzy = _solve(lambda b, n: chain_tokens(rate, b, n), arm)
        stale = mean_staleness(make_partition(num_layers, arm.group_size))
        if stale > 0:
            losses.append(1 - min(fuzzy / rate, 1.0) ** (1 / stale))
    loss = sum(losses) / len(losses) if losses else Acceptance.stale_loss
    for arm in (a for a in arms if a.tree_width > 1):
        partition = make_partition(num_layers, arm.group_size)
        chain = Acceptance(rate=rate, stale_loss=loss, sibling=0.0).rates(partition)
        exponents += _exponent(arm, chain)
    sibling = max(sum(exponents) / len(exponents), 0.0) if exponents else Acceptance.sibling
    return Acceptance(rate=rate, stale_loss=loss, sibling=sibling)


def _read_arms(rows: Sequence[Any], where: str) -> list[_Arm]:
    if not all(isinstance(row, dict) for row in rows):
        raise ValueError(f"{where}: not a JSON object on every line")
    if sum("options" in row for row in rows) > 1:
        raise ValueError(f"{where} holds several runs: give one of them")
    arms = []
    for row in rows:
        if row.get("temperature") != 0 or row.get("calibrate") is False:
            continue
        counts = (row.get("group_size"), row.get("tree_width"))
        depths, tokens = row.get("tried_per_depth"), row.get("tokens_per_step")
        if (
            not all(is_integer(n) and n > 0 for n in counts)
            or not isinstance(depths, list)
            or not is_number(tokens)
        ):
            raise ValueError(
                f"{where}: an arm needs group_size, tree_width, tried_per_depth and tokens_per_step"
            )
        arms.append(_Arm(*counts, len(depths), float(tokens)))
    return arms


def _exponent(arm: _Arm, chain: tuple[float, float]) -> list[float]:
    """`sibling` as one tree has it; nothing where its chain leaves nothing to win."""
    if chain[1] > 0.99:
        return []

    def tokens(won, n):
        first, later = (1 - (1 - a) * (1 - won) for a in chain)
        return chain_tokens(first, later, n)

    missed = max(1 - _solve(tokens, arm), 1e-3)
    return [-math.log(missed) / math.log(arm.tree_width)]


def _solve(tokens: Any, arm: _Arm) -> float:
    """The x in [0, 1] with `tokens(x, γ)` = the arm's tokens per step, or the end that comes
    nearest; `tokens` rises in x.
    """
    from scipy.optimize import brentq  # takes a second to import

    def missing(x):
        return tokens(x, arm.num_draft_tokens) - arm.tokens_per_step

    if not missing(0.0) < 0:
        return 0.0
    if missing(1.0) <= 0:
        return 1.0
    root: Any = brentq(missing, 0.0, 1.0)  # a pair only where more is asked of it
    return root

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

from easyspec_jax.config import is_number
from easyspec_jax.layer_parallel import make_partition


@dataclasses.dataclass(frozen=True, kw_only=True)
class Acceptance:
    """What drafts of a pair are worth.

    The defaults are no measurement: `rate` is common for pairs of one family, `stale_loss` is what
    the paper's headline allows (groups of 4, acceptance at most 7 % lower), `sibling` lies between
    what trees brought a good and a poor draft here.
    """

    rate: float = 0.8  # a chain's token of the exact draft is accepted
    stale_loss: float = 0.05  # share of `rate` lost per layer that a mean attention reads back
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
        fuzzy = self.rate * max(1 - self.stale_loss * mean_staleness(partition), 0.0)
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


def read_acceptance(text: str) -> Acceptance:
    """Acceptance from a number (the exact draft's rate), a JSON object of its fields, or the
    records that `experiments/acceptance.py` writes, to which it is fitted.

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
    try:
        rows = [json.loads(line) for line in path.read_text("utf-8").split("\n") if line.strip()]
    except (UnicodeDecodeError, json.JSONDecodeError):
        try:
            rows = [json.loads(path.read_text("utf-8"))]
        except (UnicodeDecodeError, json.JSONDecodeError) as error:
            raise ValueError(f"{path} is no JSON") from error
    names = {field.name for field in dataclasses.fields(Acceptance)}
    if len(rows) == 1 and isinstance(rows[0], dict) and rows[0].keys() <= names:
        return Acceptance(**rows[0])
    return fit_acceptance(rows, str(path))


def fit_acceptance(rows: Sequence[Any], where: str = "the records") -> Acceptance:
    """The rates that give the tokens per step of measured arms at temperature 0.

    Args:
      rows: a header with options and the number of layers is not needed; arms have group_size,
        tree_width, calibrate, temperature and tokens_per_step; γ is read off their depths.

    Raises:
      ValueError: no arm of an exact chain to start from.
    """
    arms = [row for row in rows if isinstance(row, dict) and "tokens_per_step" in row]
    arms = [
        row for row in arms if row.get("temperature") == 0 and row.get("calibrate") is not False
    ]
    chains = {row["group_size"]: row for row in arms if row["tree_width"] == 1}
    if 1 not in chains:
        raise ValueError(f"{where} has no arm of group size 1 and width 1 at temperature 0")
    rate = _solve(lambda a, n: chain_tokens(a, a, n), chains[1])
    losses, exponents = [], []
    for size, row in chains.items():
        if size > 1 and rate > 0:
            fuzzy = _solve(lambda b, n: chain_tokens(rate, b, n), row)
            stale = mean_staleness(make_partition(2 + 6 * size, size))
            losses.append((1 - fuzzy / rate) / stale)
    loss = min(max(sum(losses) / len(losses), 0.0), 1.0) if losses else Acceptance.stale_loss
    for row in (row for row in arms if row["tree_width"] > 1):
        exponents.append(_exponent(row, rate, loss))
    known = [value for value in exponents if value is not None]
    sibling = max(sum(known) / len(known), 0.0) if known else Acceptance.sibling
    return Acceptance(rate=rate, stale_loss=loss, sibling=sibling)


def _exponent(row: dict[str, Any], rate: float, loss: float) -> float | None:
    """`sibling` as one tree has it; None where its chain leaves nothing to win."""
    size, width = row["group_size"], row["tree_width"]
    partition = make_partition(2 + 6 * size, size)
    chain = Acceptance(rate=rate, stale_loss=loss, sibling=0.0).rates(partition)
    if chain[1] > 0.99:
        return None

    def tokens(missed, n):
        return chain_tokens(*(1 - (1 - a) * (1 - missed) for a in chain), n)

    missed = 1 - _solve(tokens, row)
    return -math.log(max(missed, 1e-3)) / math.log(width)


def _solve(tokens: Any, row: dict[str, Any]) -> float:
    """The x in [0, 1] with `tokens(x, γ)` = the arm's tokens per step; `tokens` rises in x."""
    low, high = 0.0, 1.0
    depth = len(row["tried_per_depth"])
    for _ in range(50):
        middle = (low + high) / 2
        below = tokens(middle, depth) < row["tokens_per_step"]
        low, high = (middle, high) if below else (low, middle)
    return (low + high) / 2

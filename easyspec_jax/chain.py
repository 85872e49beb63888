"""Whether a further model pays in a chain of models that draft for each other, from measured times.

The formulas are those of polybasic speculative decoding (arXiv 2510.26527): the time of a chain is
Lemma 3.1, what a model must bring to be worth inserting its two conditions.
"""

from __future__ import annotations

import dataclasses
import json
import math
import pathlib
from collections.abc import Sequence
from typing import Any

from easyspec_jax.config import is_number


@dataclasses.dataclass(frozen=True, kw_only=True)
class ChainModel:
    """One model of a chain; the first is the base, the last only drafts.

    Raises:
      ValueError: no name, a time that is not above 0, or less than one token a pass.
    """

    name: str
    seconds: float  # T, of one pass
    accepted: float | None = None  # L, tokens that one pass brings, its own included; None: drafts

    def __post_init__(self):
        if not isinstance(self.name, str) or not self.name:
            raise ValueError(f"the name of a model must be a text, got {self.name!r}")
        _check_above(f"seconds of {self.name}", self.seconds, 0)
        if self.accepted is not None:
            _check_at_least_one(f"accepted of {self.name}", self.accepted)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Condition:
    """`ratio` < `bound`: a model's time against the most that it may take."""

    ratio: float
    bound: float

    @property
    def holds(self) -> bool:
        """Whether the model is fast enough."""
        return self.ratio < self.bound


@dataclasses.dataclass(frozen=True, kw_only=True)
class Insertion:
    """What a model brings to a chain; times are seconds per token."""

    before: float  # without it
    after: float  # with it
    upper: Condition  # its passes against those that the model above it saves
    lower: Condition | None  # against those that the drafter below saves; None: there is no drafter

    @property
    def pays(self) -> bool:
        """Whether the chain is faster with it. It is where both conditions hold; where one does,
        the other's loss may be larger.
        """
        return self.after < self.before


def chain_seconds(models: Sequence[ChainModel], draft_passes: float) -> float:
    """Seconds per token of a chain: sum over i < n of T_i / L_i, and beta T_n / L_{n-1} (arXiv
    2510.26527, Lemma 3.1, for N = 1).

    L_i counts tokens that stay. Where the models above throw away much of what one emits, take its
    share of the final text, tokens / passes; its own acceptance length is the lemma's limit.

    Args:
      models: the base first; all but the last with `accepted`.
      draft_passes: beta, passes of the last model per pass of the one above it.

    Raises:
      ValueError: fewer than two models, two of one name, one without or the last with `accepted`,
        or no passes.
    """
    models = tuple(models)
    if len(models) < 2:
        raise ValueError(
            f"a chain has at least two models, a base and a drafter, not {len(models)}"
        )
    for model in models[:-1]:
        if model.accepted is None:
            raise ValueError(f"accepted of {model.name} is missing: tokens that its pass brings")
    if models[-1].accepted is not None:
        raise ValueError(f"{models[-1].name} is the last of the chain and accepts nothing")
    names = [model.name for model in models]
    if len(set(names)) < len(names):
        raise ValueError(f"the models of a chain need names of their own, got {', '.join(names)}")
    _check_above("draft_passes", draft_passes, 0)
    verifying = sum(model.seconds / model.accepted for model in models[:-1])
    return verifying + draft_passes * models[-1].seconds / models[-2].accepted


def insertion_pays(
    models: Sequence[ChainModel],
    new: ChainModel,
    accepted_above: float,
    draft_passes: float,
    *,
    after: str | None = None,
) -> Insertion:
    """What `new` brings between a model M_i and the next, M_{i+1} (arXiv 2510.26527, conditions of
    model insertion): T_new / T_i < L_new (1 / L_i - 1 / L_{i,new}), and, M_{i+1} being the drafter,
    T_new / T_{i+1} < beta (L_new / L_i - 1).

    Each compares the new passes with one saving alone; `pays` adds both up.

    Args:
      models: the chain without it, as `chain_seconds` takes it.
      new: with `accepted`, over the tokens of what stands below it.
      accepted_above: L_{i,new}, tokens that a pass of M_i brings over the new model's.
      draft_passes: beta, the same with and without.
      after: name of M_i; None: the last before the drafter.

    Raises:
      ValueError: a bad chain, or a name that is not one of its verifying models.
    """
    models = tuple(models)
    before = chain_seconds(models, draft_passes)
    _check_at_least_one("accepted_above", accepted_above)
    names = [model.name for model in models[:-1]]
    if after is not None and after not in names:
        raise ValueError(f"a model goes after one of {', '.join(names)}, not after {after!r}")
    i = len(names) - 1 if after is None else names.index(after)
    above, below = models[i], models[i + 1]
    if new.accepted is None:
        raise ValueError(f"accepted of {new.name} is missing: tokens that its pass brings")
    longer = dataclasses.replace(above, accepted=accepted_above)
    inserted = (*models[:i], longer, new, *models[i + 1 :])
    upper = Condition(
        ratio=new.seconds / above.seconds,
        bound=new.accepted * (1 / above.accepted - 1 / accepted_above),
    )
    lower = Condition(
        ratio=new.seconds / below.seconds,
        bound=draft_passes * (new.accepted / above.accepted - 1),
    )
    return Insertion(
        before=before,
        after=chain_seconds(inserted, draft_passes),
        upper=upper,
        lower=lower if i == len(names) - 1 else None,
    )


def plan_chain(path: str, *, as_json: bool) -> str:
    """What the file of a chain comes to, in words or as one JSON document.

    The file is {"models": [{"name", "seconds", "accepted"}, ...], "draft_passes": beta, "new":
    {"name", "seconds", "accepted", "accepted_above", "after"}}: models in order, the last without
    "accepted"; "new" may be left out, and so may "after" (default: above the drafter).

    Raises:
      ValueError: a file that cannot be read or says something else.
    """
    document = _read(path)
    models = tuple(_model(entry, path) for entry in document["models"])
    passes = document["draft_passes"]
    seconds, new = chain_seconds(models, passes), document.get("new")
    if new is None:
        text = f"{1e3 * seconds:.3g} ms a token: {' > '.join(model.name for model in models)}"
        return json.dumps({"seconds": seconds}) if as_json else text
    fields = {name: value for name, value in new.items() if name not in ("accepted_above", "after")}
    if "accepted_above" not in new:
        raise ValueError(
            f'{path}: "new" needs "accepted_above", tokens per pass of the model above'
        )
    model = _model(fields, path)
    result = insertion_pays(models, model, new["accepted_above"], passes, after=new.get("after"))
    if as_json:
        return json.dumps(_as_dict(result))
    return "\n".join(_report(result, model.name))


def _report(result: Insertion, name: str) -> list[str]:
    def line(title, condition):
        if condition is None:
            return f"{title}  no drafter below: nothing saved"
        verdict = "holds" if condition.holds else "fails"
        return f"{title}  {condition.ratio:.3g} < {condition.bound:.3g} {verdict}"

    gain = result.before / result.after
    return [
        f"without {name}   {1e3 * result.before:.3g} ms a token",
        f"with {name}      {1e3 * result.after:.3g} ms a token",
        line("passes of the model above", result.upper),
        line("passes of the drafter    ", result.lower),
        f"{name} {'pays' if result.pays else 'does not pay'}: {gain:.2f} times the speed",
    ]


def _as_dict(result: Insertion) -> dict[str, Any]:
    def condition(c):
        return None if c is None else {"ratio": c.ratio, "bound": c.bound, "holds": c.holds}

    return {
        "seconds": result.before,
        "seconds_with_new": result.after,
        "condition_above": condition(result.upper),
        "condition_drafter": condition(result.lower),
        "pays": result.pays,
    }


def _read(path: str) -> dict[str, Any]:
    try:
        document = json.loads(pathlib.Path(path).read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} is no JSON file of a chain: {error}") from None
    known = {"models", "draft_passes", "new"}
    if not isinstance(document, dict) or not {"models", "draft_passes"} <= set(document) <= known:
        raise ValueError(f'{path} must hold "models", "draft_passes" and perhaps "new"')
    models, new = document["models"], document.get("new")
    if not isinstance(models, list) or not (new is None or isinstance(new, dict)):
        raise ValueError(f'{path}: "models" must be a list, and "new" one model')
    return document


def _model(entry: Any, path: str) -> ChainModel:
    allowed = {"name", "seconds", "accepted"}
    if not isinstance(entry, dict) or not {"name", "seconds"} <= set(entry) <= allowed:
        raise ValueError(f'{path}: a model has "name", "seconds" and "accepted", not {entry!r}')
    return ChainModel(**entry)


def _check_above(name: str, value: Any, least: float) -> None:
    if not is_number(value) or not least < value < math.inf:
        raise ValueError(f"{name} must be a number above {least}, got {value!r}")


def _check_at_least_one(name: str, value: Any) -> None:
    if not is_number(value) or not 1 <= value < math.inf:
        raise ValueError(f"{name} must be at least 1, a pass's own token, got {value!r}")

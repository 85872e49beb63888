"""When a further model pays in a chain of models that draft for each other: polybasic speculative
decoding's own formulas (arXiv 2510.26527).

T is the seconds of one pass of a model, L the tokens that it brings, its own included. L counts
tokens that stay: where the models above throw away much of what one emits, take its share of the
final text, tokens / passes; its own acceptance length is the lemma's limit.
"""

from __future__ import annotations

from collections.abc import Sequence


def chain_seconds(
    seconds: Sequence[float], accepted: Sequence[float], draft_passes: float
) -> float:
    """Seconds per token of a chain: sum over i < n of T_i / L_i, and beta T_n / L_{n-1} (Lemma 3.1,
    for N = 1).

    Args:
      seconds: T of every model, the base's first.
      accepted: L of all but the last, which only drafts.
      draft_passes: beta, passes of the last model per pass of the one above it.
    """
    *verifying, drafting = seconds
    each = (t / length for t, length in zip(verifying, accepted, strict=True))
    return sum(each) + draft_passes * drafting / accepted[-1]


def saves_above(new: float, above: float, lengths: tuple[float, float, float]) -> bool:
    """Whether the passes of a new model take less than those that it saves of the model above it:
    T_new / T_i < L_new (1 / L_i - 1 / L_{i,new}).

    Args:
      new, above: T of both.
      lengths: L_new, and those of the model above, over what now stands below it and over the new
        model: L_i and L_{i,new}.
    """
    own, before, over_new = lengths
    return new / above < own * (1 / before - 1 / over_new)


def saves_drafting(
    new: float, draft: float, lengths: tuple[float, float], draft_passes: float
) -> bool:
    """Whether they take less than the passes of the drafter below that the new model saves:
    T_new / T_{i+1} < beta (L_new / L_i - 1).

    The chain is faster with the model where both conditions hold; where one does, the other's loss
    may be larger.
    """
    own, before = lengths
    return new / draft < draft_passes * (own / before - 1)

"""A partition of the draft's layers that fits the model: more tokens per step at the same number of
sequential attention steps. The most promising ones that a search finds are decoded with, a uniform
one among them, and the best of these is taken.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from tqdm import tqdm

from easyspec_jax.config import Sampling, is_integer
from easyspec_jax.decode import Decoder
from easyspec_jax.drafters.layer_parallel import LayerParallelDrafter
from easyspec_jax.model import Model
from easyspec_jax.tuner.partitions import Partition
from easyspec_jax.tuner.search import (
    Candidate,
    StepSeconds,
    make_scorer,
    measure_sensitivity,
    search,
)
from easyspec_jax.tuner.stale_passes import answer, regroup, write_texts


@dataclasses.dataclass(frozen=True)
class Tuning:
    """What `tune` found."""

    partition: Partition  # the best of those that were confirmed
    candidates: tuple[Candidate, ...]  # all that were confirmed, the best first
    exact_acceptance: float  # of the draft's exact distribution
    sensitivity: np.ndarray  # f[L, S] nats, for layer j alone reading s layers back
    num_prompts: int
    num_tokens: int  # of the answers that were measured on


def confirm(
    base: Model,
    draft: Model,
    candidate: Candidate,
    prompts: Sequence[Sequence[int]],
    expected: Sequence[Sequence[int]] | None,
    *,
    num_draft_tokens: int,
    max_new_tokens: int,
    eos_ids: Sequence[int],
    sampling: Sampling,
) -> Candidate:
    """The candidate with what decoding the prompts gave; `expected` answers are autoregression's,
    None above temperature 0.
    """
    drafter = LayerParallelDrafter(regroup(draft, candidate.partition))
    decoder = Decoder(base, drafter, num_draft_tokens=num_draft_tokens)
    outs = list(answer(decoder, prompts, max_new_tokens, eos_ids=eos_ids, sampling=sampling))
    tokens = [row for out in outs for row in out.tokens]
    stats = [out.stats for out in outs]
    tried = sum(sum(s.tried_per_depth) for s in stats)
    same = [a == b for a, b in zip(tokens, expected, strict=True)] if expected is not None else None
    return dataclasses.replace(
        candidate,
        tokens_per_step=sum(s.emitted for s in stats) / sum(s.steps for s in stats),
        acceptance_rate=sum(s.nodes_accepted for s in stats) / max(tried, 1),
        identical=sum(same) if same is not None else None,
    )


def confirm_best(
    base: Model,
    draft: Model,
    candidates: Sequence[Candidate],
    prompts: Sequence[Sequence[int]],
    expected: Sequence[Sequence[int]] | None,
    *,
    num_confirmed: int,
    progress: bool = False,
    **options: Any,
) -> list[Candidate]:
    """The first uniform candidate and of the others the first, confirmed, and then those behind it,
    at most `num_confirmed`, while one of them might still be the best; the best first.

    One might, if decoding is to its prediction what it was to any so far. Each takes a compilation.

    Args:
      options: of `confirm`.
    """
    uniform = [c for c in candidates if c.kind == "uniform"][:1]
    others = [c for c in candidates[:num_confirmed] if c not in uniform]
    confirmed: list[Candidate] = []
    bar = tqdm(others[:1] + uniform + others[1:], "decoding", disable=not progress, leave=False)
    for candidate in bar:
        if len(confirmed) > len(uniform):
            gain = max(c.speed / c.promise for c in confirmed)
            if candidate.promise * gain <= max(c.speed for c in confirmed):
                break  # as all behind it promise no more
        confirmed.append(confirm(base, draft, candidate, prompts, expected, **options))
    bar.close()
    return sorted(confirmed, key=lambda c: (-c.speed, -c.predicted))


def tune(
    base: Model,
    draft: Model,
    prompts: Sequence[Sequence[int]],
    *,
    attention_steps: int | None = None,
    max_group_size: int | None = None,
    step_seconds: StepSeconds | None = None,
    num_draft_tokens: int = 5,
    max_new_tokens: int = 64,
    num_confirmed: int = 5,
    eos_ids: Sequence[int] = (),
    temperature: float = 0.0,
    progress: bool = False,
) -> Tuning:
    """The best partition found for drafting with `draft` ahead of `base` on prompts like these.

    Args:
      base, draft: without groups, in a layout that spreads no layers; they may be the same model.
      prompts: token ids; the base's own answers to them are what is measured on.
      attention_steps: K, blocks that the partition may have; None: as many as layers.
      max_group_size: layers that may run at once; None: any number.
      step_seconds: predicted time of a step, to weigh tokens per step against; None: partitions of
        K blocks count as equally fast, so K is needed.
      num_draft_tokens: γ.
      num_confirmed: candidates that are decoded with, beside the best uniform one.
      temperature: of the text to be drafted; answers to measure on are greedy all the same.
      progress: show bars on stderr.

    Raises:
      ValueError: bad options or prompts, models in groups, or neither K nor a time.
    """
    k, largest = check_options(
        draft.config.num_layers, attention_steps, max_group_size, step_seconds is not None
    )
    greedy = write_texts(base, prompts, max_new_tokens, eos_ids)
    scorer = make_scorer(base, draft, greedy, num_draft_tokens, temperature)
    costs = measure_sensitivity(scorer, largest, progress)
    candidates = search(scorer, costs, k, step_seconds=step_seconds, progress=progress)
    confirmed = confirm_best(
        base,
        draft,
        candidates,
        prompts,
        [t.tokens[0, t.counted].tolist() for t in greedy] if temperature == 0 else None,
        num_confirmed=num_confirmed,
        progress=progress,
        num_draft_tokens=num_draft_tokens,
        max_new_tokens=max_new_tokens,
        eos_ids=eos_ids,
        sampling=Sampling(temperature=temperature),
    )
    return Tuning(
        partition=confirmed[0].partition,
        candidates=tuple(confirmed),
        exact_acceptance=scorer.exact_acceptance,
        sensitivity=costs,
        num_prompts=len(greedy),
        num_tokens=sum(scorer.sizes),
    )


def check_options(
    num_layers: int, attention_steps: int | None, max_group_size: int | None, timed: bool
) -> tuple[int, int]:
    """K and the largest group worth looking at: three times as large as an even split's.

    Raises:
      ValueError: no partition is possible, or nothing to weigh partitions with.
    """
    if attention_steps is None and not timed:
        raise ValueError("tune needs attention_steps, or step_seconds to weigh them with")
    k = num_layers if attention_steps is None else attention_steps
    if not is_integer(k) or not 1 <= k <= num_layers:
        raise ValueError(
            f"attention_steps must be in 1 .. {num_layers}, the draft's layers, got {k!r}"
        )
    most = num_layers if max_group_size is None else max_group_size
    if not is_integer(most) or most < 1:
        raise ValueError(f"max_group_size must be a whole number above 0, got {most!r}")
    if most * k < num_layers:
        raise ValueError(
            f"{k} attention steps with at most {most} layers at once cover {most * k} of the "
            f"draft's {num_layers} layers: allow {-(-num_layers // most)} steps or larger groups"
        )
    even = max(-(-num_layers // k), 4 if timed else 1)
    return int(k), min(int(most), 3 * even, num_layers)

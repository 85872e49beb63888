"""Partitions that promise much: predicted by passes over texts, not decoded with.

Layers differ in how stale an input they bear. So it is measured, layer by layer, what the draft's
distribution suffers when that layer alone reads an old residual stream. Dynamic programming over
the sums finds good partitions; as they are only about additive, the best are rescored by a pass
each, moved a boundary at a time.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from easyspec_jax.memory import check_memory, device_bytes
from easyspec_jax.model import Model
from easyspec_jax.sharding import mesh_jit, replicate
from easyspec_jax.tuner.partitions import (
    Partition,
    cheapest_partitions,
    expected_tokens,
    fastest_partitions,
    interpolate,
    neighbours,
    uniform_partitions,
)
from easyspec_jax.tuner.stale_passes import (
    Text,
    Window,
    make_window,
    stale_log_probs,
    staleness,
)

# Seconds that one whole step (calibrating, drafting, verifying) takes with the draft in this
# partition, on the machine that is tuned for; only ratios count.
StepSeconds = Callable[[Partition], float]

KEEP = 6  # cheapest partitions that are rescored
ROUNDS = 4  # times that boundaries are moved
SENSITIVITY_TEXTS = 8


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A partition and what it promises or gives; rates are over the tuning prompts."""

    partition: Partition
    kind: str  # "uniform", or how it was found: "sum" of sensitivities, "moved" boundaries
    divergence: float  # nats, of the grouped draft from the exact one
    acceptance: float  # of a token drafted by a parallel pass, the ones before it accepted
    predicted: float  # tokens per step
    step_seconds: float | None = None  # predicted; None: unknown
    tokens_per_step: float | None = None  # by real decoding; None: not decoded with
    acceptance_rate: float | None = None  # the same
    identical: int | None = None  # answers equal to autoregression's; None above temperature 0

    @property
    def attention_steps(self) -> int:
        """Attention layers that run one after another: blocks."""
        return len(self.partition)

    @property
    def tokens(self) -> float:
        """Tokens per step: by real decoding, else as predicted."""
        return self.predicted if self.tokens_per_step is None else self.tokens_per_step

    @property
    def speed(self) -> float:
        """Tokens per second; tokens per step where no time is known."""
        return self.tokens / (self.step_seconds or 1.0)

    @property
    def promise(self) -> float:
        """The same as it was predicted."""
        return self.predicted / (self.step_seconds or 1.0)


class Scorer:
    """Predicts acceptance and tokens per step of partitions, a pass over all texts for each."""

    def __init__(
        self,
        draft: Model,
        windows: Sequence[Window],
        num_draft_tokens: int,
        temperature: float = 0.0,
        base_log_probs: Sequence[jax.Array] | None = None,
        *,
        vocab_size: int,
    ):
        """Predict for answers that the base has written.

        Args:
          draft: without groups.
          windows: of its texts.
          temperature: above 0 acceptance is the overlap with `base_log_probs` (f[1, N, V] of each
            text, after temperature), else agreement with the base's tokens.
          vocab_size: V of the base.
        """
        self.draft, self.windows = draft, list(windows)
        self.sizes = [int(w.size) for w in self.windows]
        self.num_draft_tokens, self.temperature = num_draft_tokens, temperature
        self.base = list(base_log_probs) if base_log_probs else [None] * len(self.windows)
        # Parallel passes of a step see 1 to γ - 1 entries of its own: the middle stands for all.
        self.recent = max(num_draft_tokens // 2, 1)
        num_layers = draft.config.num_layers
        exact = np.zeros((num_layers,), np.int32)
        self.exact = [
            _log_probs(draft, w, exact, recent=self.recent, vocab_size=vocab_size)
            for w in self.windows
        ]
        self.first = [accepted for _, accepted in self._run(exact, self._all)]
        self._known: dict[Partition, tuple[float, float, float]] = {}

    def score(self, partition: Partition) -> tuple[float, float, float]:
        """Divergence (nats), acceptance of a parallel pass and predicted tokens per step."""
        if partition not in self._known:
            found = self._run(staleness(partition), self._all)
            promised = [
                expected_tokens(first, later, self.num_draft_tokens)
                for first, (_, later) in zip(self.first, found, strict=True)
            ]
            sizes = self.sizes
            self._known[partition] = (
                _mean([kl for kl, _ in found]),
                _mean([later for _, later in found]),
                # steps, not tokens per step, add up
                sum(sizes) / sum(n / p for n, p in zip(sizes, promised, strict=True)),
            )
        return self._known[partition]

    def divergence(self, stale: np.ndarray, num_texts: int) -> float:
        """Mean divergence (nats) from the exact draft with stale layers (i32[L]), over so many of
        the texts, evenly spread.
        """
        texts = self._all[:: -(-len(self._all) // num_texts)]
        return _mean([kl for kl, _ in self._run(stale, texts)])

    @property
    def exact_acceptance(self) -> float:
        """Of tokens that the exact draft proposes."""
        return _mean(self.first)

    @property
    def _all(self) -> range:
        return range(len(self.windows))

    def _run(self, stale: np.ndarray, texts: range) -> list[tuple[np.ndarray, np.ndarray]]:
        """Divergence and acceptance, f[n] each, of every answer token of these texts."""
        mesh = self.draft.layout.mesh
        old = replicate(np.asarray(stale, np.int32), mesh)
        temperature = replicate(np.float32(self.temperature), mesh)
        found = []
        # All are started before the first is waited for.
        for i in texts:
            args = (self.draft, self.windows[i], old, self.exact[i], self.base[i], temperature)
            found.append(_judge(*args, recent=self.recent))
        sizes = [self.sizes[i] for i in texts]
        return [
            (np.asarray(kl)[:n], np.asarray(accepted)[:n])
            for n, (kl, accepted) in zip(sizes, found, strict=True)
        ]


def make_scorer(
    base: Model,
    draft: Model,
    texts: Sequence[Text],
    num_draft_tokens: int,
    temperature: float = 0.0,
) -> Scorer:
    """A scorer on texts that `base` wrote."""
    room = max(text.end - text.start for text in texts)
    first = make_window(draft, texts[0], room)
    scores = 4 * room * base.config.vocab_size * (2 if temperature > 0 else 1)
    needed = (len(texts) - 1) * device_bytes(first) + (len(texts) + 1) * scores
    check_memory(draft.layout.mesh, {"calibration texts": needed})
    windows = [first, *(make_window(draft, text, room) for text in texts[1:])]
    base_scores = None
    if temperature > 0:
        base_scores = [_tempered(base, make_window(base, t, room), temperature) for t in texts]
    vocab_size = base.config.vocab_size
    return Scorer(draft, windows, num_draft_tokens, temperature, base_scores, vocab_size=vocab_size)


def _tempered(base: Model, window: Window, temperature: float) -> jax.Array:
    """The base's log-probabilities f[1, N, V] at this temperature."""
    exact = np.zeros((base.config.num_layers,), np.int32)
    options = {"recent": 1, "vocab_size": base.config.vocab_size}
    scores = _log_probs(base, window, exact, **options)
    return jax.nn.log_softmax(scores / temperature, axis=-1)


def _mean(rows: Sequence[np.ndarray]) -> float:
    return float(np.concatenate(rows).mean(dtype=np.float64))


_log_probs = mesh_jit(static_argnames=("recent", "vocab_size"))(stale_log_probs)


@mesh_jit(static_argnames="recent")
def _judge(draft, window, stale, exact, base, temperature, *, recent):
    """Divergence from `exact` and acceptance, f[N] each, of a pass with stale layers."""
    q = stale_log_probs(draft, window, stale, recent=recent, vocab_size=exact.shape[-1])
    # An id that the draft has not: -inf on both sides.
    kl = jnp.where(exact > -jnp.inf, jnp.exp(exact) * (exact - q), 0.0).sum(axis=-1)
    if base is None:
        accepted = q.argmax(axis=-1).astype(jnp.int32) == window.answer
    else:
        q = jax.nn.log_softmax(q / temperature.astype(q.dtype), axis=-1)
        accepted = jnp.exp(jnp.minimum(q, base)).sum(axis=-1)
    return kl[0], accepted[0]


def measure_sensitivity(scorer: Scorer, largest: int, progress: Any = None) -> np.ndarray:
    """f[L, largest] nats: what the draft's distribution suffers where layer j alone reads the
    residual stream s layers back; infinite where there is none.

    Measured at s = 1, 2, 4, ... and at the last, straight lines between.
    """
    num_layers = scorer.draft.config.num_layers
    table = np.full((num_layers, largest), math.inf)
    table[:, 0] = 0.0
    for j in tqdm(range(1, num_layers), desc="layers", disable=not progress, leave=False):
        last = min(j, largest - 1)
        places = {1 << i for i in range(last.bit_length())} | {last} if last else set()
        measured = {}
        for place in sorted(places):
            stale = np.zeros((num_layers,), np.int32)
            stale[j] = place
            measured[place] = max(scorer.divergence(stale, SENSITIVITY_TEXTS), 0.0)
        table[j, : last + 1] = interpolate(measured, last + 1)
    return table


def search(
    scorer: Scorer,
    costs: np.ndarray,
    max_blocks: int,
    *,
    step_seconds: StepSeconds | None = None,
    progress: Any = None,
) -> list[Candidate]:
    """Candidates of at most `max_blocks` blocks, the most promising first: the cheapest by `costs`
    (f[L, S], blocks of at most S layers), the same with boundaries moved, and uniform ones.

    Without `step_seconds` those with `max_blocks` blocks, as fewer are never more accurate; with it
    those that none beats in both cost and time.
    """
    num_layers, largest = costs.shape
    found: dict[Partition, Candidate] = {}
    bar = tqdm(desc="partitions", disable=not progress, leave=False)

    def consider(partition: Partition, kind: str) -> Candidate:
        if partition not in found:
            bar.update()
            seconds = step_seconds(partition) if step_seconds is not None else None
            scores = dict(
                zip(("divergence", "acceptance", "predicted"), scorer.score(partition), strict=True)
            )
            found[partition] = Candidate(partition, kind, step_seconds=seconds, **scores)
        return found[partition]

    def promise(candidate: Candidate) -> tuple[float, float]:
        return candidate.speed, -candidate.divergence

    for partition in uniform_partitions(num_layers, max_blocks, largest):
        consider(partition, "uniform")
    if step_seconds is None:
        cheapest = cheapest_partitions(costs, max_blocks, KEEP)
        good = [partition for _, partition in cheapest[max(cheapest)]]
    else:
        good = fastest_partitions(costs, max_blocks, step_seconds)
    for partition in good:
        consider(partition, "sum")
    best = max(found.values(), key=promise)
    for _ in range(ROUNDS):
        near = [consider(p, "moved") for p in neighbours(best.partition, largest)]
        better = max([best, *near], key=promise)
        if better is best:
            break
        best = better
    bar.close()
    return sorted(found.values(), key=promise, reverse=True)

"""Whether text is the base's own: distributions enumerated and compared, divergences explained.

A tiny model's distribution over whole sequences can be written down, so that samples are compared
with the truth. Greedy texts of two ways of decoding may part where rounding breaks a near-tie;
how near it was says whether that is the explanation.
"""

from __future__ import annotations

import collections
import dataclasses
import itertools
from collections.abc import Iterable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

import easyspec_jax as es
from easyspec_jax.cli.demo import divergence
from easyspec_jax.model import Model, forward, logits
from easyspec_jax.sampling import make_filters, probabilities
from easyspec_jax.sharding import zeros

Table = dict[tuple[int, ...], float]  # probability of every sequence


def all_logits(base: Model, tokens: np.ndarray) -> np.ndarray:
    """Scores f[B, T, V] behind every position of i32[B, T], from one pass on one device."""
    tokens = jnp.asarray(tokens, jnp.int32)
    return np.asarray(_score(base, tokens, zeros(base.abstract_cache(*tokens.shape))))


@jax.jit
def _score(base, tokens, cache):
    return logits(base, forward(base, tokens, cache)[0])


def enumerate_sequences(
    base: Model, prompt: Sequence[int], sampling: es.Sampling, length: int
) -> Table:
    """Probability of every sequence of `length` tokens behind the prompt, under the base alone."""
    sequences = list(itertools.product(range(base.config.vocab_size), repeat=length))
    scores = all_logits(base, np.array([[*prompt, *s[:-1]] for s in sequences]))
    p = np.asarray(probabilities(jnp.asarray(scores[:, -length:]), make_filters(sampling)))
    chosen = np.take_along_axis(p, np.array(sequences)[..., None], axis=-1)[..., 0]
    return dict(zip(sequences, chosen.astype(np.float64).prod(axis=1).tolist(), strict=True))


def total_variation(draws: Iterable[Sequence[int]], table: Table) -> float:
    """Half the absolute difference of the draws' frequencies and the table: 0 to 1."""
    counts = collections.Counter(map(tuple, draws))
    n = sum(counts.values())
    keys = counts.keys() | table.keys()
    return sum(abs(counts[key] / n - table.get(key, 0.0)) for key in keys) / 2


def honest_variation(table: Table, sizes: Sequence[int], repeats: int = 20) -> list[float]:
    """Mean `total_variation` of true draws from the table itself, by number of draws."""
    rng = np.random.default_rng(0)
    p = np.array(list(table.values()))
    draws = [rng.multinomial(n, p / p.sum(), size=repeats) / n for n in sizes]
    return [float(np.abs(one - p).sum(axis=1).mean() / 2) for one in draws]


@dataclasses.dataclass(frozen=True)
class Divergence:
    """Where two greedy texts of one prompt part."""

    row: int
    at: int  # index of the first new token that differs
    gap: float  # between the base's two best scores there


def top_gaps(base: Model, tokens: Sequence[int]) -> np.ndarray:
    """Difference of the two best scores behind every position, f64[T]."""
    best = np.sort(all_logits(base, np.array([tokens]))[0].astype(np.float64), axis=-1)
    return best[:, -1] - best[:, -2]


def divergences(
    base: Model,
    prompts: Sequence[Sequence[int]],
    expected: Sequence[list[int]],
    found: Sequence[list[int]],
) -> list[Divergence]:
    """The first difference of every row whose new tokens differ, with the gap that decided it."""
    parted = []
    for row, (prompt, a, b) in enumerate(zip(prompts, expected, found, strict=True)):
        at = divergence(a, b)
        if at is not None:
            gaps = top_gaps(base, [*prompt, *a])
            parted.append(Divergence(row, at, float(gaps[len(prompt) + at - 1])))
    return parted

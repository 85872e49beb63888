"""How far a head's drafts would be accepted: on greedy answers that it has not learnt.

The text is the base's own greedy answer, so at each place the head, fed with that text, is right or
wrong; a step from there accepts the tokens before the first that is wrong, and one of the base's.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from easyspec_jax.config import ModelConfig
from easyspec_jax.training.features import FeatureSource
from easyspec_jax.training.head import Features, Head, Texts, logits, run_head
from easyspec_jax.training.step import Vocabulary, over_devices


@functools.partial(jax.jit, static_argnames=("config", "num_depths"))
def drafted_right(
    head: Head,
    vocabulary: Vocabulary,
    texts: Texts,
    features: Features,
    *,
    config: ModelConfig,
    num_depths: int,
) -> jax.Array:
    """bool[J, B, A]: whether the likeliest token at depth j of each query is the base's."""
    wide = head["norm.weight"].dtype
    scaled = features.taps.astype(wide) / vocabulary.sizes[None, None]
    states = run_head(head, config, texts, features.embedding.astype(wide), scaled, num_depths)
    scores = [logits(head, config, state, vocabulary.rows) for state in states]
    chosen = jnp.stack([vocabulary.ids[jnp.argmax(x, axis=-1)] for x in scores])
    return chosen == features.greedy[None]


def chains(right: np.ndarray, since: np.ndarray) -> np.ndarray:
    """How many draft tokens in a row are right behind each query of a sequence: i32[A].

    Args:
      right: bool[J, A]; depth j of query i is drafted from the root i - j.
      since: i32[A], 0, 1, .. within every sequence, -1 for padding.
    """
    depths, size = right.shape
    found, alive = np.zeros(size, np.int32), since >= 0
    for depth in range(depths):
        at = np.minimum(np.arange(size) + depth, size - 1)
        alive = alive & (since[at] == since + depth) & right[depth, at]
        found += alive
    return found


def walk(accepted: np.ndarray, since: np.ndarray) -> tuple[int, int]:
    """Tokens and steps of decoding every sequence."""
    tokens = steps = place = 0
    while place < len(since) and since[place] >= 0:
        end = place + 1
        while end < len(since) and since[end] > 0:
            end += 1
        while place < end:
            new = min(int(accepted[place]) + 1, end - place)
            tokens, steps, place = tokens + new, steps + 1, place + new
    return tokens, steps


def measure(
    head: Head,
    vocabulary: Vocabulary,
    source: FeatureSource,
    rows: Sequence[Sequence[int]],
    num_depths: int,
) -> dict[str, Any]:
    """Of held-out rows: queries, how often each depth is right where it is fed with the text, how
    often where all before it are, and tokens per step with as many draft tokens as depths.
    """
    hits, count = np.zeros((2, num_depths), np.int64)
    reached = np.zeros(num_depths + 1, np.int64)
    tokens = steps = 0
    for first in range(0, len(rows), source.batch):
        texts, features = source(rows[first : first + source.batch])
        mesh = source.base.layout.mesh
        right = drafted_right(
            head,
            vocabulary,
            over_devices(texts, mesh),
            over_devices(features, mesh),
            config=source.base.config,
            num_depths=num_depths,
        )
        for b, own in enumerate(np.asarray(right).swapaxes(0, 1)):
            since = texts.since[b]
            accepted = chains(own, since)
            for depth in range(num_depths):
                hits[depth] += (own[depth] & (since >= depth)).sum()
                count[depth] += (since >= depth).sum()
            reached += [(accepted[since >= 0] >= n).sum() for n in range(num_depths + 1)]
            new, taken = walk(accepted, since)
            tokens, steps = tokens + new, steps + taken
    return {
        "queries": int(count[0]),
        "right": _shares(hits, count),
        "accepted": _shares(reached[1:], reached[:-1]),
        "num_draft_tokens": num_depths,
        "tokens_per_step": round(tokens / max(steps, 1), 4),
    }


def _shares(part: np.ndarray, whole: np.ndarray) -> list[float]:
    return [round(float(a / max(b, 1)), 4) for a, b in zip(part, whole, strict=True)]

"""One step of training: the loss of all depths, and an optimiser's step against it.

Labels are soft: the base's distribution over the draft's vocabulary, renormalised. A depth counts
`DECAY` times the one before. Batches are split over all devices, and the head is on each of them.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from easyspec_jax.config import ModelConfig
from easyspec_jax.training.head import Features, Head, Texts, logits, run_head

DECAY = 0.8
_WARMUP = 0.04  # of all steps


class Vocabulary(struct.PyTreeNode, kw_only=True):
    """What a head drafts, and what turns features of the base into its inputs and labels."""

    ids: Any  # i32[V'], the base's ids of the draft's
    rows: Any  # [V', D], theirs of the base's head
    sizes: Any  # [taps * D], RMS of each number of the taps


class TrainState(struct.PyTreeNode, kw_only=True):
    """All that a step changes."""

    head: Head
    optimiser: Any
    step: jax.Array  # i32[]


@functools.cache  # programs are compiled for it
def make_optimiser(learning_rate: float, num_steps: int) -> Any:
    """Muon for matrices, AdamW for norms; the rate rises, then falls to nothing.

    Raises:
      ValueError: optax is not there.
    """
    try:
        import optax
        from optax.contrib import muon
    except ImportError:
        raise ValueError("training needs optax: pip install 'easyspec_jax[training]'") from None
    warmup = max(int(_WARMUP * num_steps), 1)
    rate = optax.schedules.warmup_cosine_decay_schedule(
        0.0, learning_rate, warmup, max(num_steps, warmup + 1), 0.02 * learning_rate
    )
    return optax.chain(optax.clip_by_global_norm(1.0), muon(rate))


def losses(
    head: Head,
    config: ModelConfig,
    vocabulary: Vocabulary,
    texts: Texts,
    features: Features,
    num_depths: int,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The loss, and by depth (f32[J] each) its parts `loss`, how often the likeliest token is the
    base's (`hits`), of how many (`count`).
    """
    wide = head["norm.weight"].dtype
    scaled = features.taps.astype(wide) / vocabulary.sizes[None, None]
    states = run_head(head, config, texts, features.embedding.astype(wide), scaled, num_depths)
    target = features.hidden.astype(wide) @ vocabulary.rows.T
    likely = jax.nn.softmax(target, axis=-1)
    found: dict[str, list[jax.Array]] = {"loss": [], "hits": [], "count": []}
    for depth, state in enumerate(states):
        scores = logits(head, config, state, vocabulary.rows)
        counted = (texts.since >= depth).astype(wide)
        missed = jax.nn.logsumexp(scores, axis=-1) - (likely * scores).sum(-1)
        chosen = vocabulary.ids[jnp.argmax(scores, axis=-1)] == features.greedy
        found["loss"].append((missed * counted).sum() / jnp.maximum(counted.sum(), 1))
        found["hits"].append((chosen.astype(wide) * counted).sum())
        found["count"].append(counted.sum())
    parts = {name: jnp.stack(values) for name, values in found.items()}
    weights = jnp.asarray([DECAY**depth for depth in range(num_depths)], wide)
    return (parts["loss"] * weights).sum(), parts


@functools.partial(
    jax.jit, static_argnames=("optimiser", "config", "num_depths"), donate_argnames="state"
)
def train_step(
    state: TrainState,
    vocabulary: Vocabulary,
    texts: Texts,
    features: Features,
    *,
    optimiser: Any,
    config: ModelConfig,
    num_depths: int,
) -> tuple[TrainState, dict[str, jax.Array]]:
    """The state behind one step, and the parts of the loss before it."""
    import optax

    def loss(head):
        return losses(head, config, vocabulary, texts, features, num_depths)

    slope, parts = jax.grad(loss, has_aux=True)(state.head)
    # optax mixes types and ranks, which whoever runs this may have forbidden.
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        change, after = optimiser.update(slope, state.optimiser, state.head)
        head: Any = optax.apply_updates(state.head, change)
    return TrainState(head=head, optimiser=after, step=state.step + 1), parts


def over_devices(tree: Any, mesh: Mesh) -> Any:
    """Arrays [B, ..] split over all devices of a mesh by their first axis."""
    sharding = NamedSharding(mesh, P(mesh.axis_names))
    return jax.tree.map(lambda x: jax.device_put(x, sharding), tree)

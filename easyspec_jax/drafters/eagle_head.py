"""An EAGLE-3 head (arXiv 2503.01840): one layer that goes on from what the base knows already.

What it reads at position p is a *pair*: the token there, and what was known one position before.
That is the base's residual stream at a few taps, fused by one matrix; or, where the base has not
been yet, its own output. So a single layer guesses what the base would say next.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from easyspec_jax.cache import KVCache
from easyspec_jax.model import (
    Model,
    Placement,
    attention,
    make_step,
    mlp,
    product,
    rms_norm,
    score,
)
from easyspec_jax.sampling import Scores
from easyspec_jax.sharding import psum


class EagleHead(struct.PyTreeNode, kw_only=True):
    """The weights of a head; what `model` has not is the same on every device.

    D' is the width of the base, D that of the head, V' the ids that it knows. Matrices have their
    outputs first where the layout says so.
    """

    # one layer, whose attention has 2 D inputs and no norm of its own; final norm; head [D, V']
    model: Model
    embedding: Model  # the base's, or the head's own: nothing but the table
    fc: Any  # [taps * D', D]
    embed_norm: Any  # [D]
    hidden_norm: Any  # [D]
    taps_norm: Any = None  # [taps * D'], before fc; None: as they are
    embed_residual: Any = None  # [D, D], from the embedding to the layer's residual
    ids: Any = None  # i32[V'], what its ids are for the base; None: the same
    taps: tuple[int, ...] = struct.field(pytree_node=False)
    # Whether the layer adds to its normed input, and whether it is its normed output that goes on.
    norm_before_residual: bool = struct.field(pytree_node=False, default=False)
    norm_output: bool = struct.field(pytree_node=False, default=False)

    def fuse(self, features: jax.Array) -> jax.Array:
        """The base's residual stream at the taps, [B, T, taps, D'], as one vector, [B, T, D]."""
        x = features.reshape(*features.shape[:2], -1).astype(self.model.dtype)
        if self.taps_norm is not None:
            x = rms_norm(x, self.taps_norm, self.model.config.norm_eps)
        return product(self.model, x, self.fc).astype(x.dtype)

    def run(
        self,
        embedded: jax.Array,
        known: jax.Array,
        cache: KVCache,
        *,
        num: jax.Array | None = None,
        placement: Placement | None = None,
    ) -> tuple[jax.Array, KVCache]:
        """The layer over T pairs behind the cache's `length` entries; see `model.forward`.

        Args:
          embedded: tokens, [B, T, D].
          known: what was known one position before each, [B, T, D].

        Returns:
          Hidden states before the final norm, [B, T, D], and the cache.
        """
        model, t = self.model, known.shape[1]
        axes, eps = model.layout, model.config.norm_eps
        (block,), ((kv,),) = model.params.blocks, cache.blocks
        token = rms_norm(embedded.astype(model.dtype), self.embed_norm, eps)
        before = rms_norm(known, self.hidden_norm, eps)
        residual = before if self.norm_before_residual else known
        if self.embed_residual is not None:
            residual = residual + product(model, token, self.embed_residual).astype(known.dtype)
        step = make_step(model, cache, t, placement)
        # Nothing is known before the text's first token: it is no pair, and seen by itself alone.
        if placement is None:
            positions = cache.length[:, None] + jnp.arange(t, dtype=jnp.int32)[None]
        else:
            positions = placement.positions
        entries = jnp.arange(cache.max_len, dtype=jnp.int32)[None, None]
        step = step.replace(mask=step.mask & ((entries > 0) | (positions == 0)[..., None]))
        pairs = jnp.concatenate((token, before), axis=-1)
        with jax.named_scope("block_0"):
            delta, kv = attention(model, block.attention[0], pairs, kv, step)
            x = residual + psum(delta, axes.heads)
            x = x + psum(mlp(model, block.mlp[0], x), axes.mlp)
        length = cache.length + (t if num is None else num)
        return x, cache.replace(blocks=((kv,),), length=length)

    def goes_on(self, hidden: jax.Array) -> jax.Array:
        """What the next pair takes of hidden states [B, T, D] where the base has not been."""
        if not self.norm_output:
            return hidden
        return rms_norm(hidden, self.model.params.final_norm, self.model.config.norm_eps)

    def score(self, hidden: jax.Array) -> Scores:
        """Logits of hidden states [B, T, D] over its V' ids, named as the base names them."""
        return score(self.model, hidden).replace(ids=self.ids)

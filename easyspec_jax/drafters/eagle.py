"""EAGLE-3: a head of one layer drafts from what the base has computed.

The base's verification brings its residual stream at a few taps for every token that it accepts.
Each step begins with one pass of the head over those true features, which replaces the guesses that
drafting went on from; its last logits are already the first draft distribution.
"""

from __future__ import annotations

import os
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from easyspec_jax import tree as trees
from easyspec_jax.cache import KVCache
from easyspec_jax.drafter import Drafter
from easyspec_jax.drafters.eagle_head import EagleHead
from easyspec_jax.drafters.layer_parallel import check_candidates
from easyspec_jax.loop import put_rows, window
from easyspec_jax.model import Model, embed
from easyspec_jax.quantized import Quantization
from easyspec_jax.request import Request
from easyspec_jax.sharding import LayoutRules, shape_of
from easyspec_jax.verify import Proposal, Verdict


class EagleState(struct.PyTreeNode, kw_only=True):
    """Entry p of both belongs to the pair at position p: the token there, and what was known one
    position before.
    """

    cache: KVCache  # of the head's one layer; between steps exact up to `length`
    known: jax.Array  # [B, S + 1, D], the base's fused features


class EagleDrafter(Drafter):
    """Drafts chains and trees with a head that was trained for this base; `load` reads one.

    Args:
      head: from `load`.
      candidates: as of `LayerParallelDrafter`.

    Raises:
      ValueError: no head, or an unknown `candidates`.
    """

    head: EagleHead
    candidates: str = struct.field(pytree_node=False, default="sampled", kw_only=True)

    def __post_init__(self):
        if self.head is None or isinstance(self.head, str | os.PathLike | type | Model):
            raise ValueError(
                f"a head is needed, EagleDrafter.load(folder, base) makes one, got {self.head!r}"
            )
        check_candidates(self.candidates)

    @classmethod
    def load(
        cls,
        folder: str | os.PathLike,
        base: Model,
        *,
        candidates: str = "sampled",
        dtype: Any = None,
        layout: str | LayoutRules | None = None,
        quantization: str | Quantization | None = None,
    ) -> EagleDrafter:
        """The drafter of a folder with config.json and model.safetensors (or the shards that an
        index names), as SafeAILab, SpecForge, NeMo and speculators write them, on the mesh of its
        base.

        Args:
          base: the model that it was trained for; shapes alone give a drafter of shapes.
          dtype: of weights and cache; default: the base's, and if its matrices are bfloat16 under
            float32 those of the head are rounded to that.
          layout: as of `load_model`; default: over all devices.
          quantization: as of `load_model`; embeddings of its own stay floats.

        Raises:
          ValueError: no head there, or one of another base; no such kind of codes, or groups that
            do not divide its matrices. Nothing is allocated then.
        """
        from easyspec_jax.drafters.eagle_folder import load_head

        check_candidates(candidates)
        how: dict[str, Any] = dict(dtype=dtype, layout=layout, quantization=quantization)
        head = load_head(folder, base, **how)
        return cls(head, candidates=candidates)

    @property
    def taps(self) -> tuple[int, ...]:
        """Those it was trained with."""
        return self.head.taps

    def models(self) -> tuple[Model, ...]:
        """Its layer and its head."""
        return (self.head.model,)

    def check(self, base: Model, num_draft_tokens: int, tree_width: int) -> None:
        """Refuse another base than the head's, and trees wider than its vocabulary."""
        del num_draft_tokens
        head = self.head
        inputs = head.fc.shape[1 if head.model.layout.outputs_first else 0]
        ours = inputs // len(head.taps), head.embedding.config.vocab_size
        theirs = base.config.embed_dim, base.config.vocab_size
        if ours != theirs:
            raise ValueError(
                f"the head was trained for a base of width {ours[0]} and {ours[1]} ids, but this "
                f"one has {theirs[0]} and {theirs[1]}: load the head of this base"
            )
        if tree_width > head.model.config.vocab_size:
            raise ValueError(
                f"the head knows {head.model.config.vocab_size} ids: tree_width must be no more, "
                f"got {tree_width}"
            )

    def abstract_state(self, batch: int, max_len: int, request: Request) -> EagleState:
        """A cache of one layer, and the base's features of `max_len` tokens."""
        del request
        shape = (batch, max_len + 1, self.head.model.config.embed_dim)
        return EagleState(
            cache=self.head.model.abstract_cache(batch, max_len),
            known=shape_of(shape, self.head.model.dtype),
        )

    def prefill(
        self,
        state: EagleState,
        request: Request,
        tokens: jax.Array,
        start: jax.Array,
        num: jax.Array,
        features: jax.Array | None,
    ) -> EagleState:
        """Absorb prompt tokens; without features with those that were observed."""
        del request
        if features is not None:
            new = self.head.fuse(features)
            state = state.replace(known=_put(state.known, new, start + 1, num))
        _, cache = self._absorb(state, tokens, start, num)
        return state.replace(cache=cache)

    def _absorb(self, state, tokens, start, num):
        """Hidden states behind the pairs of i32[B, W] tokens, and the cache with them."""
        known = window(state.known, start, tokens.shape[1])
        embedded = embed(self.head.embedding, tokens)
        return self.head.run(embedded, known, state.cache.rollback(start), num=num)

    def propose(
        self,
        state: EagleState,
        request: Request,
        base_cache: KVCache,
        tokens: jax.Array,
        start: jax.Array,
        num: jax.Array,
        key: jax.Array,
    ) -> tuple[Proposal, EagleState, KVCache]:
        """Absorb the committed tokens with the base's features, then draft γ levels: the first from
        that pass, each further one from a pass over the level before.
        """
        keys = jax.random.split(key, request.num_draft_tokens)
        with jax.named_scope("calibrate"):
            hidden, cache = self._absorb(state, tokens, start, num)
            last = jnp.maximum(num - 1, 0)[:, None, None]
            hidden = jnp.take_along_axis(hidden, last, axis=1)
        absorbed, active = cache.length, num > 0
        with jax.named_scope("draft"):
            proposal, cache = self._draft(hidden, cache, active, request, keys)
        state = state.replace(cache=cache.rollback(absorbed))
        return proposal, state, base_cache

    def _draft(
        self,
        hidden: jax.Array,
        cache: KVCache,
        active: jax.Array,
        request: Request,
        keys: jax.Array,
    ) -> tuple[Proposal, KVCache]:
        """The whole draft behind `hidden` ([B, 1, D], the root's), and the cache with its nodes as
        scratch.
        """
        head, origin, width = self.head, cache.length, request.tree_width

        def run(tree, depth, carry):
            known, cache = carry  # behind the level before
            if width > 1:  # each node goes on from its parent
                first = jnp.asarray(depth * width, jnp.int32)
                parents = jax.lax.dynamic_slice_in_dim(tree.parents, first, width, axis=1)
                parents = jnp.maximum(parents - (first - width), 0)
                parents = jnp.where(depth == 0, 0, parents)
                known = jnp.take_along_axis(known, parents[..., None], axis=1)
            placement = tree.placement(origin, depth)
            embedded = embed(head.embedding, tree.level(depth))
            hidden, cache = head.run(embedded, known, cache, placement=placement)
            return head.score(hidden), (head.goes_on(hidden), cache)

        scores = head.score(hidden)
        drawn = self.candidates == "sampled" and not request.filters.greedy
        known = jnp.broadcast_to(head.goes_on(hidden), (len(hidden), width, hidden.shape[-1]))
        proposal, (_, cache) = trees.draft(
            request, active, keys, scores, run, (known, cache), drawn=drawn
        )
        return proposal, cache

    def observe(self, state: EagleState, verdict: Verdict, aux: jax.Array) -> EagleState:
        """Remember what the base knows at the root and at the accepted nodes."""
        assert verdict.length is not None and verdict.active is not None
        rows = jnp.pad(verdict.path + 1, ((0, 0), (1, 0)))
        with jax.named_scope("calibrate"):
            new = self.head.fuse(jnp.take_along_axis(aux, rows[..., None, None], axis=1))
            num = jnp.where(verdict.active, verdict.num_accepted + 1, 0)
            return state.replace(known=_put(state.known, new, verdict.length, num))


def _put(x: jax.Array, new: jax.Array, start: jax.Array, num: jax.Array) -> jax.Array:
    """x ([B, S + 1, D]) with the first num[b] rows of new[b] at start[b]; the rest stays, as it may
    count.
    """
    counts = jnp.arange(new.shape[1], dtype=jnp.int32)[None] < num[:, None]
    old = window(x, start, new.shape[1])
    return put_rows(x, jnp.where(counts[..., None], new, old), start)

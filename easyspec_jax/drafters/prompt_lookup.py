"""Prompt lookup: what the text has said before, it may say again.

The last tokens of the text are looked up in the text itself, and what followed them there is the
draft (the idea is Saxena's, "Prompt Lookup Decoding", 2023). There is no second model and nothing
to train: summaries, edits and answers from documents repeat much of their prompt. All of it is a
few comparisons of token ids, so it runs on the device as a part of the step.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax

from easyspec_jax.cache import KVCache
from easyspec_jax.config import is_integer
from easyspec_jax.drafter import Drafter
from easyspec_jax.request import Request
from easyspec_jax.sharding import shape_of
from easyspec_jax.verify import Proposal

MAX_NGRAM = 64  # every token of the ending is a comparison of the whole text


class PromptLookupDrafter(Drafter, kw_only=True):
    """Drafts what followed the last tokens of the text where they stood before.

    The longest repeated ending of at most `max_ngram` tokens counts; of its places, one with γ
    tokens behind it comes before one with fewer, and then the most recent. A tree of width w holds
    the w best places whose tokens differ, each as one chain (they share what they begin with). A
    text whose last `min_ngram` tokens are new drafts nothing: that step is plain autoregression.
    Draft tokens are chosen, not drawn, so the text is lossless at any temperature.

    Its state is the text by absolute position, i32[B, S]; every call says how much of it counts.

    Args:
      max_ngram: tokens of the ending that is looked up, at most.
      min_ngram: at least; before another drafter (`FallbackDrafter`) 3 is better than 1, after
        which a draft model's tokens are mostly likelier.

    Raises:
      ValueError: max_ngram is no whole number in 1 .. `MAX_NGRAM`, or min_ngram in 1 .. max_ngram.
    """

    max_ngram: int = struct.field(pytree_node=False, default=3)
    min_ngram: int = struct.field(pytree_node=False, default=1)

    def __post_init__(self):
        if not is_integer(self.max_ngram) or not 1 <= self.max_ngram <= MAX_NGRAM:
            raise ValueError(
                f"max_ngram must be a whole number in 1 .. {MAX_NGRAM}, got {self.max_ngram!r}"
            )
        if not is_integer(self.min_ngram) or not 1 <= self.min_ngram <= self.max_ngram:
            raise ValueError(
                f"min_ngram must be a whole number in 1 .. max_ngram={self.max_ngram}, got "
                f"{self.min_ngram!r}"
            )

    def abstract_state(self, batch: int, max_len: int, request: Request) -> Any:
        """Room for `max_len` tokens of `batch` rows.

        Raises:
          ValueError: drafting is to stop at a probability.
        """
        if request.min_probability is not None:
            raise ValueError(
                "prompt lookup has no probabilities that drafting could stop at: leave "
                "min_draft_probability out"
            )
        return shape_of((batch, max_len), jnp.int32)

    def prefill(
        self,
        state: jax.Array,
        request: Request,
        tokens: jax.Array,
        start: jax.Array,
        num: jax.Array,
        features: jax.Array | None,
    ) -> jax.Array:
        """Remember prompt tokens."""
        del request, num, features  # what lies behind `num` is written again before it counts
        write = lambda row, new, at: lax.dynamic_update_slice(row, new, (at,))  # noqa: E731
        return jax.vmap(write)(state, tokens, start)

    def propose(
        self,
        state: jax.Array,
        request: Request,
        base_cache: KVCache,
        tokens: jax.Array,
        start: jax.Array,
        num: jax.Array,
        key: jax.Array,
    ) -> tuple[Proposal, jax.Array, KVCache]:
        """Remember the committed tokens and look up the last of them."""
        del key
        state = self.prefill(state, request, tokens, start, num, None)
        gamma, width = request.num_draft_tokens, request.tree_width
        with jax.named_scope("draft"):
            chains, known = look_up(
                state, start + num, self.max_ngram, self.min_ngram, depth=gamma, width=width
            )
            return share_prefixes(chains, known), state, base_cache

    def foresee(
        self, request: Request, tokens: jax.Array, length: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """What is found is known at once."""
        gamma = request.num_draft_tokens
        with jax.named_scope("draft"):
            _, known = look_up(tokens, length, self.max_ngram, self.min_ngram, depth=gamma, width=1)
        return jnp.zeros_like(length), known[:, 0].sum(axis=-1, dtype=jnp.int32)


def look_up(
    tokens: jax.Array,
    length: jax.Array,
    max_ngram: int,
    min_ngram: int = 1,
    *,
    depth: int,
    width: int,
) -> tuple[jax.Array, jax.Array]:
    """The tokens that followed the `width` best earlier places of a text's ending.

    A place is better whose tokens before it agree with more of the text's last `max_ngram`; then
    one with more of the next `depth` tokens known; then a more recent one. A place that would add
    no token to those chosen before it is passed over, and so is one that agrees with fewer than
    `min_ngram`.

    Args:
      tokens: i32[B, S], ids, of which the first length[b] are the text.
      length: i32[B].

    Returns:
      i32[B, w, depth] chains, and which of their tokens are known, bool[B, w, depth].
    """
    at = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None]  # places, by what follows first
    end = length[:, None]
    agree, repeated = at < end, jnp.zeros_like(tokens)
    for i in range(1, max_ngram + 1):
        last = jnp.take_along_axis(tokens, jnp.maximum(end - i, 0), axis=1)
        agree = agree & (at >= i) & (_shift(tokens, -i) == last)
        repeated = repeated + agree.astype(jnp.int32)
    behind = jnp.minimum(end - at, depth)
    steps = jnp.arange(depth, dtype=jnp.int32)[None]
    free, chains, known = repeated >= min_ngram, [], []
    for _ in range(width):
        best = free
        for rank in (repeated, behind, jnp.broadcast_to(at, tokens.shape)):
            best = best & (rank == jnp.where(best, rank, -1).max(axis=1, keepdims=True))
        place = jnp.argmax(best, axis=1).astype(jnp.int32)[:, None] + steps
        chain = jnp.take_along_axis(tokens, jnp.minimum(place, tokens.shape[1] - 1), axis=1)
        is_known = best.any(axis=1, keepdims=True) & (place < end)
        adds = jnp.zeros_like(free)
        for d in range(depth):
            same = (_shift(tokens, d) == chain[:, d, None]) & is_known[:, d, None]
            adds = adds | ((at + d < end) & ~same)
        free = free & adds
        chains.append(chain)
        known.append(is_known)
    return jnp.stack(chains, axis=1), jnp.stack(known, axis=1)


def _shift(x: jax.Array, by: int) -> jax.Array:
    """x[b, s + by] at s (i32[B, S]); 0 outside."""
    pad = ((0, 0), (max(-by, 0), max(by, 0)))
    return lax.slice_in_dim(jnp.pad(x, pad), max(by, 0), max(by, 0) + x.shape[1], axis=1)


def share_prefixes(chains: jax.Array, known: jax.Array) -> Proposal:
    """The tree of chains (i32[B, w, γ]; bool of the same shape, which tokens there are): node
    d * w + r is token d of chain r.

    Where a chain begins as an earlier one does, only the earliest one's nodes are valid, and the
    chain goes on from there; so siblings never share a token.
    """
    batch, width, depth = chains.shape
    equal = (chains[:, :, None] == chains[:, None]) & known[:, :, None] & known[:, None]
    equal = lax.cummin(equal.astype(jnp.int32), axis=3)  # [B, w, w, γ]: the same up to here
    chain = jnp.arange(width, dtype=jnp.int32)
    # The earliest chain that begins alike; each one itself where nothing is known.
    alike = (equal > 0) | (chain[:, None] == chain[None])[None, ..., None]
    first = jnp.argmax(alike, axis=2).astype(jnp.int32)  # [B, w, γ]
    at = width * jnp.arange(depth - 1, dtype=jnp.int32)
    parents = jnp.pad(
        at[None, None] + first[..., :-1], ((0, 0), (0, 0), (1, 0)), constant_values=-1
    )
    valid = known & (first == chain[None, :, None])
    level_major = lambda x: x.transpose(0, 2, 1).reshape(batch, depth * width)  # noqa: E731
    return Proposal(
        tokens=level_major(chains),
        parents=level_major(parents),
        valid=level_major(valid),
        depth=depth,
    )

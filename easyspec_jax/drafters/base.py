"""What the decoding loop knows of a drafter: a frozen pytree with pure methods, and nothing else.

A drafter's state is addressed by absolute position: every call forgets all at or beyond `start`, so
rolling back a rejected draft needs no method of its own.
"""

from __future__ import annotations

import functools
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax

from easyspec_jax import model as models
from easyspec_jax.cache import KVCache
from easyspec_jax.model import Model
from easyspec_jax.sampling import Filters, Proposal, Verdict
from easyspec_jax.tree import verification_placement


@struct.dataclass(kw_only=True)
class DraftOptions:
    """What a drafter is asked for."""

    filters: Filters  # q is filtered as p is
    num_draft_tokens: int = struct.field(pytree_node=False)  # γ, at most
    tree_width: int = struct.field(pytree_node=False, default=1)  # w; 1 is a chain
    vocab_size: int = struct.field(pytree_node=False)  # V of the base: q covers exactly its ids
    # f32[], a row whose likeliest path falls below it drafts no further; None: never
    min_probability: jax.Array | None = None
    eos_ids: jax.Array | None = None  # i32[E], padded with -1: nothing behind them is emitted


class Drafter(Protocol):
    """A way of drafting. `check`, `verify`, `observe` and `report` have the defaults of
    `DrafterBase`.
    """

    def check(self, base: Model, num_draft_tokens: int, tree_width: int) -> None:
        """Raise a ValueError of one sentence where it cannot draft γ levels of w nodes for this
        base.
        """

    def models(self) -> tuple[Model, ...]:
        """The models it runs, for checks against the base."""

    def init(self, batch: int, max_len: int, options: DraftOptions) -> Any:
        """An empty state for `batch` rows of at most `max_len` tokens; its field `options` holds
        the options. What is not on the base's mesh is put there, the same on every device.
        """

    def abstract_state(self, batch: int, max_len: int, options: DraftOptions) -> Any:
        """Shapes and shardings of what `init` allocates, for the memory budget. Raises a
        ValueError of one sentence where there can be no such state.
        """

    def resume(self, state: Any, options: DraftOptions) -> Any:
        """The state of an earlier request, with all it absorbed, under other options."""

    def prefill(self, state: Any, tokens: jax.Array, start: jax.Array, num: jax.Array) -> Any:
        """Absorb prompt tokens (i32[B, C], `num` of them count) at positions start[b] and on."""

    def propose(
        self,
        state: Any,
        base_cache: KVCache,
        tokens: jax.Array,
        start: jax.Array,
        num: jax.Array,
        key: jax.Array,
    ) -> tuple[Proposal, Any, KVCache]:
        """Absorb the newly committed tokens (i32[B, W], `num` of them count), then draft behind
        them.

        A proposal has depth γ and γ·w nodes (or γ, from a drafter of chains), those that are not
        meant marked invalid. A row with num = 0 is finished, or waits (in a chain of models) for
        other rows: nobody reads what it drafts, and what it absorbed stays.
        """

    def verify(
        self, base: Model, base_cache: KVCache, root: jax.Array, proposal: Proposal, state: Any
    ) -> tuple[jax.Array, KVCache, Any]:
        """Base logits [B, n + 1, V] at the root (i32[B]) and behind each node, the written cache,
        and anything for `observe`; `state` is what `propose` left.

        The root's entry is that at base_cache.length and node i's the one i + 1 behind it: there
        the loop looks for the accepted path.
        """

    def observe(self, state: Any, verdict: Verdict, aux: Any) -> Any:
        """Learn from a verdict."""

    def report(self, state: Any) -> dict[str, Any]:
        """Counters of this drafter's own stages, by name."""


def verify_in_one_pass(
    base: Model, base_cache: KVCache, root: jax.Array, proposal: Proposal
) -> tuple[jax.Array, KVCache, None]:
    """Base logits [B, n + 1, V] at the root (i32[B]) and behind each node; the written cache.

    Of a draft that may stop early, the smallest of a few compiled sizes that holds its levels is
    run; logits behind nodes that were left out are zero.
    """

    def run(proposal, cache):
        tokens = jnp.concatenate((root[:, None], proposal.tokens), axis=1)
        placement = verification_placement(cache.length, proposal)
        hidden, cache = models.forward(base, tokens, cache, placement=placement)
        return models.logits(base, hidden), cache

    def run_first(levels, state):
        _, scores, cache = state
        some, cache = run(proposal.first(levels), cache)
        return jnp.bool_(False), lax.dynamic_update_slice(scores, some, (0, 0, 0)), cache

    if proposal.levels is None:
        return *run(proposal, base_cache), None
    batch, n = proposal.tokens.shape
    scores = jnp.zeros((batch, n + 1, base.config.vocab_size), models.wide_type(base.dtype))
    smaller = -1
    for levels in verification_sizes(proposal.depth):
        # A loop of at most one turn writes the cache in place; a `cond` or `switch` copies it.
        fits = (proposal.levels <= levels) & (proposal.levels > smaller)
        body = functools.partial(run_first, levels)
        _, scores, base_cache = lax.while_loop(lambda s: s[0], body, (fits, scores, base_cache))
        smaller = levels
    return scores, base_cache, None


def verification_sizes(depth: int) -> tuple[int, ...]:
    """Numbers of levels that verification is compiled for: `depth`, halved down to 1; rising."""
    sizes = {depth}
    while depth > 1:
        depth = -(-depth // 2)
        sizes.add(depth)
    return tuple(sorted(sizes))


class DrafterBase:
    """The hooks most drafters leave alone."""

    def check(self, base, num_draft_tokens, tree_width):
        """Any base, depth and width will do."""
        del base, num_draft_tokens, tree_width

    def models(self):
        """No model of its own."""
        return ()

    def verify(self, base, base_cache, root, proposal, state):
        """One base pass over the root and all nodes."""
        del state
        return verify_in_one_pass(base, base_cache, root, proposal)

    def observe(self, state, verdict, aux):
        """Nothing is learnt."""
        del verdict, aux
        return state

    def report(self, state):
        """No stages of its own."""
        del state
        return {}

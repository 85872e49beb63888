"""EasySpec's drafter: a small model whose layers run in parallel groups, calibrated once per step.

Each step begins with one exact pass over the tokens just committed. It replaces the approximate
cache entries that drafting
left, so errors never pile up, and its last logits are already the first draft distribution:
calibration costs no extra pass.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax

from easyspec_jax.cache import KVCache, abstract_cache, zeros
from easyspec_jax.drafters.base import DrafterBase, DraftOptions
from easyspec_jax.layer_parallel import draft_runner, run_exact
from easyspec_jax.model import Model, forward, logits
from easyspec_jax.sampling import Proposal, argmax, probabilities, sample


@struct.dataclass(kw_only=True)
class DraftState:
    """Between steps the cache's first `length` entries cover the absorbed tokens; with calibration
    they are exact.
    """

    cache: KVCache
    options: DraftOptions


@struct.dataclass
class LayerParallelDrafter(DrafterBase):
    """Drafts a chain with `draft`, whose partition says which layers run at once; all groups of one
    layer = exact drafting.

    Args:
      draft: loaded with `group_size` (or a partition).
      calibrate: run the pass over newly committed tokens exactly (EasySpec); False runs it in
        groups too.
      parallel: "attention" (EasySpec: MLPs in order) or "layer" (whole layers at once, the paper's
        ablation).

    Raises:
      ValueError: an unknown `parallel`.
    """

    draft: Model
    calibrate: bool = struct.field(pytree_node=False, default=True, kw_only=True)
    parallel: str = struct.field(pytree_node=False, default="attention", kw_only=True)

    def __post_init__(self):
        draft_runner(self.parallel)

    def models(self) -> tuple[Model, ...]:
        """The draft."""
        return (self.draft,)

    def abstract_state(self, batch: int, max_len: int, options: DraftOptions) -> DraftState:
        """Shapes and shardings of `init`'s result."""
        m = self.draft
        cache = abstract_cache(m.config, m.layout, m.partition, batch, max_len, m.dtype)
        return DraftState(cache=cache, options=options)

    def init(self, batch: int, max_len: int, options: DraftOptions) -> DraftState:
        """An empty cache of `max_len` tokens for `batch` rows."""
        abstract = self.abstract_state(batch, max_len, options)
        return abstract.replace(cache=zeros(abstract.cache))

    def resume(self, state: DraftState, options: DraftOptions) -> DraftState:
        """The same cache, other options."""
        return state.replace(options=options)

    def prefill(
        self, state: DraftState, tokens: jax.Array, start: jax.Array, num: jax.Array
    ) -> DraftState:
        """Absorb prompt tokens exactly, whatever `calibrate` says."""
        _, cache = forward(
            self.draft, tokens, state.cache.rollback(start), num=num, run_block=run_exact
        )
        return state.replace(cache=cache)

    def propose(
        self,
        state: DraftState,
        base_cache: KVCache,
        tokens: jax.Array,
        start: jax.Array,
        num: jax.Array,
        key: jax.Array,
    ) -> tuple[Proposal, DraftState, KVCache]:
        """Calibrate, then draft γ tokens: the first from the calibration pass, each further one
        from a parallel pass.
        """
        options = state.options
        fuzzy = draft_runner(self.parallel)
        keys = jax.random.split(key, options.num_draft_tokens)
        with jax.named_scope("calibrate"):
            window = run_exact if self.calibrate else fuzzy
            hidden, cache = forward(
                self.draft, tokens, state.cache.rollback(start), num=num, run_block=window
            )
            last = jnp.maximum(num - 1, 0)[:, None, None]
            hidden = jnp.take_along_axis(hidden, last, axis=1)
        absorbed = cache.length
        first = self._choose(hidden, options, keys[0])

        def level(carry, key):
            token, cache = carry
            hidden, cache = forward(self.draft, token[:, None], cache, run_block=fuzzy)
            token, q = self._choose(hidden, options, key)
            return (token, cache), (token, q)

        with jax.named_scope("draft"):
            (_, cache), more = lax.scan(level, (first[0], cache), keys[1:])
        tokens, q = jax.tree.map(
            lambda one, rest: jnp.moveaxis(jnp.concatenate((one[None], rest)), 0, 1), first, more
        )
        return _chain(tokens, q), state.replace(cache=cache.rollback(absorbed)), base_cache

    def _choose(self, hidden: jax.Array, options: DraftOptions, key: jax.Array) -> Any:
        """The next draft token i32[B] behind `hidden` ([B, 1, D]) and q, f32[B, V]; None when
        greedy.
        """
        scores = _fit_vocab(logits(self.draft, hidden)[:, 0], options.vocab_size)
        if options.filters.greedy:
            return argmax(scores), None
        q = probabilities(scores, options.filters)
        return sample(key, q), q


def _chain(tokens: jax.Array, probs: jax.Array | None) -> Proposal:
    batch, n = tokens.shape
    parents = jnp.broadcast_to(jnp.arange(-1, n - 1, dtype=jnp.int32)[None], (batch, n))
    return Proposal(tokens=tokens, parents=parents, valid=jnp.ones((batch, n), bool), probs=probs)


def _fit_vocab(scores: jax.Array, vocab_size: int) -> jax.Array:
    """Draft scores [B, V'] over the base's V ids: cut, or padded with -inf; ids the draft lacks are
    never drafted.
    """
    missing = vocab_size - scores.shape[-1]
    if missing <= 0:
        return scores[:, :vocab_size]
    return jnp.pad(scores, ((0, 0), (0, missing)), constant_values=-jnp.inf)

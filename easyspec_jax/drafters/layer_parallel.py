"""EasySpec's drafter: a small model whose layers run in parallel groups, calibrated once per step.

Each step begins with one exact pass over the tokens just committed. It replaces the approximate
cache entries that drafting left, so errors never pile up, and its last logits are already the first
draft distribution: calibration costs no extra pass.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax

from easyspec_jax import tree as trees
from easyspec_jax.cache import KVCache, abstract_cache, zeros
from easyspec_jax.drafters.base import DrafterBase, DraftOptions
from easyspec_jax.layer_parallel import draft_runner, run_exact
from easyspec_jax.model import Model, forward, logits
from easyspec_jax.sampling import Proposal, fit_vocab

CANDIDATES = ("sampled", "best")


@struct.dataclass(kw_only=True)
class DraftState:
    """Between steps the cache's first `length` entries cover the absorbed tokens; with calibration
    they are exact.
    """

    cache: KVCache
    options: DraftOptions


@struct.dataclass
class LayerParallelDrafter(DrafterBase):
    """Drafts chains and trees with `draft`, whose partition says which layers run at once; all
    groups of one layer = exact drafting.

    Args:
      draft: loaded with `group_size` (or a partition).
      calibrate: run the pass over newly committed tokens exactly (EasySpec); False runs it in
        groups too.
      parallel: "attention" (EasySpec: MLPs in order) or "layer" (whole layers at once, the paper's
        ablation).
      candidates: at temperature > 0, "sampled" draws draft tokens from q (in a tree without
        replacement), "best" takes the likeliest; both are lossless, and sampled ones were accepted
        more often wherever the draft is good.

    Raises:
      ValueError: an unknown `parallel` or `candidates`; without calibration a draft with a second
        copy for exact passes, as the copy's cache would miss what is absorbed in groups.
    """

    draft: Model
    calibrate: bool = struct.field(pytree_node=False, default=True, kw_only=True)
    parallel: str = struct.field(pytree_node=False, default="attention", kw_only=True)
    candidates: str = struct.field(pytree_node=False, default="sampled", kw_only=True)

    def __post_init__(self):
        draft_runner(self.parallel)
        if self.candidates not in CANDIDATES:
            names = ", ".join(map(repr, CANDIDATES))
            raise ValueError(f"candidates must be one of {names}, got {self.candidates!r}")
        layout = getattr(self.draft, "layout", None)  # jax also puts placeholders there
        grouped = layout is not None and max(self.draft.partition) > 1
        if not self.calibrate and grouped and layout.copy is not None:
            raise ValueError('a draft with exact="copy" needs calibrate=True')

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
        """Calibrate, then draft γ levels: the first from the calibration pass, each further one
        from a parallel pass over the level before.
        """
        keys = jax.random.split(key, state.options.num_draft_tokens)
        with jax.named_scope("calibrate"):
            window = run_exact if self.calibrate else draft_runner(self.parallel)
            hidden, cache = forward(
                self.draft, tokens, state.cache.rollback(start), num=num, run_block=window
            )
            last = jnp.maximum(num - 1, 0)[:, None, None]
            hidden = jnp.take_along_axis(hidden, last, axis=1)
        absorbed = cache.length
        with jax.named_scope("draft"):
            proposal, cache = self._draft(hidden, cache, num > 0, state.options, keys)
        return proposal, state.replace(cache=cache.rollback(absorbed)), base_cache

    def _draft(
        self,
        hidden: jax.Array,
        cache: KVCache,
        active: jax.Array,
        options: DraftOptions,
        keys: jax.Array,
    ) -> tuple[Proposal, KVCache]:
        """The whole draft behind `hidden` ([B, 1, D], the root's) of the rows that are active, and
        the cache with its nodes as scratch.
        """
        gamma, width, least = options.num_draft_tokens, options.tree_width, options.min_probability
        origin, fuzzy = cache.length, draft_runner(self.parallel)

        def grow(tree, depth, hidden):
            scores = fit_vocab(logits(self.draft, hidden), options.vocab_size)
            return trees.grow(tree, depth, scores, options.filters, keys[depth], least)

        def level(carry):
            depth, tree, cache = carry
            placement = tree.placement(origin, depth - 1)
            hidden, cache = forward(
                self.draft, tree.newest, cache, placement=placement, run_block=fuzzy
            )
            return depth + 1, grow(tree, depth, hidden), cache

        drawn = self.candidates == "sampled" and not options.filters.greedy
        tree = trees.plant(active, gamma, width, options.vocab_size, drawn=drawn)
        carry = (jnp.int32(1), grow(tree, 0, hidden), cache)
        if gamma > 1 and least is None:
            carry = lax.fori_loop(1, gamma, lambda _, carry: level(carry), carry)
        elif gamma > 1:
            carry = lax.while_loop(lambda c: (c[0] < gamma) & ~c[1].stopped.all(), level, carry)
        levels, tree, cache = carry
        return tree.proposal(None if least is None else levels), cache

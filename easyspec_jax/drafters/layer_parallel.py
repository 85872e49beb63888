"""EasySpec's drafter: a small model whose layers run in parallel groups, calibrated once per step.

Each step begins with one exact pass over the tokens just committed. It replaces the approximate
cache entries that drafting left, so errors never pile up, and its last logits are already the first
draft distribution: calibration costs no extra pass.
"""

from __future__ import annotations

import os

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from easyspec_jax import tree as trees
from easyspec_jax.cache import KVCache
from easyspec_jax.drafter import Drafter, refuse_no_model
from easyspec_jax.layer_parallel import draft_runner, run_exact
from easyspec_jax.model import Model, forward, score
from easyspec_jax.request import Request
from easyspec_jax.verify import Proposal
from easyspec_jax.vocabulary import SharedVocabulary

CANDIDATES = ("sampled", "best")


def check_candidates(candidates: str) -> None:
    """Refuse another word than those of CANDIDATES.

    Raises:
      ValueError: naming them.
    """
    if candidates not in CANDIDATES:
        names = ", ".join(map(repr, CANDIDATES))
        raise ValueError(f"candidates must be one of {names}, got {candidates!r}")


class LayerParallelDrafter(Drafter):
    """Drafts chains and trees with `draft`, whose partition says which layers run at once; all
    groups of one layer = exact drafting.

    Args:
      draft: loaded with `group_size` (or a partition).
      calibrate: run the pass over newly committed tokens exactly (EasySpec); False runs it in
        groups too.
      parallel: "attention" (EasySpec: MLPs in order), "indirect" (MLPs at once too, each behind the
        attentions up to its own: two collectives a group) or "layer" (whole layers at once, the
        paper's ablation, which costs as much and is accepted no more often).
      candidates: at temperature > 0, "sampled" draws draft tokens from q (in a tree without
        replacement), "best" takes the likeliest; both are lossless, and sampled ones were accepted
        more often wherever the draft is good.
      vocabulary: `shared_vocabulary(base, draft)`, for a draft with another tokenizer; None: the
        base's.

    Its state is the draft's KV cache: between steps the first `length` entries cover the absorbed
    tokens, and with calibration they are exact.

    Raises:
      ValueError: no model or vocabulary, or an unknown `parallel` or `candidates`.
    """

    draft: Model
    calibrate: bool = struct.field(pytree_node=False, default=True, kw_only=True)
    parallel: str = struct.field(pytree_node=False, default="attention", kw_only=True)
    candidates: str = struct.field(pytree_node=False, default="sampled", kw_only=True)
    vocabulary: SharedVocabulary | None = struct.field(default=None, kw_only=True)

    def __post_init__(self):
        refuse_no_model(self.draft)
        draft_runner(self.parallel)
        check_candidates(self.candidates)
        shared = self.vocabulary
        if isinstance(shared, str | os.PathLike | type):
            raise ValueError(f"a vocabulary is a shared_vocabulary(base, draft), got {shared!r}")
        # Else it is placed already.
        if isinstance(shared, SharedVocabulary) and isinstance(shared.reading, np.ndarray):
            placed = shared.on(self.draft.layout.mesh, self.draft.config.vocab_size)
            object.__setattr__(self, "vocabulary", placed)

    def check(self, base: Model, num_draft_tokens: int, tree_width: int) -> None:
        """Refuse a vocabulary that was made for another pair."""
        del num_draft_tokens, tree_width
        shared = self.vocabulary
        if shared is None:
            return
        pairs = ((shared.base, base.tokenizer), (shared.draft, self.draft.tokenizer))
        if any(None not in pair and pair[0] != pair[1] for pair in pairs):
            raise ValueError(
                "the vocabulary is that of other tokenizers than this base's and draft's: make it "
                "with shared_vocabulary(base, draft) of these two"
            )

    def models(self) -> tuple[Model, ...]:
        """The draft; its tokens are the base's where a vocabulary translates them."""
        shared = self.vocabulary
        return (self.draft if shared is None else self.draft.replace(tokenizer=shared.base),)

    def abstract_state(self, batch: int, max_len: int, request: Request) -> KVCache:
        """A cache of `max_len` tokens for `batch` rows."""
        del request
        return self.draft.abstract_cache(batch, max_len)

    def prefill(
        self,
        state: KVCache,
        request: Request,
        tokens: jax.Array,
        start: jax.Array,
        num: jax.Array,
        features: jax.Array | None,
    ) -> KVCache:
        """Absorb prompt tokens exactly, whatever `calibrate` says."""
        del request, features
        cache = state.rollback(start)
        return forward(self.draft, self._read(tokens), cache, num=num, run_block=run_exact)[1]

    def propose(
        self,
        state: KVCache,
        request: Request,
        base_cache: KVCache,
        tokens: jax.Array,
        start: jax.Array,
        num: jax.Array,
        key: jax.Array,
    ) -> tuple[Proposal, KVCache, KVCache]:
        """Calibrate, then draft γ levels: the first from the calibration pass, each further one
        from a parallel pass over the level before.
        """
        keys = jax.random.split(key, request.num_draft_tokens)
        with jax.named_scope("calibrate"):
            window = run_exact if self.calibrate else draft_runner(self.parallel)
            hidden, cache = forward(
                self.draft, self._read(tokens), state.rollback(start), num=num, run_block=window
            )
            last = jnp.maximum(num - 1, 0)[:, None, None]
            hidden = jnp.take_along_axis(hidden, last, axis=1)
        absorbed = cache.length
        with jax.named_scope("draft"):
            proposal, cache = self._draft(hidden, cache, num > 0, request, keys)
        return proposal, cache.rollback(absorbed), base_cache

    def _read(self, tokens: jax.Array) -> jax.Array:
        """The base's ids as the draft's."""
        return tokens if self.vocabulary is None else self.vocabulary.read(tokens)

    def _draft(
        self,
        hidden: jax.Array,
        cache: KVCache,
        active: jax.Array,
        request: Request,
        keys: jax.Array,
    ) -> tuple[Proposal, KVCache]:
        """The whole draft behind `hidden` ([B, 1, D], the root's) of the rows that are active, and
        the cache with its nodes as scratch.
        """
        origin, fuzzy = cache.length, draft_runner(self.parallel)

        def scores(hidden):
            found, shared = score(self.draft, hidden), self.vocabulary
            return found if shared is None else shared.offer(found, request.vocab_size)

        def run(tree, depth, cache):
            placement, tokens = tree.placement(origin, depth), self._read(tree.level(depth))
            cache = cache.rollback(origin + depth * tree.width)
            hidden, cache = forward(self.draft, tokens, cache, placement=placement, run_block=fuzzy)
            return scores(hidden), cache.rollback(origin)  # no loop carries a length

        drawn = self.candidates == "sampled" and not request.filters.greedy
        return trees.draft(request, active, keys, scores(hidden), run, cache, drawn=drawn)

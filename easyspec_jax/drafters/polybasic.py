"""A chain of three or more models (polybasic speculative decoding, arXiv 2510.26527).

A middle model, decoding losslessly ahead of a drafter of its own, fills a buffer that the base then
verifies in one pass. The middle's stage is the ordinary step with the middle as base, so any
drafter may stand below it; a token of the buffer was drawn from the middle's distribution, which is
therefore the q of the base's verification.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import lax

from easyspec_jax import loop  # imports this package: its names are there only when called
from easyspec_jax.cache import KVCache, abstract_cache, zeros
from easyspec_jax.config import is_integer
from easyspec_jax.drafters.base import Drafter, DrafterBase, DraftOptions
from easyspec_jax.model import Model, forward
from easyspec_jax.sampling import Proposal, probabilities
from easyspec_jax.stats import Counters, make_stats

NEVER = np.iinfo(np.int32).max


@struct.dataclass(kw_only=True)
class PolybasicState:
    """Between steps the stage's first `cache.length` tokens are those the middle's cache covers;
    what the base made of the buffer behind its committed tokens shows in the next call.
    """

    stage: Any  # loop.DecodeState with the middle as base; nothing but `mu` ends its rows
    # i32[B, 2], passes over a single committed token that the middle, the inner drafter lacked
    catch_ups: jax.Array
    options: DraftOptions


@struct.dataclass
class PolybasicDrafter(DrafterBase):
    """Drafts chains of tokens that `middle` has verified of what `drafter` drafts for it.

    Of `num_draft_tokens` = γ, the capacity of the buffer, the drafter below gets γ - mu levels: the
    middle verifies again and again until the buffer holds at least mu tokens, at most γ. A pass of
    the base over all γ places then decides. `min_draft_probability` is the inner drafter's.

    Where the base accepts a whole buffer, the inner drafter first runs one more pass, over a single
    token, and so does the middle below which a drafter works with its cache (`report` counts both).
    The time of a step depends on what is accepted, so `Decoder.profile` shows that of a text of no
    meaning.

    Args:
      middle: a model between the base and the drafter in size and likeness, loaded with
        group_size=1; of another vocabulary size, its ids are cut, or never drafted.
      drafter: what drafts for it: any drafter, another `PolybasicDrafter` too.
      mu: tokens that make the base verify, at least 1 (the paper's μ).

    Raises:
      ValueError: mu is no whole number above 0.
    """

    middle: Model
    drafter: Drafter
    mu: int = struct.field(pytree_node=False, default=8, kw_only=True)

    def __post_init__(self):
        if not is_integer(self.mu) or self.mu < 1:
            raise ValueError(f"mu must be a whole number above 0, got {self.mu!r}")

    def check(self, base: Model, num_draft_tokens: int, tree_width: int) -> None:
        """Refuse trees, a buffer without room for the inner drafter, a middle in groups, and what
        the inner drafter refuses.
        """
        del base
        if tree_width != 1:
            raise ValueError(
                f"the base verifies a chain of models as a chain: tree_width must be 1, got "
                f"{tree_width}"
            )
        if num_draft_tokens <= self.mu:
            raise ValueError(
                f"num_draft_tokens must be above mu={self.mu}, got {num_draft_tokens}: choose mu "
                "plus what the inner drafter is to draft for each pass of the middle, "
                f"{self.mu + 5} say"
            )
        if max(self.middle.partition) > 1:
            raise ValueError("the middle model runs layer after layer: load it with group_size=1")
        if not hasattr(self.drafter, "propose"):
            raise ValueError(
                "the middle model needs a drafter, LayerParallelDrafter(draft) say, got "
                f"{type(self.drafter).__name__}"
            )
        levels = num_draft_tokens - self.mu
        try:
            self.drafter.check(self.middle, levels, 1)
        except ValueError as error:
            raise ValueError(
                f"the inner drafter, with num_draft_tokens - mu = {levels} levels: {error}"
            ) from None

    def models(self) -> tuple[Model, ...]:
        """The middle and those of the inner drafter."""
        return (self.middle, *self.drafter.models())

    def abstract_state(self, batch: int, max_len: int, options: DraftOptions) -> PolybasicState:
        """Shapes of `init`'s result; small arrays as they are."""
        inner = self._inner_options(options)
        # A row whose buffer is full is run on with those that fill theirs: its scratch needs room.
        size = max_len + inner.num_draft_tokens + 1
        m = self.middle
        none = np.zeros((batch,), np.int32)
        stage = loop.DecodeState(
            tokens=np.zeros((batch, size), np.int32),
            length=none + 1,
            limit=none + NEVER,
            absorbed=none,
            done=np.zeros((batch,), bool),
            cache=abstract_cache(m.config, m.layout, m.partition, batch, size, m.dtype),
            draft=self.drafter.abstract_state(batch, size, inner),
            counters=Counters.zeros(batch, inner.num_draft_tokens),
            logprobs=None,
            key=jax.random.key(0),
            step=np.int32(0),
            eos_ids=np.full((1,), -1, np.int32),
            filters=options.filters,
        )
        return PolybasicState(
            stage=stage, catch_ups=np.zeros((batch, 2), np.int32), options=options
        )

    def init(self, batch: int, max_len: int, options: DraftOptions) -> PolybasicState:
        """Empty caches of the middle and of the inner drafter."""
        abstract = self.abstract_state(batch, max_len, options)
        size = abstract.stage.tokens.shape[1]
        stage = abstract.stage.replace(
            cache=zeros(abstract.stage.cache),
            draft=self.drafter.init(batch, size, _own(self._inner_options(options))),
            filters=_own(options.filters),
        )
        return abstract.replace(stage=stage)

    def resume(self, state: PolybasicState, options: DraftOptions) -> PolybasicState:
        """The same caches, other options; counters start anew."""
        stage = state.stage.replace(
            draft=self.drafter.resume(state.stage.draft, _own(self._inner_options(options))),
            filters=_own(options.filters),
            counters=jax.tree.map(jnp.zeros_like, state.stage.counters),
        )
        return PolybasicState(
            stage=stage, catch_ups=jnp.zeros_like(state.catch_ups), options=options
        )

    def prefill(
        self, state: PolybasicState, tokens: jax.Array, start: jax.Array, num: jax.Array
    ) -> PolybasicState:
        """Both stages absorb prompt tokens."""
        stage = state.stage
        _, cache = forward(self.middle, tokens, stage.cache.rollback(start), num=num)
        # A short row of a batch meets chunks that begin behind its end.
        covered = jnp.where(num > 0, start + num, jnp.minimum(stage.cache.length, start))
        stage = stage.replace(
            tokens=loop.put_rows(stage.tokens, tokens, start),
            length=covered + 1,
            cache=cache.rollback(covered),
            draft=self.drafter.prefill(stage.draft, tokens, start, num),
            absorbed=covered,
        )
        return state.replace(stage=stage)

    def propose(
        self,
        state: PolybasicState,
        base_cache: KVCache,
        tokens: jax.Array,
        start: jax.Array,
        num: jax.Array,
        key: jax.Array,
    ) -> tuple[Proposal, PolybasicState, KVCache]:
        """Absorb the committed tokens, most of which the stages have made themselves, then fill the
        buffer. With γ <= mu (`check` refuses it) nothing is drafted.
        """
        options = state.options
        with jax.named_scope("absorb"):
            stage, behind = self._absorb(state.stage, tokens, start, num)
        state = state.replace(catch_ups=state.catch_ups + behind)
        origin, scores = stage.length, None
        if options.num_draft_tokens > self.mu:
            with jax.named_scope("middle"):
                stage, scores = self._fill(stage.replace(key=key), num > 0, options)
        at = jnp.arange(options.num_draft_tokens, dtype=jnp.int32)[None]
        drafted = loop.window(stage.tokens, origin, options.num_draft_tokens)
        proposal = Proposal(
            tokens=drafted,
            parents=jnp.broadcast_to(at - 1, drafted.shape),
            valid=at < (stage.length - origin)[:, None],
            probs=None if scores is None else probabilities(scores, options.filters),
            depth=options.num_draft_tokens,
        )
        return proposal, state.replace(stage=stage), base_cache

    def report(self, state: PolybasicState) -> dict[str, Any]:
        """How the middle's stage went, summed over rows; passes are those a row took part in.

        Keys: middle_passes (verifications and catch-ups), middle_catch_up_passes, buffered_tokens,
        tokens_per_middle_pass (by verification, its own token included), middle_acceptance_rate,
        middle_accepted_histogram (verifications by accepted tokens), inner_drafts (as many as
        verifications), inner_draft_tokens (for a model that drafts a chain, its passes too, with
        inner_catch_up_passes), and inner, the inner drafter's own report.
        """
        stats = make_stats(state.stage.counters)
        middle, inner = np.asarray(state.catch_ups).sum(axis=0).tolist()
        return {
            "middle_passes": stats.steps + middle,
            "middle_catch_up_passes": middle,
            "buffered_tokens": stats.emitted,
            "tokens_per_middle_pass": stats.tokens_per_step,
            "middle_acceptance_rate": stats.acceptance_rate,
            "middle_accepted_histogram": stats.accepted_histogram,
            "inner_drafts": stats.steps,
            "inner_draft_tokens": stats.nodes_drafted,
            "inner_catch_up_passes": inner,
            "inner": self.drafter.report(state.stage.draft),
        }

    @property
    def _lag(self) -> int:
        """Where the base accepts a whole buffer, the middle lacks the token before its root: it
        runs over that in its next pass, unless the inner drafter works with the middle's cache.
        """
        return int(type(self.drafter).verify is DrafterBase.verify)

    def _inner_options(self, options: DraftOptions) -> DraftOptions:
        levels = max(options.num_draft_tokens - self.mu, 1)
        return options.replace(num_draft_tokens=levels, tree_width=1)

    def _absorb(
        self, stage: Any, tokens: jax.Array, start: jax.Array, num: jax.Array
    ) -> tuple[Any, jax.Array]:
        """The stage at the end of the committed tokens (arguments as `propose`'s), with no more
        missing than its step absorbs by itself; and the passes this took, i32[B, 2]: the middle's,
        the inner drafter's.

        Entries of tokens that it had in its buffer are kept as they are. A row with num = 0 stays
        as it is.
        """
        active, width = num > 0, stage.num_draft_tokens + 1
        at = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None]
        known = loop.window(stage.tokens, start, tokens.shape[1])
        new = at < num[:, None]
        agreed = start + jnp.cumprod((known == tokens) & new, axis=1, dtype=jnp.int32).sum(
            axis=1, dtype=jnp.int32
        )
        text = loop.put_rows(stage.tokens, jnp.where(new, tokens, known), start)
        length = jnp.where(active, start + num, stage.length)

        def covered(count):
            common = jnp.minimum(agreed, start + num - 1)
            return jnp.where(active, jnp.minimum(count, common), count)

        def lacking(count, spare):
            return (active & (count + spare < length)).astype(jnp.int32)

        def middle_catches_up(carry):
            cache, passes = carry
            num = lacking(cache.length, 1 + self._lag)
            _, cache = forward(self.middle, loop.window(text, cache.length, 1), cache, num=num)
            return cache, passes + num

        def inner_catches_up(carry):
            (draft, absorbed), passes = carry
            num = lacking(absorbed, width)
            draft = self.drafter.prefill(draft, loop.window(text, absorbed, 1), absorbed, num)
            return (draft, absorbed + num), passes + num

        cache, none = stage.cache.rollback(covered(stage.cache.length)), jnp.zeros_like(num)
        cache, middle = lax.while_loop(
            lambda c: (lacking(c[0].length, 1 + self._lag) > 0).any(),
            middle_catches_up,
            (cache, none),
        )
        (draft, absorbed), inner = lax.while_loop(
            lambda c: (lacking(c[0][1], width) > 0).any(),
            inner_catches_up,
            ((stage.draft, covered(stage.absorbed)), none),
        )
        stage = stage.replace(
            tokens=text, length=length, absorbed=absorbed, cache=cache, draft=draft
        )
        return stage, jnp.stack((middle, inner), axis=1)

    def _fill(
        self, stage: Any, active: jax.Array, options: DraftOptions
    ) -> tuple[Any, jax.Array | None]:
        """The stage after enough steps for mu tokens in every active row, and the middle's logits
        (f[B, γ, V]) that each of them was chosen by; None where greedy.
        """
        origin, steps = stage.length, stage.num_draft_tokens + 1
        shape = (active.shape[0], options.num_draft_tokens, options.vocab_size)

        def fill(carry):
            before, scores = carry
            after, out = loop.step(
                self.middle, self.drafter, before, vocab_size=options.vocab_size, lag=self._lag
            )
            if scores is not None:
                at = before.length - origin
                # Where a full row's end is beyond the last place, both slices move back alike.
                kept = loop.window(scores, at, steps)
                rows = jnp.where(before.done[:, None, None], kept, out.scores.astype(kept.dtype))
                scores = loop.put_rows(scores, rows, at)
            full = after.length - origin >= self.mu
            return after.replace(done=after.done | full), scores

        scores = None if options.filters.greedy else jnp.zeros(shape, jnp.float32)
        return lax.while_loop(
            lambda carry: ~carry[0].done.all(), fill, (stage.replace(done=~active), scores)
        )


def _own(tree: Any) -> Any:
    """Copies: a buffer that stands twice in a state could not be donated."""
    return jax.tree.map(jnp.copy, tree)

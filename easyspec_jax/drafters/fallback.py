"""Two ways of drafting in one: where the first finds nothing, the second drafts.

A text that repeats itself is drafted for free by looking it up; a draft model knows what is new.
Both absorb the same tokens in every step, and each row takes the chain of one of them. A chosen
token beside drawn ones is a token drawn from a q that knows no other: it is accepted with p(x) / 1
and leaves p without x, which is the rule for chosen tokens, so one proposal holds both kinds.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from easyspec_jax.cache import KVCache, run_if
from easyspec_jax.drafter import Drafter
from easyspec_jax.model import Model
from easyspec_jax.request import Request
from easyspec_jax.sharding import shape_of, zeros
from easyspec_jax.stats import Tally
from easyspec_jax.verify import Proposal, Verdict


class FallbackCounters(Tally, struct.PyTreeNode, kw_only=True):
    """What each drafter's chains were worth: [B, 2], the first's and the second's."""

    steps: jax.Array  # i32[B, 2], steps that took its chain
    accepted: jax.Array  # i32[B, 2], tokens of it that the base accepted


class FallbackState(struct.PyTreeNode, kw_only=True):
    """The states of both, which have absorbed the same tokens."""

    first: Any
    second: Any
    taken: jax.Array  # bool[B, 2], whose chain each active row drafted in this step
    counters: FallbackCounters


class FallbackDrafter(Drafter):
    """Drafts what `first` proposes where it proposes anything, else what `second` does, row by row.

    Where `first` serves every row, `second` only absorbs what was committed, which for a draft
    model is one pass in place of γ.

    Args:
      first: usually free and often without a proposal: `PromptLookupDrafter(min_ngram=3)`.
      second: what drafts then, `LayerParallelDrafter(draft)` say. Both draft chains, and neither
        works in the base's cache.

    Raises:
      ValueError: one of them is no drafter.
    """

    first: Drafter
    second: Drafter

    def __post_init__(self):
        for drafter in (self.first, self.second):
            if drafter is None or isinstance(drafter, str | type):
                raise _no_drafter(repr(drafter))

    @property
    def depth(self) -> int:
        """As many as either likes."""
        return max(getattr(drafter, "depth", 0) for drafter in (self.first, self.second))

    def depths(self, most: int) -> tuple[int, ...]:
        """Those of both."""
        return tuple(sorted({*self.first.depths(most)} & {*self.second.depths(most)}))

    @property
    def num_kinds(self) -> int:
        """The first's and the second's."""
        return self.first.num_kinds + self.second.num_kinds

    def foresee(
        self, request: Request, tokens: jax.Array, length: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """The first's draft where it finds one, else the second's."""
        kind, levels = self.first.foresee(request, tokens, length)
        other, deep = self.second.foresee(request, tokens, length)
        found = levels > 0
        kind = jnp.where(found, kind, self.first.num_kinds + other)
        return kind, jnp.where(found, levels, deep)

    @property
    def taps(self) -> tuple[int, ...]:
        """Those of either."""
        return tuple(sorted({*self.first.taps, *self.second.taps}))

    def _tapped(self, features: jax.Array | None) -> list[jax.Array | None]:
        """Of features [B, T, taps, D] those that the first and the second tap."""
        if features is None:
            return [None, None]
        rows = [[self.taps.index(i) for i in x.taps] for x in (self.first, self.second)]
        return [features[:, :, np.array(own)] if own else None for own in rows]

    def check(self, base: Model, num_draft_tokens: int, tree_width: int) -> None:
        """Refuse trees, drafters that work in the base's cache, and what either refuses."""
        if tree_width != 1:
            raise ValueError(
                f"a drafter with a fallback drafts chains: tree_width must be 1, got {tree_width}"
            )
        for drafter in (self.first, self.second):
            if not hasattr(drafter, "propose"):
                raise _no_drafter(type(drafter).__name__)
            if drafter.shares_base_cache:
                raise ValueError(
                    f"{type(drafter).__name__} drafts in the base's own cache, where no other "
                    "drafter can stand beside it: use it alone"
                )
            drafter.check(base, num_draft_tokens, tree_width)

    def models(self) -> tuple[Model, ...]:
        """Those of both."""
        return (*self.first.models(), *self.second.models())

    def abstract_state(self, batch: int, max_len: int, request: Request) -> FallbackState:
        """The states of both."""
        counts = shape_of((batch, 2), jnp.int32)
        return FallbackState(
            first=self.first.abstract_state(batch, max_len, request),
            second=self.second.abstract_state(batch, max_len, request),
            taken=shape_of((batch, 2), jnp.bool_),
            counters=FallbackCounters(steps=counts, accepted=counts),
        )

    def init(self, batch: int, max_len: int, request: Request) -> FallbackState:
        """Empty states of both."""
        shapes = self.abstract_state(batch, max_len, request)
        return zeros(shapes.replace(first=None, second=None)).replace(
            first=self.first.init(batch, max_len, request),
            second=self.second.init(batch, max_len, request),
        )

    def prefill(
        self,
        state: FallbackState,
        request: Request,
        tokens: jax.Array,
        start: jax.Array,
        num: jax.Array,
        features: jax.Array | None,
    ) -> FallbackState:
        """Both absorb prompt tokens, each with the features that it taps."""
        what, tapped = (request, tokens, start, num), self._tapped(features)
        return state.replace(
            first=self.first.prefill(state.first, *what, tapped[0]),
            second=self.second.prefill(state.second, *what, tapped[1]),
        )

    def propose(
        self,
        state: FallbackState,
        request: Request,
        base_cache: KVCache,
        tokens: jax.Array,
        start: jax.Array,
        num: jax.Array,
        key: jax.Array,
    ) -> tuple[Proposal, FallbackState, KVCache]:
        """Both absorb the committed tokens, and rows for which the first finds nothing draft with
        the second.
        """
        keys = jax.random.split(key)
        what = (request, base_cache, tokens, start, num)
        proposal, first, _ = self.first.propose(state.first, *what, keys[0])
        found = proposal.valid[:, 0]
        wanted = ((num > 0) & ~found).any()

        def draft(second):
            proposal, second, _ = self.second.propose(second, *what, keys[1])
            return proposal, second

        def absorb(_, second):
            return _, self.second.prefill(second, request, tokens, start, num, None)

        shapes = jax.eval_shape(lambda: draft(state.second)[0])
        other = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
        # Not one `cond`: that would copy caches.
        other, second = run_if(~wanted, absorb, other, state.second)
        other, second = run_if(wanted, lambda _, second: draft(second), other, second)
        taken = jnp.stack((found, ~found), axis=1) & (num > 0)[:, None]
        state = state.replace(first=first, second=second, taken=taken)
        return _of_either(found, proposal, other, request), state, base_cache

    def observe(self, state: FallbackState, verdict: Verdict, aux: Any) -> FallbackState:
        """Both learn from the verdict, and it is counted for the one whose chain it was."""
        first, second = self._tapped(aux)
        accepted = jnp.where(state.taken, verdict.num_accepted[:, None], 0)
        counters = FallbackCounters(
            steps=state.counters.steps + state.taken.astype(jnp.int32),
            accepted=state.counters.accepted + accepted,
        )
        return state.replace(
            first=self.first.observe(state.first, verdict, first),
            second=self.second.observe(state.second, verdict, second),
            counters=counters,
        )

    def skip(self, state: FallbackState, verdict: Verdict, aux: Any) -> FallbackState:
        """Both look on; nobody's chain was taken."""
        first, second = self._tapped(aux)
        return state.replace(
            first=self.first.skip(state.first, verdict, first),
            second=self.second.skip(state.second, verdict, second),
        )

    def report(self, state: FallbackState) -> dict[str, Any]:
        """How often each drafted, summed over rows, and what of it was accepted.

        Keys: first_steps, first_accepted, second_steps, second_accepted (tokens, those behind a
        stop too), and first and second, their own reports.
        """
        steps, accepted = (
            np.asarray(x).sum(axis=0) for x in (state.counters.steps, state.counters.accepted)
        )
        return {
            "first_steps": int(steps[0]),
            "first_accepted": int(accepted[0]),
            "second_steps": int(steps[1]),
            "second_accepted": int(accepted[1]),
            "first": self.first.report(state.first),
            "second": self.second.report(state.second),
        }


def _no_drafter(got: str) -> ValueError:
    """What is said of something that is none."""
    return ValueError(
        "a fallback needs two drafters, PromptLookupDrafter(min_ngram=3) and "
        f"LayerParallelDrafter(draft) say, got {got}"
    )


def _of_either(found: jax.Array, first: Proposal, second: Proposal, request: Request) -> Proposal:
    """The first's chain in rows of `found` (bool[B]), else the second's."""
    tokens = jnp.where(found[:, None], first.tokens, second.tokens)
    valid = jnp.where(found[:, None], first.valid, second.valid)
    probs, levels = None, None
    if first.probs is not None or second.probs is not None:
        ids = jnp.arange(request.vocab_size, dtype=jnp.int32)[None, None]
        certain, drawn = [
            (ids == x.tokens[..., None]).astype(jnp.float32) if x.probs is None else x.probs
            for x in (first, second)
        ]
        probs = jnp.where(found[:, None, None], certain, drawn)
    if first.levels is not None or second.levels is not None:
        levels = valid.sum(axis=1, dtype=jnp.int32).max()
    return Proposal(
        tokens=tokens,
        parents=jnp.broadcast_to(
            jnp.arange(-1, tokens.shape[1] - 1, dtype=jnp.int32), tokens.shape
        ),
        valid=valid,
        probs=probs,
        levels=levels,
        depth=first.depth,
    )

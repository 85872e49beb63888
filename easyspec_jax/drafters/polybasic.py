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

from easyspec_jax.cache import KVCache
from easyspec_jax.config import is_integer
from easyspec_jax.drafter import Drafter, refuse_no_model
from easyspec_jax.loop import DecodeState, put_rows, step, window
from easyspec_jax.model import Model, forward, forward_tapped, score
from easyspec_jax.request import Request, check_taps
from easyspec_jax.sampling import Scores, probabilities
from easyspec_jax.sharding import shape_of, zeros
from easyspec_jax.stats import Counters, Tally, make_stats
from easyspec_jax.verify import Proposal

NEVER = np.iinfo(np.int32).max


class CatchUps(Tally, struct.PyTreeNode, kw_only=True):
    """Passes over a single committed token."""

    middle: jax.Array  # i32[B]
    inner: jax.Array  # i32[B], of the inner drafter


class PolybasicState(struct.PyTreeNode, kw_only=True):
    """Between steps the stage's first `cache.length` tokens are those the middle's cache covers;
    what the base made of the buffer behind its committed tokens shows in the next call.
    """

    stage: DecodeState  # with the middle as base; a stop id or `mu` tokens end its rows
    catch_ups: CatchUps


class FillState(struct.PyTreeNode, kw_only=True):
    """The inner drafter's state while one buffer is filled."""

    inner: Any
    # f32[B, γ, V], the middle's logits that each token was chosen by; None where greedy
    scores: jax.Array | None
    origin: jax.Array  # i32[B], length of the text before the buffer
    at: jax.Array  # i32[B], tokens in the buffer before this step
    active: jax.Array  # bool[B], rows that this step fills
    # i32[B], 1 where the middle's cache lacks the entry before the root, of the token `before`
    missing: jax.Array
    before: jax.Array  # i32[B]


def lag(drafter: Drafter) -> int:
    """Tokens before its root that the middle may lack when its step begins: where the base accepts
    a whole buffer it lacks one, which its next pass begins with; none below which a drafter works
    with its cache or its features.
    """
    return 0 if drafter.shares_base_cache or drafter.taps else 1


def correct(
    text: jax.Array, tokens: jax.Array, start: jax.Array, num: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The text (i32[B, S]) with the first num[b] of i32[B, W] tokens at start[b], and where it
    first said something else.
    """
    known = window(text, start, tokens.shape[1])
    new = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None] < num[:, None]
    same = jnp.cumprod((known == tokens) & new, axis=1, dtype=jnp.int32)
    agreed = start + same.sum(axis=1, dtype=jnp.int32)
    return put_rows(text, jnp.where(new, tokens, known), start), agreed


class Fill(Drafter):
    """The inner drafter, as the middle's stage has it: what the middle says is remembered, and its
    pass begins where its cache ends.
    """

    drafter: Drafter

    def propose(self, state, request, base_cache, tokens, start, num, key):
        """As the inner drafter."""
        proposal, inner, base_cache = self.drafter.propose(
            state.inner, request, base_cache, tokens, start, num, key
        )
        state = state.replace(inner=inner, at=start + num - state.origin, active=num > 0)
        return proposal, state, base_cache

    def verify(self, base, base_cache, root, proposal, state):
        """As the inner drafter; the default pass may begin one token before the root."""
        if lag(self.drafter) == 0:
            scores, cache, aux = self.drafter.verify(base, base_cache, root, proposal, state.inner)
            return scores, cache, (scores, aux)
        n = proposal.tokens.shape[1]
        text = jnp.concatenate((state.before[:, None], root[:, None], proposal.tokens), axis=1)
        text = window(jnp.pad(text, ((0, 0), (0, 1))), 1 - state.missing, n + 2)
        cache = base_cache.rollback(base_cache.length - state.missing)
        hidden, cache = forward(base, text, cache)
        scores = score(base, window(hidden, state.missing, n + 1))
        return scores, cache, (scores, None)

    def observe(self, state, verdict, aux):
        """The middle lacks nothing now; its scores stand where the tokens do."""
        scores, aux = aux
        kept = state.scores
        if kept is not None:
            rows = Scores.of(scores).fit(kept.shape[-1]).whole().astype(kept.dtype)
            # Where a full row's end is beyond the last place, both slices move back alike.
            old = window(kept, state.at, rows.shape[1])
            kept = put_rows(kept, jnp.where(state.active[:, None, None], rows, old), state.at)
        inner = self.drafter.observe(state.inner, verdict, aux)
        return state.replace(inner=inner, scores=kept, missing=jnp.zeros_like(state.missing))


class PolybasicDrafter(Drafter):
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
      ValueError: no model, no drafter, or mu is no whole number above 0.
    """

    middle: Model
    drafter: Drafter
    mu: int = struct.field(pytree_node=False, default=8, kw_only=True)

    def __post_init__(self):
        refuse_no_model(self.middle)
        if self.drafter is None or isinstance(self.drafter, str | type):
            raise ValueError(
                "the middle model needs a drafter, LayerParallelDrafter(draft) say, got "
                f"{self.drafter!r}"
            )
        if not is_integer(self.mu) or self.mu < 1:
            raise ValueError(f"mu must be a whole number above 0, got {self.mu!r}")

    @property
    def depth(self) -> int:
        """A full buffer and the last draft of the one below."""
        return self.mu + getattr(self.drafter, "depth", 0)  # `check` refuses what is no drafter

    def depths(self, most: int) -> tuple[int, ...]:
        """A full buffer or none: its parts are of a size that stays."""
        return (0, most)

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
            check_taps(self.middle, self.drafter)
        except ValueError as error:
            raise ValueError(
                f"the inner drafter, with num_draft_tokens - mu = {levels} levels: {error}"
            ) from None

    def models(self) -> tuple[Model, ...]:
        """The middle and those of the inner drafter."""
        return (self.middle, *self.drafter.models())

    def abstract_state(self, batch: int, max_len: int, request: Request) -> PolybasicState:
        """Caches of the middle and of the inner drafter."""
        inner = self._inner(request)
        # A row whose buffer is full is run on with those that fill theirs: its scratch needs room.
        # GPUs copy all values in every pass, padded, where their number does not divide well.
        size = -(-(max_len + inner.num_draft_tokens + 1) // 64) * 64
        row = shape_of((batch,), jnp.int32)
        counters = Counters.zeros(batch, inner.num_draft_tokens)
        stage = DecodeState(
            tokens=shape_of((batch, size), jnp.int32),
            length=row,
            limit=row,
            absorbed=row,
            done=shape_of((batch,), bool),
            cache=self.middle.abstract_cache(batch, size),
            draft=self.drafter.abstract_state(batch, size, inner),
            counters=jax.eval_shape(lambda: counters),
            logprobs=None,
            step=shape_of((), jnp.int32),
        )
        return PolybasicState(stage=stage, catch_ups=CatchUps(middle=row, inner=row))

    def init(self, batch: int, max_len: int, request: Request) -> PolybasicState:
        """Empty caches of the middle and of the inner drafter; no row ends by its length."""
        shapes = self.abstract_state(batch, max_len, request)
        size = shapes.stage.tokens.shape[1]
        state = zeros(shapes.replace(stage=shapes.stage.replace(draft=None)))
        stage = state.stage.replace(
            length=np.ones((batch,), np.int32),
            limit=np.full((batch,), NEVER, np.int32),
            draft=self.drafter.init(batch, size, self._inner(request)),
        )
        return state.replace(stage=stage)

    def prefill(
        self,
        state: PolybasicState,
        request: Request,
        tokens: jax.Array,
        start: jax.Array,
        num: jax.Array,
        features: jax.Array | None,
    ) -> PolybasicState:
        """Both stages absorb prompt tokens; the inner drafter taps the middle."""
        del features
        stage, inner = state.stage, self._inner(request)
        cache, taps = stage.cache.rollback(start), self.drafter.taps
        _, cache, tapped = forward_tapped(self.middle, tokens, cache, taps, num=num)
        # A short row of a batch meets chunks that begin behind its end.
        covered = jnp.where(num > 0, start + num, jnp.minimum(stage.cache.length, start))
        stage = stage.replace(
            tokens=put_rows(stage.tokens, tokens, start),
            length=covered + 1,
            cache=cache.rollback(covered),
            draft=self.drafter.prefill(stage.draft, inner, tokens, start, num, tapped),
            absorbed=covered,
        )
        return state.replace(stage=stage)

    def propose(
        self,
        state: PolybasicState,
        request: Request,
        base_cache: KVCache,
        tokens: jax.Array,
        start: jax.Array,
        num: jax.Array,
        key: jax.Array,
    ) -> tuple[Proposal, PolybasicState, KVCache]:
        """Absorb the committed tokens, most of which the stages have made themselves, then fill the
        buffer. With γ <= mu (`check` refuses it) nothing is drafted.
        """
        with jax.named_scope("absorb"):
            stage, behind = self._absorb(state.stage, request, tokens, start, num)
        caught_up = jax.tree.map(jnp.add, state.catch_ups, behind)
        origin, scores = stage.length, None
        if request.num_draft_tokens > self.mu:
            with jax.named_scope("middle"):
                stage, scores = self._fill(stage, request.replace(key=key), num > 0)
        at = jnp.arange(request.num_draft_tokens, dtype=jnp.int32)[None]
        drafted = window(stage.tokens, origin, request.num_draft_tokens)
        proposal = Proposal(
            tokens=drafted,
            parents=jnp.broadcast_to(at - 1, drafted.shape),
            valid=at < (stage.length - origin)[:, None],
            probs=None if scores is None else probabilities(scores, request.filters),
            depth=request.num_draft_tokens,
        )
        return proposal, PolybasicState(stage=stage, catch_ups=caught_up), base_cache

    def report(self, state: PolybasicState) -> dict[str, Any]:
        """How the middle's stage went, summed over rows; passes are those a row took part in.

        Keys: middle_passes (verifications and catch-ups), middle_catch_up_passes, buffered_tokens,
        tokens_per_middle_pass (by verification, its own token included), middle_acceptance_rate,
        middle_accepted_histogram (verifications by accepted tokens), inner_drafts (as many as
        verifications), inner_draft_tokens (for a model that drafts a chain, its passes too, with
        inner_catch_up_passes), and inner, the inner drafter's own report.
        """
        stats = make_stats(state.stage.counters)
        caught_up = state.catch_ups
        middle, inner = (int(np.asarray(n).sum()) for n in (caught_up.middle, caught_up.inner))
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

    def _inner(self, request: Request) -> Request:
        """What the inner drafter is asked for."""
        levels = max(request.num_draft_tokens - self.mu, 1)
        return request.replace(num_draft_tokens=levels, tree_width=1, pacing=None)

    def _absorb(
        self,
        stage: DecodeState,
        request: Request,
        tokens: jax.Array,
        start: jax.Array,
        num: jax.Array,
    ) -> tuple[DecodeState, CatchUps]:
        """The stage at the end of the committed tokens (arguments as `propose`'s), with no more
        missing than its step absorbs by itself; and the passes this took.

        Entries of tokens that it had in its buffer are kept as they are. A row with num = 0 stays
        as it is.
        """
        inner = self._inner(request)
        active, width = num > 0, inner.num_draft_tokens + 1
        absorb = lambda state, *new: self.drafter.prefill(state, inner, *new)  # noqa: E731
        taps, spare = self.drafter.taps, 1 + lag(self.drafter)
        text, agreed = correct(stage.tokens, tokens, start, num)
        length = jnp.where(active, start + num, stage.length)
        common = jnp.minimum(agreed, start + num - 1)
        covered = lambda count: jnp.where(active, jnp.minimum(count, common), count)  # noqa: E731

        def lacking(count, spare):
            return (active & (count + spare < length)).astype(jnp.int32)

        def middle_catches_up(carry):
            cache, (draft, absorbed), passes, inner_passes = carry
            num, start = lacking(cache.length, spare), cache.length
            if taps:  # tokens before, whose features it has observed, come first
                before = jnp.where(num > 0, jnp.minimum(start - absorbed, width), 0)
                draft = absorb(draft, window(text, absorbed, width), absorbed, before, None)
                absorbed, inner_passes = absorbed + before, inner_passes + jnp.minimum(before, 1)
                num = jnp.where(absorbed == start, num, 0)
            one = window(text, start, 1)
            _, cache, features = forward_tapped(self.middle, one, cache, taps, num=num)
            if taps:
                draft = absorb(draft, one, jnp.where(num > 0, start, absorbed), num, features)
                absorbed, inner_passes = absorbed + num, inner_passes + num
            return cache, (draft, absorbed), passes + num, inner_passes

        def inner_catches_up(carry):
            (draft, absorbed), passes = carry
            num = lacking(absorbed, width)
            draft = absorb(draft, window(text, absorbed, 1), absorbed, num, None)
            return (draft, absorbed + num), passes + num

        cache, none = stage.cache.rollback(covered(stage.cache.length)), jnp.zeros_like(num)
        below = stage.draft, covered(stage.absorbed)
        cache, below, middle, passes = lax.while_loop(
            lambda c: (lacking(c[0].length, spare) > 0).any(),
            middle_catches_up,
            (cache, below, none, none),
        )
        (draft, absorbed), passes = lax.while_loop(
            lambda c: (lacking(c[0][1], width) > 0).any(), inner_catches_up, (below, passes)
        )
        where = {"length": length, "absorbed": absorbed}
        stage = stage.replace(tokens=text, cache=cache, draft=draft, **where)
        return stage, CatchUps(middle=middle, inner=passes)

    def _fill(
        self, stage: DecodeState, request: Request, active: jax.Array
    ) -> tuple[DecodeState, jax.Array | None]:
        """The stage after enough steps for mu tokens in every active row, and the middle's logits
        (f[B, γ, V]) that each of them was chosen by; None where greedy.
        """
        origin, inner, none = stage.length, self._inner(request), jnp.zeros_like(stage.length)
        shape = (active.shape[0], request.num_draft_tokens, request.vocab_size)
        draft = FillState(
            inner=stage.draft,
            scores=None if request.filters.greedy else jnp.zeros(shape, jnp.float32),
            origin=origin,
            at=none,
            active=active,
            missing=(stage.cache.length < origin - 1).astype(jnp.int32),
            before=window(stage.tokens, origin - 2, 1)[:, 0],
        )

        def fill(before):
            after, _ = step(self.middle, Fill(self.drafter), inner, before)
            return after.replace(done=after.done | (after.length - origin >= self.mu))

        stage = lax.while_loop(
            lambda s: ~s.done.all(), fill, stage.replace(done=~active, draft=draft)
        )
        return stage.replace(draft=stage.draft.inner), stage.draft.scores

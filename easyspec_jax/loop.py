"""The decoding loop on the device: prefill, one step, and the while_loop of steps.

One step function serves generation, streaming, speculation and plain autoregression, whose drafter
drafts nothing. The whole state is donated, so caches are updated in place from the first token to
the last; what a request fixes stands beside it.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax

from easyspec_jax.cache import KVCache, run_if
from easyspec_jax.depth import CATCH_UP, Pace
from easyspec_jax.drafter import Drafter, Waiting
from easyspec_jax.model import Model, forward_tapped
from easyspec_jax.request import Request
from easyspec_jax.sampling import Scores
from easyspec_jax.sharding import mesh_jit
from easyspec_jax.stats import Counters, count
from easyspec_jax.verify import Proposal, Verdict, accept_path

# Parts of a step; its operations are named so in compiled programs and in profiles.
PHASES = ("calibrate", "draft", "verify", "commit")


class DecodeState(struct.PyTreeNode, kw_only=True):
    """Everything that one batch carries from step to step.

    Between steps the base cache covers all committed tokens but the last, the root of the next
    step; the drafter has absorbed the first `absorbed` of them.
    """

    # i32[B, S], prompt and new tokens; what lies at or beyond `length` is scratch
    tokens: jax.Array
    length: jax.Array  # i32[B], committed tokens
    limit: jax.Array  # i32[B], the row stops at this length
    absorbed: jax.Array  # i32[B], in [length - 1 - γ, length]; less where drafting was left out
    done: jax.Array  # bool[B]; a finished row never changes again
    cache: KVCache  # of the base
    draft: Any  # the drafter's state
    counters: Counters
    # f32[B, S], log p of each new token at temperature 1, unfiltered; None: not asked for
    logprobs: jax.Array | None
    step: jax.Array  # i32[]
    pace: Pace | None = None  # where the depth of each step is chosen


class Emission(struct.PyTreeNode, kw_only=True):
    """What one step committed: tokens[b, :num_emitted[b]]."""

    tokens: jax.Array  # i32[B, γ + 1]
    num_emitted: jax.Array  # i32[B], 0 for a finished row
    num_accepted: jax.Array  # i32[B], accepted draft tokens before any cut
    tries: jax.Array  # i32[B, γ], nodes tried at each depth
    num_drafted: jax.Array  # i32[B], nodes there were to try
    depth: jax.Array  # i32[], levels that were asked for


def step(
    base: Model, drafter: Drafter, request: Request, state: DecodeState
) -> tuple[DecodeState, Emission]:
    """Draft, verify and commit once; a finished row stays as it is."""
    draft_key, verify_key = jax.random.split(jax.random.fold_in(request.key, state.step))
    root = window(state.tokens, state.length - 1, 1)[:, 0]
    recent = window(state.tokens, state.absorbed, request.num_draft_tokens + 1)
    new = jnp.where(state.done, 0, state.length - state.absorbed)
    cache = state.cache.rollback(state.length - 1)
    proposal, draft, cache = drafter.propose(
        state.draft, request, cache, recent, state.absorbed, new, draft_key
    )
    with jax.named_scope("verify"):
        scores, cache, aux = drafter.verify(base, cache, root, proposal, draft)
        scores = Scores.of(scores).fit(request.vocab_size)
        verdict = accept_path(scores, proposal, request.filters, verify_key)
        if not proposal.is_chain:
            cache = cache.keep(state.length, verdict.path)
    seen = verdict.replace(length=state.length, active=~state.done)
    draft = drafter.observe(draft, seen, aux)
    with jax.named_scope("commit"):
        state = state.replace(cache=cache, draft=draft)
        return _commit(request, state, proposal, verdict, scores)


def _commit(
    request: Request,
    state: DecodeState,
    proposal: Proposal,
    verdict: Verdict,
    scores: Scores,
) -> tuple[DecodeState, Emission]:
    """Append accepted tokens and the base's own, up to the first stop token or the length limit."""
    at = jnp.arange(request.num_draft_tokens + 1, dtype=jnp.int32)[None]
    drafted = jnp.take_along_axis(proposal.tokens, verdict.path, axis=1)
    padded = jnp.pad(drafted, ((0, 0), (0, 1)))
    tokens = jnp.where(at == verdict.num_accepted[:, None], verdict.next_token[:, None], padded)
    offered = at <= verdict.num_accepted[:, None]
    is_stop = (tokens[..., None] == request.eos_ids[None, None]).any(axis=-1) & offered
    first_stop = jnp.where(is_stop, at, at.shape[1]).min(axis=1)
    num = jnp.minimum(jnp.minimum(verdict.num_accepted, first_stop) + 1, state.limit - state.length)
    num = jnp.where(state.done, 0, num).astype(jnp.int32)
    stopped = first_stop < num
    length = state.length + num
    num_drafted = proposal.valid.sum(axis=1, dtype=jnp.int32)
    logprobs = state.logprobs
    if logprobs is not None:
        on_path = jnp.pad(verdict.path + 1, ((0, 0), (1, 0)))
        rows = jnp.take_along_axis(scores.whole(), on_path[..., None], axis=1).astype(jnp.float32)
        chosen = jnp.take_along_axis(rows, tokens[..., None], axis=-1)[..., 0]
        logprobs = put_rows(logprobs, chosen - jax.nn.logsumexp(rows, axis=-1), state.length)
    depth, spare = jnp.int32(request.num_draft_tokens), state.counters.tried.shape[1]
    # Where depths are chosen, a step may have fewer levels than there is room for.
    pad = lambda x, size: jnp.pad(x, ((0, 0), (0, size - x.shape[1])))  # noqa: E731
    emission = Emission(
        tokens=pad(tokens, spare + 1),
        num_emitted=num,
        num_accepted=verdict.num_accepted,
        tries=pad(verdict.tries, spare),
        num_drafted=num_drafted,
        depth=depth,
    )
    new = state.replace(
        tokens=put_rows(state.tokens, tokens, state.length),
        length=length,
        absorbed=jnp.where(state.done, state.absorbed, state.length),
        done=state.done | stopped | (length >= state.limit),
        cache=state.cache.rollback(length - 1),
        counters=count(
            state.counters, verdict.num_accepted, emission.tries, num_drafted, num, depth
        ),
        logprobs=logprobs,
        step=state.step + 1,
    )
    return new, emission


def window(x: jax.Array, start: jax.Array, width: int) -> jax.Array:
    """x[b, start[b] : start[b] + width] of every row, [B, width, ...]."""
    return jax.vmap(lambda row, s: lax.dynamic_slice_in_dim(row, s, width))(x, start)


def put_rows(x: jax.Array, values: jax.Array, start: jax.Array) -> jax.Array:
    """x with values[b] written at start[b] in every row."""
    return jax.vmap(lambda row, v, s: lax.dynamic_update_slice_in_dim(row, v, s, 0))(
        x, values, start
    )


@mesh_jit(out="state", donate="state", static_argnames="chunk")
def prefill_chunk(
    base: Model,
    drafter: Drafter,
    request: Request,
    state: DecodeState,
    start: jax.Array,
    *,
    chunk: int,
) -> DecodeState:
    """Absorb prompt tokens [start, start + chunk) of every row, but never its last: that is the
    root of the first step.

    Args:
      state: donated.
      start: i32[]; start + chunk must not exceed S.
    """
    last = state.length - 1
    starts = jnp.broadcast_to(start, last.shape)
    num = jnp.clip(last - start, 0, chunk)
    tokens = lax.dynamic_slice_in_dim(state.tokens, start, chunk, axis=1)
    cache = state.cache.rollback(starts)
    _, cache, features = forward_tapped(base, tokens, cache, drafter.taps, num=num)
    draft = drafter.prefill(state.draft, request, tokens, starts, num, features)
    return state.replace(cache=cache, draft=draft)


@mesh_jit(out="state", donate="state")
def run_loop(base: Model, drafter: Drafter, request: Request, state: DecodeState) -> DecodeState:
    """Step until every row is done; `state` is donated."""

    def going(state):
        return ~state.done.all()

    if request.pacing is None:
        return lax.while_loop(going, lambda s: step(base, drafter, request, s)[0], state)
    depths, take = request.pacing.depths, functools.partial(step_of_depth, base, drafter, request)

    def turns(state):
        for number, depth in enumerate(depths):  # each as often as it is chosen again
            state = lax.while_loop(
                lambda s, number=number: going(s) & (_pace(s).choice == number),
                lambda s, depth=depth: choose(drafter, request, take(depth, s)[0]),
                state,
            )
        return state

    return lax.while_loop(going, turns, choose(drafter, request, state))


@mesh_jit(out=("state", None), donate="state")
def run_step(
    base: Model, drafter: Drafter, request: Request, state: DecodeState
) -> tuple[DecodeState, Emission]:
    """One step, for streaming; `state` is donated."""
    if request.pacing is None:
        return step(base, drafter, request, state)
    take = functools.partial(step_of_depth, base, drafter, request)
    shapes = jax.eval_shape(lambda: take(request.num_draft_tokens, state)[1])
    emission = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    state = choose(drafter, request, state)
    choice = _pace(state).choice  # the turn itself may not change who has one
    for number, depth in enumerate(request.pacing.depths):
        state, emission = run_if(
            choice == number, lambda s, _, depth=depth: take(depth, s), state, emission
        )
    return state, emission


def choose(drafter: Drafter, request: Request, state: DecodeState) -> DecodeState:
    """The state with a depth for its next step."""
    assert request.pacing is not None
    with jax.named_scope("commit"):
        kind, levels = drafter.foresee(request, state.tokens, state.length)
        pace = _pace(state).choose(request.pacing, kind, levels, ~state.done)
        return state.replace(pace=pace)


def step_of_depth(
    base: Model, drafter: Drafter, request: Request, depth: int, state: DecodeState
) -> tuple[DecodeState, Emission]:
    """A step with so many levels, and what it taught. With none the drafter does not run: it falls
    behind, and absorbs what it missed before it drafts again.
    """
    active, shallow = ~state.done, request.replace(num_draft_tokens=depth)
    if depth:
        state, emission = step(base, drafter, shallow, _caught_up(drafter, request, state, depth))
    else:
        absorbed = state.absorbed
        state, emission = step(base, Waiting(drafter), shallow, state)
        state = state.replace(absorbed=absorbed)
    with jax.named_scope("commit"):
        pace = _pace(state).learn(depth, emission.num_accepted, active)
    return state.replace(pace=pace), emission


def _pace(state: DecodeState) -> Pace:
    assert state.pace is not None  # only asked where depths are chosen
    return state.pace


def _caught_up(drafter: Drafter, request: Request, state: DecodeState, depth: int) -> DecodeState:
    """The state whose drafter lacks no more than a step of `depth` levels absorbs by itself."""
    size = state.tokens.shape[1]
    width = min(CATCH_UP, size)

    def lacking(absorbed):
        return jnp.where(state.done, 0, jnp.maximum(state.length - absorbed - (depth + 1), 0))

    def absorb(carry):
        draft, absorbed = carry
        # Moved back where it would not fit: absorbing again changes nothing.
        start = jnp.minimum(absorbed, size - width)
        num = jnp.minimum(absorbed + lacking(absorbed) - start, width)
        recent = window(state.tokens, start, width)
        return drafter.prefill(draft, request, recent, start, num, None), start + num

    with jax.named_scope("calibrate"):
        draft, absorbed = lax.while_loop(
            lambda carry: (lacking(carry[1]) > 0).any(), absorb, (state.draft, state.absorbed)
        )
    return state.replace(draft=draft, absorbed=absorbed)

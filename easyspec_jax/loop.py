"""The decoding loop on the device: prefill, one step, and the while_loop of steps.

One step function serves generation, streaming, speculation and plain autoregression (no drafter).
The whole state is donated, so caches are updated in place from the first token to the last.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax

from easyspec_jax.cache import KVCache, own_slots, stacked_like
from easyspec_jax.drafters.base import verify_in_one_pass
from easyspec_jax.model import Model, forward, logits
from easyspec_jax.sampling import Filters, Proposal, Verdict, fit_vocab, verify
from easyspec_jax.sharding import on_mesh, specs_of
from easyspec_jax.stats import Counters, count


@struct.dataclass(kw_only=True)
class DecodeState:
    """Everything that one batch carries from step to step.

    Between steps the base cache covers all committed tokens but the last, the root of the next
    step; the drafter has absorbed the first `absorbed` of them.
    """

    tokens: (
        jax.Array
    )  # i32[B, S], prompt and new tokens; what lies at or beyond `length` is scratch
    length: jax.Array  # i32[B], committed tokens
    limit: jax.Array  # i32[B], the row stops at this length
    absorbed: jax.Array  # i32[B], in [length - 1 - γ, length]
    done: jax.Array  # bool[B]; a finished row never changes again
    cache: KVCache  # of the base
    draft: Any  # the drafter's state; None without one
    counters: Counters
    logprobs: (
        jax.Array | None
    )  # f32[B, S], log p of each new token at temperature 1, unfiltered; None: not asked for
    key: jax.Array  # of the whole run; every step folds in its number
    step: jax.Array  # i32[]
    eos_ids: jax.Array  # i32[E], padded with -1
    filters: Filters

    @property
    def num_draft_tokens(self) -> int:
        """γ; 0 for autoregression."""
        return self.counters.tried.shape[1]


@struct.dataclass(kw_only=True)
class Emission:
    """What one step committed: tokens[b, :num_emitted[b]]."""

    tokens: jax.Array  # i32[B, γ + 1]
    num_emitted: jax.Array  # i32[B], 0 for a finished row
    num_accepted: jax.Array  # i32[B], accepted draft tokens before any cut
    tries: jax.Array  # i32[B, γ], nodes tried at each depth
    num_drafted: jax.Array  # i32[B], nodes there were to try
    # f[B, n + 1, V], the base's logits at the root and behind each node; None: not asked for
    scores: jax.Array | None = None


def step(
    base: Model,
    drafter: Any,
    state: DecodeState,
    *,
    vocab_size: int | None = None,
    lag: int = 0,
) -> tuple[DecodeState, Emission]:
    """Draft, verify and commit once; a finished row stays as it is.

    Args:
      vocab_size: for a base that itself drafts for a larger one: the ids it chooses from are cut
        (or padded) to that many, and the emission holds its scores.
      lag: committed tokens before the root that the base's cache may lack too. If not 0, the draft
        must be a chain, and the base verifies it in one whole pass.
    """
    draft_key, verify_key = jax.random.split(jax.random.fold_in(state.key, state.step))
    root = window(state.tokens, state.length - 1, 1)[:, 0]
    covered = state.length - 1
    cache = state.cache.rollback(jnp.minimum(state.cache.length, covered) if lag else covered)
    if drafter is None:
        proposal, draft = no_proposal(state.length.shape[0]), None
    else:
        width = state.num_draft_tokens + 1
        recent = window(state.tokens, state.absorbed, width)
        new = jnp.where(state.done, 0, state.length - state.absorbed)
        proposal, draft, cache = drafter.propose(
            state.draft, cache, recent, state.absorbed, new, draft_key
        )
    with jax.named_scope("verify"):
        if drafter is None:
            scores, cache, aux = verify_in_one_pass(base, cache, root, proposal)
        elif lag:
            scores, cache, aux = *_verify_behind(base, cache, state, proposal, lag), None
        else:
            scores, cache, aux = drafter.verify(base, cache, root, proposal, draft)
        if vocab_size is not None:
            scores = fit_vocab(scores, vocab_size)
        verdict = verify(scores, proposal, state.filters, verify_key)
        if not proposal.is_chain:
            cache = cache.keep(state.length, verdict.path)
    if drafter is not None:
        draft = drafter.observe(draft, verdict, aux)
    with jax.named_scope("commit"):
        state = state.replace(cache=cache, draft=draft)
        state, emission = _commit(state, proposal, verdict, scores)
    return state, emission if vocab_size is None else emission.replace(scores=scores)


def _verify_behind(
    base: Model, cache: KVCache, state: DecodeState, proposal: Proposal, lag: int
) -> tuple[jax.Array, KVCache]:
    """As `verify_in_one_pass`, of a chain, in a pass that begins where the cache ends."""
    n = proposal.tokens.shape[1]
    text = put_rows(state.tokens, proposal.tokens, state.length)
    missing = state.length - 1 - cache.length
    hidden, cache = forward(base, window(text, cache.length, lag + 1 + n), cache)
    return logits(base, window(hidden, missing, n + 1)), cache


def _commit(
    state: DecodeState, proposal: Proposal, verdict: Verdict, scores: jax.Array
) -> tuple[DecodeState, Emission]:
    """Append accepted tokens and the base's own, up to the first stop token or the length limit."""
    at = jnp.arange(state.num_draft_tokens + 1, dtype=jnp.int32)[None]
    drafted = jnp.take_along_axis(proposal.tokens, verdict.path, axis=1)
    padded = jnp.pad(drafted, ((0, 0), (0, 1)))
    tokens = jnp.where(at == verdict.num_accepted[:, None], verdict.next_token[:, None], padded)
    offered = at <= verdict.num_accepted[:, None]
    is_stop = (tokens[..., None] == state.eos_ids[None, None]).any(axis=-1) & offered
    first_stop = jnp.where(is_stop, at, at.shape[1]).min(axis=1)
    num = jnp.minimum(jnp.minimum(verdict.num_accepted, first_stop) + 1, state.limit - state.length)
    num = jnp.where(state.done, 0, num).astype(jnp.int32)
    stopped = first_stop < num
    length = state.length + num
    num_drafted = proposal.valid.sum(axis=1, dtype=jnp.int32)
    logprobs = state.logprobs
    if logprobs is not None:
        on_path = jnp.pad(verdict.path + 1, ((0, 0), (1, 0)))
        scores = jnp.take_along_axis(scores, on_path[..., None], axis=1).astype(jnp.float32)
        chosen = jnp.take_along_axis(scores, tokens[..., None], axis=-1)[..., 0]
        logprobs = put_rows(logprobs, chosen - jax.nn.logsumexp(scores, axis=-1), state.length)
    new = state.replace(
        tokens=put_rows(state.tokens, tokens, state.length),
        length=length,
        absorbed=jnp.where(state.done, state.absorbed, state.length),
        done=state.done | stopped | (length >= state.limit),
        cache=state.cache.rollback(length - 1),
        counters=count(state.counters, verdict.num_accepted, verdict.tries, num_drafted, num),
        logprobs=logprobs,
        step=state.step + 1,
    )
    emission = Emission(
        tokens=tokens,
        num_emitted=num,
        num_accepted=verdict.num_accepted,
        tries=verdict.tries,
        num_drafted=num_drafted,
    )
    return new, emission


def no_proposal(batch: int) -> Proposal:
    """The proposal of autoregression: no nodes."""
    empty = jnp.zeros((batch, 0), jnp.int32)
    return Proposal(tokens=empty, parents=empty, valid=jnp.zeros((batch, 0), bool), depth=0)


def window(x: jax.Array, start: jax.Array, width: int) -> jax.Array:
    """x[b, start[b] : start[b] + width] of every row, [B, width, ...]."""
    return jax.vmap(lambda row, s: lax.dynamic_slice_in_dim(row, s, width))(x, start)


def put_rows(x: jax.Array, values: jax.Array, start: jax.Array) -> jax.Array:
    """x with values[b] written at start[b] in every row."""
    return jax.vmap(lambda row, v, s: lax.dynamic_update_slice_in_dim(row, v, s, 0))(
        x, values, start
    )


@struct.dataclass
class Specs:
    """PartitionSpecs of a pytree as a hashable value, for static arguments."""

    leaves: tuple = struct.field(pytree_node=False)
    structure: Any = struct.field(pytree_node=False)

    @classmethod
    def of(cls, tree: Any) -> Specs:
        """The specs that the arrays of `tree` have."""
        leaves, structure = jax.tree.flatten(specs_of(tree))
        return cls(tuple(leaves), structure)

    @property
    def tree(self) -> Any:
        """A pytree of PartitionSpecs."""
        return jax.tree.unflatten(self.structure, self.leaves)


@functools.partial(jax.jit, static_argnames=("chunk", "specs"), donate_argnames="state")
def prefill_chunk(
    base: Model, drafter: Any, state: DecodeState, start: jax.Array, *, chunk: int, specs: Specs
) -> DecodeState:
    """Absorb prompt tokens [start, start + chunk) of every row, but never its last: that is the
    root of the first step.

    Args:
      state: donated.
      start: i32[]; start + chunk must not exceed S.
      specs: of (base, drafter, state).
    """
    base_specs, drafter_specs, state_specs = specs.tree

    def run(base, drafter, state, start):
        before, state = state, own_slots(state)
        last = state.length - 1
        starts = jnp.broadcast_to(start, last.shape)
        num = jnp.clip(last - start, 0, chunk)
        tokens = lax.dynamic_slice_in_dim(state.tokens, start, chunk, axis=1)
        _, cache = forward(base, tokens, state.cache.rollback(starts), num=num)
        draft = drafter.prefill(state.draft, tokens, starts, num) if drafter is not None else None
        return stacked_like(before, state.replace(cache=cache, draft=draft))

    in_specs = (base_specs, drafter_specs, state_specs, jax.sharding.PartitionSpec())
    return on_mesh(run, base.layout.mesh, in_specs, state_specs)(base, drafter, state, start)


@functools.partial(jax.jit, static_argnames="specs", donate_argnames="state")
def run_loop(base: Model, drafter: Any, state: DecodeState, *, specs: Specs) -> DecodeState:
    """Step until every row is done; `state` is donated, `specs` are those of (base, drafter,
    state).
    """

    def run(base, drafter, state):
        own = own_slots(state)
        end = lax.while_loop(lambda s: ~s.done.all(), lambda s: step(base, drafter, s)[0], own)
        return stacked_like(state, end)

    return on_mesh(run, base.layout.mesh, specs.tree, specs.tree[2])(base, drafter, state)


@functools.partial(jax.jit, static_argnames="specs", donate_argnames="state")
def run_step(
    base: Model, drafter: Any, state: DecodeState, *, specs: Specs
) -> tuple[DecodeState, Emission]:
    """One step, for streaming; arguments as in `run_loop`."""

    def run(base, drafter, state):
        end, emission = step(base, drafter, own_slots(state))
        return stacked_like(state, end), emission

    out_specs = (specs.tree[2], jax.sharding.PartitionSpec())
    return on_mesh(run, base.layout.mesh, specs.tree, out_specs)(base, drafter, state)

"""Where a step's time goes: every phase run alone, many times inside one compiled loop.

Phases are parts of one compiled step, so they cannot be timed in place; each is compiled by itself,
in a counted loop that carries the caches as the real loop does, and the rest of a step is what
remains.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from easyspec_jax import loop
from easyspec_jax.cache import own_slots, stacked_like
from easyspec_jax.drafters.base import verify_in_one_pass
from easyspec_jax.model import Model
from easyspec_jax.sampling import verify
from easyspec_jax.sharding import on_mesh


def _step(base, drafter, state):
    """A step that leaves its row where it was: one that has finished may do less."""
    after = loop.step(base, drafter, state)[0]
    where = ("length", "limit", "absorbed", "done")
    return after.replace(**{name: getattr(state, name) for name in where})


def _propose(base, drafter, state):
    proposal, draft, cache = _proposal(drafter, state, state.draft)
    return _use(state.replace(draft=draft, cache=cache), proposal.tokens)


def _calibrate(base, drafter, state):
    """Proposing a single token is the pass over the committed ones and nothing more."""
    options = state.draft.options
    one = drafter.resume(state.draft, options.replace(num_draft_tokens=1))
    proposal, draft, cache = _proposal(drafter, state, one)
    draft = drafter.resume(draft, options)
    return _use(state.replace(draft=draft, cache=cache), proposal.tokens)


def _verify(base, drafter, state):
    cache = state.cache.rollback(state.length - 1)
    if drafter is None:
        proposal = loop.no_proposal(state.length.shape[0])
        scores, cache, _ = verify_in_one_pass(base, cache, state.tokens[:, 0], proposal)
    else:
        shapes = jax.eval_shape(lambda: _proposal(drafter, state, state.draft)[0])
        proposal = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
        if proposal.levels is not None:  # the largest of its sizes
            proposal = proposal.replace(levels=jnp.int32(proposal.depth))
        root = state.tokens[:, 0]
        scores, cache, _ = drafter.verify(base, cache, root, proposal, state.draft)
    verdict = verify(scores, proposal, state.filters, state.key)
    return _use(state.replace(cache=cache), verdict.next_token[:, None])


def _proposal(drafter, state, draft):
    width = state.num_draft_tokens + 1
    recent = loop.window(state.tokens, state.absorbed, width)
    cache = state.cache.rollback(state.length - 1)
    num = jnp.full_like(state.length, width)
    return drafter.propose(draft, cache, recent, state.absorbed, num, state.key)


def _use(state, result):
    """A state that depends on `result` (i32[B, n]), so that no compiler drops it."""
    return state.replace(tokens=state.tokens.at[:, :1].set(result[:, :1]))


PHASES: dict[str, Callable] = {
    "step": _step,
    "propose": _propose,
    "calibrate": _calibrate,
    "verify": _verify,
}


@functools.partial(jax.jit, static_argnames=("phase", "specs", "repeats"), donate_argnames="state")
def _repeat(base, drafter, state, *, phase, specs, repeats):
    def run(base, drafter, state):
        own = own_slots(state)
        end = lax.fori_loop(0, repeats, lambda _, s: PHASES[phase](base, drafter, s), own)
        return stacked_like(state, end)

    return on_mesh(run, base.layout.mesh, specs.tree, specs.tree[2])(base, drafter, state)


def time_phase(
    phase: str, base: Model, drafter: Any, state: loop.DecodeState, *, repeats: int
) -> tuple[float, loop.DecodeState]:
    """Mean seconds of one of `PHASES`, run `repeats` times in a compiled loop that has run once
    before, and the state it leaves; nothing but this phase is compiled.

    Args:
      state: with room for a step; donated.
    """
    specs = loop.Specs.of((base, drafter, state))
    run = functools.partial(_repeat, phase=phase, specs=specs, repeats=repeats)
    state = jax.block_until_ready(run(base, drafter, state))
    start = time.perf_counter()
    state = jax.block_until_ready(run(base, drafter, state))
    return (time.perf_counter() - start) / repeats, state


def phase_seconds(
    base: Model, drafter: Any, state: loop.DecodeState, *, repeats: int
) -> dict[str, float]:
    """Mean seconds of a whole step and of its phases: calibrate, draft, verify, commit (the rest).

    Args:
      state: prefilled, with room for a step; donated.
      repeats: runs in each compiled loop.
    """
    times = {}
    for phase in PHASES if drafter is not None else ("step", "verify"):
        times[phase], state = time_phase(phase, base, drafter, state, repeats=repeats)
    propose, calibrate = times.pop("propose", 0.0), times.pop("calibrate", 0.0)
    rest = times["step"] - propose - times["verify"]
    return times | {
        "calibrate": calibrate,
        "draft": max(propose - calibrate, 0.0),
        "commit": max(rest, 0.0),
    }

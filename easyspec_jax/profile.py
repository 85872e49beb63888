"""Where a step's time goes: every phase run alone, many times inside one compiled loop.

Phases are parts of one compiled step, so they cannot be timed in place; each is compiled by itself,
in a counted loop that carries the caches as the real loop does, and the rest of a step is what
remains.
"""

from __future__ import annotations

import functools
import time

import jax
import jax.numpy as jnp
from jax import lax

from easyspec_jax import loop
from easyspec_jax.engine import Engine
from easyspec_jax.request import Request
from easyspec_jax.sharding import mesh_jit
from easyspec_jax.verify import accept_path


def _step(base, drafter, request, state):
    """A step that leaves its row where it was: one that has finished may do less."""
    after = loop.step(base, drafter, request, state)[0]
    where = ("length", "limit", "absorbed", "done")
    return after.replace(**{name: getattr(state, name) for name in where})


def _propose(base, drafter, request, state):
    proposal, draft, cache = _proposal(drafter, request, state)
    return _use(state.replace(draft=draft, cache=cache), proposal.tokens)


def _calibrate(base, drafter, request, state):
    """Proposing a single token is the pass over the committed ones and nothing more."""
    proposal, draft, cache = _proposal(drafter, request.replace(num_draft_tokens=1), state)
    return _use(state.replace(draft=draft, cache=cache), proposal.tokens)


def _verify(base, drafter, request, state):
    cache = state.cache.rollback(state.length - 1)
    shapes = jax.eval_shape(lambda: _proposal(drafter, request, state)[0])
    proposal = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    if proposal.levels is not None:  # the largest of its sizes
        proposal = proposal.replace(levels=jnp.int32(proposal.depth))
    scores, cache, _ = drafter.verify(base, cache, state.tokens[:, 0], proposal, state.draft)
    verdict = accept_path(scores, proposal, request.filters, request.key)
    return _use(state.replace(cache=cache), verdict.next_token[:, None])


def _proposal(drafter, request, state):
    width = state.counters.tried.shape[1] + 1
    recent = loop.window(state.tokens, state.absorbed, width)
    cache = state.cache.rollback(state.length - 1)
    num = jnp.full_like(state.length, width)
    return drafter.propose(state.draft, request, cache, recent, state.absorbed, num, request.key)


def _use(state, result):
    """A state that depends on `result` (i32[B, n]), so that no compiler drops it."""
    return state.replace(tokens=state.tokens.at[:, :1].set(result[:, :1]))


# What is timed; "propose" is calibrating and drafting.
TIMED = {"step": _step, "propose": _propose, "calibrate": _calibrate, "verify": _verify}


@mesh_jit(out="state", donate="state", static_argnames=("timed", "repeats"))
def _repeat(base, drafter, request, state, *, timed, repeats):
    run = TIMED[timed]
    return lax.fori_loop(0, repeats, lambda _, s: run(base, drafter, request, s), state)


def time_phase(
    timed: str, engine: Engine, request: Request, state: loop.DecodeState, *, repeats: int
) -> tuple[float, loop.DecodeState]:
    """Mean seconds of one of `TIMED`, run `repeats` times in a compiled loop that has run once
    before, and the state it leaves; nothing but this phase is compiled.

    Args:
      engine: whose base, drafter and compiler options are taken.
      state: prefilled, with room for a step; donated.
    """
    run = functools.partial(engine.compiled(_repeat), timed=timed, repeats=repeats)
    state = jax.block_until_ready(run(engine.base, engine.drafter, request, state))
    start = time.perf_counter()
    state = jax.block_until_ready(run(engine.base, engine.drafter, request, state))
    return (time.perf_counter() - start) / repeats, state


def phase_seconds(
    engine: Engine, request: Request, state: loop.DecodeState, *, repeats: int
) -> dict[str, float]:
    """Mean seconds of a whole step and of its phases: calibrate, draft, verify, commit (the rest);
    arguments as for `time_phase`.
    """
    times = {}
    for timed in TIMED if request.num_draft_tokens else ("step", "verify"):
        times[timed], state = time_phase(timed, engine, request, state, repeats=repeats)
    propose, calibrate = times.pop("propose", 0.0), times.pop("calibrate", 0.0)
    rest = times["step"] - propose - times["verify"]
    return times | {
        "calibrate": calibrate,
        "draft": max(propose - calibrate, 0.0),
        "commit": max(rest, 0.0),
    }

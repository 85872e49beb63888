"""What a step of each depth takes here: measured with the very program that will decode.

A row is made to end after one step, with costs under which only one depth can be chosen for it; a
call that takes no step at all is subtracted. So nothing but the loop is compiled.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import logging
import os
import pathlib
import platform
import time
from collections.abc import Callable
from importlib import metadata
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from easyspec_jax.depth import CATCH_UP
from easyspec_jax.json_files import read_object, write_object
from easyspec_jax.loop import DecodeState
from easyspec_jax.request import Request

logger = logging.getLogger("easyspec_jax")

FAR = 1e9  # how much dearer all other depths are than the one that is to be chosen
LEAST = 1e-6  # seconds, below which no difference means anything
# For one depth, behind a first time: no more than either number of seconds and rounds, but at least
# so many rounds. Of three the least was off by a sixth where a clock strays.
SECONDS, ROUNDS, LEAST_ROUNDS = 0.4, 20, 7
STATISTIC = "medians of seven rounds or more"  # kept costs of another are not read

Run = Callable[[Request, DecodeState], DecodeState]


@dataclasses.dataclass(frozen=True)
class StepCosts:
    """What was measured, the same in all processes."""

    seconds: Any  # f32[K, D], of a step by kind of draft and depth
    catch_up: Any  # f32[], of absorbing a token that was left out


def measured(
    run: Run, request: Request, state: DecodeState, fresh: Callable[..., DecodeState]
) -> StepCosts:
    """The costs here; of kinds that do not come up those of the dearest one.

    Args:
      run: the loop of a decoder, or one step of it; donates the state.
      request: with any costs.
      state: of the size that will be decoded; donated.
      fresh: a state and values of its fields to the state with caches kept and all else as before a
        first step.
    """
    pacing = request.pacing
    assert pacing is not None
    num_kinds, num_depths = pacing.costs.shape
    shape = state.tokens.shape
    end = shape[1] - request.num_draft_tokens * request.tree_width - 1
    lengths = np.full(shape[:1], end, np.int32)
    # One that repeats itself and one that does not: what drafts may hang on it.
    same, new = np.zeros(shape, np.int32), np.arange(shape[0] * shape[1], dtype=np.int32)
    texts = (same, new.reshape(shape) % request.vocab_size)[: 1 if num_kinds == 1 else 2]
    seconds = np.zeros((num_kinds, num_depths), np.float32)

    def take(number, steps, text, state, behind=0):
        """The seconds of 0 or 1 step of this depth, and the state behind it; `behind` more tokens
        have to be absorbed before.
        """
        costs = np.full((num_kinds, num_depths), FAR, np.float32)
        costs[:, number] = 1.0
        asked = request.replace(pacing=pacing.replace(costs=costs))
        done = np.full(lengths.shape, steps == 0)
        where = {"length": lengths, "limit": lengths + steps, "absorbed": lengths - 1 - behind}
        state = jax.block_until_ready(fresh(state, tokens=text, done=done, **where))
        start = time.perf_counter()
        state = jax.block_until_ready(run(asked, state))
        return time.perf_counter() - start, state

    for text in texts:
        _, state = take(0, 0, text, state)
        assert state.pace is not None
        kinds = np.unique(jax.device_get(state.pace.kind))
        found, state = _in_turns(functools.partial(take, text=text), num_depths, state)
        seconds[kinds] = np.maximum(seconds[kinds], found)
    seconds = np.where(seconds > 0, seconds, seconds.max(axis=0))
    seconds[:, 0] = seconds[:, 0].min()  # without a draft they are all the same
    behind, spent = min(CATCH_UP, end - 3), []
    for more in (0, 1 + behind) * 3 if behind > 0 else ():  # a step of one level absorbs two itself
        one, state = take(1, 1, texts[-1], state, behind=more)
        spent.append(one)
    catch_up = max(min(spent[3::2]) - min(spent[2::2]), 0.0) / behind if spent else 0.0
    costs: Any = (seconds, np.float32(catch_up))
    if jax.process_count() > 1:
        costs = map(np.asarray, multihost_utils.broadcast_one_to_all(costs))
    return StepCosts(*costs)


def _in_turns(
    take: Callable[..., tuple[float, DecodeState]], num_depths: int, state: DecodeState
) -> tuple[np.ndarray, DecodeState]:
    """Median seconds of a step of each depth, f32[D], above what a call takes; depths take turns,
    so that what else is going on meets them all.
    """
    found, spent, least = [], 0.0, LEAST_ROUNDS + 1
    most = ROUNDS if jax.process_count() == 1 else least  # clocks differ, programs may not
    while len(found) < least or (len(found) < most and spent < SECONDS * num_depths):
        row = []
        for number in range(num_depths):
            for steps in (0, 1):
                one, state = take(number, steps, state=state)
                row.append(one)
        found.append(row)
        spent += sum(row)
    typical = np.median(found[1:], axis=0)  # the first may have compiled
    seconds = np.maximum(typical[1::2] - typical[::2].min(), LEAST)
    # A deeper step that took less says nothing but how well the clock can tell.
    return np.maximum.accumulate(seconds).astype(np.float32), state


def kept(what: Any, shape: tuple[int, int], find: Callable[[], StepCosts]) -> StepCosts:
    """Costs (of this shape) that were found before for what prints as `what`, on a device of this
    kind; else found now, and kept beside jax's compilation cache, where there is one. Several
    processes keep nothing: they would have to agree.
    """
    settings: Any = jax.config
    folder = settings.jax_compilation_cache_dir
    if not folder or "://" in str(folder) or jax.process_count() > 1:
        return find()
    device = jax.devices()[0]
    versions = f"{metadata.version('easyspec_jax')} {jax.__version__} {platform.machine()}"
    kind = f"{device.platform} {device.device_kind} {len(jax.devices())} {os.cpu_count()}"
    about = f"{STATISTIC} {versions} {kind} {what}"
    name = hashlib.sha256(about.encode()).hexdigest()[:24]
    file = pathlib.Path(folder) / f"easyspec-step-costs-{name}.json"
    try:
        held = read_object(file)
        costs = _as_kept(held["seconds"], held["catch_up"])
        sound = costs.seconds.shape == shape and costs.catch_up.shape == ()
        finite = np.isfinite(costs.seconds).all() and np.isfinite(costs.catch_up).all()
        if sound and finite and (costs.seconds > 0).all() and costs.catch_up >= 0:
            return costs
    except (OSError, ValueError, KeyError, TypeError):
        pass  # none, or not one of these
    costs = find()
    seconds = [[round(float(x), 9) for x in row] for row in costs.seconds]
    catch_up = round(float(costs.catch_up), 9)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_object(file, {"seconds": seconds, "catch_up": catch_up})
    except OSError as error:
        logger.info("seconds of steps are not kept: %s", error)
    return _as_kept(seconds, catch_up)


def _as_kept(seconds: Any, catch_up: Any) -> StepCosts:
    return StepCosts(np.asarray(seconds, np.float32), np.asarray(catch_up, np.float32))

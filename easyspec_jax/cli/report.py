"""What a text command says about an answer: its clock and its statistics."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from easyspec_jax.session import Session
from easyspec_jax.stats import Stats

_FIGURES = (  # of Stats, as JSON has them
    "steps", "tokens_per_step", "acceptance_rate", "accepted_histogram", "acceptance_per_depth",
    "acceptance_per_rank", "nodes_drafted", "nodes_accepted", "steps_per_depth",
)  # fmt: skip


class Clock:
    """A context that times one answer: until its first tokens, compiling included, and in all."""

    def __init__(self, load_seconds: float):
        self.load = load_seconds
        self.first = 0.0  # seconds until the first tokens
        self.compiling = 0.0
        self.total = 0.0
        self.later_tokens = 0  # behind the first step's

    def __enter__(self) -> Clock:
        self._began = time.perf_counter()
        jax.monitoring.register_event_duration_secs_listener(self._listen)
        return self

    def __exit__(self, *_) -> None:
        jax.monitoring.unregister_event_duration_listener(self._listen)
        self.total = time.perf_counter() - self._began

    def count(self, piece: Sequence[int]) -> None:
        """One step has ended."""
        if self.first:
            self.later_tokens += len(piece)
        else:
            self.first = time.perf_counter() - self._began

    def _listen(self, event: str, duration_secs: float, **_) -> None:
        if event.startswith("/jax/core/compile/"):
            self.compiling += duration_secs


def print_report(args: argparse.Namespace, session: Session, clock: Clock) -> None:
    """Print the statistics of the last answer of a session."""
    stats, own = session.stats, _plain(session.drafter_report)
    speed = clock.later_tokens / (clock.total - clock.first) if clock.later_tokens else None
    if args.stats:
        lines = _describe(stats, clock, speed)
        lines[-1:-1] = [_listed(own)] if own else []  # the clock comes last
        print("\n".join(lines), file=sys.stderr)
    if args.json:
        values = {
            "tokens": stats.emitted,
            **{name: getattr(stats, name) for name in _FIGURES},
            "load_seconds": clock.load,
            "first_token_seconds": clock.first,
            "compile_seconds": clock.compiling,
            "total_seconds": clock.total,
            "tokens_per_second": speed,
        }
        if own:
            values["drafter_report"] = own
        print(json.dumps(values), flush=True)


def _plain(report: dict[str, Any]) -> dict[str, Any]:
    """A drafter's counters as Python's numbers and lists, in their order."""
    return {
        name: _plain(value) if isinstance(value, dict) else np.asarray(value).tolist()
        for name, value in report.items()
    }


def _listed(report: dict[str, Any]) -> str:
    """Names and values in one line, without those that hold nothing."""

    def shown(value):
        if isinstance(value, dict):
            return " ".join(f"{name}:{shown(v)}" for name, v in value.items())
        if isinstance(value, list | tuple):
            return " ".join(map(shown, value))
        return f"{value:.3g}" if isinstance(value, float) else str(value)

    held = {name: value for name, value in report.items() if value not in ({}, [])}
    return ", ".join(f"{name.replace('_', ' ')} {shown(v)}" for name, v in held.items())


def _describe(stats: Stats, clock: Clock, speed: float | None) -> list[str]:
    rate = f"{stats.tokens_per_step:.2f} tokens per step"
    lines = [f"{stats.emitted} tokens in {stats.steps} steps: {rate}"]
    if stats.tried_per_depth:
        lines[0] += f", acceptance rate {stats.acceptance_rate:.3f}"
        bins = " ".join(f"{n}:{steps}" for n, steps in enumerate(stats.accepted_histogram))
        lines.append(f"accepted draft tokens:steps  {bins}")
    if sum(n > 0 for n in stats.steps_per_depth) > 1:
        used = " ".join(f"{d}:{n}" for d, n in enumerate(stats.steps_per_depth) if n)
        lines.append(f"levels drafted:steps  {used}")
    if len(stats.tried_per_rank) > 1:
        ranks = " ".join(f"{r}:{n}" for r, n in enumerate(stats.accepted_per_rank, 1))
        lines.append(
            f"accepted siblings, first to last  {ranks}; "
            f"{stats.nodes_accepted} of {stats.nodes_drafted} drafted tokens"
        )
    parts = [f"load {clock.load:.2f} s"] if clock.load else []
    parts.append(
        f"first token after {clock.first:.2f} s, of which compiling {clock.compiling:.2f} s"
    )
    if speed is not None:
        parts.append(
            f"then {speed:.1f} tok/s ({clock.later_tokens} in {clock.total - clock.first:.2f} s)"
        )
    return [*lines, "; ".join(parts)]

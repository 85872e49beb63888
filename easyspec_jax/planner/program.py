"""What travels between devices: every collective of a compiled decoding loop, by phase and block.

The compiler is asked, not a formula: the loop is compiled from shapes alone, so a pair of any size
can be looked at on CPU devices, and what a formula says is compared with it in the tests.
"""

from __future__ import annotations

import copy
import dataclasses
import math
import re

import numpy as np

from easyspec_jax import loop
from easyspec_jax.decode import Decoder
from easyspec_jax.request import make_inputs

_KINDS = "all-reduce|all-gather|all-to-all|reduce-scatter|collective-permute|collective-broadcast"
_LINE = re.compile(rf"= (?P<shapes>.*?) (?P<kind>{_KINDS})(?:-start)?\(")
_SHAPE = re.compile(r"([a-z]+)(\d*)\w*\[([\d,]*)\]")
_NAME = re.compile(r'op_name="([^"]*)"')
_COMPILE = {"xla_backend_optimization_level": 0}  # halves the time; the program is not run


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective of a step, as compiled."""

    phase: str  # of loop.PHASES; "draft" runs once per drafted level behind the first
    part: str  # "embed", "block_3", "logits", or "" for anything else
    kind: str  # as the compiler calls it: "all-reduce", ...
    bytes: int  # of its result on one device


def collectives(decoder: Decoder, batch: int = 1, max_len: int = 512) -> list[Collective]:
    """Every collective of one step of the decoder's greedy loop, in program order.

    The first level of a draft needs logits only, and they are told apart: their phase is
    "calibrate", as is the pass they come from. So a step of γ levels runs "calibrate", "verify" and
    "commit" once and "draft" γ - 1 times. No draft is stopped early here.

    Args:
      decoder: its models may be `abstract_model`s; nothing is allocated.
      batch: rows.
      max_len: tokens of each row in all, at most the context; it changes no collective.

    Raises:
      ValueError: `max_len` below 2.
    """
    if max_len < 2:
        raise ValueError(f"max_len must be at least 2, got {max_len}")
    decoder = copy.copy(decoder)
    decoder.min_draft_probability = None
    prompts = np.zeros((batch, 1), np.int32)
    context = decoder.base.config.max_len
    inputs = make_inputs(decoder.base.config, prompts, min(max_len, context) - 1)
    lowered = loop.run_loop.lower(decoder.base, decoder.drafter, *decoder.planned(inputs))
    return read_collectives(lowered.compile(compiler_options=_COMPILE).as_text())


def read_collectives(hlo: str) -> list[Collective]:
    """The collectives of an optimised HLO module, in its order."""
    found = []
    for line in hlo.splitlines():
        match = _LINE.search(line)
        if match:
            name = _NAME.search(line)
            shapes = _SHAPE.findall(match["shapes"])
            size = sum(_itemsize(bits) * _elements(dims) for _, bits, dims in shapes)
            found.append(Collective(*_place(name[1] if name else ""), match["kind"], size))
    return found


def _place(name: str) -> tuple[str, str]:
    """Phase and part of an operation, from the scopes in its name."""
    scopes = name.split("/")
    phase = next((scope for scope in scopes if scope in loop.PHASES), "")
    if phase == "draft" and "while" not in scopes[scopes.index("draft") :]:
        phase = "calibrate"  # the first level's logits
    part = next((s for s in scopes if s in ("embed", "logits") or s.startswith("block_")), "")
    return phase, part


def _itemsize(bits: str) -> int:
    return max(int(bits or 8) // 8, 1)  # a pred takes a byte


def _elements(dims: str) -> int:
    return math.prod(int(n) for n in dims.split(",") if n)

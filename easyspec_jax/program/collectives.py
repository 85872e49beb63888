"""What travels between devices: every collective of a compiled decoding loop, by phase and block.

The compiler is asked, not a formula: the loop is compiled from shapes alone, so a pair of any size
can be looked at on CPU devices, and what a formula says is compared with it in the tests.
"""

from __future__ import annotations

import copy
import dataclasses

import numpy as np

from easyspec_jax import loop
from easyspec_jax.decode import Decoder
from easyspec_jax.program import hlo
from easyspec_jax.program.phases import place
from easyspec_jax.program.target import compile_options
from easyspec_jax.request import make_inputs


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
    options = compile_options(decoder.base.layout.mesh)
    return read_collectives(lowered.compile(compiler_options=options).as_text() or "")


def read_collectives(text: str) -> list[Collective]:
    """The collectives of an optimised HLO module, in its order."""
    ops = [op for op in hlo.parse(text).ops() if op.collective]
    return [Collective(*place(op.scope), op.collective, op.bytes) for op in ops]

"""What the parts of `suite.py` share: shapes, a drafter with a set acceptance, compiled loops.

All models are random and made on the device. A prompt is one token, so there is nothing to absorb
and no prefill to compile.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from gpu.kernels import step_launches

import easyspec_jax as es
from easyspec_jax import loop
from easyspec_jax.request import Inputs, make_inputs
from easyspec_jax.sampling import Scores
from easyspec_jax.sharding import replicate
from easyspec_jax.verify import Proposal

WARM = 3  # calls before one is timed: GPU programs are captured as graphs in their first runs


@dataclasses.dataclass(frozen=True, kw_only=True)
class Preset:
    """Shapes and numbers of one run."""

    models: dict[str, es.ModelConfig]  # timed alone; `base` and `draft` are among them
    base: str
    draft: str
    small: es.ModelConfig  # for correctness
    small_groups: tuple[int, ...]  # layers per block of its draft
    small_widths: tuple[int, ...]  # of its trees
    dtype: str
    new_tokens: int
    rows: int  # prompts of the correctness check
    gammas: tuple[int, ...]
    widths: tuple[int, ...]
    acceptances: tuple[float, ...]
    group_sizes: tuple[int, ...]
    verified: tuple[tuple[int, int], ...]  # γ and w of the verifications that are timed
    loop_repeats: int  # runs of a phase in one compiled loop
    repeats: int  # timed calls
    copy_bytes: int  # of the array whose copy measures the bandwidth


LLAMA = {"vocab_size": 128256, "num_kv_heads": 8, "rope_theta": 500000.0, "max_len": 8192}
GPU = Preset(
    models={
        "llama-3.2-1b": es.ModelConfig(
            embed_dim=2048, mlp_dim=8192, num_layers=16, num_heads=32, head_dim=64,
            tie_embeddings=True, **LLAMA,
        ),
        "llama-3.2-3b": es.ModelConfig(
            embed_dim=3072, mlp_dim=8192, num_layers=28, num_heads=24, head_dim=128,
            tie_embeddings=True, **LLAMA,
        ),
        "llama-3-8b": es.ModelConfig(
            embed_dim=4096, mlp_dim=14336, num_layers=32, num_heads=32, head_dim=128, **LLAMA,
        ),
    },
    base="llama-3-8b", draft="llama-3.2-1b",
    small=es.ModelConfig(
        vocab_size=4096, embed_dim=256, mlp_dim=512, num_layers=4, num_heads=8, num_kv_heads=4,
        head_dim=32, max_len=512,
    ),
    small_groups=(1, 2, 1), small_widths=(1, 4),
    dtype="bfloat16", new_tokens=128, rows=16, gammas=(5, 3), widths=(1, 4),
    acceptances=(0.6, 0.8), group_sizes=(1, 2, 4, 8),
    verified=((0, 1), (5, 1), (5, 4), (5, 8), (5, 2), (1, 1)),
    loop_repeats=20, repeats=5, copy_bytes=2**30,
)  # fmt: skip
TINY_LAYERS = {"embed_dim": 32, "mlp_dim": 48, "num_heads": 4, "num_kv_heads": 2, "head_dim": 10}
TINY = Preset(
    models={
        "tiny-draft": es.ModelConfig(num_layers=4, vocab_size=300, max_len=256, **TINY_LAYERS),
        "tiny-base": es.ModelConfig(num_layers=2, vocab_size=300, max_len=256, **TINY_LAYERS),
    },
    base="tiny-base", draft="tiny-draft",
    small=es.ModelConfig(num_layers=2, vocab_size=300, max_len=256, **TINY_LAYERS),
    small_groups=(2,), small_widths=(2,),
    dtype="float32", new_tokens=24, rows=4, gammas=(3,), widths=(1, 2), acceptances=(0.8,),
    group_sizes=(1, 2), verified=((0, 1), (3, 2)), loop_repeats=2, repeats=2, copy_bytes=2**24,
)  # fmt: skip
PRESETS = {"gpu": GPU, "tiny": TINY}


class AgreeingDrafter(es.LayerParallelDrafter):
    """A drafter that the base agrees with at a set rate, for models that never would: it measures
    the time of the loop, not its text.

    Each drafted node is, by a draw of its own, made the base's argmax behind its parent or ruled
    out, of siblings that agree the first. So a chain is accepted as by a pair with this rate at
    every depth. Of a tree less can be said: siblings agree as often as the first, but which nodes
    have children is the random draft's choice. Greedy decoding only. The draws and one scatter into
    the logits are in what is timed.
    """

    acceptance: jax.Array = struct.field(kw_only=True)  # f32[], a
    seed: jax.Array = struct.field(kw_only=True)  # i32[]

    def verify(self, base, base_cache, root, proposal, state):
        """The base's pass over all nodes, whose logits then agree or disagree as drawn."""
        scores, cache, aux = super().verify(base, base_cache, root, proposal, state)
        scores = Scores.of(scores).whole()
        u = draws(self.seed, base_cache.length, proposal.tokens.shape[1])
        return agree(scores, proposal, u < self.acceptance), cache, aux


def draws(seed: jax.Array, position: jax.Array, n: int) -> jax.Array:
    """f32[B, n] in [0, 1), hashed (murmur3) from a seed, the row's position (i32[B]) and the node:
    a single kernel, where random keys would take several.
    """
    x = position.astype(jnp.uint32)[:, None] * jnp.uint32(0x9E3779B1)
    x = (x ^ seed.astype(jnp.uint32)) * jnp.uint32(0xCC9E2D51)
    x = x ^ (jnp.arange(1, n + 1, dtype=jnp.uint32) * jnp.uint32(0x1B873593))[None]
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        x = (x ^ (x >> shift)) * jnp.uint32(factor)
    return ((x ^ (x >> 16)) >> 8).astype(jnp.float32) * jnp.float32(2**-24)


def agree(scores: jax.Array, proposal: Proposal, agreed: jax.Array) -> jax.Array:
    """Base logits [B, n + 1, V] under which the nodes of bool[B, n] are the argmax behind their
    parents, of siblings the first, and no other node is.
    """
    n = proposal.tokens.shape[1]
    high = 1e6 - jnp.arange(n, dtype=jnp.float32)[None]
    values = jnp.where(agreed, high, -high).astype(scores.dtype)
    rows = jnp.where(proposal.valid, proposal.parents + 1, n + 1)  # beyond the end: dropped
    put = lambda row, i, x, value: row.at[i, x].set(value, mode="drop")  # noqa: E731
    return jax.vmap(put)(scores, rows, proposal.tokens, values)


@dataclasses.dataclass(frozen=True)
class Arm:
    """A loop: of a model alone, or ahead of it a draft with γ and w."""

    base: str
    draft: str | None = None
    gamma: int = 0
    width: int = 1

    def __str__(self):
        pair = f" + {self.draft}, gamma {self.gamma}, width {self.width}" if self.draft else ""
        return self.base + pair


@dataclasses.dataclass
class Program:
    """A compiled loop."""

    run: Callable  # (base, drafter, request, state) -> state
    lower_seconds: float  # tracing and lowering, in Python
    compile_seconds: float
    launches: dict[str, Any]  # of `step_launches`


class Suite:
    """What all parts share: the preset, one device, compiled loops, and the time that is left."""

    def __init__(self, preset: Preset, budget_seconds: float):
        self.preset, self.budget = preset, budget_seconds
        self.mesh = es.make_mesh(1, 1)
        self.programs: dict[Arm, Program] = {}
        self.skipped: list[str] = []
        self._start = time.perf_counter()

    @property
    def elapsed(self) -> float:
        """Seconds since the suite began."""
        return time.perf_counter() - self._start

    def say(self, text: str) -> None:
        """Print a line for people."""
        print(f"[{self.elapsed:6.1f} s] {text}", flush=True)

    def time_for(self, what: str) -> bool:
        """Whether the budget still allows `what`; if not it is noted as skipped."""
        if self.elapsed < self.budget:
            return True
        self.skipped.append(what)
        self.say(f"skipped, no time left: {what}")
        return False

    def model(self, name: str, num_layers: int | None = None, **options) -> es.Model:
        """A random model of the preset, or one with fewer layers; options of `random_model`."""
        config = self.preset.models[name]
        config = dataclasses.replace(config, num_layers=num_layers or config.num_layers)
        return es.random_model(config, self.mesh, dtype=self.preset.dtype, **options)

    def decoder(self, arm: Arm, base: es.Model, draft: es.Model | None = None) -> es.Decoder:
        """A decoder of the arm, whose drafter agrees with the base."""
        if arm.draft is None:
            return es.Decoder(base)
        drafter = AgreeingDrafter(draft, **self.dice(0.0, 0))
        return es.Decoder(base, drafter, num_draft_tokens=arm.gamma, tree_width=arm.width)

    def dice(self, acceptance: float, seed: int) -> dict[str, jax.Array]:
        """The arrays of an `AgreeingDrafter`."""
        values = {"acceptance": np.float32(acceptance), "seed": np.int32(seed)}
        return {name: replicate(value, self.mesh) for name, value in values.items()}

    def inputs(self, decoder: es.Decoder) -> Inputs:
        """One token of prompt, and as many new ones as the preset says."""
        return make_inputs(decoder.base.config, [[1]], self.preset.new_tokens)

    def program(self, arm: Arm) -> Program:
        """The arm's loop, compiled from shapes at the first call."""
        if arm not in self.programs:
            self.programs[arm] = self._compile(arm)
        return self.programs[arm]

    def _compile(self, arm: Arm) -> Program:
        p = self.preset
        base, draft = (
            es.abstract_model(p.models[name], self.mesh, dtype=p.dtype) if name else None
            for name in (arm.base, arm.draft)
        )
        decoder = self.decoder(arm, base, draft)
        request, state = decoder.planned(self.inputs(decoder))
        start = time.perf_counter()
        lowered = loop.run_loop.lower(base, decoder.drafter, request, state)
        middle = time.perf_counter()
        compiled = lowered.compile()
        end = time.perf_counter()
        caches = (state.cache, state.draft) if arm.draft else (state.cache,)
        pairs = [cache.blocks[0][0].arrays for cache in caches]
        keys = [int(np.prod(arrays[0].shape)) * len(arrays) // 2 for arrays in pairs]
        entries = tuple(n for one in keys for n in (one, 2 * one))  # alone, and beside the values
        launches = step_launches(compiled.as_text(), entries)
        self.say(f"compiled {arm}: {middle - start:.1f} s in Python, {end - middle:.1f} s by XLA")
        return Program(compiled, middle - start, end - middle, launches)

    def run(self, arm: Arm, decoder: es.Decoder, drafter: Any = None) -> tuple[float, int]:
        """Seconds and steps of one whole loop of the arm."""
        program = self.program(arm)
        request, state = jax.block_until_ready(decoder.prefill(self.inputs(decoder)))
        start = time.perf_counter()
        drafter = decoder.drafter if drafter is None else drafter
        state = jax.block_until_ready(program.run(decoder.base, drafter, request, state))
        return time.perf_counter() - start, int(state.step)


def spread(values: Iterable[float]) -> dict[str, float]:
    """Median and quartiles, to five digits."""
    values = list(values)
    cuts = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
    return {
        name: float(f"{cut:.5g}") for name, cut in zip(("q1", "median", "q3"), cuts, strict=True)
    }

"""Tiny models and decoders, made once per test process: compiling them is what the tests' time goes
into. The one way in which tests run a decoder step by step, and Pearson's test of what it draws.
"""

import collections
import dataclasses
import functools
import os

import jax
import numpy as np

import easyspec_jax as es
from easyspec_jax import loop
from easyspec_jax.request import Inputs, make_inputs
from easyspec_jax.sharding import replicate, zeros

MESHES = [(1, 1), (1, 8), (8, 1), (4, 2), (2, 4)]
CONFIG = es.ModelConfig(
    vocab_size=61, embed_dim=24, mlp_dim=32, num_layers=3, num_heads=8, num_kv_heads=4, head_dim=6,
    max_len=96,
)  # fmt: skip
SMALL = es.ModelConfig(
    vocab_size=64, embed_dim=16, mlp_dim=24, num_layers=4, num_heads=6, num_kv_heads=2, head_dim=8,
    max_len=96, tie_embeddings=True,
)  # fmt: skip
GROUPS = (1, 2)  # of CONFIG's layers; on 4 and 8 devices the group is padded
# Without these, as conftest.py has it, compilers make loops of scatters, but for newer ones.
_EMITTERS = "xla_cpu_use_fusion_emitters"
EMITTERS = {_EMITTERS: True} if _EMITTERS in os.environ.get("XLA_FLAGS", "") else {}
PROMPTS = [[1, 2, 3, 4, 5, 6, 7], [9, 8], [60]]
NEW = 24


@functools.cache
def model(mesh_shape, *, config=CONFIG, dtype="float64", **options):
    return es.random_model(config, es.make_mesh(*mesh_shape), dtype=dtype, **options)


@functools.cache
def autoregressive(mesh_shape=(1, 1)):
    return es.Decoder(model(mesh_shape))


@functools.cache
def self_drafting(
    mesh_shape=(1, 1),
    group_size=GROUPS,
    gamma=3,
    calibrate=True,
    parallel="attention",
    *,
    width=1,
    **more,
):
    draft = model(mesh_shape, group_size=group_size, layout="grouped")
    drafter = es.LayerParallelDrafter(draft, calibrate=calibrate, parallel=parallel)
    base = model(mesh_shape)
    return es.Decoder(base, drafter, num_draft_tokens=gamma, tree_width=width, **more)


@functools.cache
def stranger_drafting():
    """A draft of other shape and weights, with a larger vocabulary and a shorter context: it hardly
    helps.
    """
    draft = model((1, 1), group_size=2, seed=7, config=SMALL)
    return es.Decoder(model((1, 1)), es.LayerParallelDrafter(draft), num_draft_tokens=2)


def all_logits(base, tokens):
    """Logits f[B, T, V] at every position of texts of one length, i32[B, T]; on one device. What
    is padded to round numbers is compiled once for many sizes.
    """
    tokens = np.asarray(tokens, np.int32)
    (b, t), rows = tokens.shape, 1 << (len(tokens) - 1).bit_length()
    padded = np.pad(tokens, ((0, rows - b), (0, -t % 16)))
    return np.asarray(_all_logits(base, padded, fresh_cache(base, *padded.shape)))[:b, :t]


@jax.jit
def _all_logits(base, tokens, cache):
    hidden, _ = es.model.forward(base, tokens, cache)
    return es.model.logits(base, hidden)


def fresh_cache(m, batch, max_len):
    return zeros(m.abstract_cache(batch, max_len))


@dataclasses.dataclass
class Run:
    """A decoder at work on one request: prompts absorbed, then step by step or to the end."""

    decoder: es.Decoder
    inputs: Inputs
    request: es.Request
    state: loop.DecodeState

    def step(self) -> loop.Emission:
        """One step of the stream's program; `state` goes on."""
        run = self.decoder.compiled(loop.run_step)
        self.state, emission = run(*self._pair, self.request, self.state)
        return emission

    def finish(self) -> None:
        """Every step that is left, by the loop of `generate`."""
        run = self.decoder.compiled(loop.run_loop)
        self.state = run(*self._pair, self.request, self.state)

    def after(self, state: loop.DecodeState, key=None) -> loop.DecodeState:
        """The state one step behind `state`, under another key if one is given; to be traced."""
        request = self.request if key is None else self.request.replace(key=key)
        return loop.step(*self._pair, request, state)[0]

    def finish_row(self, b: int) -> None:
        """Row b counts as done from now on."""
        done = np.asarray(self.state.done).copy()
        done[b] = True
        self.state = self.state.replace(done=replicate(done, self.decoder.base.layout.mesh))

    @property
    def _pair(self):
        return self.decoder.base, self.decoder.drafter


def started(decoder, prompts, max_new_tokens=NEW, sampling=es.Sampling(), **options) -> Run:  # noqa: B008
    """The prompts of a request absorbed, but for each row's last token."""
    inputs = make_inputs(decoder.base.config, prompts, max_new_tokens, sampling, **options)
    return Run(decoder, inputs, *decoder.prefill(inputs))


def lowered_loop(decoder, inputs, size=None):
    """The loop of `generate` before it is compiled, for caches of `size` tokens; and its state, as
    shapes.
    """
    request, state = decoder.planned(inputs, size)
    return loop.run_loop.lower(decoder.base, decoder.drafter, request, state), state


def compiled_text(lowered) -> str:
    """Optimised HLO, as it is outside of the tests."""
    options = dict(es.CompileOptions().on(es.make_mesh(1, 1), 4))
    return lowered.compile(compiler_options=options | EMITTERS).as_text()


def compilations() -> tuple[int, int, int]:
    """How many programs this process has of the loop, of a step, and of a piece of a prefill."""
    return tuple(run.num_compiled() for run in (loop.run_loop, loop.run_step, loop.prefill_chunk))


def entries(cache) -> list[np.ndarray]:
    """Keys and values of every slot of a cache, [..., S, H]."""
    slots = (kv for block in jax.device_get(cache.blocks) for kv in block)
    return [x for kv in slots for x in (kv.k, kv.v)]


def spy_on_prefills(monkeypatch) -> list[int]:
    """Where each prefill begins from now on, in order."""
    starts, absorb = [], es.Decoder.absorb

    def spy(self, request, state, longest, start=0):
        starts.append(start)
        return absorb(self, request, state, longest, start)

    monkeypatch.setattr(es.Decoder, "absorb", spy)
    return starts


def joined(pieces):
    """The tokens of all pieces of a stream."""
    return [token for piece in pieces for token in piece]


def surprise(draws, table):
    """-log10 of the p-value of Pearson's test: above 5 once in 100,000 times by chance.

    Args:
      draws: keys of `table`; one of probability zero is not tolerated.
      table: {key: probability}; cells that expect fewer than 5 draws are merged.
    """
    from scipy.special import chdtrc

    counts, possible = collections.Counter(draws), [key for key in table if table[key] > 0]
    assert counts.keys() <= {*possible}, "an impossible outcome was drawn"
    p = np.array([table[key] for key in possible], np.float64)
    assert abs(p.sum() - 1) < 1e-5  # of float32
    expected = p / p.sum() * counts.total()
    found = np.array([counts[key] for key in possible])
    small = expected < 5
    if small.any():
        found, expected = (np.append(n[~small], n[small].sum()) for n in (found, expected))
    statistic = ((found - expected) ** 2 / expected).sum()
    return -np.log10(max(chdtrc(len(found) - 1, statistic), 1e-300))

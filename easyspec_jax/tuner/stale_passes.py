"""A model's texts, and passes over them in which layers read a residual stream that is stale.

Any partition into groups is one rule: the attention of layer j reads the residual stream as it was
s[j] layers ago, where s[j] is j's place in its group, and MLPs follow in order. So a single
compiled pass with s as an argument evaluates the exact model, one stale layer alone and every
partition.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import lax

from easyspec_jax.cache import KVCache
from easyspec_jax.config import Sampling
from easyspec_jax.decode import Decoder, Generation
from easyspec_jax.layer_parallel import make_partition
from easyspec_jax.model import Model, Placement, RunBlock, attention, forward, mlp, score
from easyspec_jax.sharding import mesh_jit, psum, replicate, zeros
from easyspec_jax.weights import Block

BATCH = 16  # prompts that are answered at once


@dataclasses.dataclass(frozen=True)
class Text:
    """Tokens to run a model on: a prompt, a model's answer, which counts, and padding."""

    tokens: np.ndarray  # i32[1, T]
    start: int  # of the answer
    end: int

    @property
    def counted(self) -> slice:
        """The positions that figures are taken over."""
        return slice(self.start, self.end)


def answer(
    decoder: Decoder,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    *,
    eos_ids: Sequence[int] = (),
    sampling: Sampling = Sampling(),  # noqa: B008
) -> Iterator[Generation]:
    """Answer all prompts, at most `BATCH` at a time; options as for `Decoder.generate`."""
    options = {"max_new_tokens": max_new_tokens, "eos_ids": eos_ids, "sampling": sampling}
    size = -(-len(prompts) // -(-len(prompts) // BATCH))  # even batches compile once
    for first in range(0, len(prompts), size):
        yield decoder.generate(prompts[first : first + size], seed=first, **options)


def write_texts(
    model: Model, prompts: Sequence[Sequence[int]], max_new_tokens: int, eos_ids: Sequence[int] = ()
) -> list[Text]:
    """Every prompt with the model's greedy answer, all padded to one length; answers count."""
    decoder = Decoder(model)
    outs = answer(decoder, prompts, max_new_tokens, eos_ids=eos_ids)
    answers = [tokens for out in outs for tokens in out.tokens]
    length = max(len(p) + len(a) for p, a in zip(prompts, answers, strict=True))
    texts = []
    for prompt, new in zip(prompts, answers, strict=True):
        tokens = np.zeros((1, length), np.int32)
        end = len(prompt) + len(new)
        tokens[0, :end] = [*prompt, *new]
        texts.append(Text(tokens, len(prompt), end))
    return texts


def regroup(model: Model, group_size: int | Sequence[int]) -> Model:
    """The same weights in other groups; nothing is copied, as layers that share their devices are
    not stacked.

    Raises:
      ValueError: a bad group size, or a model in a layout that spreads the layers of a group.
    """
    if model.layout.group_devices > 1:
        raise ValueError(
            "regroup needs layers that share their devices: load the model on one device, or with "
            'layout="tensor"'
        )
    attentions = [w for block in model.params.blocks for w in block.attention]
    mlps = [w for block in model.params.blocks for w in block.mlp]
    partition = make_partition(model.config.num_layers, group_size)
    ends = np.cumsum(partition)
    blocks = tuple(
        Block(attention=tuple(attentions[end - size : end]), mlp=tuple(mlps[end - size : end]))
        for size, end in zip(partition, ends, strict=True)
    )
    return model.replace(params=model.params.replace(blocks=blocks), partition=partition)


def staleness(partition: Sequence[int]) -> np.ndarray:
    """i32[L], how many layers old the residual stream is that each layer's attention reads."""
    return np.concatenate([np.arange(size, dtype=np.int32) for size in partition])


class Window(struct.PyTreeNode, kw_only=True):
    """An answer of n tokens to predict, padded to N, and the exact cache of its whole text."""

    tokens: jax.Array  # i32[1, N], the prompt's last token and the answer but its last
    answer: jax.Array  # i32[1, N], what each of them should predict
    start: jax.Array  # i32[1], position of the first of `tokens`
    cache: KVCache  # exact entries of T tokens, and room for N more
    size: jax.Array  # i32[], n


def make_window(model: Model, text: Text, room: int) -> Window:
    """The window of a text that a model without groups is to predict, padded to N = `room`.

    Raises:
      ValueError: a model in groups.
    """
    if max(model.partition) > 1:
        raise ValueError("a window needs the exact model: load it with group_size=1")
    put = functools.partial(replicate, mesh=model.layout.mesh)
    num = text.tokens.shape[1]
    cache = _absorb(model, put(text.tokens), zeros(model.abstract_cache(1, num + room)))
    padded = np.zeros((1, room + 1), np.int32)
    size = text.end - text.start
    padded[0, : size + 1] = text.tokens[0, text.start - 1 : text.end]
    return Window(
        tokens=put(padded[:, :-1]),
        answer=put(padded[:, 1:]),
        start=put(np.array([text.start - 1], np.int32)),
        cache=cache,
        size=put(np.int32(size)),
    )


@mesh_jit(out="cache", donate="cache")
def _absorb(model: Model, tokens: jax.Array, cache: KVCache) -> KVCache:
    """The cache with all tokens, exactly."""
    return forward(model, tokens, cache)[1]


def stale_log_probs(
    model: Model, window: Window, stale: jax.Array, *, recent: int, vocab_size: int
) -> jax.Array:
    """Log-probabilities f[1, N, V] of the next token in a pass with stale layers, over the V ids of
    the base, as drafts have them; traceable, over local shards.

    Every token is run as if it had been drafted: it sees exact entries of the text before it, but
    of the last `recent` tokens, itself included, the entries that this pass makes. recent = 1 is
    the first parallel pass behind a calibration, d the d-th.

    Args:
      stale: i32[L], in [0, j] for layer j: how many layers old its attention's input is.
    """
    n = window.tokens.shape[1]
    behind = window.cache.max_len - n  # T, entries of the text
    at = jnp.arange(n, dtype=jnp.int32)
    own = (at[None] <= at[:, None]) & (at[None] > at[:, None] - recent)
    first = window.start + jnp.maximum(at - recent + 1, 0)  # exact entries lie before it
    exact = jnp.arange(behind, dtype=jnp.int32)[None] < first[:, None]
    placement = Placement(
        origin=jnp.zeros_like(window.start),
        positions=window.start[:, None] + at[None],
        ancestors=jnp.concatenate((exact, own), axis=1)[None],
    )
    cache = window.cache.rollback(jnp.full_like(window.start, behind))
    run = stale_runner(model, stale)
    hidden, _ = forward(model, window.tokens, cache, placement=placement, run_block=run)
    return jax.nn.log_softmax(score(model, hidden).fit(vocab_size).whole(), axis=-1)


def stale_runner(model: Model, stale: jax.Array) -> RunBlock:
    """How one pass of a model without groups runs its layers, the attention of layer j on what the
    residual stream was stale[j] layers ago; for one pass alone, as it counts layers.
    """
    state: dict = {"layer": 0, "streams": None}

    def run(model, block, x, kv, step):
        j, streams = state["layer"], state["streams"]
        if streams is None:
            streams = jnp.zeros((model.config.num_layers, *x.shape), x.dtype)
        streams = lax.dynamic_update_index_in_dim(streams, x, j, axis=0)
        state.update(layer=j + 1, streams=streams)
        read = lax.dynamic_index_in_dim(streams, j - stale[j], axis=0, keepdims=False)
        delta, new = attention(model, block.attention[0], read, kv[0], step)
        x = x + psum(delta, model.layout.heads)
        return x + psum(mlp(model, block.mlp[0], x), model.layout.mlp), (new,)

    return run

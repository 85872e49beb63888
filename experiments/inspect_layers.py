"""Why grouping works, in numbers: what layers read, what groups of them make of it, what it costs.

A group lets attention layers read a hidden state that is a few layers old. Looked at here: how far
it is from the one they should read, how far a grouped model's hidden states are from the exact
ones, and how far its next-token distribution is. All on one device, on texts that the model wrote
itself, with blocks run by the library's own `run_block`s, whose insides a hook records.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from easyspec_jax.cache import KVCache
from easyspec_jax.layer_parallel import PARALLEL, draft_runner
from easyspec_jax.model import Model, Placement, RunBlock, forward, logits, rms_norm, run_layer
from easyspec_jax.sharding import zeros
from easyspec_jax.tuner.stale_passes import Text, regroup
from easyspec_jax.weights import Block, arranged_dims

Record = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Pass:
    """What one pass over a text gave."""

    states: np.ndarray  # f[L + 1, T, D], before the first layer and after each
    log_probs: np.ndarray  # f64[T, V], of the next token
    cache: KVCache  # with the text's T entries behind those that it had


def recording(run_block: RunBlock, states: list) -> RunBlock:
    """`run_block`, which also appends to `states` what goes into the first block and the hidden
    state after every layer.

    That after layer j of a group is what the block of its first j layers would return: attentions
    do not wait for later ones, and MLPs follow in order.
    """

    def run(model, block, x, kv, step):
        if not states:
            states.append(x)
        for j in range(1, len(block.mlp)):
            first = Block(attention=block.attention[:j], mlp=block.mlp[:j])
            states.append(run_block(model, first, x, kv[:j], step)[0])
        x, kv = run_block(model, block, x, kv, step)
        states.append(x)
        return x, kv

    return run


@functools.partial(jax.jit, static_argnames="run_block")
def _run(model, tokens, cache, placement, run_block):
    states: list[jax.Array] = []
    hook = recording(run_block, states)
    hidden, cache = forward(model, tokens, cache, placement=placement, run_block=hook)
    scores = jax.nn.log_softmax(logits(model, hidden)[0].astype(jnp.float32))
    return jnp.concatenate(states), scores, cache


def exact_pass(model: Model, text: Text) -> Pass:
    """One pass of a model without groups over the text; its cache has room for as much again."""
    cache = zeros(model.abstract_cache(1, 2 * text.tokens.shape[1]))
    return _as_pass(_run(model, text.tokens, cache, None, run_layer))


def fuzzy_pass(model: Model, text: Text, parallel: str, exact: KVCache, calibrate: bool) -> Pass:
    """One pass over the text in the model's groups; every position sees its own, fuzzy entry.

    Args:
      parallel: one of `PARALLEL`, as for a drafter.
      exact: the cache of `exact_pass` on the same text.
      calibrate: True: of all positions before its own each sees exact entries, as the first
        parallel pass behind a calibration does. False: exact ones of the prompt, fuzzy ones of the
        model's own words, as a drafter that does not calibrate.
    """
    t = text.tokens.shape[1]
    own = np.arange(t)[None] >= text.start
    before, itself = np.tri(t, k=-1, dtype=bool), np.eye(t, dtype=bool)
    if calibrate:
        seen = np.concatenate((before, itself), axis=1)
    else:
        seen = np.concatenate((before & ~own, before & own | itself), axis=1)
    placement = Placement(
        origin=jnp.zeros((1,), jnp.int32),
        positions=jnp.arange(t, dtype=jnp.int32)[None],
        ancestors=jnp.asarray(seen[None]),
    )
    layers = iter([kv for block in exact.blocks for kv in block])
    blocks = tuple(tuple(itertools.islice(layers, size)) for size in model.partition)
    cache = KVCache(
        blocks=blocks,
        length=jnp.full((1,), t, jnp.int32),
        layout=model.layout,
        partition=model.partition,
    )
    return _as_pass(_run(model, text.tokens, cache, placement, draft_runner(parallel)))


def _as_pass(result) -> Pass:
    states, log_probs, cache = result
    return Pass(np.asarray(states, np.float32), np.asarray(log_probs, np.float64), cache)


def cosine(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Cosine similarity over the last axis."""
    return (a * b).sum(-1) / (np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1))


def queries_and_keys(model: Model, layer: int, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Queries [..., N, H] and keys [..., K, H] that a layer makes of hidden states x ([..., D]),
    not rotated: rotation turns both sides of a comparison alike.
    """
    w = [w for block in model.params.blocks for w in block.attention][layer]
    x, eps = jnp.asarray(x, model.dtype), model.config.norm_eps
    dims = arranged_dims("wqkv", model.layout).lower()
    heads = jnp.einsum(f"...d,{dims}->...kgh", rms_norm(x, w.norm, eps), w.wqkv.astype(x.dtype))
    if w.bqkv is not None:
        heads = heads + w.bqkv.reshape((1,) * (heads.ndim - 3) + w.bqkv.shape)
    queries, keys = heads[..., :-2, :], heads[..., -2, :]
    if w.q_norm is not None:
        queries, keys = rms_norm(queries, w.q_norm, eps), rms_norm(keys, w.k_norm, eps)
    queries = queries.reshape(*queries.shape[:-3], -1, queries.shape[-1])
    return np.asarray(queries, np.float32), np.asarray(keys, np.float32)


def stale_similarity(
    model: Model, states: np.ndarray, counted: slice, back: int
) -> dict[str, list[float]]:
    """Per layer from `back` on, mean cosine similarity of its input and of the one `back` layers
    earlier, and of the queries and keys (mean over heads) that the layer makes of the two.
    """
    found: dict[str, list[float]] = {"hidden": [], "queries": [], "keys": []}
    for layer in range(back, model.config.num_layers):
        fresh, stale = states[layer][counted], states[layer - back][counted]
        pairs = zip(
            queries_and_keys(model, layer, fresh),
            queries_and_keys(model, layer, stale),
            strict=True,
        )
        values = [cosine(fresh, stale), *(cosine(a, b) for a, b in pairs)]
        for name, value in zip(found, values, strict=True):
            found[name].append(float(value.mean()))
    return found


def compare_distributions(p: np.ndarray, q: np.ndarray) -> dict[str, float]:
    """Means over positions of log-probabilities [n, V]: Kullback-Leibler divergence of q from p
    (nats), how often both have the same likeliest token, and the sum of min(p, q), which is the
    chance that a token drawn from q is accepted by p at temperature 1.
    """
    return {
        "kl": float((np.exp(p) * (p - q)).sum(-1).mean()),
        "argmax_agreement": float((p.argmax(-1) == q.argmax(-1)).mean()),
        "overlap": float(np.exp(np.minimum(p, q)).sum(-1).mean()),
    }


def measure_group(
    model: Model, texts: list[Text], exact: list[Pass], parallel: str, calibrate: bool
) -> Record:
    """One grouping against the exact model: figures of `compare_distributions`, each with its
    standard error over texts, and the hidden states' cosine similarity after every layer.
    """
    rows, hidden = [], []
    for text, true in zip(texts, exact, strict=True):
        fuzzy = fuzzy_pass(model, text, parallel, true.cache, calibrate)
        at = text.counted
        rows.append(compare_distributions(true.log_probs[at], fuzzy.log_probs[at]))
        hidden.append(cosine(true.states[1:, at], fuzzy.states[1:, at]).mean(axis=1))
    record: Record = {"partition": list(model.partition)}
    for name in rows[0]:
        values = np.array([row[name] for row in rows])
        record[name] = float(values.mean())
        if len(rows) > 1:
            record[f"{name}_stderr"] = float(values.std(ddof=1) / len(rows) ** 0.5)
    return record | {"hidden": np.mean(hidden, axis=0).tolist()}


def measure(
    model: Model, texts: list[Text], group_sizes: Sequence[int], max_back: int = 5
) -> Record:
    """Everything that this module can say about a model without groups: "stale", by how many layers
    back, and "groups", one record for each size, way of running in parallel and calibration.
    """
    exact = [exact_pass(model, text) for text in texts]
    backs = range(1, min(max_back, model.config.num_layers - 1) + 1)
    stale = {}
    for back in backs:
        found = [
            stale_similarity(model, true.states, text.counted, back)
            for text, true in zip(texts, exact, strict=True)
        ]
        stale[str(back)] = {n: np.mean([f[n] for f in found], axis=0).tolist() for n in found[0]}
    ways = [(s, p, c) for s in group_sizes for p in PARALLEL for c in (True, False)]
    groups = []
    for size, parallel, calibrate in tqdm(ways, unit="way", leave=False):
        record = measure_group(regroup(model, size), texts, exact, parallel, calibrate)
        way = {"group_size": size, "parallel": parallel, "calibrate": calibrate}
        groups.append(way | record)
    positions = sum(text.end - text.start for text in texts)
    return rounded({"texts": len(texts), "positions": positions, "stale": stale, "groups": groups})


def rounded(value: Any) -> Any:
    """The same with five significant digits, to be stored."""
    if isinstance(value, dict):
        return {key: rounded(one) for key, one in value.items()}
    if isinstance(value, list):
        return [rounded(one) for one in value]
    return float(f"{value:.5g}") if isinstance(value, float) else value

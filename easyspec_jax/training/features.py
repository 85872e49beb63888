"""What the base makes of packed answers, computed once and kept in a file if asked to.

A pass over a row runs its sequences side by side: each token sees those of its own. All of it is
rounded to bfloat16, so that features from the file are those of the pass, bit by bit.
"""

from __future__ import annotations

import hashlib
import json
import pathlib
import shutil
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from easyspec_jax.cache import KVCache
from easyspec_jax.json_files import read_object, write_object
from easyspec_jax.model import Model, Placement, embed, forward_tapped, rms_norm, score
from easyspec_jax.sharding import mesh_jit, replicate, zeros
from easyspec_jax.training.head import Features, Texts
from easyspec_jax.training.packing import Answer, texts_of

_BF16 = np.dtype(jnp.bfloat16)


class FeatureSource:
    """Rows of answers as training reads them."""

    def __init__(
        self,
        base: Model,
        answers: Sequence[Answer],
        taps: tuple[int, ...],
        shape: tuple[int, int],
        batch: int,
        folder: pathlib.Path | None = None,
    ):
        """Answers of a base, in rows of `shape` (T and A), `batch` rows at a time.

        Args:
          taps: layers before which the residual stream is read.
          folder: where features are kept for the next time; None: nowhere.

        Raises:
          ValueError: the disk has no room for them.
        """
        self.base, self.answers, self.taps = base, answers, taps
        self.shape, self.batch = shape, batch
        sizes = [len(one.prompt) + len(one.answer) for one in answers]
        self._start = np.concatenate(([0], np.cumsum(sizes))).astype(np.int64)
        self._kept = None if folder is None else _Kept(self, folder)
        self._cache = zeros(base.abstract_cache(batch, shape[0]))

    def __call__(self, rows: Sequence[Sequence[int]]) -> tuple[Texts, Features]:
        """Rows (which answers are in each; at most `batch`) with what the base makes of them."""
        rows = [*rows, *[[]] * (self.batch - len(rows))]
        texts = texts_of(self.answers, rows, self.shape)
        members = [index for row in rows for index in row]
        if self._kept is None:
            return texts, self._run(texts)
        flat = self._flat(rows)
        queries = np.take_along_axis(flat, texts.query, axis=1)
        if not self._kept.done[members].all():
            self._kept.write(members, texts, flat, queries, self._run(texts))
        tokens = replicate(texts.tokens, self.base.layout.mesh)
        return texts, self._kept.read(flat, queries, _look_up(self.base, tokens))

    @property
    def num_tokens(self) -> int:
        """Tokens of all answers and their prompts."""
        return int(self._start[-1])

    def _run(self, texts: Texts) -> Features:
        placed = jax.tree.map(lambda x: replicate(x, self.base.layout.mesh), texts)
        return _features(self.base, placed, self._cache, taps=self.taps)

    def _flat(self, rows: Sequence[Sequence[int]]) -> np.ndarray:
        """Place of every token of rows among all: i64[B, T], 0 for padding."""
        flat = np.zeros((len(rows), self.shape[0]), np.int64)
        for b, members in enumerate(rows):
            spans = [np.arange(self._start[i], self._start[i + 1]) for i in members]
            if spans:
                all_of_it = np.concatenate(spans)
                flat[b, : all_of_it.size] = all_of_it
        return flat


class _Kept:
    """Features in files, by place of the token; an answer's count once it is marked as done."""

    def __init__(self, source: FeatureSource, folder: pathlib.Path):
        about = _about(source)
        d, total = source.base.config.embed_dim, source.num_tokens
        self._width = len(source.taps) * d
        mode: Any = "w+"
        if (folder / "features.json").is_file() and read_object(folder / "features.json") == about:
            mode = "r+"
        else:
            _check_room(folder, total * (2 * (self._width + d) + 4) + len(source.answers))
        folder.mkdir(parents=True, exist_ok=True)

        def array(name, dtype, shape):
            return np.memmap(folder / name, dtype, mode, shape=shape)

        self.done = array("done", np.uint8, (len(source.answers),))
        self._states = array("states", np.uint16, (total, self._width + d))
        self._greedy = array("greedy", np.int32, (total,))
        if mode == "w+":
            write_object(folder / "features.json", about)

    def write(self, members, texts: Texts, flat, queries, features: Features) -> None:
        """Keep what was computed of these answers."""
        there, asked = texts.segment >= 0, texts.since >= 0
        bits = lambda x: np.asarray(x).view(np.uint16)  # noqa: E731
        self._states[flat[there], : self._width] = bits(features.taps)[there]
        self._states[queries[asked], self._width :] = bits(features.hidden)[asked]
        self._greedy[queries[asked]] = np.asarray(features.greedy)[asked]
        self.done[members] = 1

    def read(self, flat, queries, embedding: jax.Array) -> Features:
        """What was kept of these places."""
        return Features(
            embedding=embedding,
            taps=self._states[flat, : self._width].view(_BF16),
            hidden=self._states[queries, self._width :].view(_BF16),
            greedy=self._greedy[queries],
        )


def _check_room(folder: pathlib.Path, size: int) -> None:
    """Delete features of other answers there, and refuse a disk without room for so many bytes."""
    for name in ("features.json", "done", "states", "greedy"):
        (folder / name).unlink(missing_ok=True)
    there = next(p for p in folder.absolute().parents if p.exists())
    free = shutil.disk_usage(there).free
    if size > free:
        raise ValueError(
            f"the features of these answers are {size / 1e9:.1f} GB, but the disk of {folder} has "
            f"{free / 1e9:.1f} GB: compute them in every epoch (--no-features, keep_features=False)"
        )


def base_digest(base: Model) -> str:
    """Of all of a base's numbers and of how it computes with them; the same on any mesh."""
    parts = [*base.params.blocks, base.params.replace(blocks=())]
    sums = [int(_sum_of_bits(part)) for part in parts]
    about = [sums, base.dtype.name, repr(base.quantization), repr(base.config)]
    return hashlib.sha256(json.dumps(about).encode()).hexdigest()


@jax.jit
def _sum_of_bits(tree: Any) -> jax.Array:
    """Of all numbers, modulo 2^32: no order and no layout changes it."""

    def bits(x: jax.Array) -> jax.Array:
        if not jnp.issubdtype(x.dtype, jnp.integer):
            x = lax.bitcast_convert_type(x, jnp.dtype(f"uint{min(8 * x.dtype.itemsize, 32)}"))
        return x.astype(jnp.uint32).sum(dtype=jnp.uint32)

    return sum(map(bits, jax.tree.leaves(tree)), jnp.uint32(0))


def _about(source: FeatureSource) -> dict[str, Any]:
    """What the kept features depend on."""
    texts = hashlib.sha256(json.dumps([one.tokens for one in source.answers]).encode())
    return {
        "answers": texts.hexdigest(),
        "base": base_digest(source.base),
        "taps": list(source.taps),
    }


@mesh_jit(static_argnames="taps")
def _features(model: Model, texts: Texts, cache: KVCache, taps: tuple[int, ...]) -> Features:
    """Features of rows; the cache is scratch."""
    same = texts.segment[:, :, None] == texts.segment[:, None]
    before = texts.position[:, None] <= texts.position[:, :, None]
    placement = Placement(
        origin=jnp.zeros_like(texts.position[:, 0]),
        positions=texts.position,
        ancestors=same & before,
    )
    found: Any = forward_tapped(model, texts.tokens, cache, taps, placement=placement)
    x, _, streams = found
    asked = jnp.take_along_axis(x, texts.query[..., None], axis=1)
    # Row by row: logits of all of them would be the largest array there is.
    greedy = lax.map(lambda row: score(model, row[None]).argmax()[0], asked)
    hidden = rms_norm(asked, model.params.final_norm, model.config.norm_eps)
    return Features(
        embedding=embed(model, texts.tokens),
        taps=streams.reshape(*x.shape[:2], -1).astype(jnp.bfloat16),
        hidden=hidden.astype(jnp.bfloat16),
        greedy=greedy.astype(jnp.int32),
    )


@mesh_jit()
def _look_up(model: Model, tokens: jax.Array) -> jax.Array:
    return embed(model, tokens)

"""A head trained on answers of its base: from a file of answers to a folder that drafts.

Everything that is drawn follows from the seed and the number of the step, and the checkpoint holds
all that a step changes; so a run that was killed ends as one that was not.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import hashlib
import itertools
import json
import os
import pathlib
import time
import zipfile
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from easyspec_jax.config import ModelConfig, is_integer, is_number
from easyspec_jax.drafters.eagle_folder import default_taps
from easyspec_jax.json_files import parse_object, write_object
from easyspec_jax.model import Model
from easyspec_jax.quantized import Quantized, dequantise, wide_type
from easyspec_jax.sharding import replicate
from easyspec_jax.training.answers import too_few
from easyspec_jax.training.features import FeatureSource, base_digest
from easyspec_jax.training.folder import write_head
from easyspec_jax.training.head import start_head
from easyspec_jax.training.heldout import measure
from easyspec_jax.training.packing import Answer, pack, room_for_queries
from easyspec_jax.training.step import (
    TrainState,
    Vocabulary,
    make_optimiser,
    over_devices,
    train_step,
)
from easyspec_jax.weights import separate_top

_STATE_FILE, RECORD_FILE, CHECKPOINT, FEATURES = (
    "state.npz",
    "training.json",
    "checkpoint",
    "features",
)
_LOGGED = 10  # steps between two points of the curve


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """How a head is trained."""

    taps: tuple[int, ...] | None = None  # None: before layers 2, L // 2 and L - 3
    num_ids: int = 4096  # draft vocabulary: the likeliest tokens of the answers
    num_depths: int = 3  # levels behind a feature of the base that are trained
    num_epochs: int = 2
    num_rows: int = 8  # of a step
    row_length: int = 512  # tokens
    learning_rate: float = 1e-2
    held_out: int = 40  # greedy answers that are not learnt
    embed_residual: bool = True
    keep_features: bool = True  # in the folder: what the base makes of the answers
    own_rows: bool = True  # the folder holds the base's head over the draft's vocabulary
    checkpoint_minutes: float = 5.0
    seed: int = 0

    def taps_of(self, config: ModelConfig) -> tuple[int, ...]:
        """The layers before which the residual stream of such a base is read."""
        return default_taps(config.num_layers) if self.taps is None else tuple(self.taps)

    def check(self, config: ModelConfig, mesh: Mesh) -> None:
        """Refuse what cannot be trained for a base of this configuration on this mesh.

        Raises:
          ValueError: taps it has not, rows longer than its context, numbers out of range; several
            processes, or rows that the mesh does not divide.
        """
        taps, layers = self.taps_of(config), config.num_layers
        rising = all(a < b for a, b in itertools.pairwise(taps))
        if not taps or not rising or not 0 < taps[0] <= taps[-1] < layers:
            shown = ",".join(map(str, taps))
            raise ValueError(f"taps must rise within 1 .. {layers - 1}, got {shown}: name others")
        for name in ("num_ids", "num_depths", "num_epochs", "num_rows", "held_out"):
            if not (is_integer(getattr(self, name)) and getattr(self, name) >= 1):
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)!r}")
        if not 2 <= self.row_length <= config.context:
            raise ValueError(
                f"rows must have 2 .. {config.context} tokens, the base's context, got "
                f"{self.row_length}"
            )
        if not (is_number(self.learning_rate) and self.learning_rate > 0):
            raise ValueError(f"the learning rate must be above 0, got {self.learning_rate!r}")
        if not (is_number(self.checkpoint_minutes) and self.checkpoint_minutes >= 0):
            raise ValueError(
                f"minutes between checkpoints must be at least 0, got {self.checkpoint_minutes!r}"
            )
        if not (is_integer(self.seed) and 0 <= self.seed < 2**32):
            raise ValueError(f"the seed must be a whole number of 32 bits, got {self.seed!r}")
        if mesh.is_multi_process:
            raise ValueError("a head is trained in one process")
        if self.num_rows % mesh.size:
            count = f"{self.num_rows} rows a step cannot be split"
            raise ValueError(f"{count} over {mesh.size} devices: name a multiple")


class Data:
    """Answers in rows: those that are learnt, and those that are held out."""

    def __init__(self, base: Model, answers: Sequence[Answer], options: Options):
        """Check and pack them.

        Raises:
          ValueError: a base in groups, options that do not fit it or its mesh, or too few answers.
        """
        if max(base.partition) > 1:
            raise ValueError("the base runs layer after layer: load it with group_size=1")
        options.check(base.config, base.layout.mesh)
        self.options, self.base = options, base
        self.taps = options.taps_of(base.config)
        greedy = [i for i, one in enumerate(answers) if one.temperature == 0]
        held = greedy[: options.held_out]
        if len(held) < options.held_out:
            raise ValueError(too_few(options.held_out, len(held)))
        self.answers = answers
        known = {tuple(answers[i].prompt) for i in held}
        rest = [i for i, one in enumerate(answers) if tuple(one.prompt) not in known]
        length = options.row_length
        fitting = [i for i in (*rest, *held) if 1 < len(answers[i].tokens) <= length]
        if not set(rest) & set(fitting):
            raise ValueError(f"no answer is left to learn: none has at most {length} tokens")
        self.shape = (length, room_for_queries([answers[i] for i in fitting], length))
        self.rows, self.held_rows = self._packed(rest), self._packed(held)
        counts = collections.Counter(t for i in rest for t in answers[i].answer)
        self.num_tokens = counts.total()
        common = [token for token, _ in counts.most_common(options.num_ids)]
        self.ids = np.sort(np.asarray(common, np.int32))
        epochs = options.num_epochs * len(self.rows)
        self.num_steps = -(-epochs // options.num_rows)

    def _packed(self, indices: Sequence[int]) -> list[list[int]]:
        rows = pack([self.answers[i] for i in indices], *self.shape)
        return [[indices[i] for i in row] for row in rows]

    def rows_of(self, step: int) -> list[list[int]]:
        """The rows of one step: every epoch all of them, in an order of its own."""
        size, count = self.options.num_rows, len(self.rows)
        found = []
        for at in range(step * size, min((step + 1) * size, self.options.num_epochs * count)):
            epoch, place = divmod(at, count)
            order = np.random.default_rng((self.options.seed, epoch)).permutation(count)
            found.append(self.rows[order[place]])
        return found

    @functools.cached_property
    def digest(self) -> str:
        """Of all that a step depends on."""
        options = dataclasses.asdict(self.options)
        for name in ("checkpoint_minutes", "own_rows", "keep_features"):
            del options[name]
        texts = [[one.prompt, one.answer, one.temperature] for one in self.answers]
        about = [options, texts, base_digest(self.base)]
        return hashlib.sha256(json.dumps(about).encode()).hexdigest()


def train(
    base: Model, answers: Sequence[Answer], folder: str | os.PathLike, options: Options, **bar: Any
) -> dict[str, Any]:
    """The folder holds a head trained for the base; returns what training.json says.

    Args:
      base: not in groups.
      answers: its own.
      folder: what a run that was broken off left in it is continued.
      bar: options of tqdm.

    Raises:
      ValueError: a base, answers, taps or rows that will not do, a checkpoint made with others, or
        a disk without room for features.
    """
    data = Data(base, answers, options)
    optimiser = make_optimiser(options.learning_rate, data.num_steps)
    target = pathlib.Path(folder)
    kept = target / FEATURES if options.keep_features else None
    place = target / CHECKPOINT / _STATE_FILE
    found = _read_state(place, data.digest)
    source = FeatureSource(base, answers, data.taps, data.shape, options.num_rows, kept)
    place.parent.mkdir(parents=True, exist_ok=True)
    vocabulary = _vocabulary(data, source, None if found is None else found["sizes"])
    state = _begin(data, vocabulary, optimiser)
    history, seconds = [], 0.0
    if found is not None:
        state = _restored(state, found)
        history, seconds = found["history"], found["seconds"]
    run = _Run(data, source, vocabulary, optimiser, place, history, seconds)
    state = run.to_end(state, bar)
    head = jax.device_get(state.head)
    record = {
        "answers": len(answers),
        "answer_tokens": data.num_tokens,
        "steps": data.num_steps,
        "minutes": round(run.seconds / 60, 2),
        "options": dataclasses.asdict(options) | {"taps": data.taps},
        "curve": run.history,
        "held_out": measure(state.head, vocabulary, source, data.held_rows, options.num_depths),
    }
    write_head(
        target,
        head,
        base.config,
        taps=data.taps,
        ids=data.ids,
        sizes=np.asarray(vocabulary.sizes),
        rows=np.asarray(vocabulary.rows) if options.own_rows else None,
    )
    write_object(target / RECORD_FILE, record)
    return record


def _vocabulary(data: Data, source: FeatureSource, sizes: Any) -> Vocabulary:
    """What is drafted, on all devices; `sizes` are measured on the first rows if nobody knows."""
    base = data.base
    if sizes is None:
        texts, features = source(data.rows_of(0))
        taps = np.asarray(features.taps, np.float32)
        # Queries alone: the first tokens of texts have states that are hundreds of times larger.
        seen = np.take_along_axis(taps, texts.query[..., None], axis=1)[texts.since >= 0]
        sizes = np.sqrt(np.mean(np.square(seen), axis=0)) + np.float32(1e-6)
    separate = jax.jit(lambda params: separate_top(params, base.layout))
    top = separate(base.params.replace(blocks=()))
    table = top["embed"] if top.get("lm_head") is None else top["lm_head"]
    table = dequantise(table) if isinstance(table, Quantized) else table
    ids = jnp.asarray(data.ids)
    rows = table[ids] if top.get("lm_head") is None else table[:, ids].T
    mesh = base.layout.mesh
    place = lambda x: replicate(np.asarray(x), mesh)  # noqa: E731
    wide = np.asarray(rows).astype(wide_type(base.dtype))
    return Vocabulary(ids=place(data.ids), rows=place(wide), sizes=place(sizes.astype(wide.dtype)))


def _begin(data: Data, vocabulary: Vocabulary, optimiser: Any) -> TrainState:
    """The state before the first step."""
    sizes = np.asarray(vocabulary.sizes).reshape(len(data.taps), -1)
    options, mesh = data.options, data.base.layout.mesh
    head = start_head(data.base, sizes, embed_residual=options.embed_residual, seed=options.seed)
    dtype = vocabulary.rows.dtype
    head = {name: replicate(np.asarray(x, dtype), mesh) for name, x in head.items()}
    everywhere = NamedSharding(mesh, PartitionSpec())  # as a step returns it: one program
    started = jax.jit(optimiser.init, out_shardings=everywhere)(head)
    return TrainState(head=head, optimiser=started, step=replicate(np.int32(0), mesh))


def _read_state(place: pathlib.Path, digest: str) -> dict[str, Any] | None:
    """What a checkpoint holds; None where there is none.

    Raises:
      ValueError: it is of another training, or damaged.
    """
    if not place.is_file():
        return None
    try:
        with np.load(place, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise ValueError(f"{place} cannot be read: {error}") from None
    about = parse_object(str(arrays.pop("about", "")), place)
    if about.get("digest") != digest:
        folder = place.parent.parent
        raise ValueError(
            f"{folder} has a checkpoint of another training: options, answers or base are not "
            "those it was made with; name another folder"
        )
    return about | arrays


def _restored(state: TrainState, found: dict[str, Any]) -> TrainState:
    """The state that a checkpoint holds, on the devices of `state`."""
    leaves, structure = jax.tree.flatten(state)
    kept = [jax.device_put(found[f"leaf{i}"], leaf.sharding) for i, leaf in enumerate(leaves)]
    return jax.tree.unflatten(structure, kept)


class _Run:
    """Steps from where the checkpoint is to the last."""

    def __init__(self, data, source, vocabulary, optimiser, place, history, seconds):
        self.data, self.source, self.vocabulary = data, source, vocabulary
        self.optimiser, self.place = optimiser, place
        self.history, self.seconds = history, seconds
        self._parts: list[dict[str, np.ndarray]] = []

    def to_end(self, state: TrainState, bar: dict[str, Any]) -> TrainState:
        """The state behind the last step, which the checkpoint then holds."""
        from tqdm import tqdm

        first, total = int(state.step), self.data.num_steps
        began = saved = time.monotonic()
        with tqdm(total=total, initial=first, desc="training", unit="step", **bar) as shown:
            for step in range(first, total):
                state = self._step(state, step)
                now = time.monotonic()
                self.seconds, began = self.seconds + now - began, now
                shown.update()
                if (step + 1) % _LOGGED and step + 1 < total:
                    continue
                self._log(step + 1, shown)
                if now - saved > 60 * self.data.options.checkpoint_minutes:
                    self._save(state)
                    saved = now
        self._save(state)
        return state

    def _step(self, state: TrainState, step: int) -> TrainState:
        mesh = self.data.base.layout.mesh
        texts, features = self.source(self.data.rows_of(step))
        state, parts = train_step(
            state,
            self.vocabulary,
            over_devices(texts, mesh),
            over_devices(features, mesh),
            optimiser=self.optimiser,
            config=self.data.base.config,
            num_depths=self.data.options.num_depths,
        )
        self._parts.append(jax.device_get(parts))
        return state

    def _log(self, step: int, shown: Any) -> None:
        """A point of the curve: loss and accuracy by depth since the last."""
        loss = np.mean([p["loss"] for p in self._parts], axis=0)
        hits, count = (np.sum([p[name] for p in self._parts], axis=0) for name in ("hits", "count"))
        accuracy = hits / np.maximum(count, 1)
        point = {"step": step, "loss": _rounded(loss), "accuracy": _rounded(accuracy)}
        self.history.append(point)
        self._parts.clear()
        by_depth = lambda x: "/".join(f"{v:.3g}" for v in x)  # noqa: E731
        shown.set_postfix_str(f"loss {by_depth(loss)}, right {by_depth(accuracy)}", refresh=False)

    def _save(self, state: TrainState) -> None:
        """Write the checkpoint, whole or not at all; only at points of the curve."""
        leaves = {f"leaf{i}": np.asarray(x) for i, x in enumerate(jax.tree.leaves(state))}
        about = {"digest": self.data.digest, "seconds": self.seconds, "history": self.history}
        leaves["sizes"] = np.asarray(self.vocabulary.sizes)
        leaves["about"] = np.array(json.dumps(about))
        temporary = self.place.with_name("writing.npz")
        with temporary.open("wb") as file:
            np.savez(file, allow_pickle=False, **leaves)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, self.place)


def _rounded(values: np.ndarray) -> list[float]:
    return [round(float(x), 4) for x in values]

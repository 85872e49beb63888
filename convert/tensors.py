"""Which tensors a Hugging Face model must have, and how each becomes an array of a checkpoint.

The one idea: everything that can be refused by looking at names, shapes and types is refused from
the headers; the values are then read in slices of rows, straight into the array that is saved, so a
transposed or cast weight never exists twice.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import NamedTuple, Protocol

import ml_dtypes
import numpy as np

from easyspec_jax.checkpoint import TOP_PART, layer_name
from easyspec_jax.config import ModelConfig
from easyspec_jax.quantized import KINDS, Form, smallest_code
from easyspec_jax.weights import EMBED, HEAD, HF_PREFIX, LAYER_WEIGHTS, TOP_WEIGHTS, Weight, present

DTYPES = {
    "float32": np.dtype(np.float32),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float16": np.dtype(np.float16),
}
CHUNK_BYTES = 16 * 2**20


@dataclasses.dataclass(frozen=True)
class Tensor:
    """What a header says about one tensor."""

    shape: tuple[int, ...]
    dtype: str  # a key of DTYPES where the values can be read, else the source's own word


class Rows(NamedTuple):
    """R rows (outputs) of a quantised matrix."""

    codes: np.ndarray  # [R, in], int8, uint8 or float8_e4m3fn
    zeros: np.ndarray | None  # [R, G] integers, None: all 0
    scales: np.ndarray  # [R, G] floats, as stored
    # Inputs of a group, lying side by side; or the group of every input, [in].
    groups: int | np.ndarray
    minima: np.ndarray | None = None  # [R, G] floats, weights of code 0, which is the smallest then

    def dequantised(self) -> np.ndarray:
        """f32[R, in]: (code - zero point) * scale, the difference exact and the product rounded
        once; and the minimum, rounded once, where products are exact.

        The references compute in the type of the scales, where the difference is exact as well: a
        cast to that type gives their values.
        """
        with np.errstate(over="ignore", invalid="ignore"):  # what is not finite is refused later
            dense = self.codes.astype(np.float32, order="C")
            if self.zeros is not None:
                dense -= _spread(self.zeros, self.groups, dense.shape[1])
            dense *= _spread(self.scales, self.groups, dense.shape[1])
            if self.minima is not None:
                dense += _spread(self.minima, self.groups, dense.shape[1])
        return dense

    def from_zero(self, kind: str) -> Rows:
        """The same with codes that have no sign, and minima in place of zero points: exact, as
        scales have 16 bits.

        Args:
          kind: "int4" or "int8", which holds the codes.
        """
        half = 0 if self.codes.dtype == np.uint8 else half_range(kind)
        codes = (self.codes.astype(np.int16) + half).astype(np.uint8)
        zeros = np.int16(half) + (0 if self.zeros is None else self.zeros.astype(np.int16))
        # + 0 as -0 would not survive sums of what devices have
        minima = (-zeros).astype(np.float32) * self.scales.astype(np.float32) + np.float32(0)
        return Rows(codes, None, self.scales, self.groups, minima)


def half_range(kind: str) -> int:
    """How many codes of "int4" or "int8" are below 0."""
    return -smallest_code(KINDS[kind][0])


def _spread(values: np.ndarray, groups: int | np.ndarray, inputs: int) -> np.ndarray:
    """f32[R, in], or [R, 1] where there is one group: of every input what its group has."""
    values = values.astype(np.float32)
    if isinstance(groups, np.ndarray):
        return np.take(values, groups, axis=1)
    return values if values.shape[1] == 1 else np.repeat(values, groups, axis=1)[:, :inputs]


class Source(Protocol):
    """A model as found on disk, under the tensor names of transformers."""

    config: ModelConfig
    config_text: str  # config.json, as it is copied
    generation_config: dict
    dtype: str  # a key of DTYPES: what the source stores
    codes: str  # what its quantised weights are, for people, or ""
    note: str  # what else whoever converts it should know, or ""

    @property
    def tensors(self) -> Mapping[str, Tensor]:
        """What the headers say, by name."""
        ...

    def label(self, name: str) -> str:
        """The name under which the source itself knows a tensor, for messages."""
        ...

    def chunks(self, name: str) -> Iterator[np.ndarray]:
        """Consecutive slices along the first axis; each is valid until the next one is taken."""
        ...

    def form(self, name: str) -> Form | str | None:
        """In which form the codes of a matrix are such as checkpoints have, the scales of floats of
        theirs; or what it is or has that they have not; None: it is stored as floats.
        """
        ...

    def coded(self, name: str) -> Iterator[Rows]:
        """Of a matrix that has a form, as `chunks`; with minima in place of zero points where it
        has them.
        """
        ...

    def write_tokenizer(self, folder) -> None:
        """Put the tokenizer files that the source has into `folder`."""
        ...


def model_parts(config: ModelConfig) -> Iterator[tuple[str, dict[str, Weight]]]:
    """Every part of a model's checkpoint, and its weights by their names in transformers."""
    yield TOP_PART, {w.hf: w for w in present(TOP_WEIGHTS, config).values()}
    layer = present(LAYER_WEIGHTS, config).values()
    for i in range(config.num_layers):
        yield layer_name(i), {HF_PREFIX.format(i) + w.hf: w for w in layer}


def expected_tensors(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor that a model of this config has in transformers."""
    return {
        name: weight.hf_shape(config)
        for _, weights in model_parts(config)
        for name, weight in weights.items()
    }


def check_tensors(source: Source) -> None:
    """Refuse a source whose headers do not fit its config, naming every tensor at fault.

    Raises:
      ValueError: tensors are missing, unknown, misshapen, or of a type that cannot be read.
    """
    if source.config.num_layers > len(source.tensors):
        raise ValueError(
            f"the weights do not fit the config; it has {source.config.num_layers} layers, but "
            f"there are {len(source.tensors)} tensors in all."
        )
    expected, found = expected_tensors(source.config), source.tensors
    problems = {
        "are missing": [source.label(n) for n in expected if n not in found],
        "are not part of the model": [
            source.label(n) for n in found if n not in expected and not _harmless(n, source.config)
        ],
        "have the wrong shape": [
            f"{source.label(n)} {list(found[n].shape)} instead of {list(shape)}"
            for n, shape in expected.items()
            if n in found and found[n].shape != shape
        ],
        "have a type that cannot be read": [
            f"{source.label(n)} ({found[n].dtype})"
            for n in expected
            if n in found and found[n].dtype not in DTYPES
        ],
    }
    parts = [f"tensors {what}: {some(names)}" for what, names in problems.items() if names]
    if parts:
        raise ValueError(f"the weights do not fit the config; {'; '.join(parts)}.")


def check_tied_head(source: Source) -> None:
    """Refuse a head beside a tied embedding unless it repeats it: dropped, it would go unnoticed.

    Reads values, a slice of each tensor at a time, after `check_tensors`.

    Raises:
      ValueError: the two differ.
    """
    head, embed = HEAD.hf, EMBED.hf
    if source.config.tie_embeddings and head in source.tensors:
        if not _same_values(source, head, embed):
            raise ValueError(
                f"config.json ties the head, but {source.label(head)} differs from the embedding: "
                "set tie_word_embeddings to false."
            )


def read_array(source: Source, tensor: str, weight: Weight, dtype: np.dtype) -> np.ndarray:
    """The array of a weight, as checkpoints have it, from a tensor of the source.

    Raises:
      ValueError: a value is not finite, in the source or after the cast; or the source yields
        fewer or more rows than the array has.
    """
    out = np.empty(weight.shape(source.config), dtype)
    target = rows_of(out, weight)
    start = 0
    for chunk in source.chunks(tensor):
        stop = start + len(chunk)
        check_finite(source, tensor, chunk)
        with np.errstate(over="ignore"):
            cast = chunk.astype(dtype, copy=False)
        if cast.dtype != chunk.dtype and not np.isfinite(cast).all():
            wider = "bfloat16 or float32" if dtype == np.float16 else "float32"
            raise ValueError(
                f"tensor {source.label(tensor)} holds values beyond the range of {dtype.name}; "
                f"convert with --dtype {wider}."
            )
        if stop <= len(target):
            target[start:stop] = cast
        start = stop
    check_rows(source, tensor, start, len(target))
    return out


def rows_of(array: np.ndarray, weight: Weight) -> np.ndarray:
    """The array of a weight, or of its scales, as a view whose rows are those of the source,
    whichever way it is stored.
    """
    if weight.num_inputs:
        return array.reshape(math.prod(array.shape[: weight.num_inputs]), -1).T
    return array if weight.inputs else array.reshape(-1)


def check_finite(source: Source, tensor: str, values: np.ndarray) -> None:
    """Refuse a tensor of the source that has these values where they are not finite.

    Raises:
      ValueError: one is not.
    """
    if not np.isfinite(values).all():
        raise ValueError(f"tensor {source.label(tensor)} holds values that are not finite.")


def check_rows(source: Source, tensor: str, found: int, wanted: int) -> None:
    """Refuse a tensor of the source that yields fewer or more rows than it should.

    Raises:
      ValueError: it does.
    """
    if found != wanted:
        raise ValueError(f"tensor {source.label(tensor)} holds {found} rows instead of {wanted}.")


def row_ranges(shape: tuple[int, ...], itemsize: int, multiple: int = 1) -> Iterator[slice]:
    """Slices of the first axis of about CHUNK_BYTES, each a multiple of `multiple` rows."""
    row_bytes = itemsize * math.prod(shape[1:])
    step = max(CHUNK_BYTES // row_bytes // multiple, 1) * multiple
    for start in range(0, shape[0], step):
        yield slice(start, min(start + step, shape[0]))


def _harmless(name: str, config: ModelConfig) -> bool:
    """Whether a tensor beyond the model's own may be dropped: it repeats what is known anyway.

    Of a head beside a tied embedding only `check_tied_head` can tell.
    """
    if name == HEAD.hf:
        return config.tie_embeddings
    return name.endswith("rotary_emb.inv_freq")


def _same_values(source: Source, one: str, other: str) -> bool:
    """Whether two tensors hold the same values, whatever their types; not if one is unreadable."""
    tensors = source.tensors[one], source.tensors[other]
    if tensors[0].shape != tensors[1].shape or any(t.dtype not in DTYPES for t in tensors):
        return False
    left, right = source.chunks(one), source.chunks(other)
    a = b = np.empty((0, *tensors[0].shape[1:]), np.float32)
    while True:
        # a slice is taken only when the one before it is used up: slices of two types differ
        a, b = (a if len(a) else next(left, a)), (b if len(b) else next(right, b))
        rows = min(len(a), len(b))
        if not rows:
            return len(a) == len(b)
        if not np.array_equal(a[:rows].astype(np.float32), b[:rows].astype(np.float32)):
            return False
        a, b = a[rows:], b[rows:]


def some(names: list[str], limit: int = 8) -> str:
    """Names as a sentence has them, the first of many."""
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more

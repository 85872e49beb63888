"""Matrices that a Hugging Face folder stores as codes and scales.

A matrix is several tensors there. One function says which, with which shapes; one reads the codes
and scales of some of its rows, whatever the format, into one form, of which `Rows` makes floats;
one says whether a checkpoint can hold the codes. Only the rows that are asked for are read.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from convert.quantization_config import KEY, Scheme
from convert.tensors import DTYPES, Rows, Tensor, expected_tensors, row_ranges, some
from easyspec_jax.config import ModelConfig
from easyspec_jax.quantized import Form
from easyspec_jax.weights import EMBED

# Column j of eight stands in this nibble of a word of awq: the order 0 2 4 6 1 3 5 7, inverted.
_AWQ_NIBBLES = np.array([0, 4, 1, 5, 2, 6, 3, 7])
_CODES = {"plain": "weight", "packed": "weight_packed", "gptq": "qweight", "awq": "qweight"}
_SCALES = ("weight_scale", "weight_scale_inv")  # both are multiplied by, whatever the name
_PARTS = (
    *("weight", "weight_packed", "weight_shape", "weight_zero_point", *_SCALES),
    *("qweight", "qzeros", "scales", "g_idx"),
)
# What else may stand beside a matrix, and asks for arithmetic that is not done here.
_REFUSED = {
    "weight_g_idx": "act-order (groups of inputs that do not lie side by side)",
    **dict.fromkeys(
        ("input_scale", "input_zero_point", "input_global_scale", "activation_scale"),
        "quantised activations",
    ),
    **dict.fromkeys(("output_scale", "k_scale", "v_scale"), "a quantised cache"),
}


class Part(NamedTuple):
    """One of the tensors of a matrix, as it should be."""

    shapes: Mapping[str, tuple[tuple[int, ...], ...]]  # that are right, by the type in the header
    optional: bool = False


@dataclasses.dataclass(frozen=True)
class Matrix:
    """A quantised matrix of a folder."""

    scheme: Scheme
    shape: tuple[int, int]  # outputs and inputs
    stored: Mapping[str, Any]  # its tensors by what stands behind the module's name

    @property
    def codes_name(self) -> str:
        """Of the tensor of its codes, behind the module's name."""
        return _CODES[self.scheme.storage]

    @property
    def group(self) -> int:
        """Inputs that share a scale."""
        return self.scheme.block[1] or self.shape[1]

    @property
    def _transposed(self) -> bool:
        """Whether the format stores [in, out], codes without a sign."""
        return self.scheme.storage in ("gptq", "awq")

    @property
    def _middle(self) -> int:
        """What zero points are where codes are symmetric."""
        return 2 ** (self.scheme.bits - 1) if self._transposed else 0

    def parts(self) -> dict[str, Part]:
        """What it should be stored as; optional parts that are not there included."""
        scheme, (outputs, inputs) = self.scheme, self.shape
        words, groups = 32 // scheme.bits, -(-inputs // self.group)
        if self._transposed:
            gptq = scheme.storage == "gptq"
            codes = (-(-inputs // words), outputs) if gptq else (inputs, -(-outputs // words))
            parts = {
                "qweight": Part({"I32": (codes,)}),
                "qzeros": Part({"I32": ((groups, -(-outputs // words)),)}),
                "scales": Part(_floats((groups, outputs))),
            }
            index = Part({"I32": ((inputs,),), "I64": ((inputs,),)}, not scheme.needs_index)
            return parts | ({"g_idx": index} if gptq else {})
        height = scheme.block[0]
        scales: tuple[tuple[int, ...], ...] = ((-(-outputs // (height or outputs)), groups),)
        if height is None:
            scales = ((), (1,), (1, 1)) + ((outputs, 1),) * scheme.per_output
        parts = {self._scale_name(): Part(_floats(*scales))}
        zeros = {"I8": scales}
        if scheme.storage == "plain":
            parts["weight"] = Part({scheme.code: (self.shape,)})
        else:
            parts["weight_packed"] = Part({"I32": ((outputs, -(-inputs // words)),)})
            parts["weight_shape"] = Part({"I64": ((2,),), "I32": ((2,),)})
            zeros["I32"] = ((-(-outputs // words), groups),)
        if scheme.code == "I8":
            parts["weight_zero_point"] = Part(zeros, not scheme.needs_zeros)
        return parts

    def read(self, rows: slice) -> Rows:
        """Codes and scales of some rows."""
        stored, bits, zeros = self.stored, self.scheme.bits, self._zeros(rows)
        if self._transposed:
            if self.scheme.storage == "gptq":
                codes = _unpack(stored["qweight"][:, rows].T, bits)[:, : self.shape[1]]
            else:
                words, own = _words(rows, bits)
                codes = _unpack(stored["qweight"][:, words], bits, _AWQ_NIBBLES)[:, own].T
            return Rows(codes, zeros, stored["scales"][:, rows].T, self._index())
        if self.scheme.storage == "plain":
            codes = stored["weight"][rows]
        else:
            codes = _signed(_unpack(stored["weight_packed"][rows], bits), bits)
            codes = codes[:, : self.shape[1]]
        return Rows(codes, zeros, self._by_block(stored[self._scale_name()], rows), self.group)

    def _zeros(self, rows: slice) -> np.ndarray | None:
        """Zero points [R, G] of some rows, None: all 0."""
        bits = self.scheme.bits
        words, own = _words(rows, bits)
        if self._transposed:
            gptq = self.scheme.storage == "gptq"
            packed = self.stored["qzeros"][:, words]
            zeros = _unpack(packed, bits, None if gptq else _AWQ_NIBBLES)[:, own].T
            # (stored + 1) in as many bits: the first programs subtracted 1 before they packed
            return (zeros + self.scheme.zero_offset) & (2**bits - 1)
        zeros = self.stored.get("weight_zero_point")
        if zeros is None:
            return None
        if zeros.get_dtype() == "I32":  # packed along outputs
            return _signed(_unpack(zeros[words].T, bits).T, bits)[own]
        return self._by_block(zeros, rows)

    def chunks(self) -> Iterator[np.ndarray]:
        """f32[R, in]: consecutive rows, dequantised."""
        for rows in row_ranges(self.shape, 4):
            yield self.read(rows).dequantised()

    def form(self) -> Form | str:
        """As `Source` has it."""
        if isinstance(self._index(), np.ndarray):
            return "has groups of inputs that do not lie side by side (act-order)"
        if self.shape[1] % self.group:
            return f"is not made of whole groups of {self.group} inputs"
        kind, group = self._kind, self.scheme.block[1]
        scales = self.stored["scales" if self._transposed else self._scale_name()]
        scale_dtype = _NAMES[scales.get_dtype()]
        if self._symmetric:
            return Form(kind, group, scale_dtype)
        if scale_dtype == "float32":  # in which zero point times scale is rounded
            return "has zero points and scales in float32"
        return Form(kind, group, scale_dtype, "float32")

    @property
    def _kind(self) -> str:
        """Of `quantized.KINDS`, which holds the codes."""
        plain = {"F8_E4M3": "fp8", "I8": "int8"}.get(self.scheme.code, "int4")
        return plain if self.scheme.storage == "plain" else f"int{self.scheme.bits}"

    @functools.cached_property
    def _symmetric(self) -> bool:
        """Whether all zero points are in the middle."""
        zeros = self._zeros(slice(0, self.shape[0]))
        return zeros is None or bool((zeros == self._middle).all())

    def coded(self) -> Iterator[Rows]:
        """As `Source` has it."""
        for part in row_ranges(self.shape, 4):
            rows = self.read(part)
            if not self._symmetric:
                yield rows.from_zero(self._kind)
                continue
            codes = _signed(rows.codes, self.scheme.bits) if self._middle else rows.codes
            yield rows._replace(codes=codes, zeros=None)

    def wrong_values(self) -> str | None:
        """What is wrong with the small integer tensors that say how others are read, or None."""
        if "weight_shape" in self.stored and self.scheme.storage == "packed":
            shape = [int(n) for n in self.stored["weight_shape"][...]]
            if shape != list(self.shape):
                return f"weight_shape says {shape} instead of {list(self.shape)}"
        if "g_idx" in self.stored:
            index, groups = self.stored["g_idx"][...], -(-self.shape[1] // self.group)
            if index.min() < 0 or index.max() >= groups:
                return f"g_idx names a group that is none of its {groups}"
        return None

    def _scale_name(self) -> str:
        return next((name for name in _SCALES if name in self.stored), _SCALES[0])

    def _by_block(self, stored: Any, rows: slice) -> np.ndarray:
        """[R, G]: what a tensor with one row for a block of outputs has for some outputs."""
        if math.prod(stored.get_shape()) == 1:
            return np.broadcast_to(stored[...].reshape(1, 1), (rows.stop - rows.start, 1))
        height = self.scheme.block[0] or 1
        first = rows.start // height
        blocks = stored[first : -(-rows.stop // height)]
        return blocks[np.arange(rows.start, rows.stop) // height - first]

    def _index(self) -> int | np.ndarray:
        if "g_idx" not in self.stored:
            return self.group
        index = self.stored["g_idx"][...]
        ordered = np.array_equal(index, np.arange(self.shape[1]) // self.group)
        return self.group if ordered else index


def find_matrices(
    scheme: Scheme, config: ModelConfig, stored: Mapping[str, Any], headers: Mapping[str, Tensor]
) -> tuple[dict[str, Matrix], dict[str, Tensor]]:
    """The quantised matrices of a folder by the names that their weights have as floats; and what
    the headers would say if they were floats. A matrix that stands there as floats stays one.

    Args:
      stored: the tensors of the folder, to be sliced.
      headers: what is said of each.

    Raises:
      ValueError: a part of a matrix is missing, has a wrong shape, type or value, or is none that
        is read here; or there is no quantised matrix. Every tensor at fault is named.
    """
    matrices: dict[str, Matrix] = {}
    rest, modules = dict(headers), set()
    expected = expected_tensors(config)
    problems: dict[str, list[str]] = {}
    for weight, shape in expected.items():
        module, codes = weight.removesuffix(".weight"), _CODES[scheme.storage]
        found = headers.get(f"{module}.{codes}")
        if len(shape) != 2 or weight == EMBED.hf or found is None:
            continue
        if scheme.storage == "plain" and found.dtype in DTYPES:
            continue
        inside = f"{module}."
        own = {name: stored[inside + name] for name in _PARTS if inside + name in stored}
        matrix = Matrix(scheme, (shape[0], shape[1]), own)
        parts = matrix.parts()
        for what, which in _problems(module, matrix, parts, headers):
            problems.setdefault(what, []).append(which)
        for name in parts:
            rest.pop(inside + name, None)
        matrices[weight] = matrix
        modules.add(module)
    for weight, matrix in matrices.items():
        if weight in rest:  # beside the codes, which are under another name
            problems.setdefault("are there twice, as floats and as codes", []).append(weight)
        rest[weight] = Tensor(matrix.shape, "float32")
    for name in list(rest):
        module, _, last = name.rpartition(".")
        if last in _REFUSED:
            what = f"are for {_REFUSED[last]}, which is not supported"
            problems.setdefault(what, []).append(name)
        elif last == "bias" and module in modules and name not in expected:
            found = headers[name]
            fits = found.shape == matrices[f"{module}.weight"].shape[:1] and found.dtype in DTYPES
            if fits and not np.any(stored[name][...]):
                del rest[name]  # some makers of gptq write one of zeros beside every matrix
    if not matrices:
        raise ValueError(f"config.json has a {KEY} of {scheme.method}, but no matrix is quantised.")
    if problems:
        listed = "; ".join(f"tensors {what}: {some(names)}" for what, names in problems.items())
        raise ValueError(f"the weights do not fit {KEY}; {listed}.")
    return matrices, rest


def _problems(
    module: str, matrix: Matrix, parts: dict[str, Part], headers: Mapping[str, Tensor]
) -> Iterator[tuple[str, str]]:
    """What is wrong with the tensors of a matrix, and of which: an end of a sentence, a name."""
    fits = True
    if matrix.scheme.ignores(module):
        yield f"are quantised, though {KEY} leaves them out", module
    height, group = matrix.scheme.block
    if height == 1 and group is not None and matrix.shape[1] % group:
        fits = False
        yield f"are not made of whole groups of {group} inputs", f"{module} ({matrix.shape[1]})"
    for name, part in parts.items():
        header = headers.get(f"{module}.{name}")
        if header is None:
            if not part.optional:
                fits = False
                yield "are missing", f"{module}.{name}"
            continue
        word = _WORDS.get(header.dtype, header.dtype)
        if word not in part.shapes:
            fits = False
            yield "have a type that is not read", f"{module}.{name} ({header.dtype})"
        elif fits and header.shape not in part.shapes[word]:
            fits = False
            right = " or ".join(str(list(shape)) for shape in part.shapes[word])
            yield "have the wrong shape", f"{module}.{name} {list(header.shape)} instead of {right}"
    wrong = matrix.wrong_values() if fits else None
    if wrong:
        yield "do not go together", f"{module} ({wrong})"


_WORDS = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
_NAMES = {word: name for name, word in _WORDS.items()}


def _floats(*shapes: tuple[int, ...]) -> dict[str, tuple[tuple[int, ...], ...]]:
    return dict.fromkeys(_WORDS.values(), shapes)


def _words(rows: slice, bits: int) -> tuple[slice, slice]:
    """The words that hold some of the codes packed in a row, and where those stand in them."""
    count = 32 // bits
    first = rows.start // count
    skipped = rows.start - first * count
    own = slice(skipped, skipped + rows.stop - rows.start)
    return slice(first, -(-rows.stop // count)), own


def _unpack(words: np.ndarray, bits: int, places: np.ndarray | None = None) -> np.ndarray:
    """u8[R, C]: the codes in i32[R, W], the lowest bits first or as `places` has them."""
    order = np.arange(32 // bits) if places is None else places
    shifts = (order * bits).astype(np.int32)
    codes = (words[:, :, None] >> shifts) & np.int32(2**bits - 1)
    return codes.astype(np.uint8).reshape(len(words), -1)


def _signed(codes: np.ndarray, bits: int) -> np.ndarray:
    """i8: codes that were stored with half their range added."""
    return (codes - np.uint8(2 ** (bits - 1))).view(np.int8)

"""Reads safetensors files by seeking, so that only the rows asked for are ever in memory.

The header is checked before it is believed: sizes, offsets and shapes come from a stranger.
"""

from __future__ import annotations

import json
import math
import pathlib
from collections.abc import Iterator
from typing import BinaryIO

import numpy as np

from convert.tensors import DTYPES, Tensor, row_ranges

_MAX_HEADER = 100_000_000
_DTYPE_NAMES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


class SafetensorsFile:
    """One open safetensors file; `tensors` is its checked header."""

    def __init__(self, path: pathlib.Path):
        self.path = path
        self._file: BinaryIO = path.open("rb", buffering=0)
        try:
            self.tensors, self._offsets = self._read_header()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def chunks(self, name: str) -> Iterator[np.ndarray]:
        """Consecutive slices of the first axis, in one buffer that is used again for each."""
        shape, dtype = self.tensors[name].shape, DTYPES[self.tensors[name].dtype]
        row_bytes = dtype.itemsize * math.prod(shape[1:])
        buffer = bytearray()
        for rows in row_ranges(shape, dtype.itemsize):
            size = (rows.stop - rows.start) * row_bytes
            buffer = buffer if buffer else bytearray(size)
            view = memoryview(buffer)[:size]
            self._read_into(view, self._offsets[name] + rows.start * row_bytes)
            yield np.frombuffer(view, dtype).reshape(-1, *shape[1:])

    def _read_into(self, view: memoryview, offset: int) -> None:
        self._file.seek(offset)
        done = 0
        while done < len(view):
            count = self._file.readinto(view[done:])
            if not count:
                raise self._broken("it ends before its last tensor")
            done += count

    def _broken(self, why: str) -> ValueError:
        return ValueError(f"{self.path} is not a valid safetensors file: {why}.")

    def _read_header(self) -> tuple[dict[str, Tensor], dict[str, int]]:
        size = self.path.stat().st_size
        prefix = self._file.read(8)
        length = int.from_bytes(prefix, "little")
        if len(prefix) < 8 or length > min(_MAX_HEADER, size - 8):
            raise self._broken("the header is longer than the file")
        text = bytearray(length)
        self._read_into(memoryview(text), 8)
        try:
            header = json.loads(text, object_pairs_hook=_unique)
        except ValueError as error:
            raise self._broken(f"the header is not JSON ({error})") from None
        if not isinstance(header, dict):
            raise self._broken("the header is not a JSON object")
        header.pop("__metadata__", None)
        data, end = 8 + length, 0
        tensors, offsets = {}, {}
        entries = {name: self._entry(name, header[name]) for name in header}
        for name, (tensor, begin, stop) in sorted(entries.items(), key=lambda item: item[1][1:]):
            if begin != end or stop > size - data:
                raise self._broken(f"the offsets of tensor {name!r} are wrong")
            end = stop
            tensors[name], offsets[name] = tensor, data + begin
        if end != size - data:
            raise self._broken(f"{size - data - end} bytes belong to no tensor")
        return tensors, offsets

    def _entry(self, name: str, entry) -> tuple[Tensor, int, int]:
        try:
            dtype, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
            sound = all(type(n) is int and n >= 0 for n in (*shape, begin, end)) and begin <= end
        except (TypeError, KeyError, ValueError):
            sound = False
        if not sound or not isinstance(dtype, str):
            raise self._broken(f"the entry of tensor {name!r} is malformed")
        known = _DTYPE_NAMES.get(dtype)
        if known and end - begin != math.prod(shape) * DTYPES[known].itemsize:
            raise self._broken(f"the size of tensor {name!r} does not fit its shape")
        return Tensor(tuple(shape), known or dtype), begin, end


def _unique(pairs: list[tuple]) -> dict:
    values = dict(pairs)
    if len(values) != len(pairs):
        raise ValueError("a key appears twice")
    return values

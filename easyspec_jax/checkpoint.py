"""The layout of a checkpoint folder, and its parts.

A checkpoint is one Orbax checkpoint per layer and one for embedding, norm and head, so neither
saving nor loading ever holds more than a block beside the model itself. It knows nothing of meshes
or groups: both are made at load. Its metadata has a digest of every part, which is compared when
the part is read.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import json
import logging
import math
import os
import pathlib
import sys
import threading
import time
import traceback
import warnings
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from easyspec_jax import weights
from easyspec_jax.config import ModelConfig
from easyspec_jax.distributed import is_lost_peer
from easyspec_jax.hf_config import config_from_hf
from easyspec_jax.json_files import read_object, write_object
from easyspec_jax.layer_parallel import make_partition
from easyspec_jax.quantized import Quantization, Quantized
from easyspec_jax.weights import check_groups

FORMAT = 2
WITH_CODES = 3  # the same, of matrices that are codes: what knows only floats refuses it by name
# {"format": 2, "dtype": "float16", "tokenizer": sha256 of the ordinary vocabulary, or null,
#  "parts": {name: digest}, "weights": `digest_of` all parts,
#  "quantization": `Quantization.stored`, where matrices are codes}
METADATA_FILE = "easyspec.json"
DTYPES = ("float32", "bfloat16", "float16", "float64")  # that weights may be stored in
# The part that holds `weights.TOP_WEIGHTS`; every other one holds one layer's `LAYER_WEIGHTS`.
TOP_PART = "top"
PARTITION_FILE = "partition.json"  # beside the parts: the groups that tuning chose, and why
PARTITION_FORMAT = 1
TUNED = "tuned"  # as a group size: that of the partition file
# Arrays are stored in pieces of at most this many bytes, and no piece holds two kv heads, so that a
# process reads little more than its own share.
PIECE = 4 * 2**20
# Behind the name of a matrix that is stored as codes: its scales, and its minima.
SCALES, MINIMA = ".scales", ".minima"


def layer_name(index: int) -> str:
    """Folder of layer `index` inside a checkpoint."""
    return f"layers/{index:04d}"


def part_names(config: ModelConfig) -> list[str]:
    """All parts of a checkpoint."""
    return [*(layer_name(i) for i in range(config.num_layers)), TOP_PART]


def save_part(folder: pathlib.Path, name: str, arrays: dict[str, Any]) -> str:
    """Write one part of a checkpoint, arrays as in `weights`; returns its digest."""
    from orbax.checkpoint import v1

    ocp: Any = v1  # its options are looser than their declared types
    dims = {weight.name: weight.dims for weight in (*weights.LAYER_WEIGHTS, *weights.TOP_WEIGHTS)}

    def pieces(keypath, value):
        del value
        letters = dims[keypath[-1].key.removesuffix(SCALES).removesuffix(MINIMA)]
        heads = (letters.index("K"),) if "K" in letters else None
        return ocp.options.ArrayOptions.Saving.StorageOptions(
            chunk_byte_size=PIECE, shard_axes=heads
        )

    path = (folder / name).absolute()
    path.parent.mkdir(parents=True, exist_ok=True)
    context = ocp.Context()
    context.array.saving.scoped_storage_options_creator = pieces
    threads = threading.enumerate()
    with context, _quiet:
        try:
            ocp.save(path, _flat(arrays))
        except BaseException:  # an interrupt too
            _wait_for_others(threads)
            raise
    return shown_digest(digest(arrays))


def read_part(folder: pathlib.Path, name: str, abstract: dict[str, Any]) -> dict[str, Any]:
    """One part of a checkpoint, as the abstract arrays say; its digest is not looked at.

    Raises:
      ValueError: it is damaged.
      OSError: it cannot be read.
    """
    from orbax.checkpoint import v1

    ocp: Any = v1  # takes more kinds of paths than it declares
    try:
        with _quiet:
            found = ocp.load((folder / name).absolute(), _flat(abstract))
    except Exception as error:  # Orbax has many kinds for a damaged folder
        _let_go(error)
        missing = isinstance(error, FileNotFoundError | NotADirectoryError)
        machine = isinstance(error, OSError | MemoryError) and not missing
        machine |= jax.process_count() > 1 and is_lost_peer(error)
        if machine or "RESOURCE_EXHAUSTED" in str(error):
            raise
        # TensorStore has one kind for a broken file and for one that the machine does not give.
        if "os_error_code" in str(error) and "NOT_FOUND" not in str(error):
            raise OSError(f"{folder / name} cannot be read: {str(error)[:300]}") from error
        raise ValueError(damaged(folder, name)) from error
    return {
        name: x.replace(
            codes=found[name], scales=found[name + SCALES], minima=found.get(name + MINIMA)
        )
        if isinstance(x, Quantized)
        else found[name]
        for name, x in abstract.items()
    }


@contextlib.contextmanager
def reading(
    folder: pathlib.Path, digests: dict[str, str], progress: bool | None
) -> Iterator[Callable[[str, dict[str, Any]], dict[str, Any]]]:
    """A reader of parts, `read(name, abstract)` as in `read_part`, with a bar; at the end of the
    block all that was read is compared with the digests of its parts.

    Args:
      progress: show the bar; None: where standard error is a terminal.

    Raises:
      ValueError: a part's bytes are not those that were written.
    """
    from tqdm import tqdm

    hidden = None if progress is None else not progress
    bar = tqdm(total=len(digests), desc=f"loading {folder.name}", unit="part", disable=hidden)
    found = {}

    def read(name: str, abstract: dict[str, Any]) -> dict[str, Any]:
        arrays = read_part(folder, name, abstract)
        found[name] = digest(arrays)
        bar.update()
        return arrays

    with bar:
        yield read
    # Only now: devices compute digests while the host reads on.
    for name, value in jax.device_get(found).items():
        if shown_digest(value) != digests[name]:
            raise ValueError(damaged(folder, name))


def _flat(arrays: dict[str, Any]) -> dict[str, Any]:
    """The arrays of a part by the names that they are stored under."""
    found: dict[str, Any] = {}
    for name, x in arrays.items():
        if isinstance(x, Quantized):
            found |= {name: x.codes, name + SCALES: x.scales}
            found |= {} if x.minima is None else {name + MINIMA: x.minima}
        else:
            found[name] = x
    return found


def damaged(folder: pathlib.Path, name: str) -> str:
    """What to say of a part that is not what was written."""
    return f"{folder / name} is damaged: remove {folder}, then convert the model again"


@jax.jit
def digest(arrays: dict[str, Any]) -> jax.Array:
    """u32[] that tells the bytes of a part from any others, on whatever devices they are.

    A sum over all numbers, their bits times an odd number of their place and stirred: one number
    of at most 32 bits that changes always shows, several but about once in 2**32.
    """
    total, arrays = jnp.uint32(0), _flat(arrays)
    for name in sorted(arrays):
        bits = _folded(_bits(arrays[name]))
        place = jnp.zeros(bits.shape, jnp.uint32)
        for axis, size in enumerate(bits.shape):
            index = lax.broadcasted_iota(jnp.uint32, bits.shape, axis)
            place = place * jnp.uint32(size) + index
        factor = (place + jnp.uint32(zlib.crc32(name.encode()))) * jnp.uint32(_GOLDEN)
        factor = (factor ^ (factor >> 15)) * jnp.uint32(0x85EBCA6B)
        term = bits * (factor | jnp.uint32(1))
        term = (term ^ (term >> 15)) * jnp.uint32(0x846CA68B)
        total += (term ^ (term >> 16)).sum(dtype=jnp.uint32)
    return total


_GOLDEN = 0x9E3779B1  # odd; its multiples are spread evenly
_ROWS = 8  # rows that `_folded` makes one


def _bits(x: jax.Array) -> jax.Array:
    """The bits of numbers, u16 or u32, the high ones mixed into the low ones: those of a short type
    that is stored in a long one are all high.
    """
    if x.dtype == jnp.int4:
        x = x.astype(jnp.int8)
    bits = lax.bitcast_convert_type(x, jnp.dtype(f"uint{8 * x.dtype.itemsize}"))
    if x.dtype.itemsize == 8:
        bits = (bits ^ (bits >> 32)).astype(jnp.uint32)
    return bits if x.dtype.itemsize <= 2 else bits ^ (bits >> 16)


def _folded(bits: jax.Array) -> jax.Array:
    """Rows that lie side by side, each times its own odd number, as one, along the longest axis but
    the last: what reads all of an array does little for each of its numbers, as memory is fast.
    """
    sizes = bits.shape[:-1] or (1,)
    axis = max(range(len(sizes)), key=lambda a: sizes[a])
    count = math.gcd(sizes[axis], _ROWS)
    if count == 1 or bits.size < 2**20:
        return bits.astype(jnp.uint32)
    rows = bits.reshape(*sizes[:axis], sizes[axis] // count, count, *bits.shape[axis + 1 :])
    total = jnp.uint32(0)
    for k in range(count):
        row = lax.index_in_dim(rows, k, axis + 1, keepdims=False).astype(jnp.uint32)
        total = total + row * jnp.uint32(_GOLDEN * (2 * k + 1) & 0xFFFFFFFF)
    return lax.optimization_barrier(total)  # else all of it is done again for every number


def shown_digest(value: Any) -> str:
    """A digest as metadata has it."""
    return f"{int(value):08x}"


def digest_of(parts: dict[str, str]) -> str:
    """One digest of all parts, by which weights are told apart."""
    return f"{zlib.crc32(json.dumps(sorted(parts.items())).encode()):08x}"


def make_metadata(
    dtype: str,
    tokenizer: str | None,
    parts: dict[str, str],
    quantization: Quantization | None = None,
) -> dict[str, Any]:
    """What stands in a checkpoint's `METADATA_FILE`, and proves that its weights are whole.

    Args:
      parts: the digest of each.
    """
    metadata = {"format": FORMAT, "dtype": dtype, "tokenizer": tokenizer, "parts": parts}
    codes = {}
    if quantization is not None:
        codes = {"format": WITH_CODES, "quantization": quantization.stored}
    return metadata | {"weights": digest_of(parts)} | codes


def stored_quantization(metadata: dict[str, Any]) -> Quantization | None:
    """How the matrices of a checkpoint are stored; None: as floats."""
    codes = metadata.get("quantization")
    return None if codes is None else Quantization(**codes)


def agreed_quantization(
    metadata: dict[str, Any], wanted: str | Quantization | None, model: str | os.PathLike
) -> Quantization | None:
    """How a model is loaded that is stored as its metadata say; None: as floats.

    Raises:
      ValueError: codes are stored, and others are wanted.
    """
    stored, wanted = stored_quantization(metadata), Quantization.of(wanted)
    if stored is None or wanted is None:
        return stored or wanted
    asked = {name: value for name, value in wanted.stored.items() if value is not None}
    if not asked.items() <= stored.stored.items():
        size = "" if wanted.group_size is None else f" --group-size {wanted.group_size}"
        raise ValueError(
            f"{model} holds codes, {stored}, and cannot be loaded as {wanted}: convert the source "
            f"again, with --quantization {wanted.kind}{size}"
        )
    return dataclasses.replace(stored, keep_codes=wanted.keep_codes)


def read_metadata(path: str | os.PathLike) -> tuple[ModelConfig, dict[str, Any]]:
    """Configuration and metadata of a checkpoint folder.

    Raises:
      ValueError: `path` is no checkpoint of this format, with what to do instead.
    """
    folder = pathlib.Path(path)
    if not (folder / METADATA_FILE).is_file():
        raise ValueError(
            f"{folder} is not a converted checkpoint: it has no {METADATA_FILE}; "
            f"make one with `easyspec convert {folder} DST`"
        )
    metadata = read_object(folder / METADATA_FILE)
    if metadata.get("format") not in (FORMAT, WITH_CODES):
        raise ValueError(
            f"{folder} has checkpoint format {metadata.get('format')}, "
            f"but this version reads {FORMAT}: convert it again"
        )
    config = config_from_hf(read_object(folder / "config.json"))
    parts, tokenizer = metadata.get("parts"), metadata.get("tokenizer")
    sound = metadata.get("dtype") in DTYPES and isinstance(tokenizer, str | None)
    try:
        codes = stored_quantization(metadata)
        check_groups(config, codes)
        sound &= (codes is None) == (metadata["format"] == FORMAT)
        sound &= codes is None or codes.keep_codes is None
    except (TypeError, ValueError):
        sound = False
    if not sound or not isinstance(parts, dict) or metadata.get("weights") != digest_of(parts):
        raise ValueError(damaged(folder, METADATA_FILE))
    return config, metadata


def check_whole(folder: pathlib.Path, config: ModelConfig, parts: dict[str, str]) -> None:
    """Refuse a checkpoint that has not every part, or others too.

    Raises:
      ValueError: with what is there and what should be.
    """
    stored = {p.relative_to(folder).as_posix() for p in folder.glob("layers/*")}
    stored |= {TOP_PART} if (folder / TOP_PART).is_dir() else set()
    if not stored == {*part_names(config)} == {*parts}:
        raise ValueError(
            f"{folder} is incomplete or not of one piece: config.json has {config.num_layers} "
            f"layers and {len(stored - {TOP_PART})} are stored; convert the model again"
        )


def _wait_for_others(threads: list[threading.Thread], seconds: float = 1.0) -> None:
    """Until the threads that are not among these have ended: those of a writer that failed still
    write, and complain, after it has raised. Those of pools never end, hence the limit.
    """
    until = time.monotonic() + seconds
    for thread in threading.enumerate():
        if thread not in threads:
            thread.join(max(0.0, until - time.monotonic()))


def _let_go(error: Exception) -> None:
    """Drop what the frames of an error hold: coroutines of a reader that failed, which would say,
    some time later, that they were never awaited.
    """
    with warnings.catch_warnings(), _quiet:
        warnings.simplefilter("ignore")
        traceback.clear_frames(error.__traceback__)
        gc.collect()
        time.sleep(0.2)  # for reads that are still under way, and would find nobody who waits


class _Quiet:
    """Without the pages that Orbax, and what it stands on, say of an error before it is raised; for
    all threads, from the first one that enters to the last that leaves.
    """

    def __init__(self):
        self._lock, self._depth = threading.Lock(), 0
        self._loggers = [logging.getLogger(name) for name in ("absl", "asyncio")]

    def __enter__(self) -> None:
        with self._lock:
            self._depth += 1
            if self._depth > 1:
                return
            self._kept = [logger.level for logger in self._loggers], sys.unraisablehook
            for logger in self._loggers:
                logger.setLevel(logging.CRITICAL + 1)
            sys.unraisablehook = lambda unraisable: None

    def __exit__(self, *_: Any) -> None:
        with self._lock:
            self._depth -= 1
            if self._depth == 0:
                levels, sys.unraisablehook = self._kept
                for logger, level in zip(self._loggers, levels, strict=True):
                    logger.setLevel(level)


_quiet = _Quiet()


def read_partition(
    path: str | os.PathLike, num_layers: int, weights: str | None = None
) -> tuple[int, ...]:
    """The partition that `easyspec tune` left beside the checkpoint `path`, of `num_layers` layers;
    a warning if it was found for other weights than these (a checkpoint's checksum).

    Raises:
      ValueError: there is none, or it is damaged or of another model.
    """
    file = pathlib.Path(path) / PARTITION_FILE
    again = f"run `easyspec tune --draft {path}` again"
    if not file.parent.is_dir():
        raise ValueError(f"tuned groups are kept beside a converted checkpoint, and {path} is none")
    if not file.is_file():
        raise ValueError(
            f"{path} was not tuned: it has no {PARTITION_FILE}; run `easyspec tune --draft {path}`"
        )
    try:
        record = read_object(file)
    except ValueError:
        record = {}
    if not isinstance(record.get("partition"), list):
        raise ValueError(f"{file} is damaged: {again}")
    if record.get("format") != PARTITION_FORMAT:
        raise ValueError(
            f"{file} has format {record.get('format')}, "
            f"but this version reads {PARTITION_FORMAT}: {again}"
        )
    try:
        partition = make_partition(num_layers, record["partition"])
    except ValueError as error:
        raise ValueError(f"{file} does not fit the checkpoint: {error}; {again}") from None
    tuned_for = record.get("tuned_for")
    known = tuned_for.get("draft_weights") if isinstance(tuned_for, dict) else None
    if None not in (weights, known) and weights != known:
        warnings.warn(f"{file} was found for other weights: {again}", stacklevel=2)
    return partition


def write_partition(
    path: str | os.PathLike, partition: tuple[int, ...], record: dict[str, Any]
) -> pathlib.Path:
    """The checkpoint `path` now has this partition and this record of it, as a whole file in one
    moment; returns where.

    Args:
      record: "tuned_for", "candidates", "version": what JSON can hold.
    """
    file = pathlib.Path(path) / PARTITION_FILE
    content = {"format": PARTITION_FORMAT, "partition": list(partition)} | record
    write_object(file, content)
    return file

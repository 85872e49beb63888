"""partition.json, beside a draft's checkpoint: the groups that tuning chose for it, and why."""

from __future__ import annotations

import json
import os
import pathlib
import tempfile
import warnings
from typing import Any

from easyspec_jax.layer_parallel import make_partition

PARTITION_FILE = "partition.json"
FORMAT = 1
TUNED = "tuned"  # as a group size: that of the file


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
        record = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):  # of UTF-8 and of JSON, both ValueErrors
        record = None
    if not isinstance(record, dict) or not isinstance(record.get("partition"), list):
        raise ValueError(f"{file} is damaged: {again}")
    if record.get("format") != FORMAT:
        raise ValueError(
            f"{file} has format {record.get('format')}, but this version reads {FORMAT}: {again}"
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
    content = {"format": FORMAT, "partition": list(partition)} | record
    handle, temp = tempfile.mkstemp(prefix=f".{PARTITION_FILE}.", dir=file.parent)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as stream:
            stream.write(json.dumps(content, indent=1) + "\n")
            stream.flush()
            os.fsync(stream.fileno())
        os.chmod(temp, 0o644)  # as other files of a checkpoint; mkstemp lets only its owner read
        os.replace(temp, file)
    except BaseException:
        pathlib.Path(temp).unlink(missing_ok=True)
        raise
    return file

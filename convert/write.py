"""Turns a source into a checkpoint folder that is either complete or not there.

Everything is written to a hidden sibling of the target, which is renamed once at the end; what
proves a checkpoint, easyspec.json, is written last. One layer is in memory at a time.
"""

from __future__ import annotations

import contextlib
import gc
import glob
import json
import os
import pathlib
import re
import shutil
import warnings
from collections.abc import Iterator

import jax
import numpy as np
import tqdm

from convert import tensors
from convert.folder import FolderSource, download
from convert.tokenizer import has_tokenizer, tokenizer_hash
from easyspec_jax import checkpoint

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


def convert(src, dst, *, dtype: str | None = None, revision: str | None = None, progress=True):
    """Write the checkpoint folder `dst` and return its path.

    Args:
      src: a Hugging Face folder (safetensors), a GGUF file, or a hub id (owner/name).
      dst: the new folder; it may exist if it is empty, and is removed then, before all else.
      dtype: "float32", "bfloat16" or "float16"; None keeps that of the source, which for quantised
        GGUF tensors is float32.
      revision: branch, tag or commit of a hub id.
      progress: show a progress bar, one tick per layer.

    Raises:
      ValueError: the source is not a model that can be converted; says why. Whatever the headers
        show is found before anything is written.
      OSError: a file cannot be read or written, or `dst` exists and cannot be replaced.
    """
    dst = pathlib.Path(os.path.abspath(dst))
    if dtype is not None and dtype not in tensors.DTYPES:
        raise ValueError(f"dtype {dtype!r} is not one of {', '.join(tensors.DTYPES)}.")
    _make_way(dst)
    with contextlib.ExitStack() as stack:
        source = _open(src, revision, stack)
        tensors.check_tensors(source)
        tensors.check_tied_head(source)
        temp = stack.enter_context(_temporary(dst))
        _write_texts(source, temp)
        tokenizer = tokenizer_hash(temp)  # may refuse, so it goes before the weights
        dtype = dtype or source.dtype
        parts = list(tensors.model_parts(source.config))
        parts = tqdm.tqdm(parts, desc=dst.name, unit="part", disable=not progress)
        crc = _write_arrays(source, temp, dtype, parts)
        metadata = {"format": checkpoint.FORMAT, "dtype": dtype, "tokenizer": tokenizer}
        metadata["weights"] = f"{crc:08x}"
        (temp / checkpoint.METADATA_FILE).write_text(json.dumps(metadata, indent=2) + "\n")
        os.rename(temp, dst)
    return dst


def _make_way(dst: pathlib.Path) -> None:
    """Remove `dst` if it is an empty folder; what the rename at the end would meet is found now.

    Raises:
      FileExistsError: `dst` is a file, a symlink, a mount point, in use, or not empty.
    """
    if dst.is_symlink():
        raise FileExistsError(f"{dst} is a symlink; name a folder that does not exist.")
    if not dst.exists():
        return
    if not dst.is_dir() or any(dst.iterdir()):
        raise FileExistsError(
            f"{dst} exists and is not an empty folder; name a folder that does not exist."
        )
    if dst.samefile(os.curdir):  # could be removed, and every relative path with it
        raise FileExistsError(f"{dst} is the current folder; name a folder that does not exist.")
    try:
        dst.rmdir()
    except OSError as error:
        raise FileExistsError(
            f"{dst} is empty but cannot be replaced ({error.strerror}); "
            "name a folder that does not exist."
        ) from error


def _open(src, revision: str | None, stack: contextlib.ExitStack) -> tensors.Source:
    path = pathlib.Path(src)
    if path.is_file():
        from convert.gguf_source import GgufSource

        return GgufSource(path)
    if not path.exists():
        if not _HUB_ID.fullmatch(str(src)):
            raise FileNotFoundError(f"{src} is neither a folder, a GGUF file nor a hub id.")
        path = download(str(src), revision)
    return FolderSource(path, stack)


@contextlib.contextmanager
def _temporary(dst: pathlib.Path) -> Iterator[pathlib.Path]:
    """A new hidden folder beside `dst`, gone afterwards; those of dead processes go first."""
    dst.parent.mkdir(parents=True, exist_ok=True)
    prefix = f".{dst.name}.tmp-"
    for stale in dst.parent.glob(f"{glob.escape(prefix)}*"):
        pid = stale.name.removeprefix(prefix)
        if pid.isdigit() and not _alive(int(pid)):
            shutil.rmtree(stale, ignore_errors=True)
    temp = dst.parent / f"{prefix}{os.getpid()}"
    temp.mkdir()
    try:
        yield temp
    finally:
        shutil.rmtree(temp, ignore_errors=True)


def _alive(pid: int) -> bool:
    if pid == os.getpid():
        return False  # left by an earlier process that had this number
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


def _write_texts(source: tensors.Source, folder: pathlib.Path) -> None:
    """Write the configs and the tokenizer."""
    (folder / "config.json").write_text(source.config_text, encoding="utf-8")
    generation = _generation_config(source)
    if generation:
        text = json.dumps(generation, indent=2) + "\n"
        (folder / "generation_config.json").write_text(text, encoding="utf-8")
    source.write_tokenizer(folder)
    if not has_tokenizer(folder):
        warnings.warn(
            "the source has no tokenizer; the checkpoint takes token ids only.", stacklevel=3
        )


def _write_arrays(source: tensors.Source, folder: pathlib.Path, dtype: str, parts) -> int:
    """Write the weights, one of `parts` (of `tensors.model_parts`) after the other; returns their
    checksum.
    """
    crc = 0
    for part, weights in parts:
        arrays = {}
        for tensor, weight in weights.items():
            dense = tensors.read_array(source, tensor, weight, tensors.DTYPES[dtype])
            arrays[weight.name] = _on_host(dense)
            del dense
        checkpoint.save_part(folder, part, arrays)
        crc ^= checkpoint.checksum(part, arrays)
        del arrays
        gc.collect()  # Orbax leaves cycles that hold the arrays
    return crc


def _on_host(array: np.ndarray) -> np.ndarray | jax.Array:
    """The same values as a jax array of the CPU: saving copies that once, a numpy array twice."""
    try:
        return jax.device_put(array, jax.local_devices(backend="cpu")[0], may_alias=True)
    except RuntimeError:  # JAX_PLATFORMS leaves the CPU out
        return array


def _generation_config(source: tensors.Source) -> dict:
    """The source's generation_config.json with the EOS ids of config.json added."""
    generation = dict(source.generation_config)
    eos = generation.get("eos_token_id")
    ids = [*(eos if isinstance(eos, list) else [eos]), *source.config.eos_ids]
    ids = list(dict.fromkeys(i for i in ids if i is not None))
    if ids:
        generation["eos_token_id"] = ids if len(ids) > 1 else ids[0]
    return generation

"""Turns a source into a checkpoint folder that is either complete or not there.

Everything is written to a hidden sibling of the target, which is renamed once at the end; what
proves a checkpoint, easyspec.json, is written last. One layer is in memory at a time.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import glob
import os
import pathlib
import shutil
import signal
import sys
import tempfile
import threading
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import filelock
import jax
import numpy as np
import tqdm

from convert import tensors
from convert.codes import kept, read_codes
from convert.folder import FolderSource, download
from convert.tokenizer import has_tokenizer, tokenizer_hash
from easyspec_jax import checkpoint
from easyspec_jax.hf_config import stop_ids_of
from easyspec_jax.json_files import write_object
from easyspec_jax.memory import device_bytes
from easyspec_jax.quantized import Quantization
from easyspec_jax.sources import HUB_ID
from easyspec_jax.weights import Weight, check_groups, form_of, quantised

_LOCK = ".lock"  # in a folder that is being written
_HELD = 2**24  # bytes of arrays that cycles which Orbax leaves may hold before they are looked for


def convert(
    src,
    dst,
    *,
    dtype: str | None = None,
    quantization: str | Quantization | None = None,
    dequantize: bool = False,
    revision: str | None = None,
    progress: bool | None = True,
):
    """Write the checkpoint folder `dst` and return its path.

    Args:
      src: a Hugging Face folder (safetensors), a GGUF file, or a hub id (owner/name[@revision]).
      dst: the new folder; it may exist if it is empty, and is removed then, before all else.
      dtype: "float32", "bfloat16" or "float16", of what is stored as floats; None keeps that of the
        source's floats, and is float32 for quantised GGUF files.
      quantization: "int8", "int4" or "fp8", or a `Quantization`: matrices are rounded to codes and
        scales. None: codes and scales of the source are kept where the matrices of all its layers
        have one form that a checkpoint knows, and become floats elsewhere.
      dequantize: codes of the source become floats.
      revision: branch, tag or commit of a hub id.
      progress: show a bar, and say what becomes of quantised weights; None: the bar on a terminal.

    Raises:
      ValueError: the source is not a model that can be converted; says why. Whatever the headers
        show is found before anything is written.
      OSError: a file cannot be read or written, or `dst` exists and cannot be replaced.
    """
    dst = pathlib.Path(os.path.abspath(dst))
    if dtype is not None and dtype not in tensors.DTYPES:
        raise ValueError(f"dtype {dtype!r} is not one of {', '.join(tensors.DTYPES)}.")
    codes = Quantization.of(quantization)
    if dequantize and codes is not None:
        raise ValueError("dequantize makes floats and quantization codes: choose one of the two.")
    hidden = None if progress is None else not progress  # None: shown on a terminal alone
    _make_way(dst)
    with contextlib.ExitStack() as stack:
        interrupted = stack.enter_context(_interrupts())
        source = _open(src, revision, stack)
        tensors.check_tensors(source)
        check_groups(source.config, codes)
        tensors.check_tied_head(source)
        own, said = _own_codes(source, codes, dequantize)
        if said and not hidden:
            print(f"{src}: {said}", file=sys.stderr, flush=True)
        temp = stack.enter_context(_temporary(dst))
        _write_texts(source, temp)
        tokenizer = tokenizer_hash(temp)  # may refuse, so it goes before the weights
        dtype = dtype or source.dtype
        parts = list(tensors.model_parts(source.config))
        bar = tqdm.tqdm(parts, desc=dst.name, unit="part", disable=hidden)
        digests, held = {}, 0
        for part, weights in bar:
            digests[part], size = _write_part(source, temp, dtype, codes, own, part, weights)
            held += size
            if held > _HELD:
                gc.collect()
                held = 0
            interrupted()
        checkpoint.check_whole(temp, source.config, digests)
        about = checkpoint.make_metadata(dtype, tokenizer, digests, codes or own)
        write_object(temp / checkpoint.METADATA_FILE, about)
        interrupted()
        _put(temp, dst)
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
        hub = HUB_ID.fullmatch(str(src))
        if hub is None:
            raise FileNotFoundError(f"{src} is neither a folder, a GGUF file nor a hub id.")
        path = download(hub[1], revision or hub[2])
    return FolderSource(path, stack)


def _own_codes(
    source: tensors.Source, codes: Quantization | None, dequantize: bool
) -> tuple[Quantization | None, str]:
    """How the codes of a source are kept, None where they are not; and what to say of it, "" where
    it has none.
    """
    own, said = None, f"{source.codes} become floats"
    if codes is not None:
        said = f"{source.codes} are rounded to {codes.kind}"
    elif source.codes and not dequantize:
        own, said = kept(source)
    return own, "; ".join(filter(None, (said, source.note))) if source.codes else ""


@contextlib.contextmanager
def _temporary(dst: pathlib.Path) -> Iterator[pathlib.Path]:
    """A new hidden folder beside `dst`, gone afterwards; those of dead processes go first.

    Whoever writes one holds a lock in it: numbers of processes say nothing across containers, and
    nothing about two threads.
    """
    dst.parent.mkdir(parents=True, exist_ok=True)
    prefix = f".{dst.name}.tmp-"
    for stale in dst.parent.glob(f"{glob.escape(prefix)}*"):
        with contextlib.suppress(filelock.Timeout, OSError):
            with filelock.FileLock(stale / _LOCK, timeout=0):
                shutil.rmtree(stale, ignore_errors=True)
    new = pathlib.Path(tempfile.mkdtemp(prefix=f".{dst.name}.new-", dir=dst.parent))
    temp = new.with_name(prefix + new.name.rpartition("-")[2])
    lock = filelock.FileLock(new / _LOCK)
    try:
        new.chmod(0o755)  # mkdtemp lets only its owner read
        lock.acquire()
        new.rename(temp)  # only now others look at it
        yield temp
    finally:
        for folder in (new, temp):
            shutil.rmtree(folder, ignore_errors=True)
        lock.release()


def _put(temp: pathlib.Path, dst: pathlib.Path) -> None:
    """The finished folder in its place.

    Raises:
      FileExistsError: something has come to be there.
    """
    try:
        os.rename(temp, dst)
    except OSError:
        if dst.exists():
            raise FileExistsError(f"{dst} has come to exist meanwhile, and is left so.") from None
        raise
    (dst / _LOCK).unlink(missing_ok=True)


@contextlib.contextmanager
def _interrupts() -> Iterator[Callable[[], None]]:
    """A function that raises a KeyboardInterrupt once Ctrl-C was pressed: one that came while some
    library ran a callback is swallowed there.
    """
    seen = False

    def note(number, frame):
        nonlocal seen
        seen = True
        raise KeyboardInterrupt

    def check():
        if seen:
            raise KeyboardInterrupt

    ours = threading.current_thread() is threading.main_thread()
    ours = ours and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if ours:
        signal.signal(signal.SIGINT, note)
    try:
        yield check
    except Exception:
        check()  # a library may have made another error of it
        raise
    finally:
        if ours:
            signal.signal(signal.SIGINT, signal.default_int_handler)


def _write_texts(source: tensors.Source, folder: pathlib.Path) -> None:
    """Write the configs and the tokenizer."""
    (folder / "config.json").write_text(source.config_text, encoding="utf-8")
    generation = _generation_config(source)
    if generation:
        write_object(folder / "generation_config.json", generation)
    source.write_tokenizer(folder)
    if not has_tokenizer(folder):
        warnings.warn(
            "the source has no tokenizer; the checkpoint takes token ids only.", stacklevel=3
        )


def _write_part(
    source: tensors.Source,
    folder: pathlib.Path,
    dtype: str,
    codes: Quantization | None,
    own: Quantization | None,
    part: str,
    weights: dict[str, Weight],
) -> tuple[str, int]:
    """Write one part, of `tensors.model_parts`; returns its digest and its bytes.

    Args:
      codes: what matrices are rounded to.
      own: how the codes of the source are kept.
    """
    arrays: dict[str, Any] = {}
    for tensor, weight in weights.items():
        if form_of(weight.name, weight.inputs, source.config, own) is not None:
            assert own is not None
            arrays[weight.name] = jax.tree.map(_on_host, read_codes(source, tensor, weight, own))
            continue
        # What is rounded to codes is not rounded to `dtype` before.
        rounded = form_of(weight.name, weight.inputs, source.config, codes) is not None
        kind = tensors.DTYPES["float32" if rounded else dtype]
        dense = tensors.read_array(source, tensor, weight, kind)
        one = {weight.name: _on_host(dense)}
        del dense
        arrays |= _quantised(one, source.config, codes) if rounded else one
        del one
    return checkpoint.save_part(folder, part, arrays), device_bytes(arrays)


@functools.partial(jax.jit, static_argnums=(1, 2))
def _quantised(part, config, codes):
    return quantised(part, config, codes)


def _on_host(array: np.ndarray) -> np.ndarray | jax.Array:
    """The same values as a jax array of the CPU: saving copies that once, a numpy array twice."""
    try:
        return jax.device_put(array, jax.local_devices(backend="cpu")[0], may_alias=True)
    except RuntimeError:  # JAX_PLATFORMS leaves the CPU out
        return array


def _generation_config(source: tensors.Source) -> dict:
    """The source's generation_config.json with the EOS ids of config.json added."""
    generation = dict(source.generation_config)
    ids = [*stop_ids_of(generation.get("eos_token_id")), *source.config.eos_ids]
    ids = list(dict.fromkeys(ids))
    if ids:
        generation["eos_token_id"] = ids if len(ids) > 1 else ids[0]
    return generation

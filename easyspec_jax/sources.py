"""Models as users name them: a checkpoint, a Hugging Face folder, a GGUF file, a hub id.

What is no checkpoint is converted once, into the cache, and found there afterwards. Its folder is
named after the source and what its files are, so a source that changed is another.
"""

from __future__ import annotations

import contextlib
import fnmatch
import glob
import hashlib
import json
import os
import pathlib
import re
import sys
from typing import Any

import jax

from easyspec_jax.checkpoint import FORMAT, METADATA_FILE, damaged, read_metadata
from easyspec_jax.config import ModelConfig
from easyspec_jax.hf_config import config_from_hf
from easyspec_jax.json_files import read_object

KEY = "quantization_config"  # of a config.json
CODES = 2  # counts up when other sources keep their codes: GGUF files and those with `KEY` only
# owner/name, or owner/name@revision
HUB_ID = re.compile(r"([A-Za-z0-9][\w.-]*/[\w.-]+)(?:@([\w./-]+))?")


def cache_root() -> pathlib.Path:
    """Where converted models and compiled programs are kept between runs."""
    root = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return pathlib.Path(root).expanduser() / "easyspec_jax"


def find_checkpoint(model: str | os.PathLike, *, progress: bool | None = None) -> pathlib.Path:
    """The checkpoint folder of a model; a source that is none is converted, unless it was.

    Who wants the same source at the same time waits for the first; processes that run one program
    together take checkpoints alone. A hub id is fetched once: the
    hub is not asked again while its conversion lies in the cache.

    Args:
      model: a checkpoint, a Hugging Face folder (safetensors), a GGUF file, or a hub id
        (owner/name, or owner/name@revision).
      progress: show bars and say where it lies; None: the bars only on a terminal.

    Raises:
      ValueError: there is no such model, or none that can be converted.
      OSError: a file cannot be read or written, or the hub does not deliver.
    """
    if (pathlib.Path(model) / METADATA_FILE).is_file():
        return pathlib.Path(model)
    folder = conversion(model)
    if (folder / METADATA_FILE).is_file():
        return folder
    if jax.process_count() > 1:
        raise ValueError(
            f"{model} is no checkpoint: `easyspec convert` it before several processes load it"
        )
    import filelock

    from convert import convert

    folder.parent.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(folder.parent / f".{folder.name}.lock"):
        if not (folder / METADATA_FILE).is_file():  # else another has just made it
            if folder.exists():  # half removed
                raise ValueError(damaged(folder, METADATA_FILE))
            if progress is not False:
                _say(f"converting {model}, once, to {folder}")
                for old in sorted(folder.parent.glob(f"{glob.escape(folder.name[:-8])}????????")):
                    _say(f"{old} is of that source as it was before, and may be removed")
            convert(model, folder, progress=progress)
    return folder


def read_config(model: str | os.PathLike) -> tuple[ModelConfig, dict[str, Any]]:
    """Configuration and metadata of a model as in `find_checkpoint`, or of a config.json alone;
    nothing is converted, of a hub id only config.json is fetched, and what is no checkpoint has no
    metadata but "quantization", where a conversion would keep codes.

    Raises:
      ValueError, OSError: as `find_checkpoint`.
    """
    path = pathlib.Path(model)
    file = path if path.is_file() else path / "config.json"
    if (path / METADATA_FILE).is_file():
        return read_metadata(path)
    if is_gguf(file):
        from convert.gguf_source import GgufSource

        source = GgufSource(file)
        return source.config, _codes_of(source)
    if file.is_file():
        return _hf_config(file), _codes_in(path)
    folder = conversion(model)
    if (folder / METADATA_FILE).is_file():
        return read_metadata(folder)
    from convert.folder import download

    repo, revision = _hub_id(model)
    return _hf_config(download(repo, revision, "config.json") / "config.json"), {}


def _codes_of(source: Any) -> dict[str, Any]:
    """How a checkpoint of a source would keep its codes, as in metadata."""
    from convert.codes import kept

    how = kept(source)[0]
    return {} if how is None else {"quantization": how.stored}


def _codes_in(folder: pathlib.Path) -> dict[str, Any]:
    """The same of a Hugging Face folder; nothing of a config.json alone."""
    if not folder.is_dir() or read_object(folder / "config.json").get(KEY) is None:
        return {}
    from convert.folder import INDEX, WEIGHTS, FolderSource

    if not any((folder / name).is_file() for name in (WEIGHTS, INDEX)):
        return {}
    with contextlib.ExitStack() as stack:
        return _codes_of(FolderSource(folder, stack))


def _hf_config(file: pathlib.Path) -> ModelConfig:
    """The model of a config.json, as it is once it is converted."""
    raw = read_object(file)
    if raw.get(KEY) is None:  # nothing of `convert` is needed
        return config_from_hf(raw)
    from convert.quantization_config import read_hf_config

    return read_hf_config(raw)[0]


def conversion(model: str | os.PathLike) -> pathlib.Path:
    """Where in the cache the checkpoint of a source is, or would be.

    Raises:
      ValueError: there is no such source.
    """
    path = pathlib.Path(model)
    hub = HUB_ID.fullmatch(str(model))
    if not path.exists():
        if hub is None:
            raise ValueError(
                f"{model} is no model: neither a folder, nor a GGUF file, nor a hub id (owner/name)"
            )
        return _models() / f"{str(model).replace('/', '--')}-{_hash(FORMAT)}"
    path = path.resolve()
    if path.is_dir() and not (path / "config.json").is_file():
        raise ValueError(
            f"{model} is no model: it has neither {METADATA_FILE} (of a checkpoint) nor config.json"
        )
    from convert.folder import SOURCE_FILES

    files = [path] if path.is_file() else sorted(path.iterdir())
    files = [p for p in files if p == path or any(fnmatch.fnmatch(p.name, f) for f in SOURCE_FILES)]
    about = [[p.name, p.stat().st_size, p.stat().st_mtime_ns] for p in files]
    coded = path.is_file() or read_object(path / "config.json").get(KEY) is not None
    key = [FORMAT, about, *([CODES] if coded else [])]
    name = path.name if path.is_dir() else path.stem
    return _models() / f"{name}-{_hash(str(path))}-{_hash(key)}"


def _hub_id(model: str | os.PathLike) -> tuple[str, str | None]:
    """Its repository, and the revision where one is named; of what `HUB_ID` matches."""
    found = HUB_ID.fullmatch(str(model))
    assert found is not None
    return found[1], found[2]


def _models() -> pathlib.Path:
    return cache_root() / "models"


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:8]


def is_gguf(path: pathlib.Path) -> bool:
    """Whether a file begins as GGUF files do."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(4) == b"GGUF"


def _say(sentence: str) -> None:
    print(sentence, file=sys.stderr, flush=True)

"""A Hugging Face model folder, or a hub id brought to one, as a source of tensors."""

from __future__ import annotations

import contextlib
import json
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import ml_dtypes
import numpy as np

from convert.quantization_config import read_hf_config
from convert.quantized import find_matrices
from convert.tensors import DTYPES, Rows, Tensor, expected_tensors, row_ranges
from convert.tokenizer import TOKENIZER_FILES, copy_tokenizer
from easyspec_jax.config import ModelConfig
from easyspec_jax.json_files import read_object
from easyspec_jax.quantized import Form

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
_DTYPE_NAMES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
SOURCE_FILES = [
    "model*.safetensors",
    INDEX,
    "config.json",
    "generation_config.json",
    *TOKENIZER_FILES,
]


class FolderSource:
    """`Source` over config.json and model.safetensors, or the shards that its index names."""

    def __init__(self, folder: pathlib.Path, stack: contextlib.ExitStack):
        """Open every file; `stack` closes them."""
        self.folder = folder
        path = folder / "config.json"
        self.config, plain, scheme = read_hf_config(read_object(path))
        self.config_text = path.read_text(encoding="utf-8")
        if scheme is not None:
            self.config_text = json.dumps(plain, indent=2, ensure_ascii=False) + "\n"
        path = folder / "generation_config.json"
        self.generation_config = read_object(path) if path.exists() else {}
        self._slices = open_tensors(folder, stack)
        self.tensors = {name: _header(rows) for name, rows in self._slices.items()}
        self.codes, self.note = "", ""
        self.matrices = {}  # by the names of weights: those stored as codes
        if scheme is not None:
            self.codes, self.note = scheme.codes, scheme.note
            self.matrices, self.tensors = find_matrices(
                scheme, self.config, self._slices, self.tensors
            )
        floats = {n: t for n, t in self.tensors.items() if n not in self.matrices}
        self.dtype = _common_dtype(floats, self.config)

    def label(self, name: str) -> str:
        """The name itself; of a quantised matrix that of its codes."""
        matrix = self.matrices.get(name)
        return name if matrix is None else name.removesuffix("weight") + matrix.codes_name

    def chunks(self, name: str) -> Iterator[np.ndarray]:
        """Consecutive slices along the first axis."""
        if name in self.matrices:
            yield from self.matrices[name].chunks()
            return
        tensor = self.tensors[name]
        for rows in row_ranges(tensor.shape, DTYPES[tensor.dtype].itemsize):
            yield self._slices[name][rows]

    def form(self, name: str) -> Form | str | None:
        """Of the codes of a matrix, or why there is none; None: it is floats."""
        return self.matrices[name].form() if name in self.matrices else None

    def coded(self, name: str) -> Iterator[Rows]:
        """Consecutive slices of a matrix along its outputs, symmetric."""
        return self.matrices[name].coded()

    def write_tokenizer(self, folder: pathlib.Path) -> None:
        """Copy the tokenizer files."""
        copy_tokenizer(self.folder, folder)


def download(repo: str, revision: str | None, *files: str) -> pathlib.Path:
    """Fetch a model from the hub, safetensors, configs and tokenizer only (or just these files of
    it), and return its folder.

    Raises:
      OSError: the hub cannot be reached or has no such model.
    """
    import huggingface_hub

    try:
        return pathlib.Path(
            huggingface_hub.snapshot_download(
                repo, revision=revision, allow_patterns=list(files or SOURCE_FILES)
            )
        )
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise OSError(
            f"{repo} is no local folder, and the hub did not deliver it: {reason}"
        ) from error


class Float8Rows:
    """A float8 tensor of a safetensors file, to be sliced as the library's are: with numpy, which
    lacks the type, the library cannot.
    """

    dtype = "F8_E4M3"

    def __init__(self, path: pathlib.Path, start: int, shape: Sequence[int]):
        self._where = {"filename": path, "offset": start, "shape": tuple(shape)}

    def get_dtype(self) -> str:
        """As the header has it."""
        return self.dtype

    def get_shape(self) -> list[int]:
        """As the header has it."""
        return list(self._where["shape"])

    def __getitem__(self, index: Any) -> np.ndarray:
        # mapped for as long as the slice lives: a map of every tensor would be many
        return np.memmap(mode="r", dtype=np.dtype(ml_dtypes.float8_e4m3fn), **self._where)[index]


def open_safetensors(path: pathlib.Path) -> tuple[Any, dict[str, int]]:
    """The file, mapped and its header checked, and where the bytes of its tensors begin; reading a
    slice copies those rows alone.

    Raises:
      ValueError: it is not whole, or no safetensors file.
    """
    import safetensors

    try:
        file = safetensors.safe_open(path, framework="numpy")
        with path.open("rb") as header:  # of a name that stands twice the library takes the last
            size = int.from_bytes(header.read(8), "little")
            about = json.loads(header.read(size), object_pairs_hook=_unique)
    except (safetensors.SafetensorError, OSError, ValueError) as error:
        raise ValueError(f"{path} is not a valid safetensors file: {error}.") from None
    about.pop("__metadata__", None)
    return file, {name: 8 + size + about[name]["data_offsets"][0] for name in about}


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    names = dict(pairs)
    if len(names) != len(pairs):
        raise ValueError("a key appears twice")
    return names


def _header(rows: Any) -> Tensor:
    dtype: str = rows.get_dtype()
    return Tensor(tuple(rows.get_shape()), _DTYPE_NAMES.get(dtype, dtype))


def open_tensors(folder: pathlib.Path, stack: contextlib.ExitStack) -> dict[str, Any]:
    """A slice of every tensor of model.safetensors, or of the shards that its index names; `stack`
    closes them.

    Raises:
      ValueError: neither is there, one is no safetensors file, or a tensor is missing or twice.
    """
    slices: dict[str, Any] = {}
    shard_of: dict[str, pathlib.Path] = {}
    for shard, names in _shards(folder).items():
        path = folder / shard
        file, starts = open_safetensors(path)
        stack.enter_context(file)
        found = file.keys()
        absent = sorted((names or set()).difference(found))
        if absent:
            raise ValueError(f"{path} lacks tensor {absent[0]}, which {INDEX} puts there.")
        for name in found:
            if shard_of.setdefault(name, path) != path:
                raise ValueError(f"tensor {name} is in {shard_of[name]} and {path}.")
            rows = file.get_slice(name)
            if rows.get_dtype() == Float8Rows.dtype:
                rows = Float8Rows(path, starts[name], rows.get_shape())
            slices[name] = rows
    return slices


def _shards(folder: pathlib.Path) -> Mapping[str, set[str] | None]:
    """File name of every shard, with the tensors that the index puts there (None without index)."""
    if (folder / WEIGHTS).exists():
        return {WEIGHTS: None}
    if not (folder / INDEX).exists():
        pickles = sorted(p.name for ext in ("bin", "pt", "pth") for p in folder.glob(f"*.{ext}"))
        hint = "pickles are never read: save it as safetensors"
        hint = f"; {pickles[0]} is a pickle, and {hint}" if pickles else ""
        raise ValueError(f"{folder} has neither {WEIGHTS} nor {INDEX}{hint}.")
    weight_map = read_object(folder / INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{folder / INDEX} has no weight_map.")
    shards: dict[str, set[str]] = {}
    for tensor, shard in weight_map.items():
        if (
            not isinstance(shard, str)
            or not shard.endswith(".safetensors")
            or set("/\\:") & {*shard}
        ):
            raise ValueError(
                f"{folder / INDEX} names the shard {shard!r}, which is not a safetensors file "
                "inside the folder."
            )
        shards.setdefault(shard, set()).add(tensor)
    absent = [shard for shard in shards if not (folder / shard).is_file()]
    if absent:
        raise ValueError(f"{folder} lacks the shard {absent[0]}, which {INDEX} names.")
    return shards


def _common_dtype(tensors: dict[str, Tensor], config: ModelConfig) -> str:
    """The type of all tensors of the model; float32, which holds the others, where they differ."""
    found = {tensors[n].dtype for n in expected_tensors(config) if n in tensors}
    return found.pop() if len(found) == 1 and found <= DTYPES.keys() else "float32"

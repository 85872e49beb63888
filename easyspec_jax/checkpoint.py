"""Models from disk or from a seed, straight onto a mesh; and the layout of a checkpoint folder.

A checkpoint is one Orbax checkpoint per layer and one for embedding, norm and head, so neither
saving nor loading ever holds more than a block beside the model itself. It knows nothing of meshes
or groups: both are made at load.
"""

from __future__ import annotations

import functools
import json
import math
import os
import pathlib
import shutil
import tempfile
import warnings
import zlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from easyspec_jax import weights
from easyspec_jax.config import ModelConfig
from easyspec_jax.distributed import is_lost_peer
from easyspec_jax.hf_config import config_from_hf
from easyspec_jax.layer_parallel import make_partition
from easyspec_jax.memory import check_memory, device_bytes
from easyspec_jax.model import Model
from easyspec_jax.sharding import (
    LAYER,
    TENSOR,
    Layout,
    LayoutRules,
    layout_rules,
    make_layout,
    make_mesh,
)

FORMAT = 1
# {"format": 1, "dtype": "float16", "tokenizer": sha256 of the ordinary vocabulary, or null,
#  "weights": `checksum` of all parts}
METADATA_FILE = "easyspec.json"
# The part that holds `weights.TOP_WEIGHTS`; every other one holds one layer's `LAYER_WEIGHTS`.
TOP_PART = "top"
PARTITION_FILE = "partition.json"  # beside the parts: the groups that tuning chose, and why
PARTITION_FORMAT = 1
TUNED = "tuned"  # as a group size: that of the partition file
# Arrays are stored in pieces of at most this many bytes, and no piece holds two kv heads, so that a
# process reads little more than its own share.
PIECE = 4 * 2**20


def layer_name(index: int) -> str:
    """Folder of layer `index` inside a checkpoint."""
    return f"layers/{index:04d}"


def save_part(folder: pathlib.Path, name: str, arrays: dict[str, np.ndarray]) -> None:
    """Write one part (`TOP_PART` or a `layer_name`) of a checkpoint, arrays as in `weights`."""
    from orbax.checkpoint import v1

    ocp: Any = v1  # its options are looser than their declared types
    dims = {weight.name: weight.dims for weight in (*weights.LAYER_WEIGHTS, *weights.TOP_WEIGHTS)}

    def pieces(keypath, value):
        del value
        letters = dims[keypath[-1].key]
        heads = (letters.index("K"),) if "K" in letters else None
        return ocp.options.ArrayOptions.Saving.StorageOptions(
            chunk_byte_size=PIECE, shard_axes=heads
        )

    path = (folder / name).absolute()
    path.parent.mkdir(parents=True, exist_ok=True)
    context = ocp.Context()
    context.array.saving.scoped_storage_options_creator = pieces
    with context:
        ocp.save(path, arrays)


def checksum(name: str, arrays: dict[str, np.ndarray]) -> int:
    """CRC-32 of a part's name and bytes; all parts together, by xor, tell weights apart."""
    crc = zlib.crc32(name.encode())
    for key in sorted(arrays):
        flat = np.ascontiguousarray(arrays[key]).reshape(-1)
        crc = zlib.crc32(flat.view(np.uint8).data, crc)
    return crc


def read_metadata(path: str | os.PathLike) -> tuple[ModelConfig, dict[str, Any]]:
    """Configuration and metadata of a checkpoint folder.

    Raises:
      ValueError: `path` is no checkpoint of this format, with what to do instead.
    """
    folder = pathlib.Path(path)
    if not (folder / METADATA_FILE).is_file():
        raise ValueError(
            f"{folder} is not a converted checkpoint: it has no {METADATA_FILE}; "
            f"make one with `python -m convert {folder} DST`"
        )
    metadata = json.loads((folder / METADATA_FILE).read_text())
    if metadata.get("format") != FORMAT:
        raise ValueError(
            f"{folder} has checkpoint format {metadata.get('format')}, "
            f"but this version reads {FORMAT}: convert it again"
        )
    return config_from_hf(json.loads((folder / "config.json").read_text())), metadata


def save_model(model: Model, path: str | os.PathLike, like: str | os.PathLike) -> None:
    """Write a model, from whatever mesh and groups it is in, as a checkpoint for any other.

    Args:
      path: a folder that does not exist yet; it appears when all is written.
      like: the checkpoint whose configuration and tokenizer it takes.

    Raises:
      ValueError: `like` is no checkpoint, or one of other dimensions; several processes.
      FileExistsError: there is something at `path`.
    """
    config, metadata = read_metadata(like)
    if config != model.config:
        raise ValueError(f"{like} is of another model: its configuration is not this model's")
    tokenizer = metadata.get("tokenizer")
    if None not in (model.tokenizer, tokenizer) and model.tokenizer != tokenizer:
        raise ValueError(f"{like} has another tokenizer than this model")
    if model.layout.mesh.is_multi_process:
        raise ValueError("a model is saved by one process that holds all of it")
    target = pathlib.Path(path)
    if target.exists() or target.is_symlink():
        raise FileExistsError(f"{target} exists; name a folder that does not")
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as temp:
        folder = pathlib.Path(temp) / "checkpoint"
        folder.mkdir()
        for file in pathlib.Path(like).iterdir():
            if file.is_file() and file.name != PARTITION_FILE:  # found for those weights
                shutil.copy(file, folder)
        separate = jax.jit(functools.partial(weights.separate_block, layout=model.layout))
        index, crc = 0, 0
        for block in model.params.blocks:
            for layer in jax.device_get(separate(block)):
                save_part(folder, layer_name(index), layer)
                crc ^= checksum(layer_name(index), layer)
                index += 1
        top = jax.device_get(weights.separate_top(model.params))
        save_part(folder, TOP_PART, top)
        crc ^= checksum(TOP_PART, top)
        metadata |= {"dtype": model.dtype.name, "weights": f"{crc:08x}"}
        (folder / METADATA_FILE).write_text(json.dumps(metadata, indent=2) + "\n")
        os.rename(folder, target)


def load_model(
    path: str | os.PathLike,
    mesh: Mesh | None = None,
    *,
    group_size: int | Sequence[int] | str = 1,
    dtype: Any = None,
    layout: str | LayoutRules | None = None,
) -> Model:
    """A checkpoint's model on `mesh`, restored straight onto its devices: no two of them, nor of
    the processes they belong to, read the same part of a weight that the mesh divides.

    Args:
      path: a folder written by `convert`.
      mesh: from `make_mesh`; default: one over all devices.
      group_size: layers per group for layer-parallel drafting, or an explicit partition (layers per
        block, in order), or "tuned": the partition that `easyspec tune` left in the folder.
      dtype: of weights and cache; default float32 on CPU, bfloat16 elsewhere.
      layout: "tensor" splits everything over all devices; "grouped" puts the layers of a group side
        by side on the axis "layer" and splits heads over "tensor"; "replicated" splits nothing; or
        `LayoutRules`. Default: "tensor" for group_size 1, else "grouped".

    Raises:
      ValueError: no checkpoint there, a bad partition (or no "tuned" one) or layout, or more than
        the devices hold; nothing is allocated then. Or a part of the checkpoint is damaged.
      OSError: a file cannot be read.
    """
    config, metadata = read_metadata(path)
    if isinstance(group_size, str) and group_size == TUNED:
        group_size = read_partition(path, config.num_layers, metadata.get("weights"))
    folder = pathlib.Path(path).absolute()
    stored = {p.relative_to(folder).as_posix() for p in folder.glob("layers/*")}
    if (
        stored != {layer_name(i) for i in range(config.num_layers)}
        or not (folder / TOP_PART).is_dir()
    ):
        raise ValueError(
            f"{folder} is incomplete or not of one piece: config.json has {config.num_layers} "
            f"layers and {len(stored)} are stored; convert the model again"
        )

    def part(name, abstract):
        from orbax.checkpoint import v1 as ocp

        try:
            return ocp.load(folder / name, abstract)
        except Exception as error:  # Orbax has many kinds for a damaged folder
            missing = isinstance(error, FileNotFoundError | NotADirectoryError)
            machine = isinstance(error, OSError | MemoryError) and not missing
            machine |= jax.process_count() > 1 and is_lost_peer(error)
            if machine or "RESOURCE_EXHAUSTED" in str(error):
                raise
            raise ValueError(f"{folder / name} is damaged: convert the model again") from error

    return _build(config, mesh, group_size, dtype, layout, part, metadata.get("tokenizer"))


def abstract_model(
    config: ModelConfig,
    mesh: Mesh | None = None,
    *,
    group_size: int | Sequence[int] = 1,
    dtype: Any = None,
    layout: str | LayoutRules | None = None,
) -> Model:
    """A model whose weights are shapes and shardings alone, to plan with: `Decoder.memory`,
    `planner.program.collectives`; arguments as in `load_model`.
    """
    mesh = mesh if mesh is not None else make_mesh()
    if set(mesh.axis_names) != {LAYER, TENSOR}:
        raise ValueError(f"a mesh from make_mesh is needed, got one of axes {mesh.axis_names}")
    partition = make_partition(config.num_layers, group_size)
    rules = layout_rules(layout, partition)
    if dtype is None:
        dtype = jnp.float32 if mesh.devices.flat[0].platform == "cpu" else jnp.bfloat16
    placed = make_layout(config, mesh, rules)
    params = _abstract_params(config, placed, partition, _float_type(dtype))
    return Model(params=params, config=config, layout=placed, partition=partition)


def random_model(
    config: ModelConfig,
    mesh: Mesh | None = None,
    *,
    group_size: int | Sequence[int] = 1,
    dtype: Any = None,
    layout: str | LayoutRules | None = None,
    seed: int = 0,
) -> Model:
    """A model with random weights, the same for one seed on every mesh; other arguments as in
    `load_model`.
    """
    root = jax.random.key(seed)

    def part(name, abstract):
        index = config.num_layers if name == TOP_PART else int(name.rpartition("/")[2])
        make = _random_part(tuple(abstract.items()))
        return make(jax.random.fold_in(root, index))

    return _build(config, mesh, group_size, dtype, layout, part, None)


def _build(config, mesh, group_size, dtype, layout, part: Callable, tokenizer) -> Model:
    """A model from `part(name, abstract arrays)`, which brings one part of a checkpoint; block by
    block.
    """
    model = abstract_model(config, mesh, group_size=group_size, dtype=dtype, layout=layout)
    placed, dtype = model.layout, model.dtype
    largest = max(device_bytes(block) for block in model.params.blocks)
    check_memory(placed.mesh, {"weights": device_bytes(model.params), "reading": largest})
    layer = _abstract(weights.LAYER_WEIGHTS, config, dtype, placed)
    blocks, first = [], 0
    for size in model.partition:
        layers = [part(layer_name(i), layer) for i in range(first, first + size)]
        blocks.append(_jit_arrange(size, config, placed)(layers))
        first += size
    top = part(TOP_PART, _abstract(weights.TOP_WEIGHTS, config, dtype, placed))
    shardings = _named(_fields(weights.specs(config, placed, ())), placed.mesh)
    top = jax.jit(weights.arrange_top, out_shardings=shardings)(top)
    params = weights.Params(blocks=tuple(blocks), **top)
    return model.replace(params=params, tokenizer=tokenizer)


def _float_type(dtype: Any) -> jnp.dtype:
    try:
        found = jnp.dtype(dtype)
    except TypeError:
        found = None
    known = ["bfloat16", "float16", "float32"]
    known += ["float64"] if jax.config.read("jax_enable_x64") else []
    if found is None or found.name not in known:
        raise ValueError(f"dtype must be one of {', '.join(known)}, got {dtype}")
    return found


def _abstract(
    table: Sequence[weights.Weight], config: ModelConfig, dtype: Any, layout: Layout
) -> dict[str, jax.ShapeDtypeStruct]:
    """The arrays of a part as it is read, split as finely as `layout` and its mesh allow."""
    found = {}
    for name, weight in weights.present(table, config).items():
        shape = weight.shape(config)
        finest = layout.finest(weight.dims, shape)
        found[name] = jax.ShapeDtypeStruct(shape, dtype, sharding=finest)
    return found


def _abstract_params(
    config: ModelConfig, layout: Layout, partition: tuple[int, ...], dtype: Any
) -> weights.Params:
    """Shapes and shardings of a model's weights, as ShapeDtypeStructs; nothing is allocated."""
    layer = _abstract(weights.LAYER_WEIGHTS, config, dtype, layout)
    arrange = functools.partial(weights.arrange_block, layout=layout)
    blocks = {size: jax.eval_shape(arrange, [layer] * size) for size in set(partition)}
    top = jax.eval_shape(weights.arrange_top, _abstract(weights.TOP_WEIGHTS, config, dtype, layout))
    shapes = weights.Params(blocks=tuple(blocks[size] for size in partition), **top)
    shardings = _named(weights.specs(config, layout, partition), layout.mesh)
    return jax.tree.map(
        lambda s, sharding: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=sharding),
        shapes,
        shardings,
    )


def _fields(params: weights.Params) -> dict[str, Any]:
    """What stands outside the blocks."""
    return {name: getattr(params, name) for name in ("embed", "final_norm", "lm_head")}


@functools.cache
def _jit_arrange(size, config, layout):
    """One jitted `arrange_block` per block size, so that equal blocks compile once."""
    (block,) = weights.specs(config, layout, (size,)).blocks
    arrange = functools.partial(weights.arrange_block, layout=layout)
    return jax.jit(arrange, out_shardings=_named(block, layout.mesh))


@functools.cache
def _random_part(abstract):
    """A jitted key -> arrays; one draw for all arrays of a part compiles several times faster."""
    table = {weight.name: weight for weight in (*weights.LAYER_WEIGHTS, *weights.TOP_WEIGHTS)}

    def make(key):
        ends = np.cumsum([math.prod(a.shape) for _, a in abstract])
        flat = jnp.split(jax.random.normal(key, (int(ends[-1]),), jnp.float32), ends[:-1].tolist())
        return {
            name: table[name].scaled(draw.reshape(a.shape)).astype(a.dtype)
            for draw, (name, a) in zip(flat, abstract, strict=True)
        }

    return jax.jit(make, out_shardings={name: a.sharding for name, a in abstract})


def _named(specs, mesh):
    return jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs)


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

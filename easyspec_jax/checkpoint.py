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
import zlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from easyspec_jax.config import ModelConfig
from easyspec_jax.distributed import is_lost_peer
from easyspec_jax.layer_parallel import make_partition
from easyspec_jax.memory import check_memory, device_bytes
from easyspec_jax.model import (
    LETTERS,
    Model,
    Params,
    arrange_block,
    block_specs,
    separate_block,
)
from easyspec_jax.sharding import (
    LAYER,
    TENSOR,
    Layout,
    LayoutRules,
    layout_rules,
    make_layout,
    make_mesh,
)
from easyspec_jax.tuned import PARTITION_FILE, TUNED, read_partition

FORMAT = 1
# {"format": 1, "dtype": "float16", "tokenizer": sha256 of the ordinary vocabulary, or null,
#  "weights": `checksum` of all parts}
METADATA_FILE = "easyspec.json"
TOP = "top"  # embed, final_norm and, when untied, lm_head
# Arrays are stored in pieces of at most this many bytes, and no piece holds two kv heads, so that a
# process reads little more than its own share.
PIECE = 4 * 2**20


def layer_name(index: int) -> str:
    """Folder of layer `index` inside a checkpoint."""
    return f"layers/{index:04d}"


def save_part(folder: pathlib.Path, name: str, arrays: dict[str, np.ndarray]) -> None:
    """Write one part (`TOP` or a `layer_name`) of a checkpoint, shapes as in `ModelConfig`."""
    from orbax.checkpoint import v1 as ocp

    def pieces(keypath, value):
        del value
        letters = LETTERS[keypath[-1].key]
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
        crc = zlib.crc32(flat.view(np.uint8), crc)
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
    return ModelConfig.from_hf(json.loads((folder / "config.json").read_text())), metadata


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
        separate = jax.jit(functools.partial(separate_block, layout=model.layout))
        index, crc = 0, 0
        for block in model.params.blocks:
            for layer in jax.device_get(separate(block)):
                save_part(folder, layer_name(index), layer)
                crc ^= checksum(layer_name(index), layer)
                index += 1
        p = model.params
        top = {"embed": p.embed, "final_norm": p.final_norm, "lm_head": p.lm_head}
        if config.tie_embeddings:
            top = {"embed": p.lm_head.T, "final_norm": p.final_norm}
        top = jax.device_get(top)
        save_part(folder, TOP, top)
        crc ^= checksum(TOP, top)
        weights = {"dtype": model.dtype.name, "weights": f"{crc:08x}"}
        (folder / METADATA_FILE).write_text(json.dumps(metadata | weights, indent=2) + "\n")
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
      layout: "tensor" splits everything over all devices; "layer" puts the layers of a group side
        by side on the axis "layer" and splits heads over "tensor"; "replicated" splits nothing; or
        `LayoutRules`. Default: "tensor" for group_size 1, else "layer".

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
    if stored != {layer_name(i) for i in range(config.num_layers)} or not (folder / TOP).is_dir():
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
    `traffic.collectives`; arguments as in `load_model`.
    """
    mesh = mesh if mesh is not None else make_mesh()
    if set(mesh.axis_names) != {LAYER, TENSOR}:
        raise ValueError(f"a mesh from make_mesh is needed, got one of axes {mesh.axis_names}")
    partition = make_partition(config.num_layers, group_size)
    rules = layout_rules(layout, partition)
    if dtype is None:
        dtype = jnp.float32 if mesh.devices.flat[0].platform == "cpu" else jnp.bfloat16
    placed = make_layout(config, mesh, rules)
    params = abstract_params(config, placed, partition, _float_type(dtype))
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
        index = config.num_layers if name == TOP else int(name.rpartition("/")[2])
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
    layer = _abstract(config.layer_shapes(), dtype, placed)
    blocks, first = [], 0
    for size in model.partition:
        layers = [part(layer_name(i), layer) for i in range(first, first + size)]
        blocks.append(_jit_arrange(size, config, placed)(layers))
        first += size
    top = _place_top(
        part(TOP, _abstract(config.top_shapes(), dtype, placed)),
        config,
        placed,
    )
    return model.replace(params=Params(blocks=tuple(blocks), **top), tokenizer=tokenizer)


def _float_type(dtype: Any) -> jnp.dtype:
    try:
        found = jnp.dtype(dtype)
    except TypeError:
        found = None
    known = ["bfloat16", "float16", "float32"]
    known += ["float64"] if jax.config.jax_enable_x64 else []
    if found is None or found.name not in known:
        raise ValueError(f"dtype must be one of {', '.join(known)}, got {dtype}")
    return found


def _abstract(shapes, dtype, layout: Layout):
    """ShapeDtypeStructs by name, split as finely as `layout` and its mesh allow."""
    return {
        name: jax.ShapeDtypeStruct(shape, dtype, sharding=layout.finest(LETTERS[name], shape))
        for name, shape in shapes.items()
    }


def abstract_params(
    config: ModelConfig, layout: Layout, partition: tuple[int, ...], dtype: Any
) -> Params:
    """Shapes and shardings of a model's weights, as ShapeDtypeStructs; nothing is allocated."""

    def placed(fn, arg, specs):
        shapes = jax.eval_shape(fn, arg)
        return jax.tree.map(
            lambda s, spec: jax.ShapeDtypeStruct(
                s.shape, s.dtype, sharding=NamedSharding(layout.mesh, spec)
            ),
            shapes,
            specs,
        )

    one = {
        size: placed(
            functools.partial(arrange_block, layout=layout),
            [_abstract(config.layer_shapes(), dtype, layout)] * size,
            block_specs(config, layout, size),
        )
        for size in set(partition)
    }
    top = placed(
        functools.partial(_arrange_top, tied=config.tie_embeddings),
        _abstract(config.top_shapes(), dtype, layout),
        _top_specs(config, layout),
    )
    return Params(blocks=tuple(one[size] for size in partition), **top)


def _arrange_top(top: dict[str, Any], *, tied: bool) -> dict[str, Any]:
    if tied:
        return {"embed": None, "final_norm": top["final_norm"], "lm_head": top["embed"].T}
    return {key: top[key] for key in ("embed", "final_norm", "lm_head")}


def _top_specs(config: ModelConfig, layout: Layout) -> dict[str, Any]:
    embed = None if config.tie_embeddings else layout.spec("VD")
    return {"embed": embed, "final_norm": layout.spec("D"), "lm_head": layout.spec("DV")}


def _place_top(top, config, layout):
    shardings = _named(_top_specs(config, layout), layout.mesh)
    return jax.jit(
        functools.partial(_arrange_top, tied=config.tie_embeddings), out_shardings=shardings
    )(top)


@functools.cache
def _jit_arrange(size, config, layout):
    """One jitted `arrange_block` per block size, so that equal blocks compile once."""
    shardings = _named(block_specs(config, layout, size), layout.mesh)
    return jax.jit(functools.partial(arrange_block, layout=layout), out_shardings=shardings)


@functools.cache
def _random_part(abstract):
    """A jitted key -> arrays; one draw for all arrays of a part compiles several times faster."""

    def make(key):
        ends = np.cumsum([math.prod(a.shape) for _, a in abstract])
        flat = jnp.split(jax.random.normal(key, (int(ends[-1]),), jnp.float32), ends[:-1].tolist())
        return {
            name: _scaled(draw.reshape(a.shape), name).astype(a.dtype)
            for draw, (name, a) in zip(flat, abstract, strict=True)
        }

    return jax.jit(make, out_shardings={name: a.sharding for name, a in abstract})


def _scaled(draw: jax.Array, name: str) -> jax.Array:
    """A standard normal draw as the weights `name`: outputs keep the size of inputs."""
    if name.endswith("norm"):
        return jnp.ones_like(draw)
    fan_in = {"wo": draw.shape[:-1], "embed": (1,)}.get(name, draw.shape[:1])
    return draw * (0.02 if name.startswith("b") else math.prod(fan_in) ** -0.5)


def _named(specs, mesh):
    return jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs)

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
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from easyspec_jax.config import ModelConfig
from easyspec_jax.layer_parallel import make_partition
from easyspec_jax.model import Model, Params, arrange_block, block_specs, layer_letters, top_letters
from easyspec_jax.sharding import Layout, check_memory, device_bytes, make_layout, make_mesh

FORMAT = 1
# {"format": 1, "dtype": "float16", "tokenizer": sha256 of the ordinary vocabulary, or null}
METADATA_FILE = "easyspec.json"
TOP = "top"  # embed, final_norm and, when untied, lm_head


def layer_name(index: int) -> str:
    """Folder of layer `index` inside a checkpoint."""
    return f"layers/{index:04d}"


def save_part(folder: pathlib.Path, name: str, arrays: dict[str, np.ndarray]) -> None:
    """Write one part (`TOP` or a `layer_name`) of a checkpoint, shapes as in `ModelConfig`."""
    from orbax.checkpoint import v1 as ocp

    path = (folder / name).absolute()
    path.parent.mkdir(parents=True, exist_ok=True)
    ocp.save(path, arrays)


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


def load_model(
    path: str | os.PathLike,
    mesh: Mesh | None = None,
    *,
    group_size: int | Sequence[int] = 1,
    dtype: Any = None,
    layout: str | None = None,
) -> Model:
    """A checkpoint's model on `mesh`, each array restored straight onto its devices.

    Args:
      path: a folder written by `convert`.
      mesh: from `make_mesh`; default: one over all devices.
      group_size: layers per group for layer-parallel drafting, or an explicit partition (layers per
        block, in order).
      dtype: of weights and cache; default float32 on CPU, bfloat16 elsewhere.
      layout: "base" splits the heads over all devices, "draft" over the axis "tensor" only, with
        groups over "layer". Default: "base" for group_size 1, else "draft".

    Raises:
      ValueError: no checkpoint there, a bad partition or layout, or more than the devices hold;
        nothing is allocated then. Or a part of the checkpoint is damaged.
      OSError: a file cannot be read.
    """
    config, metadata = read_metadata(path)
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
            if machine or "RESOURCE_EXHAUSTED" in str(error):
                raise
            raise ValueError(f"{folder / name} is damaged: convert the model again") from error

    return _build(config, mesh, group_size, dtype, layout, part, metadata.get("tokenizer"))


def random_model(
    config: ModelConfig,
    mesh: Mesh | None = None,
    *,
    group_size: int | Sequence[int] = 1,
    dtype: Any = None,
    layout: str | None = None,
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
    mesh = mesh if mesh is not None else make_mesh()
    partition = make_partition(config.num_layers, group_size)
    if layout not in (None, "base", "draft"):
        raise ValueError(f'layout must be "base" or "draft", got {layout!r}')
    layer_parallel = layout == "draft" or (layout is None and max(partition) > 1)
    if max(partition) > 1 and not layer_parallel:
        raise ValueError('layout "base" runs layer after layer: groups need layout="draft"')
    placed = make_layout(config, mesh, layer_parallel=layer_parallel)
    if dtype is None:
        dtype = jnp.float32 if mesh.devices.flat[0].platform == "cpu" else jnp.bfloat16
    dtype = _float_type(dtype)
    check_memory(mesh, {"weights": device_bytes(abstract_params(config, placed, partition, dtype))})
    # Each array comes with the split it keeps, so that fusing and stacking stay on the device.
    layer = _abstract(config.layer_shapes(), dtype, placed, layer_letters(config))
    blocks, first = [], 0
    for size in partition:
        layers = [part(layer_name(i), layer) for i in range(first, first + size)]
        blocks.append(_jit_arrange(size, config, placed)(layers))
        first += size
    top = _place_top(
        part(TOP, _abstract(config.top_shapes(), dtype, placed, top_letters(config))),
        config,
        placed,
    )
    params = Params(blocks=tuple(blocks), **top)
    return Model(
        params=params, config=config, layout=placed, partition=partition, tokenizer=tokenizer
    )


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


def _abstract(shapes, dtype, layout: Layout, letters):
    """ShapeDtypeStructs by name, with the shardings that `letters` mean in `layout`."""
    return {
        name: jax.ShapeDtypeStruct(shape, dtype, sharding=layout.named(letters[name]))
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
            [_abstract(config.layer_shapes(), dtype, layout, layer_letters(config))] * size,
            block_specs(config, layout, size),
        )
        for size in set(partition)
    }
    top = placed(
        functools.partial(_arrange_top, tied=config.tie_embeddings),
        _abstract(config.top_shapes(), dtype, layout, top_letters(config)),
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

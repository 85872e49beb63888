"""Models from disk or from a seed, straight onto a mesh; and back to disk."""

from __future__ import annotations

import dataclasses
import functools
import logging
import math
import os
import pathlib
import shutil
import tempfile
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from easyspec_jax import checkpoint, weights
from easyspec_jax.attend import attention_on
from easyspec_jax.bfloat16 import matrix_type
from easyspec_jax.checkpoint import METADATA_FILE, PARTITION_FILE, TOP_PART, TUNED, layer_name
from easyspec_jax.config import ModelConfig
from easyspec_jax.json_files import write_object
from easyspec_jax.layer_parallel import make_partition
from easyspec_jax.memory import check_memory, device_bytes
from easyspec_jax.model import Model
from easyspec_jax.quantized import Quantization, Quantized, dequantise, wide_type
from easyspec_jax.sharding import (
    KV_CODES,
    LAYER,
    TENSOR,
    Layout,
    LayoutRules,
    layout_rules,
    make_layout,
    make_mesh,
    platform_of,
)
from easyspec_jax.sources import find_checkpoint, read_config

logger = logging.getLogger("easyspec_jax")


def load_model(
    path: str | os.PathLike,
    mesh: Mesh | None = None,
    *,
    group_size: int | Sequence[int] | str = 1,
    dtype: Any = None,
    layout: str | LayoutRules | None = None,
    attention: str = "auto",
    quantization: str | Quantization | None = None,
    kv_dtype: str | None = None,
    matrix_dtype: Any = None,
    progress: bool | None = None,
) -> Model:
    """A checkpoint's model on `mesh`, restored straight onto its devices: no two of them, nor of
    the processes they belong to, read the same part of a weight that the mesh divides.

    Args:
      path: a folder written by `convert`; or a Hugging Face folder, a GGUF file or a hub id
        (owner/name, owner/name@revision), which is converted once and kept (`sources`).
      mesh: from `make_mesh`; default: one over all devices.
      group_size: layers per group for layer-parallel drafting, or an explicit partition (layers per
        block, in order), or "tuned": the partition that `easyspec tune` left in the folder.
      dtype: of weights and cache; default float32 on CPU (but see `matrix_dtype`), bfloat16
        elsewhere.
      layout: "tensor" splits everything over all devices; "grouped" puts the layers of a group side
        by side on the axis "layer" and splits heads over "tensor"; "replicated" splits nothing; or
        `LayoutRules`. Default: "tensor" for group_size 1, else "grouped".
      attention: "cudnn" for one kernel of cuDNN where it has one: NVIDIA GPUs since A100, bfloat16
        or float16, heads of 8, 16, .. 128 numbers; "xla" for those of XLA, as everywhere else.
        "auto": the former where the device, asked once, finds by it what it finds by the latter.
      quantization: "int8", "fp8" or "int4" (or a `Quantization`): matrices as codes and scales,
        made of a checkpoint of floats. None: as the checkpoint has them.
      kv_dtype: "int8" or "fp8": keys and values are stored as codes, with a scale for each head and
        entry; attention is XLA's then. None: in the type of the activations.
      matrix_dtype: of matrices that are no codes: as `dtype`, or "bfloat16" under activations of
        float32 (on CPUs; products are as precise as in float32, `bfloat16`, weights of other types
        are rounded). None: as `dtype` if that is given, else bfloat16 where a checkpoint of floats
        stores that and the CPU multiplies it quickly, which halves what is held and read.
      progress: show bars on standard error; None: if it is a terminal.

    Raises:
      ValueError: no model there, a bad partition (or no "tuned" one) or layout, codes of another
        kind, or more than the devices hold; nothing is allocated then. Or a part's bytes are not
        those that were written.
      OSError: a file cannot be read, or a model not be fetched.
    """
    options: dict[str, Any] = dict(mesh=mesh, dtype=dtype, layout=layout, attention=attention)
    options |= {"kv_dtype": kv_dtype, "matrix_dtype": matrix_dtype}
    tuned = isinstance(group_size, str) and group_size == TUNED
    local = pathlib.Path(path)
    if local.exists() and not (local / METADATA_FILE).is_file():  # to be converted, for minutes
        groups: Any = 1 if tuned else group_size
        source, about = read_config(local)
        options["quantization"] = checkpoint.agreed_quantization(about, quantization, local)
        abstract_model(source, group_size=groups, **options)
    folder = find_checkpoint(path, progress=progress).absolute()
    config, metadata = checkpoint.read_metadata(folder)
    codes = checkpoint.stored_quantization(metadata)
    options["quantization"] = checkpoint.agreed_quantization(metadata, quantization, folder)
    if tuned:
        group_size = checkpoint.read_partition(folder, config.num_layers, metadata["weights"])
    checkpoint.check_whole(folder, config, metadata["parts"])
    if metadata["dtype"] == "float64" and not jax.config.read("jax_enable_x64"):
        raise ValueError(f"{folder} holds float64: set jax_enable_x64 to load it")
    options |= {"group_size": group_size, "stored": jnp.dtype(metadata["dtype"])}
    with checkpoint.reading(folder, metadata["parts"], progress) as part:
        model = _build(config, part, stored_codes=codes, **options)
    return model.replace(tokenizer=metadata["tokenizer"])


def abstract_model(
    config: ModelConfig,
    mesh: Mesh | None = None,
    *,
    group_size: int | Sequence[int] = 1,
    dtype: Any = None,
    layout: str | LayoutRules | None = None,
    attention: str = "auto",
    quantization: str | Quantization | None = None,
    kv_dtype: str | None = None,
    matrix_dtype: Any = None,
    stored: Any = None,
) -> Model:
    """A model whose weights are shapes and shardings alone, to plan with: `Decoder.memory`,
    `program.collectives.collectives`; arguments as in `load_model`.

    Args:
      stored: type of the floats of the checkpoint that it stands for; None: the model's.
    """
    mesh = mesh if mesh is not None else make_mesh()
    if set(mesh.axis_names) != {LAYER, TENSOR}:
        raise ValueError(f"a mesh from make_mesh is needed, got one of axes {mesh.axis_names}")
    partition = make_partition(config.num_layers, group_size)
    rules = layout_rules(layout, partition)
    if matrix_dtype is None and (dtype is not None or quantization is not None):
        stored = None  # as they were asked for; or rounded as their codes are, and no further
    if dtype is None:
        dtype = jnp.float32 if platform_of(mesh) == "cpu" else jnp.bfloat16
    dtype = _float_type(dtype)
    if kv_dtype is not None and kv_dtype not in KV_CODES:
        names = " or ".join(f'"{name}"' for name in KV_CODES)
        raise ValueError(f"kv_dtype must be {names}, got {kv_dtype!r}")
    matrices = matrix_type(mesh, matrix_dtype, dtype, stored)
    placed = dataclasses.replace(
        make_layout(config, mesh, rules),
        attention=attention_on(mesh, attention, config, dtype, codes=kv_dtype),
        kv_codes=kv_dtype,
        bf16_matrices=matrices != dtype,
    )
    how = Quantization.of(quantization)
    if how is not None and placed.bf16_matrices:
        raise ValueError("matrix_dtype is of matrices of floats: these are rounded to codes")
    codes = _kept(how, config, placed)
    params = _abstract_params(config, placed, partition, dtype, codes)
    return Model(
        params=params, config=config, layout=placed, partition=partition, quantization=codes
    )


def random_model(
    config: ModelConfig,
    mesh: Mesh | None = None,
    *,
    group_size: int | Sequence[int] = 1,
    dtype: Any = None,
    layout: str | LayoutRules | None = None,
    attention: str = "auto",
    quantization: str | Quantization | None = None,
    kv_dtype: str | None = None,
    matrix_dtype: Any = None,
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

    options: dict[str, Any] = dict(
        mesh=mesh, group_size=group_size, dtype=dtype, layout=layout, attention=attention
    )
    options |= {"quantization": quantization, "kv_dtype": kv_dtype, "matrix_dtype": matrix_dtype}
    return _build(config, part, **options)


def quantize_model(model: Model, quantization: str | Quantization) -> Model:
    """The model with its matrices rounded to codes, on the same devices and in the same groups.

    Args:
      model: loaded, not changed.
      quantization: as in `load_model`.

    Raises:
      ValueError: no such kind, groups that do not divide a matrix's inputs, or a model that holds
        codes already.
    """
    how = Quantization.of(quantization)
    if model.quantization is not None:
        raise ValueError("the model's matrices are codes already: load it from floats")
    config, old = model.config, model.layout
    layout = dataclasses.replace(old, bf16_matrices=False)
    codes = _kept(how, config, layout)
    tell_of_floats(how, codes)
    params = _abstract_params(config, layout, model.partition, model.dtype, codes)
    held = {"weights as they are": device_bytes(model.params)}
    check_memory(layout.mesh, {"weights": device_bytes(params)}, held)
    blocks = []
    separate = jax.jit(functools.partial(weights.separate_block, layout=old))
    for block in model.params.blocks:
        arrange = _jit_arrange(len(block.mlp), config, layout, model.dtype, how, codes)
        blocks.append(arrange(separate(block)))
    separate = jax.jit(functools.partial(weights.separate_top, layout=old))
    top = separate(model.params.replace(blocks=()))
    top = _jit_arrange_top(config, layout, model.dtype, how, codes)(top)
    params = weights.Params(blocks=tuple(blocks), **top)
    return model.replace(params=params, layout=layout, quantization=codes)


def save_model(model: Model, path: str | os.PathLike, like: str | os.PathLike) -> None:
    """Write a model, from whatever mesh and groups it is in, as a checkpoint for any other.

    Args:
      path: a folder that does not exist yet; it appears when all is written.
      like: the checkpoint whose configuration and tokenizer it takes. Floats are written in the
        model's own type: matrices that are kept in bfloat16 under float32 become float32.

    Raises:
      ValueError: `like` is no checkpoint, or one of other dimensions; several processes.
      FileExistsError: there is something at `path`.
    """
    config, metadata = checkpoint.read_metadata(like)
    if config != model.config:
        raise ValueError(f"{like} is of another model: its configuration is not this model's")
    tokenizer = metadata["tokenizer"]
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
        floats = dataclasses.replace(model.layout, bf16_matrices=False)  # one type in a checkpoint
        how = (config, floats, model.dtype, None, model.quantization)

        @jax.jit
        def separate(block: weights.Block) -> list[dict[str, Any]]:
            layers = weights.separate_block(block, model.layout)
            return [made(layer, *how) for layer in layers]

        parts: dict[str, str] = {}
        for block in model.params.blocks:
            for layer in jax.device_get(separate(block)):
                name = layer_name(len(parts))
                parts[name] = checkpoint.save_part(folder, name, layer)
        top = jax.jit(lambda params: made(weights.separate_top(params, model.layout), *how))(
            model.params.replace(blocks=())
        )
        top = jax.device_get(top)
        parts[TOP_PART] = checkpoint.save_part(folder, TOP_PART, top)
        metadata = checkpoint.make_metadata(model.dtype.name, tokenizer, parts, model.quantization)
        write_object(folder / METADATA_FILE, metadata)
        os.rename(folder, target)


def _build(
    config: ModelConfig,
    part: Callable,
    *,
    stored: Any = None,
    stored_codes: Quantization | None = None,
    quantization: str | Quantization | None = None,
    **options: Any,
) -> Model:
    """A model from `part(name, abstract arrays)`, which brings one part of a checkpoint; block by
    block.

    Args:
      stored: type of the floats of the parts; None: the model's.
      stored_codes: how the matrices of the parts are stored, where they are codes.
      quantization: how the model's matrices are to be rounded.
      options: of `abstract_model`.
    """
    how = Quantization.of(quantization)
    model = abstract_model(config, quantization=how, stored=stored, **options)
    placed, dtype, codes = model.layout, model.dtype, model.quantization
    tell_of_floats(how, codes)
    layer = _abstract(weights.LAYER_WEIGHTS, config, stored or dtype, placed, stored_codes)
    top = _abstract(weights.TOP_WEIGHTS, config, stored or dtype, placed, stored_codes)
    reading = max(max(model.partition) * device_bytes(layer), device_bytes(top))
    check_memory(placed.mesh, {"weights": device_bytes(model.params), "reading": reading})
    blocks, first = [], 0
    for size in model.partition:
        layers = [part(layer_name(i), layer) for i in range(first, first + size)]
        blocks.append(_jit_arrange(size, config, placed, dtype, how, codes)(layers))
        first += size
    arranged = _jit_arrange_top(config, placed, dtype, how, codes)(part(TOP_PART, top))
    return model.replace(params=weights.Params(blocks=tuple(blocks), **arranged))


def _kept(how: Quantization | None, config: ModelConfig, layout: Layout) -> Quantization | None:
    """What devices hold of it: None where weights are rounded and kept as floats.

    Raises:
      ValueError: its groups do not divide the inputs of a matrix.
    """
    if how is None:
        return None
    weights.check_groups(config, how)
    keep = layout.for_gpu if how.keep_codes is None else how.keep_codes
    return how if keep else None


def tell_of_floats(how: Quantization | None, codes: Quantization | None) -> None:
    """One line where codes were asked for, or are stored, and a CPU keeps floats."""
    if how is not None and codes is None and how.keep_codes is None:
        logger.warning("%s weights are rounded and kept as floats: CPUs multiply those", how.kind)


def made(
    part: dict[str, Any],
    config: ModelConfig,
    layout: Layout,
    dtype: Any,
    how: Quantization | None,
    codes: Quantization | None,
) -> dict[str, Any]:
    """A part of a checkpoint as a model has its numbers: floats of `dtype`, matrices in the type
    of its layout or rounded as `how` says, and kept as codes where there are `codes`.
    """
    rounded, matrices = weights.quantised(part, config, how), layout.matrix_dtype(dtype)

    def kept(name: str, x: Any) -> Any:
        return as_kept(x, matrices if weights.is_matrix(name) else dtype, codes)

    return {name: kept(name, x) for name, x in rounded.items()}


def as_kept(x: Any, dtype: Any, codes: Quantization | None) -> Any:
    """A weight as a model of this type has it: floats, or codes where it keeps any."""
    if not isinstance(x, Quantized):
        return x.astype(dtype)
    if codes is None:
        return dequantise(x).astype(dtype)
    if x.group is None and codes.scale_dtype is None:  # scales of outputs: as the model is
        return x.replace(scales=x.scales.astype(wide_type(dtype)))
    return x


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
    table: Sequence[weights.Weight],
    config: ModelConfig,
    dtype: Any,
    layout: Layout,
    codes: Quantization | None = None,
) -> dict[str, Any]:
    """The arrays of a part as it is read, split as finely as `layout` and its mesh allow."""

    def quantised(part):
        return weights.quantised(part, config, codes)

    found: dict[str, Any] = {}
    for name, weight in weights.present(table, config).items():
        shape = weight.shape(config)
        finest = layout.finest(weight.dims, shape)
        whole = jax.ShapeDtypeStruct(shape, dtype, sharding=finest)
        shapes = jax.eval_shape(quantised, {name: whole})[name]
        where = weights.placed_as(weight, shapes, finest, layout)
        found[name] = jax.tree.map(lambda x, at: x.update(sharding=at), shapes, where)
    return found


def _abstract_params(
    config: ModelConfig,
    layout: Layout,
    partition: tuple[int, ...],
    dtype: Any,
    codes: Quantization | None,
) -> weights.Params:
    """Shapes and shardings of a model's weights, as ShapeDtypeStructs; nothing is allocated."""
    layer = _abstract(weights.LAYER_WEIGHTS, config, dtype, layout, codes)
    how = (config, layout, dtype, None, codes)
    arrange = functools.partial(_arranged, how=how)
    blocks = {size: jax.eval_shape(arrange, [layer] * size) for size in set(partition)}
    top = _abstract(weights.TOP_WEIGHTS, config, dtype, layout, codes)
    top = jax.eval_shape(functools.partial(_arranged_top, how=how), top)
    shapes = weights.Params(blocks=tuple(blocks[size] for size in partition), **top)
    shardings = _named(weights.specs(config, layout, partition, codes), layout.mesh)
    return jax.tree.map(
        lambda s, sharding: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=sharding),
        shapes,
        shardings,
    )


@functools.cache
def _jit_arrange(size, config, layout, dtype, how, codes):
    """One jitted `arrange_block` per block size, so that equal blocks compile once."""
    (block,) = weights.specs(config, layout, (size,), codes).blocks
    arrange = functools.partial(_arranged, how=(config, layout, dtype, how, codes))
    return jax.jit(arrange, out_shardings=_named(block, layout.mesh))


def _jit_arrange_top(config, layout, dtype, how, codes):
    """A jitted `arrange_top`."""
    specs = weights.specs(config, layout, (), codes)
    fields = {name: getattr(specs, name) for name in ("embed", "final_norm", "lm_head")}
    arrange = functools.partial(_arranged_top, how=(config, layout, dtype, how, codes))
    return jax.jit(arrange, out_shardings=_named(fields, layout.mesh))


def _arranged(layers, how):
    """`arrange_block` of layers as a model has them; `how`: arguments of `made` behind a part."""
    return weights.arrange_block([made(layer, *how) for layer in layers], layout=how[1])


def _arranged_top(top, how):
    """`arrange_top` of the same."""
    return weights.arrange_top(made(top, *how), how[1])


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

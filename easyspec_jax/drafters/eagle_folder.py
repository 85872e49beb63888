"""EAGLE-3 heads as others write them: config.json and model.safetensors, or its shards.

SafeAILab and SpecForge call the layer `midlayer`, NeMo `layers.0`; "speculators" nests the layer's
configuration. All are read into one description, and whatever does not fit the base is refused
before a value is read.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from easyspec_jax import weights
from easyspec_jax.config import ModelConfig, is_integer
from easyspec_jax.drafters.eagle_head import EagleHead
from easyspec_jax.hf_config import config_from_hf
from easyspec_jax.json_files import read_object
from easyspec_jax.loading import abstract_model, as_kept, made, tell_of_floats
from easyspec_jax.memory import check_memory, device_bytes
from easyspec_jax.model import Model
from easyspec_jax.quantized import Quantization, look_up, quantise, wide_type
from easyspec_jax.sharding import specs_of

# What a head's config.json says beside what a model's does.
OWN_KEYS = frozenset(
    """
    draft_vocab_size target_hidden_size eagle_config eagle_aux_hidden_state_layer_ids
    norm_before_residual norm_before_fc norm_output fc_norm transformer_layer_config
    embed_requires_grad ttt_steps auto_map modelopt_version
    speculators_config speculators_model_type speculators_version
    """.split()
)
LAYERS = ("midlayer.", "layers.0.")
EMBEDDING, HEAD = "embed_tokens.weight", "lm_head.weight"
FLOATS = {"F64": jnp.float64, "F32": jnp.float32, "F16": jnp.float16, "BF16": jnp.bfloat16}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Description:
    """What a head's config.json says."""

    config: ModelConfig  # of its layer and head; vocab_size counts the ids that it knows, V'
    vocab_size: int  # V of its base
    base_dim: int  # D' of its base
    taps: tuple[int, ...]
    flags: dict[str, bool]  # fields of `EagleHead`
    norm_before_fc: bool

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of all tensors that it must have, [out, in]."""
        c = self.config
        d, inputs = c.embed_dim, len(self.taps) * self.base_dim
        shapes: dict[str, tuple[int, ...]] = {
            "fc.weight": (d, inputs),
            "norm.weight": (d,),
            "layer.hidden_norm.weight": (d,),
        }
        for weight in weights.present(weights.LAYER_WEIGHTS, c).values():
            out, *rest = weight.hf_shape(c)
            if weight.name in ("wq", "wk", "wv"):
                rest = [2 * d]
            shapes[f"layer.{weight.hf}"] = (out, *rest)
        if self.norm_before_fc:
            shapes["input_norm.weight"] = (inputs,)
        return shapes

    def optional(self) -> dict[str, tuple[int, ...]]:
        """Of those that it may have."""
        d = self.config.embed_dim
        return {
            HEAD: (self.config.vocab_size, d),
            EMBEDDING: (self.vocab_size, d),
            "embed_residual.weight": (d, d),
            "d2t": (self.config.vocab_size,),
            "t2d": (self.vocab_size,),
        }


def load_head(
    folder: str | os.PathLike,
    base: Model,
    *,
    dtype: Any,
    layout: Any,
    quantization: str | Quantization | None,
) -> EagleHead:
    """A head on its base's mesh; arguments and errors as of `EagleDrafter.load`."""
    how = Quantization.of(quantization)
    if how is not None:
        how = dataclasses.replace(how, embed=how.lm_head)  # what it looks up is its base's table
    if not isinstance(base, Model):
        raise ValueError(f"a head is loaded for a base, got {type(base).__name__}")
    path = pathlib.Path(folder)
    if not path.is_dir():
        raise ValueError(f"{path} is no folder: a head is one with config.json and its weights")
    about = describe(read_object(path / "config.json"), base)
    with contextlib.ExitStack() as stack:
        slices = open_tensors(path, stack)
        check_tensors(path, about, slices, base)
        ids = target_ids(slices["d2t"][:], about.vocab_size) if "d2t" in slices else None
        slices = {name: x for name, x in slices.items() if name not in ("d2t", "t2d")}
        own = EMBEDDING in slices
        half = base.layout.bf16_matrices and dtype is None and how is None
        dtype = base.dtype if dtype is None else dtype
        model, table = prototypes(about, base, own, dtype, layout, how, half)
        known: dict[str, Any] = dict(about=about, model=model, table=table, own=own, how=how)
        build = functools.partial(assemble, **known, rows_first=base.layout.outputs_first)
        shapes = {name: stored_as(x) for name, x in slices.items()}
        rows = None if HEAD in slices else base.params.lm_head
        head = jax.eval_shape(build, shapes, ids, rows)
        where = jax.tree.map(lambda spec: NamedSharding(base.layout.mesh, spec), specs_of(head))
        head = jax.tree.map(lambda x, at: x.update(sharding=at), head, where)
        tell_of_floats(how, model.quantization)
        if not isinstance(base.params.final_norm, jax.ShapeDtypeStruct):  # else to plan with
            needed = {"head weights": device_bytes(head), "reading": device_bytes(shapes)}
            check_memory(base.layout.mesh, needed)
            tensors = {name: read(path, name, x) for name, x in slices.items()}
            head = jax.jit(build, out_shardings=where)(tensors, ids, rows)
        return head if own else head.replace(embedding=table)


def describe(raw: dict[str, Any], base: Model) -> Description:
    """What a head's config.json says, for this base.

    Raises:
      ValueError: it is of no EAGLE-3 head, of one with other arithmetic, or of another base.
    """
    nested = "speculators_model_type" in raw
    if nested and raw["speculators_model_type"] != "eagle3":
        raise ValueError(
            f"the head is of kind {raw['speculators_model_type']!r}: only 'eagle3' is read"
        )
    layer = raw.get("transformer_layer_config") if nested else raw
    eagle = raw.get("eagle_config") or {}
    if not isinstance(layer, dict) or not isinstance(eagle, dict):
        name = "eagle_config" if isinstance(layer, dict) else "transformer_layer_config"
        raise ValueError(f"the head's config.json: {name} is no object")
    said = eagle | {name: raw[name] for name in OWN_KEYS & raw.keys() if raw[name] is not None}
    if nested and "norm_before_residual" not in said:
        raise ValueError("the head's config.json lacks norm_before_residual, which has no default")
    names = ("norm_before_residual", "norm_output", "norm_before_fc", "fc_norm")
    flags = {name: bool(said.get(name, False)) for name in names}
    if flags.pop("fc_norm"):
        raise ValueError("the head norms every tap by itself (fc_norm), which is not supported")
    if said.get("use_aux_hidden_state") is False:
        raise ValueError("the head takes the base's last hidden state alone: it is no EAGLE-3 head")
    layer = {name: value for name, value in layer.items() if name not in OWN_KEYS}
    if layer.get("num_hidden_layers", 1) != 1:
        raise ValueError(f"a head has one layer, this one {layer['num_hidden_layers']}")
    vocab_size = layer.get("vocab_size")
    layer |= {
        "model_type": layer.get("model_type") or "llama",
        "num_hidden_layers": 1,
        "layer_types": None,
        "tie_word_embeddings": True,  # its table of embeddings stands apart
        "vocab_size": said.get("draft_vocab_size", vocab_size),
    }
    try:
        config = config_from_hf(layer)
    except ValueError as error:
        raise ValueError(f"the head's config.json: {error}") from None
    about = Description(
        config=config,
        vocab_size=base.config.vocab_size if vocab_size is None else vocab_size,
        base_dim=said.get("target_hidden_size", config.embed_dim),
        taps=taps_of(raw, eagle, base.config.num_layers),
        norm_before_fc=flags.pop("norm_before_fc"),
        flags=flags,
    )
    for name, ours, theirs in (
        ("width", about.base_dim, base.config.embed_dim),
        ("vocabulary", about.vocab_size, base.config.vocab_size),
    ):
        if ours != theirs:
            raise ValueError(
                f"the head is of another base: it was trained for a {name} of {ours}, this base "
                f"has {theirs}"
            )
    return about


def default_taps(num_layers: int) -> tuple[int, ...]:
    """Before which layers the published heads tap a base of so many."""
    return 2, num_layers // 2, num_layers - 3


def taps_of(raw: dict[str, Any], eagle: dict[str, Any], num_layers: int) -> tuple[int, ...]:
    """Where a head taps a base of so many layers.

    Raises:
      ValueError: numbers that the base has not.
    """
    key = "eagle_aux_hidden_state_layer_ids"
    # Within eagle_config layers are those whose output is taken, elsewhere whose input.
    taps, shift = (raw[key], 0) if raw.get(key) else (eagle.get(key), 1)
    if not taps:
        taps, shift = [*default_taps(num_layers)], 0
    known = isinstance(taps, list) and all(map(is_integer, taps))
    if not known or not all(0 <= tap + shift <= num_layers for tap in taps):
        raise ValueError(
            f"the head taps layers {taps!r} of its base, but this one has {num_layers}"
        )
    return tuple(tap + shift for tap in taps)


def open_tensors(folder: pathlib.Path, stack: contextlib.ExitStack) -> dict[str, Any]:
    """Slices of all tensors by one name for all formats; those of the layer begin with "layer.".

    Raises:
      ValueError: no safetensors file, or a name that stands twice.
    """
    from convert import folder as folders

    found: dict[str, Any] = {}
    for stored, rows in folders.open_tensors(folder, stack).items():
        name = stored.removeprefix("model.")
        for prefix in LAYERS:
            if name.startswith(prefix):
                name = "layer." + name.removeprefix(prefix)
        if name.endswith("rotary_emb.inv_freq"):
            continue
        if name in found:
            raise ValueError(f"{folder} has {name.replace('layer.', LAYERS[0])} twice")
        found[name] = rows
    return found


def check_tensors(
    folder: pathlib.Path, about: Description, slices: Mapping[str, Any], base: Model
) -> None:
    """Refuse tensors that are no EAGLE-3 head of this description.

    Raises:
      ValueError: some are missing, unknown or misshapen; or ids or embeddings are.
    """
    needed, optional = about.shapes(), about.optional()
    shapes = {name: tuple(x.get_shape()) for name, x in slices.items()}
    missing = [name for name in needed if name not in shapes]
    if missing:
        raise ValueError(f"{folder} is no EAGLE-3 head: it lacks {', '.join(missing)}")
    unknown = sorted(shapes.keys() - needed.keys() - optional.keys())
    if unknown:
        raise ValueError(f"{folder} holds {unknown[0]}, which is no part of an EAGLE-3 head")
    for name, shape in shapes.items():
        wanted = (needed | optional)[name]
        if shape != wanted:
            raise ValueError(f"{folder}: {name} is {list(shape)} instead of {list(wanted)}")
        if name not in ("d2t", "t2d") and slices[name].get_dtype() not in FLOATS:
            raise ValueError(f"{folder}: {name} is of type {slices[name].get_dtype()}, no floats")
    if about.config.vocab_size != about.vocab_size and "d2t" not in shapes:
        raise ValueError(f"{folder} lacks d2t: what its {about.config.vocab_size} ids are")
    width = base.config.embed_dim
    for name in (EMBEDDING, HEAD):  # without one the base's is taken
        if name not in shapes and about.config.embed_dim != width:
            raise ValueError(
                f"{folder} lacks {name}, and the base's is {width} numbers wide where the head has "
                f"{about.config.embed_dim}"
            )


def target_ids(d2t: np.ndarray, vocab_size: int) -> np.ndarray:
    """What a head's ids are for the base, i32[V'], from what is to be added to each.

    Raises:
      ValueError: an id that the base has not, or one twice.
    """
    if d2t.dtype.kind not in "iu":
        raise ValueError(f"the head's d2t is of type {d2t.dtype}, no whole numbers")
    ids = np.arange(len(d2t), dtype=np.int64) + d2t.astype(np.int64)
    outside = ids[(ids < 0) | (ids >= vocab_size)]
    if outside.size:
        raise ValueError(
            f"the head's d2t names id {outside[0]}, outside the base's 0 .. {vocab_size - 1}"
        )
    if len(np.unique(ids)) < len(ids):
        raise ValueError("the head's d2t names an id twice: such a draft would not be lossless")
    return ids.astype(np.int32)


def read(folder: pathlib.Path, name: str, rows: Any) -> np.ndarray:
    """A tensor's values.

    Raises:
      ValueError: one is not finite.
    """
    values = rows[:]
    if not np.isfinite(values.astype(np.float32)).all():
        raise ValueError(f"{folder}: {name} holds values that are not finite")
    return values


def stored_as(rows: Any) -> jax.ShapeDtypeStruct:
    """The shape and type in which a device gets a tensor."""
    dtype = jax.dtypes.canonicalize_dtype(FLOATS[rows.get_dtype()])
    return jax.ShapeDtypeStruct(rows.get_shape(), dtype)


def prototypes(
    about: Description,
    base: Model,
    own: bool,
    dtype: Any,
    layout: Any,
    how: Quantization | None,
    half: bool,
) -> tuple[Model, Model]:
    """The models of a head and of its embedding, which is its own or the base's, as shapes; `half`:
    their matrices are bfloat16.
    """
    attention = "xla" if base.layout.attention == "xla" else "auto"  # its heads may be others
    options: dict[str, Any] = dict(dtype=dtype, layout=layout, attention=attention)
    options["kv_dtype"] = base.layout.kv_codes
    mesh = base.layout.mesh
    options["matrix_dtype"] = jnp.bfloat16 if half else dtype
    model = abstract_model(about.config, mesh, quantization=how, **options)
    table = base
    if own:
        wider = dataclasses.replace(about.config, vocab_size=about.vocab_size, tie_embeddings=False)
        table = abstract_model(wider, mesh, **options)
    head = None if table.params.embed is not None else table.params.lm_head
    params = table.params.replace(blocks=(), lm_head=head)
    return model, table.replace(params=params, partition=())


def assemble(
    tensors: dict[str, Any],
    ids: Any,
    rows: Any,
    *,
    about: Description,
    model: Model,
    table: Model,
    own: bool,
    how: Quantization | None,
    rows_first: bool,
) -> EagleHead:
    """A head of tensors as they are stored; without an embedding where it is the base's.

    Args:
      rows: the base's own head, where that is taken; `rows_first`: not its inputs.
      how: its matrices are rounded.
    """
    c, layout, dtype = about.config, model.layout, model.dtype
    matrices = layout.matrix_dtype(dtype)
    if rows is not None:
        tensors = tensors | {HEAD: rows_of(rows, ids, about, model, rows_first)}
    kept: dict[str, Any] = dict(
        config=c, layout=layout, dtype=dtype, how=how, codes=model.quantization
    )
    rounded = functools.partial(made, **kept)
    top = rounded({"embed": tensors[HEAD], "final_norm": tensors["norm.weight"]})
    top = weights.arrange_top(top, layout)
    layer = rounded(layer_of(tensors, c)) | {"attn_norm": None}

    def vector(name: str) -> Any:
        return tensors[name].astype(dtype) if name in tensors else None

    def matrix(name: str) -> Any:
        if name not in tensors:
            return None
        x = tensors[name]
        form = None if how is None else how.form(x.shape[1])
        x = as_kept(x if form is None else quantise(x, (1,), form), matrices, model.quantization)
        return x if layout.outputs_first else jax.tree.map(jnp.transpose, x)

    embedding: Any = None
    if own:
        own_rows = tensors[EMBEDDING].astype(table.layout.matrix_dtype(dtype))
        params = table.params.replace(embed=own_rows, final_norm=top["final_norm"])
        embedding = table.replace(params=params)
    blocks = (weights.arrange_block([layer], layout),)
    return EagleHead(
        model=model.replace(params=weights.Params(blocks=blocks, **top)),
        embedding=embedding,
        fc=matrix("fc.weight"),
        embed_norm=vector("layer.input_layernorm.weight"),
        hidden_norm=vector("layer.hidden_norm.weight"),
        taps_norm=vector("input_norm.weight"),
        embed_residual=matrix("embed_residual.weight"),
        ids=ids,
        taps=about.taps,
        **about.flags,
    )


def layer_of(tensors: Mapping[str, Any], config: ModelConfig) -> dict[str, Any]:
    """The weights of the layer as checkpoints have them, without the norm that it lacks."""
    found: dict[str, Any] = {}
    for weight in weights.present(weights.LAYER_WEIGHTS, config).values():
        x, shape = tensors[f"layer.{weight.hf}"], weight.shape(config)
        if weight.name in ("wq", "wk", "wv"):
            shape = (2 * config.embed_dim, *shape[1:])
        if weight.name != "attn_norm":
            found[weight.name] = (x.T if weight.num_inputs else x).reshape(shape)
    return found


def rows_of(rows: Any, ids: Any, about: Description, model: Model, rows_first: bool) -> jax.Array:
    """Those of the base's own head that this head knows, [V', D]; of codes as wide as their scales,
    to be rounded once.
    """
    taken = jnp.arange(about.vocab_size, dtype=jnp.int32) if ids is None else jnp.asarray(ids)
    return look_up(rows, taken[None], 0 if rows_first else 1, wide_type(model.dtype))[0]

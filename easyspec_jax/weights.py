"""Every weight of a model, described once: dimensions, initialiser, and what others call it.

A checkpoint holds the arrays of `LAYER_WEIGHTS` for every layer and those of `TOP_WEIGHTS` once,
matrices with their inputs first. A model runs on the same numbers arranged: queries, keys and
values in one matrix, gate and up in another, the layers of a group stacked. Shapes, splits over a
mesh, random weights, conversion, loading and saving all read the tables here, so a family with one
more norm is one more entry.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax

from easyspec_jax.config import ModelConfig
from easyspec_jax.quantized import Form, Quantization, Quantized, quantise
from easyspec_jax.sharding import Layout


@dataclasses.dataclass(frozen=True)
class Weight:
    """One array of a checkpoint."""

    name: str
    # Letters of its dimensions, those that a product sums over first: D embed, F mlp, V vocabulary,
    # K kv heads, G query heads of each, H head width.
    dims: str
    hf: str  # in transformers, behind `HF_PREFIX` where it is a layer's
    gguf: str  # in GGUF files, behind `GGUF_PREFIX`
    # How many of `dims` are inputs of a matrix, which others store transposed; 0: no matrix.
    num_inputs: int = 0
    # What a standard normal draw is multiplied by; None: a matrix keeps the size of its inputs,
    # and a norm is all ones.
    spread: float | None = None
    exists: Callable[[ModelConfig], bool] = lambda config: True

    def shape(self, config: ModelConfig) -> tuple[int, ...]:
        """Of the array in a checkpoint."""
        sizes = {
            "D": config.embed_dim,
            "F": config.mlp_dim,
            "V": config.vocab_size,
            "K": config.num_kv_heads,
            "G": config.num_groups,
            "H": config.head_dim,
        }
        return tuple(sizes[letter] for letter in self.dims)

    @property
    def inputs(self) -> str:
        """Letters that a product sums over, or of what a row that is looked up holds; "": none."""
        return "D" if self.dims == "VD" else self.dims[: self.num_inputs]

    def matrix(self, config: ModelConfig) -> tuple[int, int]:
        """Inputs and outputs of a matrix."""
        shape = self.shape(config)
        return math.prod(shape[: self.num_inputs]), math.prod(shape[self.num_inputs :])

    def hf_shape(self, config: ModelConfig) -> tuple[int, ...]:
        """Of the tensor in transformers: matrices are [out, in], heads are joined."""
        if self.num_inputs:
            return self.matrix(config)[::-1]
        return self.shape(config) if self.dims == "VD" else (math.prod(self.shape(config)),)

    def scaled(self, draw: jax.Array) -> jax.Array:
        """A standard normal draw of its shape as random weights."""
        if self.spread is not None:
            return draw * self.spread
        if not self.num_inputs:
            return jnp.ones_like(draw)
        return draw * math.prod(draw.shape[: self.num_inputs]) ** -0.5


def _has_bias(config: ModelConfig) -> bool:
    return config.qkv_bias


def _has_qk_norm(config: ModelConfig) -> bool:
    return config.qk_norm


def _has_head(config: ModelConfig) -> bool:
    return not config.tie_embeddings


HF_PREFIX, GGUF_PREFIX = "model.layers.{}.", "blk.{}."
_BIAS: dict[str, Any] = {"spread": 0.02, "exists": _has_bias}

LAYER_WEIGHTS = (
    Weight("attn_norm", "D", "input_layernorm.weight", "attn_norm.weight"),
    Weight("wq", "DKGH", "self_attn.q_proj.weight", "attn_q.weight", 1),
    Weight("wk", "DKH", "self_attn.k_proj.weight", "attn_k.weight", 1),
    Weight("wv", "DKH", "self_attn.v_proj.weight", "attn_v.weight", 1),
    Weight("wo", "KGHD", "self_attn.o_proj.weight", "attn_output.weight", 3),
    Weight("bq", "KGH", "self_attn.q_proj.bias", "attn_q.bias", **_BIAS),
    Weight("bk", "KH", "self_attn.k_proj.bias", "attn_k.bias", **_BIAS),
    Weight("bv", "KH", "self_attn.v_proj.bias", "attn_v.bias", **_BIAS),
    Weight("q_norm", "H", "self_attn.q_norm.weight", "attn_q_norm.weight", exists=_has_qk_norm),
    Weight("k_norm", "H", "self_attn.k_norm.weight", "attn_k_norm.weight", exists=_has_qk_norm),
    Weight("mlp_norm", "D", "post_attention_layernorm.weight", "ffn_norm.weight"),
    Weight("w_gate", "DF", "mlp.gate_proj.weight", "ffn_gate.weight", 1),
    Weight("w_up", "DF", "mlp.up_proj.weight", "ffn_up.weight", 1),
    Weight("w_down", "FD", "mlp.down_proj.weight", "ffn_down.weight", 1),
)
EMBED = Weight("embed", "VD", "model.embed_tokens.weight", "token_embd.weight", spread=1.0)
HEAD = Weight("lm_head", "DV", "lm_head.weight", "output.weight", 1, exists=_has_head)
TOP_WEIGHTS = (EMBED, Weight("final_norm", "D", "model.norm.weight", "output_norm.weight"), HEAD)
# Letters of the arrays that a model runs with. E counts what is fused: key and value, gate and up;
# the G of "wqkv" and "bqkv" holds key and value too, where they are not apart.
ARRANGED = {
    **{"norm": "D", "wqkv": "DKGH", "wkv": "DKEH", "wo": "KGHD", "bqkv": "KGH", "bkv": "KEH"},
    **{"q_norm": "H", "k_norm": "H", "w_gate_up": "DEF", "w_down": "FD"},
    **{"embed": "VD", "final_norm": "D", "lm_head": "DV"},
}
# Matrices of a layout for GPUs, where a product of one row reads them once at any size if their
# outputs come first, and up to five times if not (XLA:GPU), or of bfloat16 ones on CPUs; of float32
# there the order above is faster.
OUTPUTS_FIRST = {
    **{"wqkv": "KGHD", "wkv": "KEHD", "wo": "DKGH"},
    **{"w_gate_up": "EFD", "w_down": "DF", "lm_head": "VD"},
}


# Letters of those that are inputs of a matrix; groups that share a scale lie along the last.
INPUTS = {
    **{"wqkv": "D", "wkv": "D", "wo": "KGH", "w_gate_up": "D", "w_down": "F"},
    **{"embed": "D", "lm_head": "D"},
}


def present(table: Iterable[Weight], config: ModelConfig) -> dict[str, Weight]:
    """The weights of a table that a model has, by name."""
    return {weight.name: weight for weight in table if weight.exists(config)}


def is_matrix(name: str) -> bool:
    """Whether a weight of a checkpoint, by name, is a matrix or a table of rows."""
    return any(weight.inputs for weight in (*LAYER_WEIGHTS, *TOP_WEIGHTS) if weight.name == name)


def arranged_dims(name: str, layout: Layout) -> str:
    """Letters of an array that a model of this layout runs with."""
    first = OUTPUTS_FIRST if layout.outputs_first else {}
    return first.get(name, ARRANGED[name])


def _ordered(part: dict[str, Any], layout: Layout, *, back: bool = False) -> dict[str, Any]:
    """Arrays in the order of `ARRANGED` in that of their layout; or `back`."""

    def turn(name: str, x: Any) -> Any:
        ours, theirs = ARRANGED[name], arranged_dims(name, layout)
        if x is None or ours == theirs:
            return x
        ours, theirs = (theirs, ours) if back else (ours, theirs)
        return _each(lambda a: jnp.transpose(a, [ours.index(letter) for letter in theirs]), x)

    return {name: turn(name, x) for name, x in part.items()}


class Attention(struct.PyTreeNode, kw_only=True):
    """Attention weights of one layer, or of one slot of a group with a leading axis over the mesh
    axis "layer".
    """

    # Dimensions are those of `ARRANGED`; with `outputs_first` as in `OUTPUTS_FIRST`.
    norm: Any  # [D]
    # [D, K, G + 2, H]: per kv head its queries, the key, the value; [D, K, G, H] beside a wkv
    wqkv: Any
    wo: Any  # [K, G, H, D]
    # [D, K, 2, H], apart only where devices share a kv head but not its query heads
    wkv: Any = None
    bqkv: Any = None  # as wqkv, without D
    bkv: Any = None  # as wkv, without D
    q_norm: Any = None  # [H]
    k_norm: Any = None  # [H]


class Mlp(struct.PyTreeNode, kw_only=True):
    """Gated MLP weights of one layer."""

    norm: Any  # [D]
    w_gate_up: Any  # [D, 2, F]
    w_down: Any  # [F, D]


class Block(struct.PyTreeNode, kw_only=True):
    """One layer, or a group of layers whose attentions may run at once.

    Layer j of a group is in slot j // n on device j % n of the mesh axis "layer" (n devices); a
    short last slot is padded with zero layers. Where n = 1 every layer is a slot of its own, not
    stacked.
    """

    attention: tuple[Attention, ...]  # one per slot
    mlp: tuple[Mlp, ...]  # one per layer


class Params(struct.PyTreeNode, kw_only=True):
    """All weights of a model, arranged for its layout."""

    embed: Any = None  # [V, D]; None when tied: the head is looked up
    blocks: tuple[Block, ...]
    final_norm: Any  # [D]
    lm_head: Any  # [D, V]


def form_of(
    name: str, inputs: str, config: ModelConfig, quantization: Quantization | None
) -> Form | None:
    """How a matrix of this name and these inputs is stored; None: as floats, like what has none.

    Raises:
      ValueError: its groups do not divide them.
    """
    if quantization is None or not inputs:
        return None
    size = {"D": config.embed_dim, "F": config.mlp_dim, "H": config.head_dim}[inputs[-1]]
    top = name if name in (EMBED.name, HEAD.name) else ""
    if top and config.tie_embeddings:
        top = EMBED.name
    return quantization.form(size, in_head=inputs[-1] == "H", top=top)


def check_groups(config: ModelConfig, quantization: Quantization | None) -> None:
    """Refuse groups that do not fit a model.

    Raises:
      ValueError: they do not divide the inputs of a matrix.
    """
    for name, inputs in INPUTS.items():
        form_of(name, inputs, config, quantization)


def scale_dims(dims: str, inputs: str, group: int | None) -> str:
    """Letters of the scales of a matrix in such groups; 1: one for all."""
    if group is not None:
        return dims
    return "".join("1" if letter in inputs else letter for letter in dims)


def quantised(
    part: dict[str, Any], config: ModelConfig, quantization: Quantization | None
) -> dict[str, Any]:
    """The arrays of a part of a checkpoint with the matrices that are floats as codes.

    Raises:
      ValueError: groups do not divide the inputs of one.
    """
    found = {}
    for weight in (*LAYER_WEIGHTS, *TOP_WEIGHTS):
        if weight.name not in part:
            continue
        w = part[weight.name]
        form = form_of(weight.name, weight.inputs, config, quantization)
        if form is not None and not isinstance(w, Quantized):
            w = quantise(w, tuple(map(weight.dims.index, weight.inputs)), form)
        found[weight.name] = w
    return found


def specs(
    config: ModelConfig,
    layout: Layout,
    partition: tuple[int, ...],
    quantization: Quantization | None = None,
) -> Params:
    """The PartitionSpec of every array of a model of these groups."""

    def split(names: Iterable[str], lead: str = "") -> dict[str, Any]:
        found: dict[str, Any] = {}
        for name in names:
            dims, inputs = lead + arranged_dims(name, layout), INPUTS.get(name, "")
            found[name] = layout.spec(dims)
            form = form_of(name, inputs, config, quantization)
            if form is not None:
                scales = layout.spec(scale_dims(dims, inputs, form.group))
                minima = None if form.minimum_dtype is None else scales
                found[name] = Quantized(found[name], scales, minima, form.group)
        return found

    def block(size: int) -> Block:
        names = ["norm", "wqkv", "wo"] + ["wkv"] * bool(layout.query)
        if config.qkv_bias:
            names += ["bqkv"] + ["bkv"] * bool(layout.query)
        if config.qk_norm:
            names += ["q_norm", "k_norm"]
        stacked = layout.stacks(size)
        attention = Attention(**split(names, "L" if stacked else ""))
        mlp = Mlp(**split(("norm", "w_gate_up", "w_down")))
        return Block(attention=(attention,) * layout.num_slots(size), mlp=(mlp,) * size)

    names = ["final_norm", "lm_head"] + ["embed"] * (not config.tie_embeddings)
    return Params(blocks=tuple(block(size) for size in partition), **split(names))


def placed_as(weight: Weight, x: Any, codes: Any, layout: Layout) -> Any:
    """Where a weight as checkpoints hold it lies: an array or codes at `codes`, scales and minima
    whole along F, as groups along it need not divide among devices.
    """
    if not isinstance(x, Quantized):
        return codes
    dims = scale_dims(weight.dims, weight.inputs, x.group).replace("F", "1")
    scales = layout.named(dims)
    return x.replace(codes=codes, scales=scales, minima=None if x.minima is None else scales)


def _each(fn: Callable[..., Any], *parts: Any) -> Any:
    """`fn` of arrays, or of codes, scales and minima: an operation on axes that all have."""
    return jax.tree.map(fn, *parts)


def arrange_block(layers: list[dict[str, Any]], layout: Layout) -> Block:
    """The layers of one block as checkpoints hold them, fused and, in a group over the axis
    "layer", stacked by slot.
    """
    n = layout.group_devices
    stacked = layout.stacks(len(layers))
    if stacked:
        # From parts as they were read to whole layers: the compiler finds no short way by itself.
        layers = [{name: _placed(name, x, layout) for name, x in layer.items()} for layer in layers]
    attentions = [_arrange_attention(layer, layout) for layer in layers]
    if stacked:
        nothing = jax.tree.map(jnp.zeros_like, attentions[0])
        attentions += [nothing] * (-len(layers) % n)
        attentions = [
            jax.tree.map(lambda *leaves: jnp.stack(leaves), *attentions[i : i + n])
            for i in range(0, len(attentions), n)
        ]
    return Block(
        attention=tuple(attentions), mlp=tuple(_arrange_mlp(layer, layout) for layer in layers)
    )


def _placed(name: str, x: Any, layout: Layout) -> Any:
    """A weight of a layer on the devices that need its parts."""
    weight = next(weight for weight in LAYER_WEIGHTS if weight.name == name)
    where = placed_as(weight, x, layout.named(weight.dims), layout)
    return lax.with_sharding_constraint(x, where)


def _arrange_mlp(layer: dict[str, Any], layout: Layout) -> Mlp:
    w_gate_up = _each(lambda *a: jnp.stack(a, axis=1), layer["w_gate"], layer["w_up"])
    w_down = pad_mlp(layer["w_down"], 0, layout)
    matrices = {"w_gate_up": pad_mlp(w_gate_up, 2, layout), "w_down": w_down}
    return Mlp(norm=layer["mlp_norm"], **_ordered(matrices, layout))


def _arrange_attention(layer: dict[str, Any], layout: Layout) -> Attention:
    """One layer's; where devices share a kv head, keys and values stay apart from queries."""
    apart = bool(layout.query)

    def fuse(q: str, k: str, v: str) -> tuple[Any, Any]:  # [..., K, G, H], [..., K, H] twice
        if q not in layer:
            return None, None
        kv = [_each(lambda a: jnp.expand_dims(a, -2), layer[name]) for name in (k, v)]
        join = lambda *a: jnp.concatenate(a, axis=-2)  # noqa: E731
        if apart:
            return layer[q], _each(join, *kv)
        return _each(join, layer[q], *kv), None

    wqkv, wkv = fuse("wq", "wk", "wv")
    bqkv, bkv = fuse("bq", "bk", "bv")
    return Attention(
        norm=layer["attn_norm"],
        **_ordered({"wqkv": wqkv, "wo": layer["wo"], "wkv": wkv}, layout),
        bqkv=bqkv,
        bkv=bkv,
        q_norm=layer.get("q_norm"),
        k_norm=layer.get("k_norm"),
    )


def separate_block(block: Block, layout: Layout) -> list[dict[str, Any]]:
    """The layers of a block as checkpoints hold them: `arrange_block` undone."""
    n, stacked = layout.group_devices, layout.stacks(len(block.mlp))
    layers = []
    for j, mlp in enumerate(block.mlp):
        one = block.attention[j // n if stacked else j]
        if stacked:
            one = jax.tree.map(lambda leaf, j=j: leaf[j % n], one)
        layers.append(_separate_attention(one, layout) | _separate_mlp(mlp, layout))
    return layers


def _separate_mlp(w: Mlp, layout: Layout) -> dict[str, Any]:
    found = _ordered({"w_gate_up": w.w_gate_up, "w_down": w.w_down}, layout, back=True)
    gate_up = pad_mlp(found["w_gate_up"], 2, layout, back=True)
    w_down = pad_mlp(found["w_down"], 0, layout, back=True)
    gate, up = (_each(lambda a, i=i: a[:, i], gate_up) for i in (0, 1))
    return {"mlp_norm": w.norm, "w_gate": gate, "w_up": up, "w_down": w_down}


def pad_mlp(x: Any, axis: int, layout: Layout, *, back: bool = False) -> Any:
    """A matrix with zeros behind every device's share of an axis of F; or `back` without.

    Where inputs lie along the axis (0), groups that share a scale become as small as the shares
    ask for, with the same scales. A padded weight may be a minimum: what it is multiplied by is 0.
    """
    if not isinstance(x, Quantized):
        return _padded(x, axis, layout, layout.mlp_padding, back=back)
    group = x.group if axis == 0 else 1

    def shared(scales: Any) -> Any:
        if group is None:
            return scales
        padded = x.codes.shape[axis] // layout.devices_along(layout.mlp)
        own = padded - layout.mlp_padding if back else padded
        part = math.gcd(group, own, layout.mlp_padding)
        if not back:
            scales = jnp.repeat(scales, group // part, axis)
        scales = _padded(scales, axis, layout, layout.mlp_padding // part, back=back)
        return lax.slice_in_dim(scales, 0, None, group // part, axis) if back else scales

    codes = _padded(x.codes, axis, layout, layout.mlp_padding, back=back)
    return x.replace(codes=codes, scales=shared(x.scales), minima=_each(shared, x.minima))


def _padded(x: Any, axis: int, layout: Layout, padding: int, *, back: bool) -> Any:
    """An array with so many zeros behind each share; or `back` without."""
    if not padding:
        return x
    n = layout.devices_along(layout.mlp)
    shares = x.reshape(*x.shape[:axis], n, -1, *x.shape[axis + 1 :])
    if back:
        own = shares.shape[axis + 1] - padding
        shares = lax.slice_in_dim(shares, 0, own, axis=axis + 1)
    else:
        widths = [(0, padding if i == axis + 1 else 0) for i in range(shares.ndim)]
        shares = jnp.pad(shares, widths)
    return shares.reshape(*x.shape[:axis], -1, *x.shape[axis + 1 :])


def _separate_attention(w: Attention, layout: Layout) -> dict[str, Any]:
    w = w.replace(**_ordered({"wqkv": w.wqkv, "wkv": w.wkv, "wo": w.wo}, layout, back=True))

    def split(heads, apart):
        """Queries [..., K, G, H], keys and values [..., K, H]."""
        q, kv = heads, apart
        if apart is None:
            q, kv = (
                _each(lambda a, i=i: a[..., i, :], heads) for i in (slice(-2), slice(-2, None))
            )
        return q, *(_each(lambda a, i=i: a[..., i, :], kv) for i in (0, 1))

    layer = {"attn_norm": w.norm, "wo": w.wo, "q_norm": w.q_norm, "k_norm": w.k_norm}
    layer |= dict(zip(("wq", "wk", "wv"), split(w.wqkv, w.wkv), strict=True))
    if w.bqkv is not None:
        layer |= dict(zip(("bq", "bk", "bv"), split(w.bqkv, w.bkv), strict=True))
    return {name: array for name, array in layer.items() if array is not None}


def arrange_top(top: dict[str, Any], layout: Layout) -> dict[str, Any]:
    """What stands outside the layers, as fields of `Params`."""
    head = top["lm_head"] if "lm_head" in top else _each(jnp.transpose, top["embed"])
    embed = top["embed"] if "lm_head" in top else None
    found = {"embed": embed, "final_norm": top["final_norm"], "lm_head": head}
    return _ordered(found, layout)


def separate_top(params: Params, layout: Layout) -> dict[str, Any]:
    """The same as checkpoints hold it: `arrange_top` undone."""
    top = _ordered({"lm_head": params.lm_head}, layout, back=True)
    top["final_norm"] = params.final_norm
    if params.embed is None:
        return {"embed": _each(jnp.transpose, top.pop("lm_head"))} | top
    return {"embed": params.embed} | top

"""Where every array lives: the mesh, and which mesh axes split which dimension of a model.

`LayoutRules` say what a user wants of any model, a `Layout` what that comes to for one model on one
mesh; both are frozen values. Model code runs on local shards inside one `shard_map` and asks the
layout only for the axes to sum over, so one device (no axes at all) and any mesh share every line.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import logging
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from easyspec_jax.config import ModelConfig, is_integer

logger = logging.getLogger("easyspec_jax")

LAYER, TENSOR = "layer", "tensor"
# XLA:GPU splits the sum of a product of few rows, and first copies weights that its parts do not
# divide; what is a multiple of this they divide.
GPU_TILE = 64


def make_mesh(layer: int = 1, tensor: int | None = None) -> Mesh:
    """A ("layer", "tensor") mesh over the first layer x tensor devices; `tensor=None` takes all
    that `layer` leaves.

    Raises:
      ValueError: an axis that is no whole number above 0, more devices asked for than there are, or
        a process that none of them belongs to.
    """
    devices = jax.devices()
    for name, size in (("layer", layer), ("tensor", tensor)):
        if size is not None and not is_integer(size):
            raise ValueError(f"mesh axis {name} must be a whole number of devices, got {size!r}")
    if layer < 1 or (tensor is not None and tensor < 1):
        raise ValueError(f"mesh axes must be at least 1, got layer={layer}, tensor={tensor}")
    if tensor is None:
        tensor = max(len(devices) // layer, 1)
    if layer * tensor > len(devices):
        raise ValueError(
            f"a mesh of layer={layer} x tensor={tensor} "
            f"needs {layer * tensor} devices, but there are {len(devices)}"
        )
    chosen = devices[: layer * tensor]
    idle = {d.process_index for d in devices} - {d.process_index for d in chosen}
    if idle:
        raise ValueError(
            f"a mesh of layer={layer} x tensor={tensor} leaves process {min(idle)} without a "
            "device: start fewer processes, or use more devices"
        )
    grid = np.asarray(chosen).reshape(layer, tensor)
    return Mesh(grid, (LAYER, TENSOR), axis_types=(AxisType.Auto, AxisType.Auto))


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayoutRules:
    """Logical dimensions -> mesh axes, whatever the model and the mesh; `make_layout` applies them.

    The default is tensor parallelism over all devices. Axes that a mesh has only one device of, or
    that do not divide a dimension, are left out when the rules are applied.

    Raises:
      ValueError: an unknown axis, one named twice in a dimension, or heads over the axis that
        carries the layers of a group.
    """

    heads: tuple[str, ...] = (LAYER, TENSOR)  # of every attention, and with them its KV cache
    mlp: tuple[str, ...] = (LAYER, TENSOR)  # columns of every MLP
    vocab: tuple[str, ...] = (LAYER, TENSOR)  # embedding and head
    group: str | None = None  # the layers of a group stand side by side on this axis

    def __post_init__(self):
        for name in ("heads", "mlp", "vocab"):
            axes = getattr(self, name)
            known = isinstance(axes, tuple) and all(axis in (LAYER, TENSOR) for axis in axes)
            if not known or len(set(axes)) < len(axes):
                raise ValueError(
                    f'{name} must be a tuple of the mesh axes "layer" and "tensor", none twice, '
                    f"got {axes!r}"
                )
        if self.group not in (None, LAYER, TENSOR):
            raise ValueError(f'group must be "layer", "tensor" or None, got {self.group!r}')
        if self.group in self.heads:
            raise ValueError(
                f'the axis "{self.group}" carries the layers of a group: it cannot split their '
                "heads too"
            )


LAYOUTS = {
    "tensor": LayoutRules(),  # all devices share every layer: any base, and a draft's baseline
    "grouped": LayoutRules(heads=(TENSOR,), group=LAYER),  # EasySpec's draft
    "replicated": LayoutRules(heads=(), mlp=(), vocab=()),  # a draft on one device: all do the same
}

KV_CODES = ("int8", "fp8")

MLPS = {"all": (LAYER, TENSOR), "tensor": (TENSOR,), "replicated": ()}  # devices that share them


def layout_rules(layout: str | LayoutRules | None, partition: tuple[int, ...]) -> LayoutRules:
    """The rules that a `layout` argument means; None: "grouped" for a model in groups, else
    "tensor".

    Raises:
      ValueError: an unknown name.
    """
    if layout is None:
        layout = "grouped" if max(partition) > 1 else "tensor"
    if isinstance(layout, LayoutRules):
        return layout
    if not isinstance(layout, str) or layout not in LAYOUTS:
        names = ", ".join(f'"{name}"' for name in LAYOUTS)
        raise ValueError(f"layout must be one of {names}, or LayoutRules, got {layout!r}")
    return LAYOUTS[layout]


@dataclasses.dataclass(frozen=True)
class Layout:
    """What rules come to for one model on one mesh. An axis of size 1 is never named, so it costs
    no collective.
    """

    mesh: Mesh
    kv: tuple[str, ...] = ()  # splits the kv heads, and with them the KV cache
    query: tuple[str, ...] = ()  # splits the query heads of each kv head
    mlp: tuple[str, ...] = ()
    vocab: tuple[str, ...] = ()
    group: str | None = None  # carries the layers of a group; None: they share the devices
    # Weights and caches are arranged as GPUs read them best: outputs first, keys beside values.
    for_gpu: bool = False
    # On CPUs: matrices are bfloat16 under activations of float32 (`bfloat16`).
    bf16_matrices: bool = False
    # On GPUs, one row times a matrix as multiply and sum: one kernel, where a product of more than
    # 10M weights is split and then added up by a second. Which is faster no clock has said yet.
    explicit_gemv: bool = True
    # "xla", or "cudnn": one kernel that writes no scores, where keys and values are two arrays;
    # whether it is fast for one row no clock has said yet.
    attention: str = "xla"
    # Kind of codes that keys and values are stored as, of KV_CODES; None: the model's own type
    kv_codes: str | None = None
    # Zero columns of an MLP behind each device's own: products of other sizes copy their weights.
    mlp_padding: int = 0

    @property
    def outputs_first(self) -> bool:
        """Whether the outputs of a matrix come before its inputs."""
        return self.for_gpu or self.bf16_matrices

    def matrix_dtype(self, dtype: Any) -> jnp.dtype:
        """Of the matrices of floats of a model of this type."""
        return jnp.dtype(jnp.bfloat16 if self.bf16_matrices else dtype)

    @property
    def heads(self) -> tuple[str, ...]:
        """Axes over which an attention output is a partial sum."""
        return self.kv + self.query

    @property
    def num_head_shards(self) -> int:
        """Devices that the attention heads of one layer are split over."""
        return self.devices_along(self.heads)

    def devices_along(self, axes: tuple[str, ...]) -> int:
        """Devices of the mesh along these axes."""
        return math.prod(self.mesh.shape[a] for a in axes)

    @property
    def group_devices(self) -> int:
        """Devices that the layers of one group are spread over."""
        return self.mesh.shape[self.group] if self.group else 1

    def stacks(self, size: int) -> bool:
        """Whether a block of this many layers is stacked over the axis `group`."""
        return size > 1 and self.group_devices > 1

    def num_slots(self, size: int) -> int:
        """Slots of a block of this many layers: each holds one layer per device of the group."""
        return -(-size // self.group_devices) if self.stacks(size) else size

    def spec(self, letters: str) -> P:
        """PartitionSpec for an array with these dimension letters: L stacked layers, K, G, F, V
        may be split.
        """
        axes = {"L": (self.group,), "K": self.kv, "G": self.query, "F": self.mlp, "V": self.vocab}
        named = [axes.get(letter) or None for letter in letters]
        while named and named[-1] in (None, (None,)):
            named.pop()  # jit compares specs as written: one form for each
        return P(*named)

    def named(self, letters: str) -> NamedSharding:
        """`spec` on this layout's mesh."""
        return NamedSharding(self.mesh, self.spec(letters))

    def finest(self, letters: str, shape: tuple[int, ...]) -> NamedSharding:
        """`named`, with every axis that it leaves out put on a dimension that it divides, one that
        is split already if possible: how a matrix is read, so that no two devices read the same.
        """
        if len(shape) == 1 or not set("DFV") & set(letters):  # norms and biases: too small
            return self.named(letters)
        named = [*self.spec(letters), *[None] * len(shape)][: len(shape)]
        axes = [(name,) if isinstance(name, str) else (name or ()) for name in named]
        for axis, n in self.mesh.shape.items():
            if n == 1 or any(axis in split for split in axes):
                continue
            parts = [n * math.prod(self.mesh.shape[a] for a in split) for split in axes]
            fits = [i for i, size in enumerate(shape) if size % parts[i] == 0]
            if fits:
                i = max(fits, key=lambda i: len(axes[i]))
                axes[i] = (*axes[i], axis)
        return NamedSharding(self.mesh, P(*((s[0] if len(s) == 1 else s) or None for s in axes)))


def make_layout(config: ModelConfig, mesh: Mesh, rules: LayoutRules) -> Layout:
    """What `rules` come to for a model of this configuration on `mesh`.

    What an axis does not divide is replicated on it, and one log line says so.
    """

    def real(axes):
        return tuple(axis for axis in axes if mesh.shape[axis] > 1)

    kv, query, whole = _split_heads(config, mesh, real(rules.heads))
    mlp = _dividing(config.mlp_dim, mesh, real(rules.mlp))
    vocab = _dividing(config.vocab_size, mesh, real(rules.vocab))
    replicated = {
        "heads": whole,
        "mlp_dim": _minus(real(rules.mlp), mlp),
        "vocab_size": _minus(real(rules.vocab), vocab),
    }
    group = next(iter(real((rules.group,) if rules.group else ())), None)
    for_gpu = has_gpus(mesh)
    own = config.mlp_dim // math.prod(mesh.shape[a] for a in mlp)
    padding = -own % GPU_TILE if for_gpu else 0
    layout = Layout(mesh, kv, query, mlp, vocab, group, for_gpu=for_gpu, mlp_padding=padding)
    notes = [f"{name} over {'/'.join(axes)}" for name, axes in replicated.items() if axes]
    if notes:
        logger.info(
            "replicated, since the mesh %s does not divide it: %s",
            dict(mesh.shape),
            ", ".join(notes),
        )
    return layout


def _split_heads(config: ModelConfig, mesh: Mesh, axes: tuple[str, ...]):
    """Kv heads over all axes if they divide, else axis by axis: kv heads, else the query heads of
    each, else nothing.
    """
    if config.num_kv_heads % math.prod(mesh.shape[a] for a in axes) == 0:
        return axes, (), ()
    kv, query, whole = (), (), ()
    kv_left, query_left = config.num_kv_heads, config.num_groups
    for axis in sorted(axes, reverse=True):  # "tensor" first
        n = mesh.shape[axis]
        if kv_left % n == 0:
            kv, kv_left = (axis, *kv), kv_left // n
        elif query_left % n == 0:
            query, query_left = (axis, *query), query_left // n
        else:
            whole = (axis, *whole)
    return kv, query, whole


def _dividing(size: int, mesh: Mesh, axes: tuple[str, ...]) -> tuple[str, ...]:
    """The most of `axes` that divide `size`: all, else "tensor", else "layer", else none."""
    for tried in (axes, *((a,) for a in sorted(axes, reverse=True))):
        if size % math.prod(mesh.shape[a] for a in tried) == 0:
            return tried
    return ()


def platform_of(mesh: Mesh | AbstractMesh) -> str | None:
    """What jax calls the kind of its devices, "cpu" say; None: it is abstract and has none."""
    return mesh.devices.flat[0].platform if isinstance(mesh, Mesh) else None


def has_gpus(mesh: Mesh | AbstractMesh) -> bool:
    """Whether its devices are GPUs, those included that programs are only compiled for."""
    return platform_of(mesh) in ("gpu", "cuda", "rocm")


def _minus(axes: tuple[str, ...], used: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(a for a in axes if a not in used)


def psum(x: jax.Array, axes: tuple[str, ...]) -> jax.Array:
    """`lax.psum` over `axes`; x itself when there are none."""
    return lax.psum(x, axes) if axes else x


def replicate(x: Any, mesh: Mesh) -> jax.Array:
    """A host value, the same in every process, as an array on every device of the mesh."""
    sharding = NamedSharding(mesh, P())
    if not mesh.is_multi_process:
        return jax.device_put(x, sharding)
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        return jax.random.wrap_key_data(replicate(np.asarray(jax.random.key_data(x)), mesh))
    x = np.asarray(x)
    return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])


def shape_of(shape: tuple[int, ...], dtype: Any, sharding: NamedSharding | None = None) -> Any:
    """A ShapeDtypeStruct, as it stands in the place of an array."""
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)


def zeros(shapes: Any) -> Any:
    """A pytree of ShapeDtypeStructs as arrays of zeros, allocated straight onto their devices."""
    return jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype, device=s.sharding), shapes)


class Placed:
    """A pytree whose static fields say how its arrays are split over a mesh: a model, a KV cache.

    Every other array that a program gets is the same on all devices.
    """

    layout: Layout

    def specs(self) -> Any:
        """The same pytree with a PartitionSpec for every array."""
        raise NotImplementedError

    def own(self) -> Any:
        """Inside `shard_map`: the same with this device's layer of every stacked slot, for good."""
        return self

    def stacked(self) -> Any:
        """`own` undone, of what is returned from `shard_map`."""
        return self


def _over_placed(fn: Callable, others: Callable, tree: Any) -> Any:
    """`fn` of every `Placed` part of a pytree, `others` of every other leaf."""
    each = lambda x: fn(x) if isinstance(x, Placed) else others(x)  # noqa: E731
    return jax.tree.map(each, tree, is_leaf=lambda x: isinstance(x, Placed))


def specs_of(tree: Any) -> Any:
    """A pytree of PartitionSpecs: those of its `Placed` parts, P() for every other array."""
    return _over_placed(lambda x: x.specs(), lambda x: P(), tree)


class MeshJit:
    """A function of arrays on a mesh as `mesh_jit` makes it: jitted, and again for every other
    choice of compiler options.
    """

    def __init__(self, run: Callable, **options: Any):
        self._run, self._options = run, options
        self._jitted: dict[tuple, Any] = {(): jax.jit(run, **options)}
        functools.update_wrapper(self, run)

    def using(self, options: tuple[tuple[str, Any], ...]) -> Any:
        """Jitted with these options of the compiler, which must be known to it."""
        key = tuple((name, type(value), value) for name, value in options)  # 1 is not True
        if key not in self._jitted:
            self._jitted[key] = jax.jit(self._run, **self._options, compiler_options=dict(options))
        return self._jitted[key]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._jitted[()](*args, **kwargs)

    def lower(self, *args: Any, **kwargs: Any) -> jax.stages.Lowered:
        """As a jitted function."""
        return self._jitted[()].lower(*args, **kwargs)

    def num_compiled(self) -> int:
        """How many programs this process has of it."""
        return sum(jitted._cache_size() for jitted in self._jitted.values())


def mesh_jit(
    *, out: str | tuple[str | None, ...] | None = None, donate: str | None = None, **options: Any
) -> Callable[[Callable], MeshJit]:
    """A decorator: a function of local shards becomes a jitted function of arrays on a mesh.

    The mesh and how everything is split are read off the `Placed` arguments while tracing, from
    their static fields, so a call of what is compiled costs what a call of `jax.jit` costs. On one
    device the function is jitted as it is.

    Args:
      out: the argument that the result is split like (and has the structure of), or one for each
        result; None: the same on every device.
      donate: the argument that is donated.
      options: of `jax.jit`.
    """

    def decorate(fn: Callable) -> MeshJit:
        signature = inspect.signature(fn)
        static = options.get("static_argnames", ())
        static = (static,) if isinstance(static, str) else static

        @functools.wraps(fn)
        def run(*args, **kwargs):
            arguments = signature.bind(*args, **kwargs).arguments
            arrays = {k: v for k, v in arguments.items() if k not in static}
            call = functools.partial(fn, **{k: v for k, v in arguments.items() if k in static})
            parts = jax.tree.leaves(arrays, is_leaf=lambda x: isinstance(x, Placed))
            mesh = next(x.layout.mesh for x in parts if isinstance(x, Placed))
            if mesh.size == 1:
                return call(**arrays)
            in_specs = specs_of(arrays)
            like = {None: P()} | in_specs
            out_specs = tuple(map(like.get, out)) if isinstance(out, tuple) else like[out]

            def local(arrays):
                result = call(**_over_placed(lambda x: x.own(), lambda x: x, arrays))
                return _over_placed(lambda x: x.stacked(), lambda x: x, result)

            return jax.shard_map(local, mesh=mesh, in_specs=(in_specs,), out_specs=out_specs)(
                arrays
            )

        return MeshJit(run, donate_argnames=donate, **options)

    return decorate

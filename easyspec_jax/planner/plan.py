"""Which deployment, which groups, how many tokens: every choice priced, the best first.

What a choice costs is predicted by `cost.step_costs` from shapes, what it brings by `Acceptance`,
from a few measured rates. Nothing is loaded and no device is touched.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterator, Sequence
from typing import Any

from jax.sharding import AbstractMesh, AxisType

from easyspec_jax.config import ModelConfig
from easyspec_jax.decode import Decoder
from easyspec_jax.drafters.layer_parallel import LayerParallelDrafter
from easyspec_jax.layer_parallel import make_partition
from easyspec_jax.loading import abstract_model
from easyspec_jax.memory import listed
from easyspec_jax.planner.acceptance import Acceptance
from easyspec_jax.planner.cost import Cost, step_costs, total
from easyspec_jax.planner.device import Device
from easyspec_jax.quantized import Quantization
from easyspec_jax.sharding import LAYER, LAYOUTS, MLPS, TENSOR, LayoutRules

GAMMAS = (1, 2, 3, 4, 5, 6, 8)
WIDTHS = (1, 2, 4, 8)
GROUP_SIZES = (1, 2, 3, 4, 5, 6, 8)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Deployment:
    """Where base and draft stand; the base is split over all devices of the mesh."""

    layer: int
    tensor: int
    draft: str  # "none" (autoregression), "one device", "tensor parallel" or "groups"
    rules: LayoutRules = LAYOUTS["tensor"]  # of the draft
    group_size: int | tuple[int, ...] = 1

    @property
    def devices(self) -> int:
        """Devices that are used."""
        return self.layer * self.tensor

    @property
    def draft_devices(self) -> int:
        """Devices that share one attention layer of the draft: its tensor parallelism."""
        sizes = {LAYER: self.layer, TENSOR: self.tensor}
        return math.prod(sizes[axis] for axis in self.rules.heads)

    @property
    def mlp(self) -> str:
        """What the draft's MLPs are split over, as `--draft-mlp` has it."""
        return next(name for name, axes in MLPS.items() if axes == self.rules.mlp)

    def options(self) -> str:
        """The same for `easyspec generate`, without γ and w."""
        if self.draft == "none":
            return f"--layer {self.layer} --tensor {self.tensor}"
        size = self.group_size
        text = f"--layer {self.layer} --tensor {self.tensor} --group-size "
        text += str(size) if isinstance(size, int) else ",".join(map(str, size))
        if self.draft == "one device":
            return f"{text} --draft-layout replicated"
        name = "grouped" if self.rules.group else "tensor"
        text += f" --draft-layout {name}"
        if self.rules.mlp != LAYOUTS[name].mlp:
            text += f" --draft-mlp {self.mlp}"
        return text


@dataclasses.dataclass(frozen=True, kw_only=True)
class Choice:
    """One way to decode, and what is predicted of it."""

    deployment: Deployment
    num_draft_tokens: int  # γ; 0: autoregression
    tree_width: int
    phases: dict[str, Cost]  # of one step
    tokens_per_step: float

    @property
    def cost(self) -> Cost:
        """Of a whole step."""
        return total(self.phases.values())

    def options(self) -> str:
        """The choice for `easyspec generate`."""
        text = self.deployment.options()
        if self.num_draft_tokens:
            text += f" --num-draft-tokens {self.num_draft_tokens}"
        return text + (f" --tree-width {self.tree_width}" if self.tree_width > 1 else "")

    @property
    def drafting(self) -> float:
        """Seconds of a step that draft."""
        return self.phases["calibrate"].seconds + self.phases["draft"].seconds

    @property
    def token_seconds(self) -> float:
        """Seconds per token."""
        return self.cost.seconds / self.tokens_per_step

    @property
    def bound(self) -> str:
        """What most of a step goes into."""
        parts = self.cost.as_dict()
        return max(parts, key=parts.__getitem__)

    def as_dict(self) -> dict[str, Any]:
        """For JSON: the choice, its phases and terms in seconds, what it brings."""
        deployment = self.deployment
        values: dict[str, Any] = {"draft": deployment.draft, "options": self.options()}
        values |= {"layer": deployment.layer, "tensor": deployment.tensor}
        if self.num_draft_tokens:
            values |= {
                "group_size": deployment.group_size,
                "draft_tensor_parallel": deployment.draft_devices,
                "draft_mlp": deployment.mlp,
                "num_draft_tokens": self.num_draft_tokens,
                "tree_width": self.tree_width,
            }
        return values | {
            "tokens_per_step": self.tokens_per_step,
            "step_seconds": self.cost.seconds,
            "token_seconds": self.token_seconds,
            "phases": {name: cost.as_dict() for name, cost in self.phases.items()},
            "bound": self.bound,
        }


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """All choices that fit into memory, the fastest first, and what they are held against."""

    choices: tuple[Choice, ...]  # autoregression on every number of devices among them
    autoregression: Choice  # the fastest without a draft
    refused: int  # choices that do not fit into a device's memory

    @property
    def best(self) -> Choice:
        """The fastest."""
        return self.choices[0]

    def by_deployment(self) -> list[Choice]:
        """Of every deployment its best γ and w, the fastest first."""
        first: dict[Deployment, Choice] = {}
        for choice in self.choices:
            first.setdefault(choice.deployment, choice)
        return list(first.values())

    def fastest(self, draft: str) -> Choice | None:
        """The fastest whose draft stands as said (`Deployment.draft`)."""
        return next((c for c in self.choices if c.deployment.draft == draft), None)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Planner:
    """A pair on devices of a kind: prices any choice.

    Args:
      device: one of the devices, all alike; weights and caches have the type it holds for.
      base_codes, draft_codes: how matrices are stored, where they are codes; kv_dtype: how keys and
        values are, as in `load_model`.
      batch: rows decoded together.
      max_len: tokens of each row, prompt and answer, at most the base's context; attention reads
        caches of the capacity that a decoder gives them.
    """

    base: ModelConfig
    draft: ModelConfig
    device: Device
    acceptance: Acceptance = Acceptance()  # noqa: RUF009
    batch: int = 1
    max_len: int = 2048
    base_codes: Quantization | None = None
    draft_codes: Quantization | None = None
    kv_dtype: str | None = None

    def decoder(self, where: Deployment, num_draft_tokens: int = 0, tree_width: int = 1) -> Decoder:
        """The pair as shapes."""
        mesh = (where.layer, where.tensor)
        dtype = self.device.dtype
        kv = self.kv_dtype
        base = _shapes(self.base, mesh, dtype, 1, LAYOUTS["tensor"], self.base_codes, kv)
        if not num_draft_tokens:
            return Decoder(base)
        draft = _shapes(
            self.draft, mesh, dtype, where.group_size, where.rules, self.draft_codes, self.kv_dtype
        )
        counts: dict[str, Any] = {
            "num_draft_tokens": num_draft_tokens, "tree_width": tree_width
        }  # fmt: skip
        return Decoder(base, LayerParallelDrafter(draft), **counts)

    def price(
        self,
        where: Deployment,
        num_draft_tokens: int = 0,
        tree_width: int = 1,
        known: dict[Any, Cost] | None = None,
    ) -> Choice:
        """What one choice costs and brings; γ = 0 is autoregression. `known` as in `step_costs`, of
        this deployment.
        """
        decoder = self.decoder(where, num_draft_tokens, tree_width)
        entries = decoder.capacity(self._tokens)
        phases = step_costs(decoder, self.device, batch=self.batch, entries=entries, known=known)
        brings = 1.0
        if num_draft_tokens:
            partition = make_partition(self.draft.num_layers, where.group_size)
            brings = self.acceptance.tokens_per_step(partition, num_draft_tokens, tree_width)
        return Choice(
            deployment=where,
            num_draft_tokens=num_draft_tokens,
            tree_width=tree_width if num_draft_tokens else 1,
            phases=phases,
            tokens_per_step=brings,
        )

    @property
    def _tokens(self) -> int:
        return min(self.max_len, self.base.context)

    def memory(
        self, where: Deployment, num_draft_tokens: int = 0, tree_width: int = 1
    ) -> dict[str, int]:
        """Bytes on each device, by name."""
        decoder = self.decoder(where, num_draft_tokens, tree_width)
        return decoder.memory(self.batch, 1, max_new_tokens=self._tokens - 1)

    def fitting(
        self, where: Deployment, counts: Sequence[tuple[int, int]]
    ) -> list[tuple[int, int]]:
        """Those (γ, w) whose weights, caches and scratch a device has the memory for."""

        def fits(count):
            return sum(self.memory(where, *count).values()) <= self.device.memory

        counts = sorted(counts, key=lambda count: count[0] * count[1])
        if fits(counts[-1]):
            return counts
        return [count for count in counts if fits(count)] if fits(counts[0]) else []

    def plan(
        self,
        num_devices: int,
        *,
        num_draft_tokens: Sequence[int] = GAMMAS,
        tree_widths: Sequence[int] = WIDTHS,
        group_sizes: Sequence[int] = GROUP_SIZES,
    ) -> Plan:
        """Every choice on up to `num_devices` devices.

        Raises:
          ValueError: not even autoregression fits into the memory of so many devices.
        """
        found, refused = [], 0
        for where in deployments(num_devices, group_sizes, self.draft.num_layers):
            counts = [(0, 1)]
            if where.draft != "none":
                counts = [(gamma, width) for gamma in num_draft_tokens for width in tree_widths]
            fitting, known = self.fitting(where, counts), {}
            found += [self.price(where, *count, known) for count in fitting]
            refused += len(counts) - len(fitting)
        found.sort(key=lambda choice: choice.token_seconds)
        plain = next((choice for choice in found if not choice.num_draft_tokens), None)
        if plain is None:
            needed = self.memory(Deployment(layer=1, tensor=num_devices, draft="none"))
            raise ValueError(
                f"the base needs {sum(needed.values()) / 2**30:.2f} GiB on each of {num_devices} "
                f"devices ({listed(needed)}), but a program may use "
                f"{self.device.memory / 2**30:.2f} GiB there: use more devices, or a smaller batch"
            )
        return Plan(choices=tuple(found), autoregression=plain, refused=refused)


def deployments(
    num_devices: int, group_sizes: Sequence[int], num_layers: int
) -> Iterator[Deployment]:
    """Every way to place a base and a draft of so many layers on all devices, or on half of them, a
    quarter, ...

    Groups of layers stand side by side on 2 devices or more; group size 1 asks for a draft in
    tensor parallelism of every degree, and on one device.
    """
    same = {make_partition(num_layers, size): size for size in sorted(group_sizes, reverse=True)}
    group_sizes = sorted(same.values())
    devices = num_devices
    while devices >= 1:
        yield Deployment(layer=1, tensor=devices, draft="none")
        for layer in (n for n in range(1, devices + 1) if devices % n == 0):
            yield from _on_mesh(layer, devices // layer, group_sizes)
        if devices % 2:
            return
        devices //= 2


def _on_mesh(layer: int, tensor: int, group_sizes: Sequence[int]) -> Iterator[Deployment]:
    mesh = {"layer": layer, "tensor": tensor}
    if 1 in group_sizes and layer == 1:
        yield Deployment(**mesh, draft="one device", rules=LAYOUTS["replicated"])
    if 1 in group_sizes and tensor > 1:
        alone = dataclasses.replace(LAYOUTS["grouped"], mlp=(TENSOR,))  # a layer on "tensor" only
        rules = LAYOUTS["tensor"] if layer == 1 else alone
        yield Deployment(**mesh, draft="tensor parallel", rules=rules)
    if layer == 1:
        return
    for size in (size for size in group_sizes if size > 1):
        for name, mlp in MLPS.items():
            if name == "replicated" and tensor == 1:  # the same as over "tensor"
                continue
            rules = dataclasses.replace(LAYOUTS["grouped"], mlp=mlp)
            yield Deployment(**mesh, draft="groups", rules=rules, group_size=size)


@functools.cache
def _shapes(config, mesh, dtype, group_size, rules, codes, kv_dtype):
    kept = None if codes is None else dataclasses.replace(codes, keep_codes=True)
    options = {"group_size": group_size, "layout": rules, "dtype": dtype, "quantization": kept}
    options["kv_dtype"] = kv_dtype
    return abstract_model(config, abstract_mesh(*mesh), **options)


def abstract_mesh(layer: int, tensor: int) -> Any:
    """`make_mesh` without devices, as it stands in the place of a mesh."""
    return AbstractMesh((layer, tensor), (LAYER, TENSOR), axis_types=(AxisType.Auto,) * 2)

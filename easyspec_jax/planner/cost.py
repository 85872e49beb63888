"""What one decoding step costs on a `Device`, predicted from shapes.

Everything is asked of the abstract model that also loads weights: what a device holds of a layer,
which axes it sums over, how groups are stacked. So the prediction follows whatever a layout does,
and a decoder of `abstract_model`s on an `AbstractMesh` needs neither weights nor devices.

    a step = calibrate(γ + 1 rows, exact) + (γ - 1) · draft(w rows, in groups)
             + verify(γ · w + 1 rows of the base) + commit
"""

from __future__ import annotations

import collections
import dataclasses
import math
from collections.abc import Iterable
from typing import Any

from easyspec_jax.decode import Decoder
from easyspec_jax.drafters.layer_parallel import LayerParallelDrafter
from easyspec_jax.loop import PHASES
from easyspec_jax.memory import device_bytes
from easyspec_jax.model import Model
from easyspec_jax.planner.device import Device
from easyspec_jax.weights import Block

_COLLECTIVE_LAUNCHES = 2  # of a host that launches a collective itself


@dataclasses.dataclass(frozen=True)
class Cost:
    """Seconds, by what they go into."""

    weights: float = 0.0  # products with weights: reading them, or multiplying where that is slower
    attention: float = 0.0  # caches read, scores, softmax
    sampling: float = 0.0  # everything that walks a vocabulary of scores
    kernels: float = 0.0  # launches and gaps
    collectives: float = 0.0
    host: float = 0.0  # between steps

    @property
    def seconds(self) -> float:
        """All of it."""
        return sum(vars(self).values())

    def __add__(self, other: Cost) -> Cost:
        pairs = zip(vars(self).values(), vars(other).values(), strict=True)
        return Cost(*(a + b for a, b in pairs))

    def __mul__(self, times: float) -> Cost:
        return Cost(*(times * a for a in vars(self).values()))

    def as_dict(self) -> dict[str, float]:
        """Seconds by name."""
        return dict(vars(self))


def total(costs: Iterable[Cost]) -> Cost:
    """All of them, one after another."""
    return sum(costs, Cost())


@dataclasses.dataclass(frozen=True)
class Pass:
    """One pass of a model over `rows` tokens of `batch` texts, with logits of `heads` of them."""

    model: Model  # arrays or shapes
    device: Device
    rows: int  # tokens of all texts
    heads: int  # tokens of all texts whose logits are wanted
    batch: int
    entries: int  # S, that every text's cache has room for
    run: str = "exact"  # or one of layer_parallel.PARALLEL

    def cost(self) -> Cost:
        """Blocks, embedding and head."""
        counts = collections.Counter(self.model.partition)
        kinds = {len(block.mlp): block for block in self.model.params.blocks}
        return total(self.block(kinds[size]) * n for size, n in counts.items()) + self._ends()

    def block(self, block: Block) -> Cost:
        """A layer alone, or a group."""
        layout, size = self.model.layout, len(block.mlp)
        mlp = self._mlp(block)
        if size == 1:
            attention = self._attention(block.attention[0])
            return attention + self._sum(layout.heads) + mlp + self._sum(layout.mlp)
        axes = ((layout.group,) if layout.group else ()) + layout.heads
        slots = len(block.attention)
        if self.run == "exact":
            turn = self._attention(block.attention[0]) + self._sum(axes)
            return (turn + mlp + self._sum(layout.mlp)) * size
        together = self._attention(block.attention[0]) * slots
        together += self._sum(axes, arrays=slots * layout.group_devices)
        if self.run == "attention":
            return together + (mlp + self._sum(layout.mlp)) * size
        return together + mlp * size + self._sum(layout.mlp)

    def _attention(self, weights: Any) -> Cost:
        c, layout, device = self.model.config, self.model.layout, self.device
        size = device_bytes(weights)
        cache = 2 * c.num_kv_heads * c.head_dim * self._itemsize * self.batch * self.entries
        heads = c.num_heads // layout.num_head_shards
        scores = device.score * self.rows * heads * self.entries
        cost = Cost(
            weights=device.product(size, self.rows, self._itemsize, _products(weights)),
            attention=cache / self._devices(layout.kv) / device.bandwidth + scores,
            kernels=device.attention_kernels * device.kernel,
        )
        return _overlapped(cost, device)

    def _mlp(self, block: Block) -> Cost:
        size, device = device_bytes(block.mlp[0]), self.device
        cost = Cost(
            weights=device.product(size, self.rows, self._itemsize, count=2),
            kernels=device.mlp_kernels * device.kernel,
        )
        return _overlapped(cost, device)

    def _ends(self) -> Cost:
        """Embedding, last norm, logits, and what is then done with each number of them."""
        params, layout, device = self.model.params, self.model.layout, self.device
        size = device_bytes(params.lm_head)
        numbers = self.heads * self.model.config.vocab_size
        cost = Cost(
            weights=device.product(size, self.heads, self._itemsize),
            sampling=device.logit * numbers,
            kernels=device.pass_kernels * device.kernel,
        )
        gather = self._collective(4 * numbers, layout.vocab, rounds=1)
        return _overlapped(cost, device) + self._sum(layout.vocab) + gather

    def _sum(self, axes: tuple[str, ...], arrays: int = 1) -> Cost:
        """Adding up [rows, D] of so many layers over mesh axes."""
        size = arrays * self.rows * self.model.config.embed_dim * self._itemsize
        return self._collective(size, axes, rounds=2)

    def _collective(self, num_bytes: float, axes: tuple[str, ...], *, rounds: int) -> Cost:
        """As `Device.exchange`; one that the host launches costs it as much as kernels do."""
        seconds = self.device.exchange(num_bytes, self._devices(axes), rounds=rounds)
        if seconds and self.device.overlapped:
            seconds = max(seconds, _COLLECTIVE_LAUNCHES * self.device.kernel)
        return Cost(collectives=seconds)

    def _devices(self, axes: tuple[str, ...]) -> int:
        return math.prod(self.model.layout.mesh.shape[axis] for axis in axes)

    @property
    def _itemsize(self) -> int:
        return self.model.dtype.itemsize


def _products(weights: Any) -> int:
    """Matrix products with the weights of an attention layer."""
    return 2 if weights.wkv is None else 3


def _overlapped(cost: Cost, device: Device) -> Cost:
    """The cost; where the host launches while the device works, only the slower of the two."""
    if not device.overlapped:
        return cost
    if cost.kernels >= cost.seconds - cost.kernels:
        return Cost(kernels=cost.kernels)
    return dataclasses.replace(cost, kernels=0.0)


def step_costs(
    decoder: Decoder,
    device: Device,
    *,
    batch: int = 1,
    entries: int,
    known: dict[Any, Cost] | None = None,
) -> dict[str, Cost]:
    """What each phase of one step of a decoder costs; "commit" is what the host adds.

    Args:
      decoder: with a layer-parallel drafter or none; its models may be `abstract_model`s.
      device: one of the mesh's devices, all alike.
      batch: rows that are decoded together.
      entries: S, the capacity of their caches, all of which attention reads.
      known: passes priced before, for decoders of the same models that differ in γ and w alone.

    Raises:
      ValueError: a drafter of another kind.
    """
    known = {} if known is None else known
    gamma, width, drafter = decoder.num_draft_tokens, decoder.tree_width, decoder.drafter

    def run(model, tokens, heads, way="exact"):
        key = (model is decoder.base, tokens, heads, way)
        if key not in known:
            one = Pass(model, device, batch * tokens, batch * heads, batch, entries, way)
            known[key] = one.cost()
        return known[key]

    costs = {phase: Cost() for phase in PHASES} | {"commit": Cost(host=device.step)}
    if not gamma:
        return costs | {"verify": run(decoder.base, 1, 1)}
    if not isinstance(drafter, LayerParallelDrafter):
        kind = type(drafter).__name__
        raise ValueError(f"costs are known of a LayerParallelDrafter or of none, got a {kind}")
    window = "exact" if drafter.calibrate else drafter.parallel
    nodes = gamma * width + 1
    return costs | {
        "calibrate": run(drafter.draft, gamma + 1, 1, window),
        "draft": run(drafter.draft, width, width, drafter.parallel) * (gamma - 1),
        "verify": run(decoder.base, nodes, nodes),
    }

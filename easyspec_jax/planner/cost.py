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
import functools
from collections.abc import Iterable
from typing import Any

from easyspec_jax.decode import Decoder
from easyspec_jax.drafters.layer_parallel import LayerParallelDrafter
from easyspec_jax.loop import PHASES
from easyspec_jax.memory import device_bytes
from easyspec_jax.model import Model
from easyspec_jax.planner.device import Device
from easyspec_jax.quantized import Quantized
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
class Piece:
    """Kernels that run one behind another on every device, and what they read."""

    kernels: float
    weights: int = 0  # bytes of one device
    rows: int = 0  # that are multiplied with them
    products: int = 1  # in which
    reads: float = 1.0  # how often the weights' bytes are moved for them
    cache: float = 0.0  # bytes of entries
    scores: float = 0.0  # of attention: row x head x entry
    outputs: float = 0.0  # numbers that products write, those of each part counted
    numbers: int = 0  # of logits that somebody walks


@dataclasses.dataclass(frozen=True)
class Exchange:
    """One collective."""

    bytes: int  # of its result on one device
    devices: int
    rounds: int  # 1: a gather, 2: a sum


Work = collections.Counter[Piece | Exchange]  # and how often


@dataclasses.dataclass(frozen=True)
class Counts:
    """What a program is made of, as `program.report` reads it from a compiled one."""

    launches: float = 0.0  # collectives among them
    bytes: float = 0.0  # read and written by one device
    collectives: int = 0

    def __add__(self, other: Counts) -> Counts:
        pairs = zip(vars(self).values(), vars(other).values(), strict=True)
        return Counts(*(a + b for a, b in pairs))

    def __mul__(self, times: int) -> Counts:
        return Counts(*(times * a for a in vars(self).values()))


# A score is written and read as float32, its softmax as two bytes; what a product of several rows
# writes is float32, read again, and of some products in parts that are then added up.
_SCORE_BYTES, _OUTPUT_BYTES = 12, 8
_PARTS = {"qkv": 4, "values": 8, "out": 8, "gate, up": 1, "down": 8}


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
    best: int = 1  # tokens that are looked for behind each of `heads`
    keeps: bool = False  # whether entries of a tree's path are moved together afterwards

    def cost(self) -> Cost:
        """Blocks, embedding and head."""
        return self._price(self._work())

    def block(self, block: Block) -> Cost:
        """A layer alone, or a group."""
        return self._price(self._block(block))

    def counts(self) -> Counts:
        """What the compiled program has of it, but for a few small numbers."""
        total = Counts()
        for work, times in self._work().items():
            if isinstance(work, Exchange):
                total += Counts(1.0, 0.0, 1) * times
            else:
                moved = work.reads * work.weights + work.cache + _SCORE_BYTES * work.scores
                moved += _OUTPUT_BYTES * work.outputs
                total += Counts(work.kernels, moved) * times
        return total

    def _work(self) -> Work:
        counts = collections.Counter(self.model.partition)
        kinds = {len(block.mlp): block for block in self.model.params.blocks}
        total = self._ends()
        for size, times in counts.items():
            for work, n in self._block(kinds[size]).items():
                total[work] += n * times
        return total

    def _block(self, block: Block) -> Work:
        layout, size, slots = self.model.layout, len(block.mlp), len(block.attention)
        mlp, mlp_sum = self._mlp(block), self._sum(layout.mlp)
        axes = ((layout.group,) if layout.group and size > 1 else ()) + layout.heads
        spread = layout.stacks(size)
        attention = self._attention(block.attention[0], spread=spread)
        if size == 1 or self.run == "exact":
            once = attention + self._sum(axes) + mlp + mlp_sum
            return Work({work: size * n for work, n in once.items()})
        together = Work({work: slots * n for work, n in attention.items()})
        # They read one stream, so what is done to it is done once; where there is one row the
        # products of a device are one kernel, too.
        shared = self.device.shared_kernels
        shared = shared if self.rows == 1 and not axes else min(shared, 1)
        together[Piece(kernels=-shared)] += slots - 1
        together += self._sum(axes, arrays=slots * layout.group_devices)
        mlps = Work({work: size * n for work, n in mlp.items()})
        in_order = Work({work: size * n for work, n in mlp_sum.items()})
        sums = in_order if self.run == "attention" else mlp_sum
        return together + mlps + sums

    def _attention(self, weights: Any, *, spread: bool) -> Work:
        """Of one layer; `spread`: of a group that stands on several devices."""
        c, layout, device = self.model.config, self.model.layout, self.device
        heads = c.num_heads // layout.num_head_shards
        width, kv = heads * c.head_dim, 2 * c.num_kv_heads // layout.devices_along(layout.kv)
        parts = _PARTS["qkv"] * (width + kv * c.head_dim) + _PARTS["values"] * width
        parts += _PARTS["out"] * c.embed_dim
        kernels = device.attention_kernels + device.group_kernels * spread
        kernels += device.keep_kernels * self.keeps
        if self.rows > 1 and not layout.heads:
            kernels += device.rows_kernels
        piece = Piece(
            kernels=kernels,
            weights=device_bytes(weights),
            rows=self.rows,
            products=_products(weights),
            reads=self._reads(weights.wo, self.rows),
            cache=self._cache_bytes,
            scores=self.rows * heads * self.entries,
            outputs=self.rows * parts if self.rows > 1 else 0,
        )
        return Work([piece])

    def _mlp(self, block: Block) -> Work:
        kernels = self.device.mlp_kernels + self.device.rows_kernels * (self.rows > 1)
        size, c, layout = device_bytes(block.mlp[0]), self.model.config, self.model.layout
        parts = 2 * _PARTS["gate, up"] * c.mlp_dim // layout.devices_along(layout.mlp)
        parts += _PARTS["down"] * c.embed_dim
        outputs = self.rows * parts if self.rows > 1 else 0
        reads = self._reads(block.mlp[0].w_down, self.rows)
        rows = {"rows": self.rows, "products": 2, "outputs": outputs, "reads": reads}
        return Work([Piece(kernels=kernels, weights=size, **rows)])

    def _ends(self) -> Work:
        """Embedding, last norm, logits, and what is then done with each number of them."""
        params, layout = self.model.params, self.model.layout
        piece = Piece(
            kernels=self.device.pass_kernels + self.device.grow_kernels * (self.best > 1),
            weights=device_bytes(params.lm_head),
            rows=self.heads,
            reads=self._reads(params.lm_head, self.heads),
            numbers=self.heads * self.model.config.vocab_size // layout.devices_along(layout.vocab),
        )
        # Of each device the likeliest tokens, ids and scores; in a tree what all scores come to.
        numbers = 2 * self.best + (self.best > 1)
        winners = 4 * numbers * self.heads * layout.devices_along(layout.vocab)
        return Work([piece]) + self._sum(layout.vocab) + self._exchange(winners, layout.vocab)

    def _sum(self, axes: tuple[str, ...], arrays: int = 1) -> Work:
        """Adding up [rows, D] of so many layers over mesh axes."""
        size = arrays * self.rows * self.model.config.embed_dim * self._itemsize
        return self._exchange(size, axes)

    def _exchange(self, num_bytes: int, axes: tuple[str, ...]) -> Work:
        devices = self.model.layout.devices_along(axes)
        return Work([Exchange(num_bytes, devices, rounds=2)] if devices > 1 else [])

    def _price(self, work: Work) -> Cost:
        """Seconds of all of it."""
        return total(self._seconds(one) * times for one, times in work.items())

    def _seconds(self, one: Piece | Exchange) -> Cost:
        device = self.device
        if isinstance(one, Exchange):
            seconds = device.exchange(one.bytes, one.devices, rounds=one.rounds)
            if device.overlapped:  # one that the host launches costs it as much as kernels do
                seconds = max(seconds, _COLLECTIVE_LAUNCHES * device.kernel)
            return Cost(collectives=seconds)
        cost = Cost(
            weights=self._product(one) if one.weights else 0.0,
            attention=one.cache / device.bandwidth + device.score * one.scores,
            sampling=device.logit * one.numbers,
            kernels=one.kernels * device.kernel,
        )
        return _overlapped(cost, device)

    @property
    def _itemsize(self) -> int:
        """Bytes of a weight that is no code."""
        return self.model.layout.matrix_dtype(self.model.dtype).itemsize

    @functools.cached_property
    def _cache_bytes(self) -> int:
        """Of a layer's keys and values on a device."""
        return device_bytes(self.model.abstract_cache(self.batch, self.entries).blocks[0][0])

    def _product(self, one: Piece) -> float:
        """Seconds of its products."""
        matrix = self.model.params.blocks[0].mlp[0].w_down
        if not isinstance(matrix, Quantized):
            return self.device.product(one.weights, one.rows, self._itemsize, one.products)
        seconds = self.device.product(one.weights, one.rows, matrix.weight_bytes, one.products)
        return max(seconds, one.reads * one.weights / self.device.bandwidth)

    def _reads(self, matrix: Any, rows: int) -> float:
        """How often the bytes of a matrix are moved for so many rows."""
        if not isinstance(matrix, Quantized):
            return 1.0
        return matrix.times_read(rows, self._itemsize)


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


def step_passes(
    decoder: Decoder, device: Device, *, batch: int = 1, entries: int
) -> dict[str, tuple[Pass, int]]:
    """The passes of each phase of one step of a decoder, and how many there are.

    Args:
      decoder: with a layer-parallel drafter or none; its models may be `abstract_model`s.
      device: one of the mesh's devices, all alike.
      batch: rows that are decoded together.
      entries: S, the capacity of their caches, all of which attention reads.

    Raises:
      ValueError: a drafter of another kind.
    """
    gamma, width, drafter = decoder.num_draft_tokens, decoder.tree_width, decoder.drafter

    def one(model: Model, tokens: int, heads: int, run: str = "exact", **how: Any) -> Pass:
        return Pass(model, device, batch * tokens, batch * heads, batch, entries, run, **how)

    nodes = gamma * width + 1
    verify = {"verify": (one(decoder.base, nodes, nodes, keeps=width > 1), 1)}
    if not gamma:
        return verify
    if not isinstance(drafter, LayerParallelDrafter):
        kind = type(drafter).__name__
        raise ValueError(f"costs are known of a LayerParallelDrafter or of none, got a {kind}")
    window = "exact" if drafter.calibrate else drafter.parallel
    return {
        "calibrate": (one(drafter.draft, gamma + 1, 1, window, best=width), 1),
        "draft": (one(drafter.draft, width, width, drafter.parallel, best=width), gamma - 1),
    } | verify


def step_costs(
    decoder: Decoder,
    device: Device,
    *,
    batch: int = 1,
    entries: int,
    known: dict[Any, Cost] | None = None,
) -> dict[str, Cost]:
    """What each phase of one step of a decoder costs; "commit" is what the host adds. Arguments and
    errors are those of `step_passes`.

    Args:
      known: passes priced before, for decoders of the same models that differ in γ and w alone.
    """
    known = {} if known is None else known
    costs = {phase: Cost() for phase in PHASES} | {"commit": Cost(host=device.step)}
    passes = step_passes(decoder, device, batch=batch, entries=entries)
    for phase, (one, times) in passes.items():
        key = (phase == "verify", one.rows, one.heads, one.run, one.best, one.keeps)
        if key not in known:
            known[key] = one.cost()
        costs[phase] = known[key] * times
    return costs


def step_counts(
    decoder: Decoder, device: Device, *, batch: int = 1, entries: int
) -> dict[str, Counts]:
    """What the compiled program has in each phase of a step, all its runs; arguments and errors are
    those of `step_passes`.
    """
    passes = step_passes(decoder, device, batch=batch, entries=entries)
    return {phase: one.counts() * times for phase, (one, times) in passes.items()}

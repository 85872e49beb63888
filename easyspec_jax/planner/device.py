"""What the planner knows of a device and of the program on it: a handful of constants.

Presets carry where each figure comes from; `measure.measure_device` fills the same fields in on the
machine at hand, and a JSON file of them may be given in place of a name.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import pathlib
from typing import Any

from easyspec_jax.config import is_integer, is_number
from easyspec_jax.json_files import read_object

DTYPES = ("float32", "bfloat16", "float16")
_WITHOUT_BOUND = ("bandwidth", "flops", "memory", "link")  # may be infinite


def _rise(points: Any) -> bool:
    """Whether points are what `Device.products` is said to be."""
    sound = isinstance(points, tuple) and all(
        isinstance(p, tuple) and len(p) == 3 and is_integer(p[0]) and all(map(_is_finite, p))
        for p in points
    )
    if not sound or any(n < 1 or per_byte <= 0 or more < 0 for n, per_byte, more in points):
        return False
    return all(a[0] < b[0] for a, b in itertools.pairwise(points))


def _is_finite(value: Any) -> bool:
    """Whether value is a number that a float can hold."""
    try:
        return is_number(value)
    except OverflowError:
        return False


@dataclasses.dataclass(frozen=True, kw_only=True)
class Device:
    """Costs of one device among equals; all of it is public, so that a plan can be argued with."""

    name: str
    bandwidth: float  # bytes a second that streaming weights reaches, not what is sold
    flops: float  # operations a second that large products reach
    dtype: str = "bfloat16"  # of the weights that all of this holds for
    memory: float = math.inf  # bytes that a program may use
    # measured (rows, seconds per weight byte, seconds beside them); (): the roofline of the above
    products: tuple[tuple[int, float, float], ...] = ()
    kernel: float = 0.0  # seconds that a kernel takes beside its bytes: launch, ramp, gap
    attention_kernels: float = 7  # norm, qkv, rotation, cache write, scores, values, output
    mlp_kernels: float = 4  # norm, gate and up, their product, down
    pass_kernels: float = 6  # embedding, last norm, head, what samples
    # Of compiled GPU programs: more of attention and of an MLP where several rows are passed, since
    # their products are split and added up; more of an attention in a group on several devices;
    # fewer for each further layer of a group on the same device, whose products of one row are one
    # (where heads are split or rows are several at most one fewer: what all read is squared once).
    rows_kernels: float = 0
    group_kernels: float = 0
    shared_kernels: float = 0
    # Of trees: more of each layer whose entries of the path are kept, more of a level that grows.
    keep_kernels: float = 0
    grow_kernels: float = 0
    score: float = 0.0  # seconds per attention score (row x head x cache entry), softmax and all
    logit: float = 0.0  # seconds per number that sampling looks at
    collective: float = 0.0  # seconds of the smallest all-reduce between two devices
    hop: float = 0.0  # more for each device behind the second
    link: float = math.inf  # bytes a second into a device
    step: float = 0.0  # seconds between two steps: what the host does
    # of compiled programs whose every kernel is known (`program.report`), in seconds
    least: float = 0.0  # what a kernel in a CUDA graph takes, however small
    launch: float = 0.0  # more for each graph, and for what is launched outside of one
    sync: float = 0.0  # more wherever the host reads a value before it goes on
    overlapped: bool = False  # the host launches while the device works: the slower of both counts

    def __post_init__(self):
        rules = {
            "name": (isinstance(self.name, str), "a text"),
            "dtype": (self.dtype in DTYPES, f"one of {', '.join(DTYPES)}"),
            "overlapped": (isinstance(self.overlapped, bool), "true or false"),
            "products": (_rise(self.products), "(rows, seconds per byte, seconds), rows rising"),
        }
        for field in dataclasses.fields(self):
            name, value = field.name, getattr(self, field.name)
            if name in _WITHOUT_BOUND:
                fits = value == math.inf or (_is_finite(value) and value > 0)
                what = "a number above 0"
            elif field.type == "float":
                fits, what = _is_finite(value) and value >= 0, "a number of at least 0"
            else:
                fits, what = rules[name]
            if not fits:
                raise ValueError(f"{name} of a device must be {what}, got {value!r}")

    def product(self, weight_bytes: float, rows: float, itemsize: float, count: int = 1) -> float:
        """Seconds of multiplying `rows` rows with weights of so many bytes in all, in `count`
        products: the roofline, or between what was measured.
        """
        if not self.products:
            work = 2 * rows * weight_bytes / itemsize
            return max(weight_bytes / self.bandwidth, work / self.flops)
        per_byte, beside = _interpolated(self.products, rows)
        return weight_bytes * per_byte + count * beside

    def exchange(self, num_bytes: float, devices: int, *, rounds: int) -> float:
        """Seconds until each of so many devices has an array of so many bytes, of which a share
        goes around in each round: one of an all-gather, two of an all-reduce.
        """
        if devices == 1:
            return 0.0
        received = rounds * (devices - 1) / devices * num_bytes
        return self.collective + self.hop * (devices - 2) + received / self.link

    def as_dict(self) -> dict[str, Any]:
        """All fields, for JSON; what is without bound is left out."""
        values = dataclasses.asdict(self)
        return {name: value for name, value in values.items() if value != math.inf}


def _interpolated(points: tuple[tuple[int, float, float], ...], rows: float) -> list[float]:
    """What was measured, at so many rows: linear between points; behind the last the time per byte
    grows as it did before, if it did.
    """
    if rows <= points[0][0]:
        return list(points[0][1:])
    if rows >= points[-1][0]:
        (n, last, beside), (before, previous, _) = points[-1], points[max(len(points) - 2, 0)]
        slope = max(last - previous, 0.0) / max(n - before, 1)
        return [last + slope * (rows - n), beside]
    i = next(i for i, point in enumerate(points) if point[0] >= rows)
    below, above = points[i - 1], points[i]
    share = (rows - below[0]) / (above[0] - below[0])
    return [a + (b - a) * share for a, b in zip(below[1:], above[1:], strict=True)]


# Kernels of a layer and of a pass (what commits a step among them) as XLA compiles them for H200;
# `tests/test_plan_programs.py` holds them against kept ones.
_PROGRAM: dict[str, Any] = {
    **{"attention_kernels": 9, "mlp_kernels": 4, "pass_kernels": 14},
    **{"rows_kernels": 1, "group_kernels": 1, "shared_kernels": 4},
    **{"keep_kernels": 2, "grow_kernels": 12},
}
# Memory: of 80 or 141 GB the three quarters that jax takes unless it is told otherwise
# (XLA_PYTHON_CLIENT_MEM_FRACTION).
# A100 (SXM, 80 GB). Bandwidth: 1.7e12 is what gpt-fast's authors saw of 2.04e12 at 330 W; kernel,
# collective and hop are fitted to three of their figures (Llama-3.1-8B on 1, 2 and 8 GPUs), see
# `experiments/published.py`, which predicts all others. Hopper devices: the same share of what they
# are sold with and the same kernels; collectives fitted to measurements of custom all-reduces of 4
# to 256 KB (sglang issue 2904). `score` and `logit`: three passes over float32 numbers. `least`,
# `launch` and `sync`: a kernel of half a million numbers on a V100 takes 3.4 us in a CUDA graph,
# 3.8 us launched behind another, 9.6 us when the host waits for each (NVIDIA, "Getting Started with
# CUDA Graphs"); later devices will be somewhat faster, by how much is not known here.
_A100 = Device(
    **_PROGRAM, name="a100", bandwidth=1.7e12, flops=0.6 * 312e12, memory=0.75 * 80e9,
    kernel=4.13e-6, score=8e-12, logit=8e-12, collective=7e-6, hop=0.57e-6, link=4e10, step=3e-5,
    least=3.4e-6, launch=0.4e-6, sync=5.8e-6,
)  # fmt: skip
_EAGER = dataclasses.replace(
    _A100, name="a100-eager", kernel=19.1e-6, attention_kernels=26, mlp_kernels=14,
    pass_kernels=23, rows_kernels=0, group_kernels=0, shared_kernels=0, keep_kernels=0,
    grow_kernels=0, step=0.0, overlapped=True,
)  # fmt: skip
_H100 = Device(
    **_PROGRAM, name="h100", bandwidth=0.83 * 3.35e12, flops=0.6 * 989e12, memory=0.75 * 80e9,
    kernel=4.13e-6, score=5e-12, logit=5e-12, collective=3.35e-6, hop=0.38e-6, link=4.6e10,
    step=3e-5, least=3.4e-6, launch=0.4e-6, sync=5.8e-6,
)  # fmt: skip
_H200 = dataclasses.replace(
    _H100, name="h200", bandwidth=0.83 * 4.8e12, memory=0.75 * 141e9, score=3e-12, logit=3e-12
)
PRESETS = {device.name: device for device in (_A100, _EAGER, _H100, _H200)}


def read_device(name: str) -> Device:
    """A preset, or the device that a JSON file describes (fields of `Device`, or a document of
    `easyspec plan --json`).

    Raises:
      ValueError: neither a preset nor a file that describes a device.
    """
    if name in PRESETS:
        return PRESETS[name]
    path = pathlib.Path(name)
    if not path.is_file():
        raise ValueError(
            f"unknown device {name!r}: use {', '.join(PRESETS)}, or a JSON file of one"
        )
    values = read_object(path)
    values = values.get("device", values)
    if not isinstance(values, dict) or not {"name", "bandwidth", "flops"} <= values.keys():
        raise ValueError(f"{path} describes no device: it needs name, bandwidth and flops at least")
    unknown = values.keys() - {field.name for field in dataclasses.fields(Device)}
    if unknown:
        raise ValueError(f"{path} has unknown fields: {', '.join(sorted(unknown))}")
    for key, value in values.items():
        if value == math.inf:
            raise ValueError(f"{path}: {key} must be finite")
    fields: dict[str, Any] = dict(values)
    if isinstance(points := fields.get("products"), list):
        fields["products"] = tuple(tuple(p) if isinstance(p, list) else p for p in points)
    try:
        return Device(**fields)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None

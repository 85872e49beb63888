"""What the compiler is asked for beside its defaults: values of a decoder, not of an environment.

Levels say how much of a step a GPU's host hands over as CUDA graphs. The default is the
compiler's own; the others were read in compiled programs (`easyspec program --graphs LEVEL`) and
wait for a clock. On CPUs there are no levels, but a few rows are multiplied by another library
(unless matrices are bfloat16, see `bfloat16`).
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import types
from collections.abc import Mapping
from typing import Any

import jax
from jax.sharding import AbstractMesh, Mesh

from easyspec_jax.sharding import has_gpus, platform_of

logger = logging.getLogger("easyspec_jax")

_CAPTURED = "FUSION,CUBLAS,CUBLASLT,CUDNN,CUSTOM_CALL,DYNAMIC_SLICE_FUSION,CONDITIONAL"
# "loop": the whole loop is one graph, its condition read on the device. "collectives": the sums
# between devices stand in graphs too; reports of hangs are the reason to measure first.
_LEVELS: dict[str, dict[str, Any]] = {
    "default": {},
    "loop": {
        "xla_gpu_enable_command_buffer": f"{_CAPTURED},WHILE",
        "xla_gpu_graph_min_graph_size": 1,
    },
    "collectives": {"xla_gpu_enable_command_buffer": f"{_CAPTURED},COLLECTIVES"},
    "all": {
        "xla_gpu_enable_command_buffer": f"{_CAPTURED},WHILE,COLLECTIVES",
        "xla_gpu_graph_min_graph_size": 1,
    },
}
LEVELS = tuple(_LEVELS)
# What is a choice for a whole program: YNNPACK, the default, takes longer than Eigen for 2 to some
# 40 rows of a model of 1.1B (4 rows: 2.1 and 1.5 times one row), for 2 and 4 of one of 135M, where
# 8 to 32 are much the same; and less for longer prompts.
_EIGEN: dict[str, Any] = {"xla_cpu_experimental_ynn_fusion_type": ""}
_EIGEN_ROWS = 32


@dataclasses.dataclass(frozen=True)
class CompileOptions:
    """How decoding loops are compiled.

    Args:
      graphs: of LEVELS, what stands in CUDA graphs.
      more: options of XLA by name, on any platform; they go before the level's.

    Raises:
      ValueError: an unknown level, or options that are no mapping of names.
    """

    graphs: str = "default"
    more: Mapping[str, Any] = dataclasses.field(default_factory=dict, hash=False)

    def __post_init__(self):
        if self.graphs not in LEVELS:
            names = ", ".join(map(repr, LEVELS))
            raise ValueError(f"graphs must be one of {names}, got {self.graphs!r}")
        pairs = self.more.items() if isinstance(self.more, Mapping) else [(None, None)]
        sound = all(isinstance(k, str) and isinstance(v, str | int | float) for k, v in pairs)
        if not sound:
            raise ValueError(
                f"more must map names of XLA options to texts or numbers, got {self.more!r}"
            )
        object.__setattr__(self, "more", types.MappingProxyType(dict(self.more)))

    def on(self, mesh: Mesh | AbstractMesh, rows: int = 1) -> tuple[tuple[str, Any], ...]:
        """What to compile with for the devices of a mesh, in the order of names; what this jaxlib
        does not know is left out, and one log line says so.

        Args:
          rows: most tokens of a text that a pass of the program multiplies with weights.
        """
        on_cpu = platform_of(mesh) == "cpu"
        few: dict[str, Any] = _EIGEN if on_cpu and 1 < rows <= _EIGEN_ROWS else {}
        level = _LEVELS[self.graphs] if has_gpus(mesh) else few
        wanted = {**level, **self.more}
        return tuple((name, wanted[name]) for name in sorted(wanted) if _known(name, wanted[name]))


@functools.lru_cache(maxsize=None, typed=True)
def _known(name: str, value: Any) -> bool:
    """Whether this jaxlib has the option, with such a value."""
    try:
        jax.jit(lambda: 0).lower().compile(compiler_options={name: value})
    except (jax.errors.JaxRuntimeError, RuntimeError, ValueError, TypeError) as error:
        reason = str(error).splitlines()[0]
        level = logging.DEBUG if name in _EIGEN else logging.WARNING  # one that nobody asked for
        logger.log(level, "left out: this jaxlib does not take %s=%r (%s)", name, value, reason)
        return False
    return True

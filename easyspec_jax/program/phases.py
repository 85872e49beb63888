"""Which phase of a step a launch belongs to, and which part of a layer, head or tail it is.

Phases are named scopes; but a draft's first level takes its logits from calibration, so they count
there, and what repeats with the draft's levels is one level. Parts are told by the weights and
cache entries that a launch reads, and else by what made its operands: the compiler's fusions have
no names for them.
"""

from __future__ import annotations

import collections
import dataclasses
import re
from collections.abc import Iterable, Sequence

from easyspec_jax.loop import PHASES
from easyspec_jax.program import hlo

BLOCK = re.compile(r"block_\d+")
# The part of what reads a matrix, by the last name of the argument.
MATRICES = {
    "wqkv": "qkv", "wkv": "qkv", "wq": "qkv", "wk": "qkv", "wv": "qkv", "wo": "out",
    "w_gate_up": "gate, up", "w_gate": "gate, up", "w_up": "gate, up",
    "w_down": "down", "lm_head": "head", "embed": "embedding",
}  # fmt: skip
_SUMS = {*MATRICES.values(), "scores", "values"}
# The part of what reads the results of another part.
_BEHIND = {
    "scores": "softmax", "softmax": "values", "values": "values", "gate, up": "silu",
    "head": "sampling", "sampling": "sampling", "logits": "sampling", "qkv": "rotation",
    "rotation": "rotation", "out": "residual", "down": "residual",
}  # fmt: skip
PARTS = (
    "embedding", "norm", "qkv", "rotation", "cache update", "cache copy", "scores", "softmax",
    "values", "attention", "out", "gate, up", "silu", "down", "residual", "collective", "head",
    "logits", "sampling", "rest",
)  # fmt: skip


def place(scope: str) -> tuple[str, str]:
    """Phase and part ("embed", "block_3", "logits" or "") of an operation, from its scopes."""
    scopes = scope.split("/")
    phase = next((one for one in scopes if one in PHASES), "")
    # The last is the operation's own: "while" of the loop over the levels is none of them.
    if phase == "draft" and "while" not in scopes[scopes.index("draft") : -1]:
        phase = "calibrate"  # the first level's logits
    part = next((s for s in scopes if s in ("embed", "logits") or BLOCK.fullmatch(s)), "")
    return phase, part


def by_phase(launches: Sequence[hlo.Launch], levels: int) -> dict[str, list[hlo.Launch]]:
    """The launches of a step by phase, in order; "" for what is in none.

    Args:
      levels: draft levels behind the first. A loop over them of unknown length counts so many
        times, and of verifications compiled for several depths the deepest is taken: a step whose
        draft is not stopped early.
    """
    unknown, forward = _unknown(launches, levels), _forward(launches)
    found = collections.defaultdict(list)
    for one in launches:
        outer = one.loops[0] if one.loops else None
        phase = place(one.scope if outer is None else outer.scope)[0]
        if outer is not None and outer.name in forward and "draft" in outer.scope.split("/"):
            phase = "draft"
        times = one.times if outer is None else one.times * unknown.get(outer.name, 1)
        if times:
            found[phase].append(dataclasses.replace(one, times=times))
    return dict(found)


def turns(launches: Sequence[hlo.Launch], levels: int) -> list[tuple[int, bool]]:
    """Of each loop in a step, in order, how many turns `by_phase` counts, and whether only the data
    say how many.
    """
    unknown = _unknown(launches, levels)
    loops = [one.op for one in launches if one.op.kind == "while"]
    return [
        (unknown.get(op.name, 1), True) if op.trips is None else (op.trips, False) for op in loops
    ]


def _forward(launches: Iterable[hlo.Launch]) -> set[str]:
    """Names of the loops in which layers run."""
    return {one.loops[0].name for one in launches if one.loops and BLOCK.search(one.scope)}


def _unknown(launches: Iterable[hlo.Launch], levels: int) -> dict[str, int]:
    """Turns of the loops of unknown length, by name, that are not one."""
    forward, found, verifications = _forward(launches), {}, []
    for one in launches:
        if one.op.kind != "while" or one.op.trips is not None or one.op.name not in forward:
            continue
        if "draft" in one.scope.split("/"):
            found[one.op.name] = max(levels, 1)
        elif place(one.scope)[0] == "verify":
            verifications.append(one.op.name)
    return found | dict.fromkeys(verifications[:-1], 0)


def parts(
    module: hlo.Module, launches: Iterable[hlo.Launch], entries: int
) -> dict[str, list[hlo.Launch]]:
    """The launches that count by part, in the order of PARTS.

    Args:
      entries: S, the capacity of the caches.
    """
    known: dict[str, str] = {}
    found = collections.defaultdict(list)
    for one in launches:
        if one.op.kind in hlo.CONTROL:
            continue
        known[one.op.name] = name = _part(module, one, known, entries)
        if one.counts:
            found[name].append(one)
    return {name: found[name] for name in PARTS if name in found}


def _part(module: hlo.Module, one: hlo.Launch, known: dict[str, str], entries: int) -> str:
    if one.op.target.startswith("__cudnn$fmha"):
        return "attention"
    if one.op.collective:
        return "logits" if place(one.scope)[1] == "logits" else "collective"
    inside = {op.kind for op in module.computations.get(module.fused(one.op), ())} | {one.op.kind}
    read = [re.split(r"[.\]]", name)[-1] for name in one.arguments]
    caches = [name for name in one.arguments if re.match(r"state\.(cache|draft)\b.*blocks", name)]
    product = next((MATRICES[name] for name in read if name in MATRICES), "")
    if product:
        looked_up = product in ("head", "embedding") and inside & {"gather", "dynamic-slice"}
        return "embedding" if looked_up else product
    if caches:
        if "dynamic-update-slice" in inside or "scatter" in inside:
            return "cache update"
        if any(kind in hlo.MOVES for kind, _ in hlo.copied(module, one.op)):
            return "cache copy"
        return "scores" if any(entries in shape.dims for shape in one.op.shapes) else "values"
    made = [known[name] for name in one.producers if name in known]
    if "gate, up" in made and inside & {"exponential", "logistic"}:
        return "silu"
    if one.scope.endswith("dot_general") and (sums := _SUMS & {*made}):  # of a product in pieces
        return max(sums, key=PARTS.index)
    behind = next((_BEHIND[name] for name in made if name in _BEHIND), "")
    if behind in ("rotation", "sampling"):  # the scale of a norm stands behind the product
        return behind
    if any("norm" in name for name in read) or "rsqrt" in inside:
        return "norm"
    if behind and (BLOCK.search(one.scope) or behind == "sampling"):
        return behind
    if one.scope.endswith("reduce_sum") and "reduce" in inside:
        return "norm"
    return "residual" if BLOCK.search(one.scope) and one.scope.endswith("/add") else "rest"

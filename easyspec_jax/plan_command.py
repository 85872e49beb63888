"""`easyspec plan`: every layout, group size, γ and w for a pair, priced and ranked."""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

import jax

from easyspec_jax.acceptance import Acceptance, read_acceptance
from easyspec_jax.chain import plan_chain
from easyspec_jax.cost import PHASES
from easyspec_jax.device import Device, read_device
from easyspec_jax.info import read_config
from easyspec_jax.measure import measure_device
from easyspec_jax.plan import Choice, Plan, Planner

KINDS = ("one device", "tensor parallel", "groups")
_TERMS = {
    "weights": "products with weights",
    "attention": "caches and scores",
    "sampling": "logits",
    "kernels": "launches and gaps",
    "collectives": "collectives",
    "host": "the host",
}


def run(args: argparse.Namespace) -> int:
    """Plan as the arguments say and print the outcome."""
    if args.chain is not None:
        _check_alone(args)
        print(plan_chain(args.chain, as_json=args.json))
        return 0
    _check(args)
    base, draft = (read_config(path)[0] for path in (args.base, args.draft))
    if not 2 <= args.max_len <= base.context:
        limit = f"2 .. {base.context}, the base's context"
        raise ValueError(f"--max-len must be in {limit}, got {args.max_len}")
    acceptance = Acceptance() if args.acceptance is None else read_acceptance(args.acceptance)
    num_devices, dtype = args.num_devices, args.dtype
    if args.measure:
        print("measuring this machine ...", file=sys.stderr)
        device = measure_device(dtype)
        num_devices = num_devices or jax.device_count()
        dtype = dtype or ("float32" if jax.devices()[0].platform == "cpu" else "bfloat16")
    else:
        collective = None if args.collective_us is None else 1e-6 * args.collective_us
        kernel = None if args.kernel_us is None else 1e-6 * args.kernel_us
        device = read_device(args.device, kernel=kernel, collective=collective)
    planner = Planner(
        base=base,
        draft=draft,
        device=device,
        acceptance=acceptance,
        dtype=dtype or "bfloat16",
        batch=args.batch,
        max_len=args.max_len,
    )
    choices = {
        "num_draft_tokens": args.num_draft_tokens,
        "tree_widths": args.tree_width,
        "group_sizes": args.group_size,
    }
    given = {name: values for name, values in choices.items() if values is not None}
    plan = planner.plan(num_devices or 1, **given)
    if args.json:
        print(json.dumps(document(planner, plan, args.top)))
    else:
        print("\n".join(report(planner, plan, args.top)))
    return 0


def _check_alone(args: argparse.Namespace) -> None:
    options = ("base", "draft", "device", "measure", "num_devices", "kernel_us", "collective_us")
    options += ("acceptance", "num_draft_tokens", "tree_width", "group_size", "dtype")
    for name in options:
        if getattr(args, name) not in (None, False):
            option = name.replace("_", "-")
            raise ValueError(f"--chain prices what its file says: leave out --{option}")


def _check(args: argparse.Namespace) -> None:
    if args.base is None or args.draft is None:
        raise ValueError("name a --base and a --draft, or a --chain")
    if args.measure == (args.device is not None):
        raise ValueError("name a --device, or --measure this machine: one of the two")
    if args.measure and (args.kernel_us is not None or args.collective_us is not None):
        raise ValueError("--kernel-us and --collective-us change a --device, not what is measured")
    for name in ("num_devices", "batch", "top"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be at least 1, got {value}")
    for name in ("num_draft_tokens", "tree_width", "group_size"):
        values = getattr(args, name)
        if values is not None and min(values) < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be at least 1, got {min(values)}")
    for name in ("kernel_us", "collective_us"):
        value = getattr(args, name)
        if value is not None and not 0 <= value < 1e6:
            raise ValueError(f"--{name.replace('_', '-')} must be microseconds, got {value:g}")


def document(planner: Planner, plan: Plan, top: int) -> dict[str, Any]:
    """The plan for JSON; times are seconds."""
    kinds = {kind: plan.fastest(kind) for kind in KINDS}
    return {
        "device": planner.device.as_dict(),
        "acceptance": vars(planner.acceptance),
        "dtype": planner.dtype,
        "batch": planner.batch,
        "max_len": planner.max_len,
        "considered": len(plan.choices),
        "too_large": plan.refused,
        "autoregression": plan.autoregression.as_dict(),
        "choices": [choice.as_dict() for choice in plan.by_layout()[:top]],
        "fastest_of_kind": {kind: c.as_dict() for kind, c in kinds.items() if c is not None},
        "speedup": plan.autoregression.token_seconds / plan.best.token_seconds,
    }


def report(planner: Planner, plan: Plan, top: int) -> list[str]:
    """The plan in words, line by line."""
    plain, best = plan.autoregression, plan.best
    lines = [
        f"device          {describe(planner.device)}",
        f"acceptance      {_describe_acceptance(planner.acceptance)}",
        f"choices         {len(plan.choices)}, {plan.refused} more need too much memory",
        f"autoregression  {1e3 * plain.token_seconds:.2f} ms a token, tensor parallel over "
        f"{plain.layout.devices}, bound by {_TERMS[plain.bound]}",
        "",
    ]
    head = (
        "rank",
        "draft",
        "devices",
        "gamma",
        "w",
        "tokens/step",
        "step ms",
        "ms/token",
        "speed-up",
    )
    lines.append(_row(*head, "how"))
    ranked = plan.by_layout()
    shown = enumerate(ranked[:top], 1)
    lines += [_choice_row(str(rank), choice, plain) for rank, choice in shown]
    lines += ["", "the fastest of each kind"]
    for kind in KINDS:
        choice = plan.fastest(kind)
        if choice is not None:
            lines.append(_choice_row(str(ranked.index(choice) + 1), choice, plain))
    lines += ["", "where a step of the best goes, ms"]
    lines.append("".join(f"{name:>13}" for name in ("", *PHASES, "step", "share")))
    for term, value in best.cost.as_dict().items():
        cells = [best.phases[phase].as_dict()[term] for phase in PHASES]
        shown = [f"{1e3 * cell:.2f}" for cell in (*cells, value)]
        share = f"{value / best.cost.seconds:.0%}"
        lines.append("".join(f"{cell:>13}" for cell in (term, *shown, share)))
    lines.append("")
    lines.append(f"It is bound by {_TERMS[best.bound]}.{_drafting(plan)}")
    return lines


def describe(device: Device) -> str:
    """A device's constants in a line."""
    parts = [f"{device.name}: {device.bandwidth / 1e9:.0f} GB/s"]
    parts.append(f"{device.flops / 1e12:.3g} Tflop/s")
    if device.kernel:
        launched = " by the host" if device.overlapped else ""
        parts.append(f"kernel {1e6 * device.kernel:.3g} us{launched}")
    if device.collective:
        more = f" + {1e6 * device.hop:.2g} us a device" if device.hop else ""
        parts.append(f"all-reduce {1e6 * device.collective:.3g} us{more}")
    return ", ".join(parts)


def _describe_acceptance(acceptance: Acceptance) -> str:
    lost, width = acceptance.stale_loss, acceptance.sibling
    return (
        f"{acceptance.rate:.2f} of the exact draft's tokens, {lost:.1%} of them lost per layer "
        f"read back, misses of a tree w ** -{width:.2f} of a chain's"
    )


def _row(*cells: str) -> str:
    widths = (5, 16, 8, 6, 3, 12, 9, 9, 9)
    fixed = "".join(f"{cell:>{n}}" for cell, n in zip(cells, widths, strict=False))
    return f"{fixed}  {cells[-1]}"


def _choice_row(rank: str, choice: Choice, plain: Choice) -> str:
    numbers = (choice.cost.seconds, choice.token_seconds)
    return _row(
        rank,
        choice.layout.draft,
        str(choice.layout.devices),
        str(choice.num_draft_tokens),
        str(choice.tree_width),
        f"{choice.tokens_per_step:.2f}",
        *(f"{1e3 * seconds:.2f}" for seconds in numbers),
        f"{plain.token_seconds / choice.token_seconds:.2f}x",
        choice.layout.options(),
    )


def _drafting(plan: Plan) -> str:
    """How groups compare with an exact draft of the same γ and w, in a sentence."""
    best = plan.best
    if best.layout.draft != "groups":
        return ""
    same = [
        c
        for c in plan.choices
        if c.layout.draft in ("one device", "tensor parallel")
        and (c.num_draft_tokens, c.tree_width) == (best.num_draft_tokens, best.tree_width)
    ]
    if not same:
        return ""
    exact = min(same, key=lambda choice: choice.drafting)
    gain = exact.drafting / best.drafting
    return (
        f" Drafting takes {1e3 * best.drafting:.2f} ms, {gain:.2f} times faster than with the "
        f"fastest exact draft ({exact.layout.options()})."
    )

"""`easyspec plan`: every layout, group size, γ and w for a pair, priced and ranked."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import sys
from typing import Any

import jax

from easyspec_jax.chain import plan_chain
from easyspec_jax.cli.arguments import DEFAULT_SESSION, check_positive
from easyspec_jax.cli.info import read_config
from easyspec_jax.planner.acceptance import Acceptance, read_acceptance
from easyspec_jax.planner.cost import PHASES
from easyspec_jax.planner.device import Device, read_device
from easyspec_jax.planner.measure import measure_device
from easyspec_jax.planner.plan import Choice, Plan, Planner
from easyspec_jax.request import check_tokenizers

MAX_BATCH = 1024
TOP = 10  # choices that are shown by default
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
    (base, about), (draft, other) = (read_config(path) for path in (args.base, args.draft))
    check_tokenizers(about.get("tokenizer"), other.get("tokenizer"))
    max_len = min(base.context, DEFAULT_SESSION) if args.max_len is None else args.max_len
    if not 2 <= max_len <= base.context:
        limit = f"2 .. {base.context}, the base's context"
        raise ValueError(f"--max-len must be in {limit}, got {max_len}")
    acceptance = Acceptance()
    if args.acceptance is not None:
        acceptance = read_acceptance(args.acceptance, draft.num_layers)
    planner = Planner(
        base=base,
        draft=draft,
        device=_find_device(args),
        acceptance=acceptance,
        batch=args.batch or 1,
        max_len=max_len,
    )
    choices = {
        "num_draft_tokens": args.num_draft_tokens,
        "tree_widths": args.tree_width,
        "group_sizes": args.group_size,
    }
    given = {name: values for name, values in choices.items() if values is not None}
    num_devices = args.num_devices or (jax.device_count() if args.measure else 1)
    plan = planner.plan(num_devices, **given)
    if args.json:
        print(json.dumps(document(planner, plan, args.top or TOP)))
    else:
        print("\n".join(report(planner, plan, args.top or TOP)))
    return 0


def _find_device(args: argparse.Namespace) -> Device:
    """The device that the arguments name, or this machine's."""
    if args.measure:
        there = jax.device_count()
        if (args.num_devices or 1) > there:
            raise ValueError(
                f"--measure finds {there} devices here, so it cannot say what {args.num_devices} "
                "exchange: name a --device"
            )
        print("measuring this machine ...", file=sys.stderr)
        device = measure_device(args.dtype)
    else:
        costs = {"kernel": args.kernel_us, "collective": args.collective_us}
        seconds = {name: None if us is None else 1e-6 * us for name, us in costs.items()}
        device = read_device(args.device, **seconds)
    if args.device_memory is None:
        return device
    return dataclasses.replace(device, memory=args.device_memory * 2**30)


def _check_alone(args: argparse.Namespace) -> None:
    options = ("base", "draft", "device", "measure", "num_devices", "kernel_us", "collective_us")
    options += ("acceptance", "num_draft_tokens", "tree_width", "group_size", "dtype", "max_len")
    options += ("device_memory", "batch", "top")
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
    if args.dtype is not None and not args.measure:
        raise ValueError("--dtype needs --measure: a --device holds for one type of weights")
    names = ("num_devices", "batch", "top", "num_draft_tokens", "tree_width", "group_size")
    check_positive(args, *names)
    if args.batch is not None and args.batch > MAX_BATCH:
        raise ValueError(f"--batch must be at most {MAX_BATCH}, got {args.batch}")
    for name in ("kernel_us", "collective_us"):
        value = getattr(args, name)
        if value is not None and not 0 <= value < 1e6:
            raise ValueError(f"--{name.replace('_', '-')} must be microseconds, got {value:g}")
    if args.device_memory is not None and not 0 < args.device_memory < math.inf:
        raise ValueError(f"--device-memory must be a size above 0, got {args.device_memory:g}")


def document(planner: Planner, plan: Plan, top: int) -> dict[str, Any]:
    """The plan for JSON; times are seconds."""
    kinds = {kind: plan.fastest(kind) for kind in KINDS}
    return {
        "device": planner.device.as_dict(),
        "acceptance": vars(planner.acceptance),
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
        f"{acceptance.rate:.2f} of the exact draft's tokens, {lost:.1%} lost by each layer "
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
        choice.options(),
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

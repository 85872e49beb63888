"""`easyspec plan`: every deployment, group size, γ and w for a pair, priced and ranked."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from typing import TYPE_CHECKING, Any

import jax

from easyspec_jax.checkpoint import agreed_quantization
from easyspec_jax.cli import drafting
from easyspec_jax.cli.options import (
    COUNT,
    COUNTS,
    add_device,
    add_dtype,
    add_quantization,
    add_requests,
    given,
    max_len,
)
from easyspec_jax.planner.device import Device, read_device
from easyspec_jax.request import check_tokenizers
from easyspec_jax.sources import read_config

if TYPE_CHECKING:  # the planner takes a while to import: only the command itself does
    from easyspec_jax.planner.acceptance import Acceptance
    from easyspec_jax.planner.plan import Choice, Plan, Planner

HELP = "which layout, groups and tree, from configurations"
PLACEMENTS = ("one device", "tensor parallel", "groups")  # of a draft; the best of each is shown
_TERMS = {
    "weights": "products with weights",
    "attention": "caches and scores",
    "sampling": "logits",
    "kernels": "launches and gaps",
    "collectives": "collectives",
    "host": "the host",
}
_COLUMNS = {  # and their widths
    "rank": 5, "draft": 16, "devices": 8, "gamma": 6, "w": 3, "tokens/step": 12, "step ms": 9,
    "ms/token": 9, "speed-up": 9,
}  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The pair, the devices, what to consider, the requests."""
    add = parser.add_argument
    add("--base", required=True, metavar="MODEL", help="the base, or its config.json")
    add("--draft", required=True, metavar="MODEL", help="the draft")
    add("--measure", action="store_true", help="measure the machine at hand instead of a --device")
    add_device(add, "kind of device", "default: 1; with --measure all there are")
    add_dtype(add, "of the weights, with --measure; ")
    rates = "share of the exact draft's tokens that is accepted, or a file of measured runs"
    add_quantization(add)
    drafting.add_option(add, "draft_quantization")
    add("--acceptance", metavar="RATE|FILE", help=f"{rates} (default 0.8)")
    add("--num-draft-tokens", **COUNTS, help="those to consider")
    add("--tree-width", **COUNTS, dest="tree_widths", help="those to consider")
    add("--group-size", **COUNTS, dest="group_sizes", help="those to consider")
    add_requests(add, memory=" that a program may use (default: the device's)")
    add("--top", **COUNT, default=10, help="choices to show (default 10)")
    add("--json", action="store_true", help="all of it as one JSON document")


def run(args: argparse.Namespace) -> int:
    """Plan as the arguments say and print the outcome."""
    from easyspec_jax.planner.acceptance import Acceptance, read_acceptance
    from easyspec_jax.planner.plan import Planner

    if args.measure == (args.device is not None):
        raise ValueError("name a --device, or --measure this machine: one of the two")
    if args.dtype is not None and not args.measure:
        raise ValueError("--dtype needs --measure: a --device holds for one type of weights")
    (base, about), (draft, other) = (read_config(path) for path in (args.base, args.draft))
    check_tokenizers(about.get("tokenizer"), other.get("tokenizer"))
    acceptance = Acceptance()
    if args.acceptance is not None:
        acceptance = read_acceptance(args.acceptance, draft.num_layers)
    codes = {
        "base_codes": agreed_quantization(about, args.quantization, args.base),
        "draft_codes": agreed_quantization(other, args.draft_quantization, args.draft),
    }
    if args.measure and jax.default_backend() == "cpu":
        codes = {}  # weights are rounded there and stay floats
    planner = Planner(
        base=base,
        draft=draft,
        max_len=max_len(args, base),
        device=_find_device(args),
        acceptance=acceptance,
        batch=args.batch,
        kv_dtype=args.kv_dtype,
        **codes,
    )
    num_devices = args.num_devices or (jax.device_count() if args.measure else 1)
    choices = given(args, "num_draft_tokens", "tree_widths", "group_sizes")
    plan = planner.plan(num_devices, **choices)
    if args.json:
        print(json.dumps(document(planner, plan, args.top)))
    else:
        print("\n".join(report(planner, plan, args.top)))
    return 0


def _find_device(args: argparse.Namespace) -> Device:
    """The device that the arguments name, or this machine's."""
    if not args.measure:
        device = read_device(args.device)
    else:
        from easyspec_jax.planner.measure import measure_device

        there = jax.device_count()
        if (args.num_devices or 1) > there:
            raise ValueError(
                f"--measure finds {there} devices here, so it cannot say what {args.num_devices} "
                "exchange: name a --device"
            )
        print("measuring this machine ...", file=sys.stderr)
        device = measure_device(args.dtype)
    if args.device_memory is None:
        return device
    return dataclasses.replace(device, memory=args.device_memory * 2**30)


def document(planner: Planner, plan: Plan, top: int) -> dict[str, Any]:
    """The plan for JSON; times are seconds."""
    fastest = {placement: plan.fastest(placement) for placement in PLACEMENTS}
    return {
        "device": planner.device.as_dict(),
        "acceptance": vars(planner.acceptance),
        "batch": planner.batch,
        "max_len": planner.max_len,
        "considered": len(plan.choices),
        "too_large": plan.refused,
        "autoregression": plan.autoregression.as_dict(),
        "choices": [choice.as_dict() for choice in plan.by_deployment()[:top]],
        "fastest_of_kind": {name: c.as_dict() for name, c in fastest.items() if c is not None},
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
        f"{plain.deployment.devices}, bound by {_TERMS[plain.bound]}",
        "",
        _row(*_COLUMNS, "how"),
    ]
    ranked = plan.by_deployment()
    lines += [_choice_row(rank, choice, plain) for rank, choice in enumerate(ranked[:top], 1)]
    lines += ["", "the fastest of each kind"]
    for placement in PLACEMENTS:
        choice = plan.fastest(placement)
        if choice is not None:
            lines.append(_choice_row(ranked.index(choice) + 1, choice, plain))
    lines += ["", "where a step of the best goes, ms"]
    lines.append("".join(f"{name:>13}" for name in ("", *best.phases, "step", "share")))
    for term, value in best.cost.as_dict().items():
        cells = [phase.as_dict()[term] for phase in best.phases.values()]
        times = [f"{1e3 * cell:.2f}" for cell in (*cells, value)]
        share = f"{value / best.cost.seconds:.0%}"
        lines.append("".join(f"{cell:>13}" for cell in (term, *times, share)))
    return [*lines, "", f"It is bound by {_TERMS[best.bound]}.{_drafting(plan)}"]


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
    fixed = "".join(f"{cell:>{n}}" for cell, n in zip(cells, _COLUMNS.values(), strict=False))
    return f"{fixed}  {cells[-1]}"


def _choice_row(rank: int, choice: Choice, plain: Choice) -> str:
    return _row(
        str(rank),
        choice.deployment.draft,
        str(choice.deployment.devices),
        str(choice.num_draft_tokens),
        str(choice.tree_width),
        f"{choice.tokens_per_step:.2f}",
        f"{1e3 * choice.cost.seconds:.2f}",
        f"{1e3 * choice.token_seconds:.2f}",
        f"{plain.token_seconds / choice.token_seconds:.2f}x",
        choice.options(),
    )


def _drafting(plan: Plan) -> str:
    """How groups compare with an exact draft of the same γ and w, in a sentence."""
    best = plan.best
    if best.deployment.draft != "groups":
        return ""
    same = [
        c
        for c in plan.choices
        if c.deployment.draft in ("one device", "tensor parallel")
        and (c.num_draft_tokens, c.tree_width) == (best.num_draft_tokens, best.tree_width)
    ]
    if not same:
        return ""
    exact = min(same, key=lambda choice: choice.drafting)
    gain = exact.drafting / best.drafting
    return (
        f" Drafting takes {1e3 * best.drafting:.2f} ms, {gain:.2f} times faster than with the "
        f"fastest exact draft ({exact.deployment.options()})."
    )

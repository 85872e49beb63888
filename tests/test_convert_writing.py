"""What conversion leaves on disk: a whole checkpoint or nothing, whoever else writes there."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import threading
import time

import filelock
import ml_dtypes
import pytest
from hf_models import (
    load_all,
    load_part,
    real_model,
    run,
    tiny_config,
    without_logs,
    write_hf_folder,
)

from convert import write
from convert.__main__ import main
from easyspec_jax import checkpoint

ROOT = pathlib.Path(__file__).parent.parent


@pytest.fixture
def folder(tmp_path) -> pathlib.Path:
    return write_hf_folder(tmp_path / "hf", tiny_config("llama"))


def test_targets_and_options_that_are_refused(folder, tmp_path):
    with pytest.raises(ValueError, match="dtype 'int8' is not one of float32"):
        run(folder, tmp_path / "out", dtype="int8")
    with pytest.raises(FileExistsError, match="is not an empty folder"):
        run(folder, folder)
    (tmp_path / "empty").mkdir()
    assert run(folder, tmp_path / "empty") == tmp_path / "empty"
    with pytest.raises(FileNotFoundError, match="neither a folder, a GGUF file nor a hub id"):
        run(tmp_path / "nowhere", tmp_path / "out")


def test_targets_that_the_rename_would_not_replace_are_refused_first(tmp_path, monkeypatch):
    monkeypatch.delattr("convert.write._open")
    empty = tmp_path / "empty"
    empty.mkdir()
    (tmp_path / "link").symlink_to(empty, target_is_directory=True)
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    for name in ("link", "dangling"):
        with pytest.raises(FileExistsError, match="is a symlink; name a folder that does not"):
            run("src", tmp_path / name)
    monkeypatch.chdir(empty)
    with pytest.raises(FileExistsError, match="is the current folder; name a folder"):
        run("src", ".")
    monkeypatch.chdir(tmp_path)

    def busy(self):
        raise OSError(errno.EBUSY, os.strerror(errno.EBUSY))  # what a mount point says

    monkeypatch.setattr(pathlib.Path, "rmdir", busy)
    with pytest.raises(FileExistsError, match=r"empty but cannot be replaced \(.*busy\); name a"):
        run("src", empty)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["dangling", "empty", "link"]


def test_an_error_while_writing_leaves_nothing(folder, tmp_path, monkeypatch):
    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(checkpoint, "save_part", fail)
    with pytest.raises(OSError, match="disk full"):
        run(folder, tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["hf"]


def test_only_folders_that_nobody_writes_are_removed(folder, tmp_path):
    """Whose they are no number says: a process of another container may have any."""
    dead, alive = tmp_path / f".out.tmp-{os.getpid()}", tmp_path / ".out.tmp-1"
    other = tmp_path / ".other.tmp-2"
    for path in (dead, alive, other):
        path.mkdir()
    with filelock.FileLock(alive / write._LOCK):
        run(folder, tmp_path / "out")
        assert (dead.exists(), alive.exists(), other.exists()) == (False, True, True)


def test_conversions_to_one_place_do_not_meet(folder, tmp_path, monkeypatch):
    """The second begins while the first has written half; one of them wins, with all its parts."""
    outcomes, save_part = [], checkpoint.save_part

    def convert():
        try:
            outcomes.append(run(folder, tmp_path / "out"))
        except FileExistsError as error:
            outcomes.append(str(error))

    second = threading.Thread(target=convert)

    def slow(temp, name, arrays):
        if name == checkpoint.layer_name(1) and threading.current_thread() is not second:
            second.start()
            second.join()
        return save_part(temp, name, arrays)

    monkeypatch.setattr(checkpoint, "save_part", slow)
    convert()
    late = f"{tmp_path / 'out'} has come to exist meanwhile, and is left so."
    assert outcomes == [tmp_path / "out", late]
    assert len(load_all(tmp_path / "out")) == 30
    assert {p.name for p in tmp_path.iterdir()} == {"hf", "out"}


def test_a_part_that_is_missing_is_noticed_before_the_end(folder, tmp_path, monkeypatch):
    save_part = checkpoint.save_part

    def losing(temp, name, arrays):
        if name == checkpoint.layer_name(2):
            shutil.rmtree(temp / checkpoint.layer_name(1))
        return save_part(temp, name, arrays)

    monkeypatch.setattr(checkpoint, "save_part", losing)
    with pytest.raises(ValueError, match="has 3 layers and 2 are stored"):
        run(folder, tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["hf"]


def test_an_interrupt_that_a_callback_swallows_ends_the_conversion(
    folder, tmp_path, monkeypatch, capsys
):
    save_part = checkpoint.save_part

    def interrupted(temp, name, arrays):
        with contextlib.suppress(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        return save_part(temp, name, arrays)

    monkeypatch.setattr(checkpoint, "save_part", interrupted)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # off in jobs
    try:
        assert main([str(folder), str(tmp_path / "out"), "--quiet"]) == 130
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)
    assert capsys.readouterr().err == "\n"
    assert [p.name for p in tmp_path.iterdir()] == ["hf"]


NO_SPACE = """
import resource, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000))
import signal
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
from convert.__main__ import main
sys.exit(main(sys.argv[1:]))
"""


def test_a_full_disk_is_one_sentence(folder, tmp_path):
    """A limit on the size of files stands for it; Orbax logs pages."""
    command = [sys.executable, "-c", NO_SPACE, str(folder), str(tmp_path / "out"), "--quiet"]
    done = subprocess.run(command, env=environment(), cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    said = without_logs(done.stderr)
    assert said.startswith("error: ") and said.count("\n") == 1, done.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["hf"]


def test_what_a_failed_writer_still_logs_is_not_shown(tmp_path, monkeypatch, caplog):
    from orbax.checkpoint import v1

    def complain():
        time.sleep(0.2)
        logging.getLogger("absl").error("a page")

    writer = threading.Thread(target=complain)

    def save(path, arrays):
        writer.start()
        raise OSError("no space")

    monkeypatch.setattr(v1, "save", save)
    with pytest.raises(OSError, match="no space"):
        checkpoint.save_part(tmp_path, checkpoint.layer_name(0), {})
    writer.join()
    assert not caplog.records


def test_the_command_line(folder, tmp_path, capsys):
    assert main([str(folder), str(tmp_path / "out"), "--dtype", "bfloat16", "--quiet"]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "out")
    assert load_part(tmp_path / "out", checkpoint.TOP_PART)["embed"].dtype == ml_dtypes.bfloat16
    assert main([str(folder), str(tmp_path / "out"), "--quiet"]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1


def environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}


@pytest.mark.slow
def test_a_killed_conversion_leaves_nothing_loadable(tmp_path):
    src = write_hf_folder(tmp_path / "hf", tiny_config("llama", num_hidden_layers=24))
    command = [sys.executable, "-m", "convert", str(src), str(tmp_path / "out"), "--quiet"]
    with subprocess.Popen(command, env=environment(), cwd=ROOT) as process:
        deadline = time.monotonic() + 60
        while not (found := list(tmp_path.glob(f".out.tmp-*/{checkpoint.layer_name(3)}"))):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.002)
        temp = found[0].parents[1]
        process.send_signal(signal.SIGKILL)
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match="is not a converted checkpoint"):
        checkpoint.read_metadata(temp)
    run(src, tmp_path / "out")
    assert not temp.exists() and (tmp_path / "out" / checkpoint.METADATA_FILE).exists()


MEASURE = """
import sys, threading, time
peak = 0
def watch():
    global peak
    while True:
        lines = open("/proc/self/status").read().split("RssAnon:")[1]
        peak = max(peak, int(lines.split()[0]) * 1024)
        time.sleep(0.002)
threading.Thread(target=watch, daemon=True).start()
from convert.__main__ import main
assert main(sys.argv[1:]) == 0
print(peak)
"""


@pytest.mark.real
@pytest.mark.slow
@pytest.mark.skipif(not pathlib.Path("/proc/self/status").exists(), reason="needs Linux's /proc")
def test_memory_stays_at_a_few_times_the_largest_part(tmp_path):
    src = real_model("tinyllama-1.1b")
    command = [sys.executable, "-c", MEASURE, str(src), str(tmp_path / "out"), "--quiet"]
    done = subprocess.run(
        command, env=environment(), cwd=ROOT, check=True, capture_output=True, text=True
    )
    embedding = 32000 * 2048 * 2
    assert int(done.stdout.split()[-1]) < 3 * embedding + 500e6

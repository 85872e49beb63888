"""Eight CPU devices, strict promotion, exact products, quick compilation: before any device is
touched.
"""

import ctypes
import gc
import io
import json
import mmap
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import zlib

import jax
import numpy as np
import pytest
from hf_models import tiny_config, write_hf_folder

import convert
from easyspec_jax import checkpoint
from easyspec_jax.cli import main as cli

os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")  # GPUs are compiled for, without one
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_enable_x64", True)  # float64 models make greedy equality exact
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_default_matmul_precision", "float32")


# Nearly all of the tests' time is the compiler's, on programs that run for milliseconds: these take
# three fifths off.
QUICK = {
    "xla_backend_optimization_level": "0",
    "xla_cpu_use_fusion_emitters": "false",
    "xla_cpu_parallel_codegen_split_count": "1",
}
LIBC = ctypes.CDLL(None)


def pytest_configure(config):
    """One folder of compiled programs for all workers of a run, empty when it begins unless
    EASYSPEC_TEST_CACHE names another. Programs are optimised only where tests with real weights
    are asked for.
    """
    worker = "PYTEST_XDIST_WORKER" in os.environ  # has the environment of who started it
    if not worker and "real" not in config.option.markexpr.replace("not real", ""):
        flags = [f"--{name}={QUICK[name]}" for name in known_flags()]
        os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), *flags])
    if not worker:
        made = tempfile.TemporaryDirectory(prefix="easyspec-tests-")
        config.add_cleanup(made.cleanup)
        # No test writes into the cache of whoever runs it.
        os.environ["XDG_CACHE_HOME"] = os.path.join(made.name, "cache")
        os.environ.setdefault("EASYSPEC_TEST_CACHE", os.path.join(made.name, "compiled"))
    # In the environment too, for the processes that tests start.
    for name, value in {
        "jax_compilation_cache_dir": os.environ["EASYSPEC_TEST_CACHE"],
        "jax_persistent_cache_min_compile_time_secs": 0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
        "jax_traceback_in_locations_limit": 0,  # a compiler carries the lines of every operation
    }.items():
        jax.config.update(name, value)
        os.environ[name.upper()] = str(value)


def known_flags():
    """Those of QUICK that this jaxlib has: any other ends the process, so one is asked."""
    names = list(QUICK)
    while names:
        flags = " ".join(f"--{name}={QUICK[name]}" for name in names)
        done = subprocess.run(
            [sys.executable, "-c", "import jax; jax.devices()"],
            env=os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
            capture_output=True,
            text=True,
        )
        unknown = [name for name in names if f"--{name}" in done.stderr]
        if done.returncode == 0 or not unknown:
            break
        names = [name for name in names if name not in unknown]
    return names


def pytest_collection_finish():
    """What was imported is never garbage: looking through it took half the time of some files. Of
    what tracing makes hardly anything is, so it is looked through more seldom.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 100)


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item, nextitem):
    """Forgets compiled programs where they have become many: they are what fills the memory, and
    each takes several mappings, of which Linux allows a process 65530. The folder on disk still has
    them.
    """
    if resident_bytes() > 3 * 2**29 or num_mappings() > 30_000:
        jax.clear_caches()
        gc.collect()
        gc.freeze()  # modules that tests imported: Orbax has all looked through for every part
        if hasattr(LIBC, "malloc_trim"):  # glibc keeps what is freed otherwise
            LIBC.malloc_trim(0)


def resident_bytes() -> int:
    """Physical memory of this process; 0 where the system does not say."""
    statm = pathlib.Path("/proc/self/statm")
    return int(statm.read_text().split()[1]) * mmap.PAGESIZE if statm.exists() else 0


def num_mappings() -> int:
    """Mappings of this process; 0 where the system does not say."""
    maps = pathlib.Path("/proc/self/maps")
    return maps.read_bytes().count(b"\n") if maps.exists() else 0


@pytest.fixture
def xla_for_cudnn(monkeypatch):
    """The public function computes by its other implementation, which all devices have."""
    attend = jax.nn.dot_product_attention

    def instead(*args, implementation, **options):
        assert implementation == "cudnn"
        with jax.numpy_dtype_promotion("standard"):
            return attend(*args, implementation="xla", **options)

    monkeypatch.setattr(jax.nn, "dot_product_attention", instead)
    return instead


@pytest.fixture(scope="module")
def digests_of_host():
    """Digests of checkpoints are zlib's: compiling the library's own for every mesh takes as long
    as what many tests are about. test_integrity.py and test_sharding.py have the real ones.
    """

    def crc32(arrays):
        return np.uint32(
            zlib.crc32(b"".join(np.asarray(arrays[k]).tobytes() for k in sorted(arrays)))
        )

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "digest", crc32)
        yield


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory) -> pathlib.Path:
    """Converted: base/ (3 layers), draft/ (5 layers, another seed), and copies of base that lack
    something: bare/ (no tokenizer), mute/ (no chat template), foreign/ (says another tokenizer).
    """
    root = tmp_path_factory.mktemp("cli")
    for name, layers, seed in (("base", 3, 0), ("draft", 5, 1)):
        # Long texts need a model that does not end them: its stop id is one that is never likely.
        config = tiny_config("llama", num_hidden_layers=layers, vocab_size=90, eos_token_id=0)
        write_hf_folder(root / f"hf-{name}", config, seed=seed)
        convert.convert(root / f"hf-{name}", root / name, progress=False)
    shutil.copytree(root / "base", root / "bare")
    (root / "bare" / "tokenizer.json").unlink()
    shutil.copytree(root / "base", root / "mute")
    (root / "mute" / "tokenizer_config.json").write_text("{}")
    shutil.copytree(root / "base", root / "foreign")
    metadata = json.loads((root / "base" / "easyspec.json").read_text())
    (root / "foreign" / "easyspec.json").write_text(json.dumps(metadata | {"tokenizer": "00"}))
    return root


@pytest.fixture
def easyspec(monkeypatch, capsys, checkpoints):
    """Runs a command in the folder of the checkpoints; returns status, stdout and stderr."""
    monkeypatch.setattr(cli, "configure", lambda args: None)
    monkeypatch.chdir(checkpoints)

    def run(*argv, stdin=""):
        piped = io.BytesIO(stdin.encode(errors="surrogateescape"))
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(piped, "utf-8"))
        status = cli.main([str(arg) for arg in argv])
        return status, *capsys.readouterr()

    return run

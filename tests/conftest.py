"""Eight CPU devices, strict promotion, exact products: before any device is touched."""

import gc
import io
import json
import pathlib
import shutil
import sys

import jax
import pytest
from hf_models import tiny_config, write_hf_folder

import convert
from easyspec_jax.cli import main as cli

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_enable_x64", True)  # float64 models make greedy equality exact
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_default_matmul_precision", "float32")


@pytest.fixture(scope="module", autouse=True)
def few_programs():
    """Forgets compiled programs between files once they are many: each takes several memory
    mappings, and Linux allows a process 65530; the compiler aborts beyond.
    """
    yield
    maps = pathlib.Path("/proc/self/maps")
    if maps.exists() and maps.read_bytes().count(b"\n") > 25_000:
        jax.clear_caches()
        gc.collect()


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
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        status = cli.main([str(arg) for arg in argv])
        return status, *capsys.readouterr()

    return run

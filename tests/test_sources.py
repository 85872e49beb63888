"""Models as users name them: a folder, a file or a hub id, converted once into the cache."""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import sys
import threading

import jax
import numpy as np
import pytest
from hf_models import run, tiny_config, write_hf_folder
from test_gguf import untokenized, write_gguf

import convert
import easyspec_jax as es
from easyspec_jax import sources

slow = pytest.mark.slow
ROOT = pathlib.Path(__file__).parent.parent


@pytest.fixture
def cache(tmp_path, monkeypatch) -> pathlib.Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "easyspec_jax" / "models"


@pytest.fixture
def folder(tmp_path) -> pathlib.Path:
    return write_hf_folder(tmp_path / "hf-1.1", tiny_config("llama"))


@pytest.fixture
def conversions(monkeypatch) -> list[str]:
    """The sources that were converted."""
    seen, really = [], convert.convert

    def count(src, *args, **options):
        seen.append(str(src))
        return really(src, *args, **options)

    monkeypatch.setattr(convert, "convert", count)
    return seen


def same_weights(one: es.Model, other: es.Model) -> None:
    jax.tree.map(np.testing.assert_array_equal, one.params, other.params)


def load(model) -> es.Model:
    return es.load_model(model, es.make_mesh(1, 1), progress=False)


def folders(cache) -> list[pathlib.Path]:
    return sorted(p for p in cache.iterdir() if p.is_dir())


@untokenized
@pytest.mark.parametrize(
    "kind", ["folder", *(pytest.param(k, marks=slow) for k in ("file", "hub"))]
)
def test_a_model_is_loaded_from_anything_and_converted_once(
    kind, folder, tmp_path, cache, conversions, monkeypatch
):
    want = load(run(folder, tmp_path / "checkpoint"))
    source = {"folder": folder, "hub": "owner/some-model"}.get(kind)
    if kind == "file":
        source = write_gguf(tmp_path / "m.gguf", tiny_config("llama"))
    monkeypatch.setattr("convert.write.download", lambda repo, revision: folder)
    for _ in range(2):
        same_weights(load(source), want)
    assert conversions[1:] == [str(source)]
    (made,) = folders(cache)
    assert load(made).config.num_layers == want.config.num_layers
    assert sources.find_checkpoint(source) == made == sources.find_checkpoint(made)


@slow
def test_a_revision_of_a_hub_id_is_a_model_of_its_own(folder, cache, conversions, monkeypatch):
    asked = []
    monkeypatch.setattr("convert.write.download", lambda *args: asked.append(args) or folder)
    for name in ("owner/m", "owner/m@v1", "owner/m@refs/pr/3"):
        sources.find_checkpoint(name)
    assert asked == [("owner/m", None), ("owner/m", "v1"), ("owner/m", "refs/pr/3")]
    assert len(folders(cache)) == 3


def test_a_source_that_changed_is_converted_anew(folder, cache, conversions, capsys):
    before = load(folder)
    (folder / "README.md").write_text("no part of the model")
    load(folder)
    assert len(conversions) == 1
    write_hf_folder(folder, tiny_config("llama"), seed=1)
    after = sources.find_checkpoint(folder)
    assert len(conversions) == 2 and len(folders(cache)) == 2
    assert not np.array_equal(load(after).params.embed, before.params.embed)
    (old,) = (p for p in folders(cache) if p != after)
    said = capsys.readouterr().err
    assert f"converting {folder}, once, to {after}" in said
    assert f"{old} is of that source as it was before, and may be removed" in said


def test_what_quantises_is_converted_anew_once_more_codes_are_kept(
    folder, tmp_path, cache, monkeypatch
):
    raw = json.loads((folder / "config.json").read_text())
    (tmp_path / "coded").mkdir()
    (tmp_path / "coded" / "config.json").write_text(json.dumps(raw | {sources.KEY: {}}))
    before = [sources.conversion(path) for path in (folder, tmp_path / "coded")]
    monkeypatch.setattr(sources, "CODES", sources.CODES + 1)
    floats, codes = (sources.conversion(path) for path in (folder, tmp_path / "coded"))
    assert floats == before[0] and codes != before[1]
    assert codes.name[:-8] == before[1].name[:-8]  # whose old folder is told of


def test_threads_at_once_convert_once(folder, cache, conversions):
    found = []
    threads = [
        threading.Thread(target=lambda: found.append(sources.find_checkpoint(folder)))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(conversions) == 1 and found == folders(cache) * 4


@slow
def test_processes_at_once_convert_once(folder, cache):
    code = (
        "import sys, jax; jax.config.update('jax_platforms', 'cpu'); import easyspec_jax as es;"
        "m = es.load_model(sys.argv[1]); print(m.config.num_layers)"
    )
    command = [sys.executable, "-c", code, str(folder)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    running = [subprocess.Popen(command, cwd=ROOT, env={**os.environ}, **pipes) for _ in range(2)]
    for process in running:
        out, err = process.communicate()
        assert (process.returncode, out) == (0, "3\n"), err
    assert len(folders(cache)) == 1


@pytest.mark.parametrize("error", [OSError("No space left on device"), KeyboardInterrupt()])
def test_nothing_half_is_left_behind(folder, cache, monkeypatch, error):
    save_part, calls = es.checkpoint.save_part, []

    def fail(*args):
        calls.append(args)
        if len(calls) == 3:
            raise error
        return save_part(*args)

    monkeypatch.setattr(es.checkpoint, "save_part", fail)
    with pytest.raises(type(error)):
        load(folder)
    assert folders(cache) == []
    load(folder)
    assert len(folders(cache)) == 1


def test_a_lost_connection_is_one_sentence_and_leaves_nothing(cache, monkeypatch):
    import huggingface_hub

    def lost(*args, **options):
        raise ConnectionError("connection reset\n\npages of advice")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", lost)
    with pytest.raises(
        OSError, match=r"owner/m is no local folder, and the hub .*: connection reset$"
    ):
        load("owner/m")
    assert folders(cache) == []


@pytest.mark.parametrize("model", ["nowhere", "a/b/c", "", "/nowhere/at/all"])
def test_what_is_no_model_is_refused(model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"no model: (neither a|it has neither)"):
        es.load_model(model)


def test_configurations_are_read_without_converting(folder, tmp_path, cache, monkeypatch):
    monkeypatch.delattr("convert.write._write_part")
    file = write_gguf(tmp_path / "m.gguf", tiny_config("llama"))
    for path in (folder, folder / "config.json", file):
        config, metadata = sources.read_config(path)
        assert config.num_layers == 3 and metadata == {}
    checkpoint = tmp_path / "named.json"
    checkpoint.write_text(json.dumps(tiny_config("qwen2")))
    assert sources.read_config(checkpoint)[0].family == "qwen2"


def test_of_a_hub_id_only_the_configuration_is_fetched(folder, cache, monkeypatch):
    asked = []
    monkeypatch.setattr("convert.folder.download", lambda *args: asked.append(args) or folder)
    assert sources.read_config("owner/m@v2")[0].num_layers == 3
    assert asked == [("owner/m", "v2", "config.json")]


@pytest.mark.parametrize(
    "options, sentence",
    [
        ({"dtype": "int8"}, "dtype must be one of"),
        ({"layout": "both"}, "layout must be one of"),
        ({"group_size": (1, 9)}, "that sum to the 3 layers"),
    ],
    ids=str,
)
def test_bad_options_are_refused_before_anything_is_converted(
    folder, cache, conversions, options, sentence
):
    with pytest.raises(ValueError, match=sentence):
        es.load_model(folder, es.make_mesh(1, 1), **options)
    assert conversions == [] and not cache.exists()


def test_half_a_conversion_is_no_model(folder, cache, conversions):
    made = sources.find_checkpoint(folder)
    (made / "easyspec.json").unlink()
    with pytest.raises(ValueError, match=f"damaged: remove {made}, then convert"):
        sources.find_checkpoint(folder)


def test_several_processes_convert_nothing(folder, cache, conversions, monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(ValueError, match="`easyspec convert` it before several processes load it"):
        sources.find_checkpoint(folder)
    assert conversions == []


@slow
def test_the_command_line_takes_a_folder_in_every_place(easyspec, cache):
    base = ("generate", "--base", "hf-base", "--draft", "hf-draft", "--tensor", 1, "hello")
    status, out, err = easyspec(*base, "--max-new-tokens", 8)
    assert status == 0 and err.count("converting ") == 2
    assert len(folders(cache)) == 2
    again = easyspec(*base, "--max-new-tokens", 8)
    assert again[:2] == (0, out) and "converting" not in again[2]
    plain = ("generate", "--base", "base", "--tensor", 1, "hello", "--max-new-tokens", 8)
    assert easyspec(*plain)[1] == out
    assert easyspec("info", "hf-base")[0] == 0
    assert easyspec("chat", "--base", "hf-base", "--tensor", 1, "--max-new-tokens", 4)[0] == 0

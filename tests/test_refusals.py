"""What cannot be is refused in one sentence, before it takes time or memory."""

from __future__ import annotations

import json
import sys

import pytest
from decoders import model
from hf_models import run, tiny_config, write_hf_folder
from test_gguf import write_gguf

import easyspec_jax as es
from easyspec_jax import memory, sources
from easyspec_jax.cli import main as cli
from easyspec_jax.hf_config import config_from_hf
from easyspec_jax.json_files import read_object


@pytest.mark.parametrize(
    "text, sentence",
    [
        (b"[" * 100_000, "cannot be read: maximum recursion depth"),
        (b"[1, 2]", "is not a JSON object"),
        (b"\xff{}", "cannot be read: 'utf-8' codec"),
        (b'{"a": ', "cannot be read: Expecting value"),
        (b'{"a": ' + b"9" * 5000 + b"}", "cannot be read: Exceeds the limit"),
        (b"", "cannot be read: Expecting value"),
    ],
    ids=["deep", "list", "bytes", "cut", "long", "empty"],
)
@pytest.mark.parametrize("file", ["config.json", "generation_config.json", "easyspec.json"])
def test_a_file_that_is_no_json_object_is_named(file, text, sentence, tmp_path):
    source = write_hf_folder(tmp_path / "hf", tiny_config("llama", num_hidden_layers=1))
    (source / "generation_config.json").write_text("{}")
    if file == "easyspec.json":
        (source / file).write_bytes(text)
        with pytest.raises(ValueError, match=rf"^\S+{file} {sentence}"):
            es.load_model(source)
    else:
        (source / file).write_bytes(text)
        with pytest.raises(ValueError, match=rf"^\S+{file} {sentence}"):
            run(source, tmp_path / "out")
        assert [p.name for p in tmp_path.iterdir()] == ["hf"]
    with pytest.raises(ValueError, match=rf"^\S+{file} {sentence}"):
        read_object(source / file)


@pytest.mark.parametrize(
    "change, sentence",
    [
        ({"num_hidden_layers": 10**7}, "num_layers must be an integer in 1 .. 10000, not 10000000"),
        ({"num_hidden_layers": 10**12}, "num_layers must be an integer in 1 .. 10000, not 1000000"),
        ({"hidden_size": 10**30}, "embed_dim must be an integer in 1 .. 2147483647"),
        ({"model_type": ["llama"]}, "model_type .* is not supported"),
        ({"rope_scaling": {"rope_type": ["linear"]}}, "rotary settings are not supported"),
        ({"rope_scaling": {"rope_type": {}}}, "rotary settings are not supported"),
        ({"layer_types": 5}, "layer_types must be a list of names, not 5"),
        ({"layer_types": [["full_attention"]] * 3}, "layer_types must be a list of names"),
        ({"eos_token_id": [[2]]}, "eos_token_id must be a token id or a list of them"),
        ({"eos_token_id": {"a": 2}}, "eos_token_id must be a token id or a list of them"),
        ({"eos_token_id": "x"}, "eos_token_id must be a token id or a list of them, not 'x'"),
        ({"rope_theta": 10**400}, "rope_theta must be a finite number > 0"),
        ({"rms_norm_eps": 10**400}, "norm_eps must be a finite number > 0"),
        ({"tie_word_embeddings": "false"}, "tie_word_embeddings must be true or false, not 'fa"),
        ({"tie_word_embeddings": 1}, "tie_word_embeddings must be true or false, not 1"),
    ],
    ids=lambda x: str(x)[:40],
)
def test_a_configuration_of_wrong_types_is_refused(change, sentence):
    with pytest.raises(ValueError, match=sentence):
        config_from_hf(tiny_config("llama") | change)


def test_a_window_that_begins_at_no_layer_is_refused():
    change = {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": "x"}
    with pytest.raises(ValueError, match="max_window_layers must be an integer, not 'x'"):
        config_from_hf(tiny_config("qwen2") | change)


@pytest.mark.parametrize("layers", [31, 9999])
def test_more_layers_than_tensors_are_refused(layers, tmp_path):
    source = write_hf_folder(tmp_path / "hf", tiny_config("llama"))
    config = json.loads((source / "config.json").read_text()) | {"num_hidden_layers": layers}
    (source / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=f"{layers} layers, but there are 30 tensors in all"):
        run(source, tmp_path / "out")


TOKENS = ["<unk>", "<s>", "</s>", "a", "b", "ab"]
TYPES = [2, 3, 3, 1, 1, 1]
LLAMA = {"model": "llama", "tokens": TOKENS, "scores": [0.0] * 6, "token_type": TYPES}
GPT2 = {"model": "gpt2", "tokens": TOKENS, "merges": ["a b"], "token_type": TYPES}


@pytest.mark.parametrize(
    "tokenizer, sentence",
    [
        (LLAMA | {"bos_token_id": 6}, "bos_token_id is 6, outside the vocabulary's 0 .. 5"),
        (LLAMA | {"eos_token_id": 2**32 - 1}, "eos_token_id is 4294967295, outside"),
        (LLAMA | {"bos_token_id": 5, "token_type": [2, 3, 3, 1, 1, 5]}, "is 5, an unused token"),
        (LLAMA | {"unknown_token_id": "0"}, "unknown_token_id must be a token id"),
        (GPT2 | {"merges": ["ab"]}, "merges has 'ab': not two tokens"),
        (GPT2 | {"merges": ["a c"]}, "merges has 'a c': not two tokens"),
        (GPT2 | {"merges": "a b"}, "merges must be a list of texts"),
        (GPT2 | {"merges": [1, 2]}, "merges must be a list of texts"),
        (LLAMA | {"tokens": [1, 2, 3, 4, 5, 6]}, "tokens must be a list of texts"),
        (LLAMA | {"scores": ["a"] * 6}, "scores must be a list of numbers"),
        (LLAMA | {"token_type": 3}, "token_type must be a list of the kinds"),
        (LLAMA | {"token_type": [9] * 6}, "token_type must be a list of the kinds"),
        (LLAMA | {"tokens": [*TOKENS[:5], ""]}, "a token twice, or an empty one"),
        (LLAMA | {"tokens": [*TOKENS[:5], "a"]}, "a token twice, or an empty one"),
        (LLAMA | {"add_bos_token": "yes"}, "add_bos_token must be true or false"),
        (LLAMA | {"pre": 3}, "pre must be a name"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_tokenizers_of_gguf_files_are_checked_before_they_are_built(tokenizer, sentence, tmp_path):
    entries = {f"tokenizer.ggml.{key}": value for key, value in tokenizer.items()}
    file = write_gguf(tmp_path / "m.gguf", tiny_config("llama"), metadata=entries)
    with pytest.raises(ValueError, match=f"tokenizer.ggml.{sentence}|{sentence}"):
        run(file, tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["m.gguf"]


@pytest.mark.parametrize(
    "entries, sentence",
    [
        ({"llama.block_count": 2**32 - 1}, "block_count must be in 1 .. "),
        ({"llama.attention.head_count": "4"}, "head_count must be in 1 .. .*, not '4'"),
        ({"llama.attention.head_count": 0}, "head_count must be in 1 .. .*, not 0"),
        ({"split.count": "2"}, "split.count='2'"),
    ],
    ids=str,
)
def test_sizes_of_gguf_files_are_checked(entries, sentence, tmp_path, monkeypatch):
    monkeypatch.setattr("convert.gguf_source._contents", contents_with(entries))
    file = write_gguf(tmp_path / "m.gguf", tiny_config("llama"))
    with pytest.raises(ValueError, match=sentence):
        run(file, tmp_path / "out")


def contents_with(entries):
    """The metadata of a file with other entries: its writer refuses to write these."""
    from convert.gguf_source import _contents

    return lambda reader, path: _contents(reader, path) | entries


def test_lists_of_gguf_files_that_never_end_are_refused(tmp_path):
    """A length beyond the file; its reader would go on for ever."""
    entries = {f"tokenizer.ggml.{key}": value for key, value in LLAMA.items()}
    file = write_gguf(tmp_path / "m.gguf", tiny_config("llama"), metadata=entries)
    data = file.read_bytes()
    at = data.index(b"tokenizer.ggml.scores") + len(b"tokenizer.ggml.scores") + 8
    for high in (3, 7):  # of the list's length, eight bytes
        file.write_bytes(data[: at + high] + b"\x40" + data[at + high + 1 :])
        with pytest.raises(ValueError, match=r"is a broken GGUF file: a list of \d+ entries"):
            run(file, tmp_path / "out")


def test_no_padding_token_is_written_as_minus_one(tmp_path):
    entries = {f"tokenizer.ggml.{key}": value for key, value in LLAMA.items()}
    entries["tokenizer.ggml.padding_token_id"] = 2**32 - 1
    file = write_gguf(tmp_path / "m.gguf", tiny_config("llama"), metadata=entries)
    assert es.Tokenizer(run(file, tmp_path / "out")).encode("ab") == [5]


def test_a_panic_of_the_tokenizers_library_is_a_sentence(tmp_path, monkeypatch):
    import tokenizers

    class PanicException(BaseException):
        """As pyo3's, which is no Exception."""

    def panic(path):
        raise PanicException("called unwrap on None")

    (tmp_path / "tokenizer.json").write_text("{}")

    class Broken:
        from_file = staticmethod(panic)

    monkeypatch.setattr(tokenizers, "Tokenizer", Broken)
    with pytest.raises(ValueError, match=r"the tokenizer in .* cannot be read: called unwrap"):
        es.Tokenizer(tmp_path)


@pytest.mark.parametrize(
    "options, sentence",
    [
        ({"num_draft_tokens": 10**6}, "1000000 draft tokens in a tree of width 1 are more than"),
        ({"num_draft_tokens": 10**12}, "1000000000000 draft tokens in a tree of width 1"),
        ({"num_draft_tokens": 96}, "96 draft tokens in a tree of width 1 .* at most 95, all nodes"),
        ({"tree_width": 10**9}, "5 draft tokens in a tree of width 1000000000"),
        ({"num_draft_tokens": 5, "tree_width": 820}, "all nodes together 4096"),
    ],
    ids=str,
)
def test_drafts_that_no_step_can_hold_are_refused(options, sentence):
    base = model((1, 1))
    with pytest.raises(ValueError, match=sentence):
        es.Decoder(base, es.LayerParallelDrafter(base), **options)


@pytest.mark.parametrize(
    "make, sentence",
    [
        (lambda base: es.Session("9"), "max_len must be None or a whole number above 0, got '9'"),
        (lambda base: es.Session(-5), "max_len must be None or a whole number above 0, got -5"),
        (lambda base: es.Decoder(None), "a base is needed, .* got NoneType"),
        (lambda base: es.Decoder("ckpt"), "a base is needed, .* got str"),
        (
            lambda base: es.Decoder(base, es.PromptLookupDrafter),
            "a drafter is needed, .* got the class PromptLookupDrafter",
        ),
        (lambda base: es.Decoder(base, 3), "a drafter is needed, .* got int"),
        (lambda base: es.LayerParallelDrafter(None), "a model is needed, .* got None"),
        (lambda base: es.LayerParallelDrafter("ckpt"), "a model is needed, .* got 'ckpt'"),
        (lambda base: es.PolybasicDrafter(None, None), "a model is needed, .* got None"),
        (lambda base: es.PolybasicDrafter(base, es.PromptLookupDrafter), "needs a drafter"),
        (lambda base: es.EarlyExitDrafter("ckpt"), "a model is needed, .* got 'ckpt'"),
        (
            lambda base: es.Decoder(base, es.LayerParallelDrafter(base.params)),
            "a drafter drafts with a model, got Params",
        ),
        (lambda base: es.Sampling(temperature=10**400), "temperature must be a finite number"),
        (
            lambda base: es.Decoder(base).stream([1], max_new_tokens=1, session=5),
            "session must be a Session, got 5",
        ),
        (lambda base: es.PromptLookupDrafter(max_ngram=10**9), "in 1 .. 64, got 1000000000"),
    ],
)
def test_arguments_of_another_kind_are_refused_where_they_are_given(make, sentence):
    with pytest.raises(ValueError, match=sentence):
        make(model((1, 1)))


def test_memory_of_a_container_counts_no_kept_files(tmp_path):
    assert memory.host_memory(tmp_path) is None
    group = tmp_path / "sys" / "fs" / "cgroup"
    group.mkdir(parents=True)
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc" / "meminfo").write_text("MemTotal: 9000 kB\nMemAvailable:    8000 kB\n")
    assert memory.host_memory(tmp_path) == 8000 * 1024
    (group / "memory.max").write_text("max\n")
    assert memory.host_memory(tmp_path) == 8000 * 1024
    (group / "memory.max").write_text("5000000\n")
    (group / "memory.current").write_text("4900000\n")
    (group / "memory.stat").write_text("anon 900000\ninactive_file 3000000\nactive_file 1000000\n")
    assert memory.host_memory(tmp_path) == 4100000


def test_memory_of_the_host_is_counted_on_cpu(monkeypatch):
    base = model((1, 1))
    free = memory.host_memory()
    assert free is None or 2**20 < free < 2**50
    monkeypatch.setattr(memory, "host_memory", lambda: 2**20)
    assert memory.device_memory(base.layout.mesh) == 2**20
    assert memory.device_memory(model((2, 2)).layout.mesh) == 2**18
    with pytest.raises(ValueError, match=r"needs \d.* but a device has 0.00 GiB free"):
        es.Decoder(base).generate([[1]] * 256, max_new_tokens=90)


@pytest.mark.parametrize(
    "text, place",
    [("he\udcff", 2), ("\ud800", 0)],
)
def test_half_characters_are_refused(text, place, checkpoints):
    tokenizer = es.Tokenizer(checkpoints / "base")
    with pytest.raises(ValueError, match=f"not UTF-8: there is half a character at place {place}"):
        tokenizer.encode(text)
    with pytest.raises(ValueError, match="not UTF-8"):
        tokenizer.render([{"role": "user", "content": text}])
    with pytest.raises(ValueError, match="a text is needed, got bytes"):
        tokenizer.encode(b"hello")


def test_a_chat_goes_on_behind_a_line_that_is_no_text(easyspec):
    command = ("chat", "--base", "base", "--tensor", 1, "--max-new-tokens", 6)
    status, out, err = easyspec(*command, stdin="hello\nhe\udcff\nmore\n")
    assert status == 0 and err.count("error: the text is not UTF-8") == 1
    assert out == easyspec(*command, stdin="hello\nmore\n")[1]


@pytest.mark.parametrize(
    "argv, sentence",
    [
        (("generate", "--base", "base", "he\udcff"), "the text is not UTF-8"),
        (
            ("generate", "--base", "base", "--cpu-devices", 10**6, "hi"),
            "--cpu-devices must be in 1",
        ),
        (("info", "base", "--layer", 100_000, "--tensor", 100_000), "--layer must be in 1 .. 1024"),
        (("info", "base", "--batch", 10**13), "--batch must be in 1 .. 1024"),
        (
            (
                "plan",
                "--base",
                "base",
                "--draft",
                "base",
                "--device",
                "h100",
                "--num-devices",
                10**12,
            ),
            "--num-devices must be in 1 .. 1024",
        ),
        (("chat", "--base", "base", "--tensor", 2000), "--tensor must be in 1 .. 1024, got 2000"),
    ],
    ids=lambda x: x if isinstance(x, str) else x[0],
)
def test_command_lines_that_cannot_be_are_one_sentence(easyspec, argv, sentence):
    status, out, err = easyspec(*argv)
    assert (status, out) == (1, "") and err.count("\n") == 1
    assert err.startswith(f"error: {sentence}")


def test_a_mesh_that_is_too_large_is_refused_before_devices_are_made(capsys):
    assert cli.main(["info", "base", "--layer", "64", "--tensor", "64"]) == 1
    assert "error: --layer times --tensor must be at most 1024, got 4096" in capsys.readouterr().err


@pytest.mark.parametrize(
    "stream, sentence", [("stdin", "standard input"), ("stdout", "standard o")]
)
@pytest.mark.parametrize("command", ["generate", "chat"])
def test_closed_streams_are_a_sentence(
    easyspec, checkpoints, monkeypatch, capsys, stream, command, sentence
):
    monkeypatch.setattr(sys, stream, None)
    prompt = ["-"] if command == "generate" else []
    assert cli.main([command, "--base", str(checkpoints / "base"), *prompt]) == 1
    assert capsys.readouterr().err.startswith(f"error: {sentence}")


def test_a_checkpoint_with_an_odd_generation_config_is_refused(checkpoints, easyspec, tmp_path):
    import shutil

    copy = shutil.copytree(checkpoints / "base", tmp_path / "copy")
    (copy / "generation_config.json").write_text('{"eos_token_id": "x"}')
    status, _, err = easyspec("generate", "--base", copy, "--tensor", 1, "hi")
    assert status == 1 and "\nerror: eos_token_id must be a token id or a list" in err


def test_read_config_names_what_is_no_configuration(tmp_path):
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ValueError, match=r"config.json is not a JSON object"):
        sources.read_config(tmp_path)

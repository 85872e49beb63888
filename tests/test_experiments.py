"""Readers of prompt sets in each set's own format, and the grid of the acceptance script."""

from __future__ import annotations

import argparse
import gzip
import importlib
import json
import pathlib
import sys

import jax
import pytest
from hf_models import run as convert
from hf_models import tiny_config, write_hf_folder

import easyspec_jax as es

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "experiments"))  # scripts, no package
acceptance = importlib.import_module("acceptance")
prompt_sets = importlib.import_module("prompt_sets")

SPECBENCH = (
    '{"question_id": 81, "category": "writing", "turns": ["w1", "again"]}\n'
    '{"question_id": 82, "category": "writing", "turns": ["w2"]}\n'
    '{"question_id": 83, "category": "rag", "turns": ["r1"]}\n'
)
MMLU = """\
question,choice0,choice1,choice2,choice3,answer
" Is it, so?",yes,no,"a, b",d,1
Two?,1,2,3,4,0"""
MMLU_ORIGINAL = '"Or\nso?",yes,no,maybe,never,B\n'
SETS = [
    ("specbench", {"question.jsonl": SPECBENCH}, ["w1", "r1", "w2"]),
    ("humaneval", {"HumanEval.jsonl": '{"task_id": "0", "prompt": "def f():\\n"}'}, ["def f():\n"]),
    ("gsm8k", {"test.jsonl": '{"question": "a\u2028b", "answer": "1"}\n\n'}, ["a\u2028b"]),
    ("math", {"test.jsonl": '\ufeff{"problem": "$x$?", "level": "Level 2"}\r\n'}, ["$x$?"]),
    ("ifeval", {"input_data.jsonl": '{"key": 1, "prompt": "Write."}\n'}, ["Write."]),
    (
        "mgsm",
        {"mgsm_de.tsv": "Wie?\t1\nWo?\t2\n", "mgsm_en.tsv": 'How "so"?\t1\n', "other.tsv": "x"},
        ["Wie?", 'How "so"?', "Wo?"],
    ),
    (
        "mmlu",
        {"a_test.csv": MMLU, "b_test.csv": MMLU_ORIGINAL},
        [
            "Is it, so?\nA. yes\nB. no\nC. a, b\nD. d\nAnswer:",
            "Or\nso?\nA. yes\nB. no\nC. maybe\nD. never\nAnswer:",
            "Two?\nA. 1\nB. 2\nC. 3\nD. 4\nAnswer:",
        ],
    ),
    ("text", {"prompts.txt": "one\tpart\n\n  two\n"}, ["one\tpart", "  two"]),
]


@pytest.mark.parametrize(("name", "files", "expected"), SETS, ids=[s[0] for s in SETS])
def test_a_set_is_read_from_its_folder_and_from_a_file(tmp_path, name, files, expected):
    for file, content in files.items():
        (tmp_path / file).write_text(content)
    assert prompt_sets.read_set(name, tmp_path) == expected
    file = tmp_path / next(iter(files))
    in_file = prompt_sets.read_set(name, str(file))
    assert in_file == [item for item in expected if item in in_file]
    packed = tmp_path / f"packed{file.suffix}.gz"
    packed.write_bytes(gzip.compress(file.read_bytes()))
    assert prompt_sets.read_set(name, packed) == in_file


def test_one_category_of_a_set_is_a_set(tmp_path):
    (tmp_path / "question.jsonl").write_text(SPECBENCH)
    assert prompt_sets.read_set("specbench:writing", tmp_path) == ["w1", "w2"]
    assert prompt_sets.read_set("specbench:rag", tmp_path / "question.jsonl") == ["r1"]


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("gsm9k", "", "unknown prompt set 'gsm9k': use one of specbench, humaneval, gsm8k, mgsm"),
        ("gsm8k:rag", "", "unknown prompt set 'gsm8k' with category 'rag': use one of specbench"),
        ("specbench:cooking", SPECBENCH, "no category 'cooking', but 'writing', 'rag'"),
        ("text", " \n\n", "FILE holds no prompts"),
        ("mmlu", "question,choice0,choice1,choice2,choice3,answer\n", "FILE holds no prompts"),
        ("mmlu", "one?,1,2,3,4,A\ntwo?,1,2,A\n", "FILE, question 2: 4 columns, but six"),
        ("mgsm", "", "FILE holds no prompts"),
        ("specbench", "", "FILE holds no prompts"),
        ("specbench", '{"turns": []}', "FILE, line 1: 'turns' is blank or no text"),
        ("gsm8k", '{"question": "a"}\n\n["b"]', "FILE, line 3 is not a JSON object"),
        ("gsm8k", '{"question": "a"}\n{"quest', "FILE, line 2 cannot be read"),
        ("math", '{"answer": "a"}', "FILE, line 1: none of"),
        ("ifeval", '{"prompt": 3}', "FILE, line 1: 'prompt' is blank or no text"),
        ("text", b"\xff\xfe", "FILE is not text in UTF-8"),
    ],
)
def test_a_bad_set_is_one_sentence(tmp_path, name, content, sentence):
    content = content if isinstance(content, bytes) else content.encode()
    pattern = prompt_sets.FILES.get(name.partition(":")[0], "")
    file = tmp_path / f"file{pathlib.Path(pattern).suffix}"
    file.write_bytes(content)
    with pytest.raises(ValueError) as error:
        prompt_sets.read_set(name, file)
    assert sentence.replace("FILE", file.name) in str(error.value) and "\n" not in str(error.value)


def test_a_missing_folder_and_a_folder_without_the_set_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"for the set mgsm: there is no file of prompts at"):
        prompt_sets.read_set("mgsm", tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"no prompts for the set mgsm: .* has no mgsm_\*.tsv"):
        prompt_sets.read_set("mgsm", tmp_path)


def test_the_grid_has_each_computation_once():
    args = argparse.Namespace(temperatures=[0.0, 0.8], tree_widths=[1, 4], group_sizes=[1, 2])
    arms = [tuple(vars(arm).values()) for arm in acceptance.make_grid(args)]
    assert arms == [
        (0.0, 1, 1, None, None),
        (0.0, 1, 2, True, None),
        (0.0, 1, 2, False, None),
        (0.0, 4, 1, None, None),
        (0.0, 4, 2, True, None),
        (0.0, 4, 2, False, None),
        (0.8, 1, 1, None, None),
        (0.8, 1, 2, True, None),
        (0.8, 1, 2, False, None),
        (0.8, 4, 1, None, "best"),
        (0.8, 4, 2, True, "best"),
        (0.8, 4, 2, False, "best"),
        (0.8, 4, 1, None, "sampled"),
        (0.8, 4, 2, True, "sampled"),
        (0.8, 4, 2, False, "sampled"),
    ]


def test_tables_have_a_row_per_grouping_and_a_column_per_width():
    def record(temperature, width, size, calibrate, candidates, rate, stderr, identical):
        arm = acceptance.Arm(temperature, width, size, calibrate, candidates)
        rates = {"tokens_per_step": rate, "tokens_per_step_stderr": stderr}
        return vars(arm) | rates | {"identical": identical, "prompts": 4}

    options = {"base": "big", "draft": "small", "num_draft_tokens": 5, "max_new_tokens": 64}
    options |= {"prompts_per_set": 2, "set": ["text=a.txt"]}
    arms = [
        record(0.0, 4, 2, False, None, 2.0, 0.125, 3),
        record(0.0, 4, 1, None, None, 3.456, None, 4),
        record(0.0, 1, 2, True, None, 1.5, None, 4),
        record(0.8, 1, 1, None, None, 1.25, None, None),
        record(0.8, 4, 1, None, "best", 2.5, None, None),
        record(0.8, 4, 1, None, "sampled", 2.75, None, None),
    ]
    lines = acceptance.format_results({"options": options}, arms).splitlines()
    assert lines[0].startswith("Tokens per step ± standard error over prompts: small drafts 5 deep")
    assert lines[1:] == [
        "",
        "Temperature 0:",
        "",
        "| group size | width 1 | width 4 |",
        "| --- | --- | --- |",
        "| 1 | - | 3.46 |",
        "| 2, calibrated | 1.50 | - |",
        "| 2, not calibrated | - | 2.00 ± 0.12 (3 of 4 identical) |",
        "",
        "Temperature 0.8, candidates best:",
        "",
        "| group size | width 1 | width 4 |",
        "| --- | --- | --- |",
        "| 1 | 1.25 | 2.50 |",
        "",
        "Temperature 0.8, candidates sampled:",
        "",
        "| group size | width 1 | width 4 |",
        "| --- | --- | --- |",
        "| 1 | 1.25 | 2.75 |",
    ]


def test_rates_of_an_arm_are_those_of_all_prompts_together():
    def stats(steps, tried, accepted):
        return es.Stats(
            steps=steps,
            emitted=8,
            accepted_histogram=(0, 0, steps),
            tried_per_depth=tried,
            accepted_per_depth=accepted,
            tried_per_rank=(4, 1),
            accepted_per_rank=(3, 0),
            nodes_drafted=4 * steps,
        )

    record = acceptance.summarise([stats(2, (2, 2), (2, 2)), stats(4, (4, 3), (3, 1))])
    assert record == {
        "tokens_per_step": 2.6667,  # 16 / 6
        "tokens_per_step_stderr": 0.8889,  # sqrt(2 * (8 / 3)**2 * 2 / 1) / 6
        "acceptance_rate": 0.7273,
        "accepted_per_depth": (5, 3),
        "tried_per_depth": (6, 5),
        "accepted_per_rank": (6, 0),
        "tried_per_rank": (8, 2),
        "nodes_drafted": 24,
        "nodes_accepted": 8,
    }
    assert acceptance.summarise([stats(4, (4, 3), (3, 1))])["tokens_per_step_stderr"] is None


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """The folder with a tiny checkpoint, prompts and the results of one run, and its arguments."""
    root = tmp_path_factory.mktemp("acceptance")
    config = tiny_config("llama", vocab_size=90, num_hidden_layers=1)
    convert(write_hf_folder(root / "hf", config), root / "tiny")
    (root / "lines.txt").write_text("hello\n" + "long " * 9 + "\nyou\n")
    argv = ["--base", f"{root}/tiny", "--draft", f"{root}/tiny", "--set", f"text={root}/lines.txt"]
    argv += ["--max-prompt-tokens", "30", "--max-new-tokens", "9", "--num-draft-tokens", "2"]
    argv += ["--tree-widths", "1,2", "--group-sizes", "1", "--temperatures", "0", "--chat"]
    argv += ["--out", f"{root}/out.jsonl"]
    with pytest.MonkeyPatch.context() as patch:  # other tests' programs are in there too
        patch.setattr(jax, "clear_caches", lambda: None)
        acceptance.main(argv)
    return root, argv


def test_the_script_measures_each_arm(measured):
    header, *arms = map(json.loads, (measured[0] / "out.jsonl").read_text().splitlines())
    assert header["options"]["base"] == "tiny" and header["options"]["set"] == ["text=lines.txt"]
    assert str(measured[0]) not in json.dumps(header)
    lengths = [len(f"user: {text}assistant: ") + 1 for text in ("hello", "you")]
    assert header["prompt_tokens"] == {"text": lengths}  # the long one is skipped
    assert [arm["tree_width"] for arm in arms] == [1, 2]
    chain, tree = arms
    assert chain["tokens_per_step"] == 3 and chain["tokens_per_step_stderr"] == 0
    assert chain["tried_per_depth"] == chain["accepted_per_depth"] == [6, 6]
    assert (chain["nodes_drafted"], chain["nodes_accepted"]) == (12, 12)
    assert len(tree["tried_per_rank"]) == 2 and tree["nodes_drafted"] > tree["nodes_accepted"]
    assert chain["identical"] == tree["identical"] == chain["prompts"] == tree["prompts"] == 2


def test_a_rerun_measures_only_what_is_missing(measured, tmp_path, monkeypatch, capsys):
    root, argv = measured
    out = tmp_path / "out.jsonl"
    argv = [*argv, "--out", str(out)]
    lines = (root / "out.jsonl").read_text().splitlines(keepends=True)
    out.write_text("".join(lines[:2]) + lines[2][:40])  # killed while it wrote the last arm
    asked = []

    def measure(args, prompts, arms):
        asked.extend(arms)
        yield json.loads(lines[2])

    monkeypatch.setattr(acceptance, "measure", measure)
    acceptance.main(argv)
    assert asked == [acceptance.Arm(0.0, 2, 1, None, None)]
    assert out.read_text() == "".join(lines)
    *table, document = capsys.readouterr().out.splitlines()
    assert json.loads(document)["arms"] == [json.loads(line) for line in lines[1:]]
    acceptance.main(argv)
    assert len(asked) == 1
    capsys.readouterr()
    acceptance.main(["--table", str(out)])
    assert capsys.readouterr().out.splitlines() == table


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (["--seed", "1"], "was measured with other seed: choose another"),
        (["--max-prompt-tokens", "22"], "the set text has 1 prompts of at most 22 tokens, but"),
        (["--prompts-per-set", "0"], "tokens, but 0 are asked for"),
        (["--set", "text=other"], "--set takes NAME=PATH, every name once, got 'text=other'"),
        (["--set", "mgsm"], "--set takes NAME=PATH, every name once, got 'mgsm'"),
        (["--table", "lines.txt"], "lines.txt holds no results of this script"),
    ],
)
def test_bad_options_are_one_sentence(measured, monkeypatch, change, sentence):
    monkeypatch.chdir(measured[0])
    with pytest.raises(ValueError) as error:
        acceptance.main(measured[1] + change)
    assert sentence in str(error.value)


def test_without_models_there_is_nothing_to_measure(capsys):
    with pytest.raises(SystemExit):
        acceptance.main(["--base", "x"])
    assert "--base, --draft, --set and --out are needed, or --table" in capsys.readouterr().err

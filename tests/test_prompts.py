"""One reader of prompt files for every command and experiment."""

from __future__ import annotations

import gzip

import pytest

from easyspec_jax.prompts import read_prompts


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.txt", "one\u2028part\r\n\n two\n", ["one\u2028part", " two"]),
        (
            "a.jsonl",
            '{"prompt": "one\\ntwo", "id": 1}\n\n{"prompt": "three"}',
            ["one\ntwo", "three"],
        ),
        (
            "question.jsonl",
            '{"category": "a", "turns": ["a1", "-"]}\n{"category": "a", "turns": ["a2"]}\n'
            '{"category": "b", "turns": ["b1"]}',
            ["a1", "b1", "a2"],
        ),
        ("test.jsonl", '{"question": "why?", "answer": "1"}', ["why?"]),
        ("a.tsv", "Wie?\t1\n", ["Wie?"]),
    ],
)
def test_prompts_are_lines_or_fields(tmp_path, name, content, expected):
    (tmp_path / name).write_text(content)
    assert read_prompts(tmp_path / name) == expected


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("a.csv", b'"' + b"x" * 140_000, "a.csv is no CSV file"),
        ("a.txt.gz", gzip.compress(b"hello", mtime=0)[:-9] + b"\xff" * 9, "a.txt.gz is not text"),
        ("a.txt.gz", b"hello", "a.txt.gz is not text"),
        ("a.jsonl", b"[" * 100_000, "a.jsonl, line 1 cannot be read"),
    ],
)
def test_damaged_files_are_one_sentence(tmp_path, name, content, sentence):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=sentence):
        read_prompts(tmp_path / name)


def test_files_of_a_folder_take_turns(tmp_path):
    for name, content in {"a.txt": "1\n2\n3\n", "b.txt": "x\n", "c.md": "-\n"}.items():
        (tmp_path / name).write_text(content)
    assert read_prompts(tmp_path, pattern="*.txt") == ["1", "x", "2", "3"]

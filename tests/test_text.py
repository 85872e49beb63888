"""Text that grows with its tokens: what was printed never changes, and nothing is lost."""

from __future__ import annotations

import json
import os
import pathlib
import sys

import numpy as np
import pytest
from hf_models import write_tokenizer

from easyspec_jax.config import ModelConfig
from easyspec_jax.text import (
    Conversation,
    TextPrinter,
    TextStream,
    Tokenizer,
    has_chat_template,
    stop_ids,
)

MODELS = pathlib.Path(os.environ.get("EASYSPEC_MODELS", "~/.cache/easyspec-models")).expanduser()
TEXTS = (
    "Hello, world!  Two spaces,\n\n\tand a tab. ",
    "Grüße aus Köln, naïve café №5 …",
    "速い茶色の狐は怠け者の犬を飛び越えた。한국어 텍스트도 있습니다.",
    "👩‍👩‍👧‍👦 family, 🏳️‍🌈 flag, 🤖 and back to text\n",
    "def f(x):\n    return {'a': x ** 2}\n",
)


class ByteTokenizer:
    """Ids are bytes of UTF-8; 256 is special and leaves no trace."""

    calls = 0
    decoded = 0

    def decode(self, ids):
        self.calls += 1
        self.decoded += len(ids)
        return bytes(i for i in ids if i < 256).decode("utf-8", errors="replace")


class WordTokenizer:
    """Ids are words with a leading space, of which a text loses its first; id 0 is special."""

    words = ("", " a", " b", "c", " ", "\n")

    def decode(self, ids):
        return "".join(self.words[i] for i in ids).removeprefix(" ")


def stream_in_pieces(stream, ids, sizes=(1,)):
    """The texts of all pushes and of the flush."""
    out, at, step = [], 0, 0
    while at < len(ids):
        size = sizes[step % len(sizes)]
        out.append(stream.push(ids[at : at + size]))
        at, step = at + size, step + 1
    return [*out, stream.flush()]


@pytest.mark.parametrize("sizes", [(1,), (3, 1, 6), (1000,)])
@pytest.mark.parametrize("text", TEXTS)
def test_pieces_are_the_whole_text(text, sizes):
    ids = [*text.encode()]
    pieces = stream_in_pieces(TextStream(ByteTokenizer()), ids, sizes)
    assert "".join(pieces) == text
    assert not any("\ufffd" in piece for piece in pieces)


def test_an_incomplete_character_waits_for_its_last_byte():
    stream = TextStream(ByteTokenizer())
    assert [stream.push([i]) for i in "x🤖y".encode()] == ["x", "", "", "", "🤖", "y"]
    assert stream.push([0xF0]) == ""
    assert stream.flush() == "\ufffd"


def test_what_is_before_an_incomplete_character_does_not_wait():
    stream = TextStream(ByteTokenizer())
    assert stream.push([*b"abc", 0xC3]) == "abc"
    assert stream.push([0xA9, 0xC3]) == "é"
    assert stream.push([0xA8]) == "è"


def test_bytes_that_are_no_text_are_not_held_for_ever():
    stream = TextStream(ByteTokenizer())
    assert stream.push([0x80] * 200).count("\ufffd") >= 100
    assert stream.push([*b"ok"]).endswith("ok")


def test_special_tokens_leave_no_trace():
    ids = [256, *b"a", 256, 256, *b"b", 256]
    assert stream_in_pieces(TextStream(ByteTokenizer()), ids) == ["", "a", "", "", "b", "", ""]


@pytest.mark.parametrize("seed", range(5))
def test_leading_spaces_survive_between_pieces(seed):
    tokenizer = WordTokenizer()
    ids = np.random.default_rng(seed).integers(0, len(tokenizer.words), 60).tolist()
    assert "".join(stream_in_pieces(TextStream(tokenizer), ids, (2, 1))) == tokenizer.decode(ids)


def test_a_long_text_costs_a_few_decoded_tokens_per_token():
    tokenizer = ByteTokenizer()
    stream_in_pieces(TextStream(tokenizer), [*"naïve 速い ".encode()] * 200)
    assert tokenizer.decoded < 20 * 200 * len("naïve 速い ".encode())


@pytest.mark.parametrize(
    ("text", "stops", "expected"),
    [
        ("one STOP two", ["STOP"], "one "),
        ("one STO two", ["STOP"], "one STO two"),
        ("aab", ["ab"], "a"),
        ("xyz", ["y", "xyz"], "x"),
        ("ends in ST", ["STOP"], "ends in ST"),
        ("STOP", ["STOP"], ""),
        ("\n\nUser: hi", ["\nUser:", "</s>"], "\n"),
    ],
)
def test_text_is_cut_before_a_stop_string(text, stops, expected):
    stream = TextStream(ByteTokenizer(), stops)
    assert "".join(stream_in_pieces(stream, [*text.encode()])) == expected
    assert stream.stopped == (expected != text)


def test_the_beginning_of_a_stop_string_is_held_back():
    stream = TextStream(ByteTokenizer(), ["##end"])
    assert [stream.push([i]) for i in b"a##e#"] == ["a", "", "", "", "##e"]
    assert stream.flush() == "#"


@pytest.mark.parametrize("before", [b"", b"no stop yet, but a long text before it. " * 5, b"ST"])
def test_tokens_end_with_the_one_that_completes_a_stop_string(before):
    stream = TextStream(ByteTokenizer(), ["STOP", "zz"])
    assert stream.until_stop([*before]) == [*before] and not stream.stopped
    rest = b"OP now" if before == b"ST" else b"STOP now"
    assert stream.until_stop([*rest]) == [*rest[: rest.index(b"P") + 1]] and stream.stopped


@pytest.fixture
def folder(tmp_path):
    write_tokenizer(tmp_path, 61)
    return tmp_path


def test_a_conversation_only_appends(folder):
    tokenizer = Tokenizer(folder)
    talk = Conversation(tokenizer, "be kind")
    first = talk.ask("hi")
    assert tokenizer.decode(first, skip_special_tokens=False) == (
        "system: be kind</s>user: hi</s>assistant: "
    )
    answer = [*tokenizer.encode("hello"), 2]
    talk.answer(answer, "hello", eos_ids=(2,))
    second = talk.ask("bye")
    assert second[: len(first) + len(answer)] == [*first, *answer]
    assert tokenizer.decode(second[len(first) + len(answer) :], skip_special_tokens=False) == (
        "user: bye</s>assistant: "
    )


def test_an_answer_cut_by_the_limit_is_ended_by_the_template(folder):
    tokenizer = Tokenizer(folder)
    talk = Conversation(tokenizer)
    first, answer = talk.ask("hi"), tokenizer.encode("hel")
    talk.answer(answer, "hel", eos_ids=(2,))
    assert talk.ask("bye")[: len(first) + len(answer) + 1] == [*first, *answer, 2]


def test_generated_ids_are_kept_where_encoding_gives_others(folder):
    tokenizer = Tokenizer(folder)
    talk = Conversation(tokenizer)
    first = talk.ask("hi")
    # The special id 0 is not in the text, so encoding the text again would lose it.
    answer = [*tokenizer.encode("he"), 0, *tokenizer.encode("y"), 2]
    talk.answer(answer, "hey", eos_ids=(2,))
    assert talk.ask("bye")[: len(first) + len(answer)] == [*first, *answer]


def test_an_answer_cut_at_a_stop_string_is_encoded_again(folder):
    tokenizer = Tokenizer(folder)
    talk = Conversation(tokenizer)
    first = talk.ask("hi")
    talk.answer(tokenizer.encode("one#two"), "one", eos_ids=(2,))
    expected = [*first, *tokenizer.encode("one"), 2]
    assert talk.ask("bye")[: len(expected)] == expected
    talk.withdraw()
    assert talk.messages[-1] == {"role": "assistant", "content": "one"}


def test_folders_without_tokenizer_or_template_are_refused(tmp_path, folder):
    (tmp_path / "bare").mkdir()
    with pytest.raises(ValueError, match=r"has no tokenizer: copy"):
        Tokenizer(tmp_path / "bare")
    with pytest.raises(ValueError, match="is no model: neither a folder"):
        Tokenizer(tmp_path / "nothing")
    (folder / "tokenizer_config.json").write_text("{}")
    assert not has_chat_template(folder)
    with pytest.raises(ValueError, match="has no chat template"):
        Tokenizer(folder).render([{"role": "user", "content": "hi"}])
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match="cannot be read"):
        Tokenizer(folder)


def test_truncation_and_padding_of_the_file_are_left_off(folder):
    text = "a text of more than four characters"
    expected = Tokenizer(folder).encode(text)
    path = folder / "tokenizer.json"
    stored = json.loads(path.read_text())
    stored["truncation"] = {
        "direction": "Right",
        "max_length": 4,
        "strategy": "LongestFirst",
        "stride": 0,
    }
    stored["padding"] = {
        "strategy": {"Fixed": 64},
        "direction": "Right",
        "pad_to_multiple_of": None,
        "pad_id": 0,
        "pad_type_id": 0,
        "pad_token": "<unk>",
    }
    path.write_text(json.dumps(stored))
    assert Tokenizer(folder).encode(text) == expected and len(expected) == len(text)


def test_special_ids_are_those_that_text_does_not_show(folder):
    tokenizer = Tokenizer(folder)
    assert tokenizer.special_ids() == {"<unk>": 0, "<s>": 1, "</s>": 2}
    assert tokenizer.decode([0, 1, 2]) == ""


def test_a_template_in_the_processors_file_is_used(folder):
    (folder / "tokenizer_config.json").write_text("{}")
    (folder / "chat_template.json").write_text("{}")
    assert not has_chat_template(folder)
    template = "{% for m in messages %}<{{ m['content'] }}>{% endfor %}"
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": template}))
    assert has_chat_template(folder)
    assert Tokenizer(folder).render([{"role": "user", "content": "hi"}]) == "<hi>"


@pytest.mark.parametrize(
    ("terminal", "no_color", "mark", "legend"),
    [
        (True, "", "\033[4;32m", "green and underlined"),
        (True, "1", "[", "in [brackets]"),
        (False, "", "[", "in [brackets]"),
    ],
)
def test_marks_are_what_the_legend_says(terminal, no_color, mark, legend, monkeypatch, capsys):
    class Letters:
        def decode(self, ids):
            return "".join(map(chr, ids))

    monkeypatch.setattr(sys.stdout, "isatty", lambda: terminal)
    monkeypatch.setenv("NO_COLOR", no_color)
    printer = TextPrinter(Letters(), mark=True)
    printer.piece([97, 98], 1)
    printer.end()
    out, err = capsys.readouterr()
    assert out.startswith(f"{mark}a") and legend in err


@pytest.mark.real
@pytest.mark.parametrize("name", ["smollm2-135m", "tinyllama-1.1b"])
class TestRealTokenizers:
    """A byte-level and a sentencepiece tokenizer."""

    @pytest.fixture
    def tokenizer(self, name):
        if not (MODELS / name / "tokenizer.json").exists():
            pytest.skip(f"needs the tokenizer of {name} in {MODELS}")
        return Tokenizer(MODELS / name)

    @pytest.mark.parametrize("text", [*TEXTS, " ".join(TEXTS) * 20])
    def test_pieces_are_the_whole_text(self, tokenizer, text):
        ids = tokenizer.encode(text)
        for sizes in ((1,), (1, 4, 2)):
            pieces = stream_in_pieces(TextStream(tokenizer), ids, sizes)
            assert "".join(pieces) == tokenizer.decode(ids)

    def test_pieces_of_random_tokens(self, tokenizer):
        rng = np.random.default_rng(0)
        for _ in range(20):
            ids = rng.integers(300, 30000, 100).tolist()
            # Bytes that are no text may be shown as another number of signs.
            ids = [i for i in ids if "\ufffd" not in tokenizer.decode([i])]
            assert "".join(stream_in_pieces(TextStream(tokenizer), ids)) == tokenizer.decode(ids)

    def test_encoding_and_template_agree_with_transformers(self, tokenizer, name):
        from transformers import AutoTokenizer

        reference = AutoTokenizer.from_pretrained(MODELS / name, local_files_only=True)
        for text in TEXTS:
            assert tokenizer.encode(text) == reference.encode(text)
        messages = [{"role": "user", "content": "hi"}]
        assert tokenizer.render(messages) == reference.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True
        )

    def test_a_conversation_keeps_what_the_model_wrote(self, tokenizer):
        talk = Conversation(tokenizer)
        first = talk.ask("hi")
        answer = [*tokenizer.encode("Hello there, friend.", add_special_tokens=False), 2]
        talk.answer(answer, tokenizer.decode(answer), eos_ids=(2,))
        second = talk.ask("bye")
        assert second[: len(first) + len(answer)] == [*first, *answer]
        rest = second[len(first) + len(answer) :]
        again = tokenizer.encode(tokenizer.render(talk.messages), add_special_tokens=False)
        assert len(rest) > 5 and rest == again[-len(rest) :]


def test_stop_ids_outside_the_vocabulary_are_left_out():
    config = ModelConfig(
        vocab_size=8, embed_dim=4, mlp_dim=4, num_layers=1, num_heads=1, num_kv_heads=1,
        head_dim=4, eos_ids=(3,),
    )  # fmt: skip
    assert stop_ids({"eos_token_id": [2, 8, -1]}, config) == (2,)
    assert stop_ids({"eos_token_id": 5}, config) == (5,)
    assert stop_ids({}, config) == (3,)

"""Text and tokens: the tokenizer of a checkpoint, text printed as it grows, stop strings, chats.

The text of a token depends on its neighbours: a character may be spread over several tokens, and
the first word of a text loses its leading space. So ids are decoded together with a few ids before
them, never alone, and never all of them.
"""

from __future__ import annotations

import json
import os
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

from easyspec_jax.hf_config import stop_ids_of
from easyspec_jax.json_files import read_object
from easyspec_jax.sources import find_checkpoint

_INCOMPLETE = "\ufffd"  # what tokenizers write for bytes that are no whole character (yet)
# Tokens without a whole character at their end before their text is printed as it is.
_MAX_WINDOW = 64


class Tokenizer:
    """The tokenizer in a checkpoint folder.

    It is read by the `tokenizers` library, which imports at once; transformers, which takes
    seconds, is imported only for chat templates and for folders without a tokenizer.json. No code
    from the folder is run.
    """

    def __init__(self, model: str | os.PathLike):
        """Read tokenizer.json, or what transformers can make of older files.

        Args:
          model: a folder with a tokenizer, or what `load_model` takes, converted once.

        Raises:
          ValueError: the folder has no tokenizer that can be read, or there is no such model.
          OSError: as `load_model`.
        """
        self.folder = pathlib.Path(model)
        if not self.folder.is_dir():
            self.folder = find_checkpoint(model)
        self._template: Any = None
        path = self.folder / "tokenizer.json"
        if path.is_file():
            import tokenizers

            self._fast = _read(path, lambda: tokenizers.Tokenizer.from_file(str(path)))
        elif any((self.folder / name).is_file() for name in ("tokenizer.model", "vocab.json")):
            self._fast = _read(self.folder, lambda: _auto(self.folder).backend_tokenizer)
        else:
            raise ValueError(
                f"{self.folder} has no tokenizer: copy the model's tokenizer.json and "
                "tokenizer_config.json there"
            )
        # Both may be stored in the file from training; transformers leaves them off, too.
        self._fast.no_truncation()
        self._fast.no_padding()

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Ids of `text`, with the special tokens (a first one, say) that the tokenizer adds.

        Raises:
          ValueError: it is no text, or holds half a character (a byte that is not UTF-8).
        """
        check_text(text)
        return self._encoding(text, add_special_tokens).ids

    def _encoding(self, text: str, add_special_tokens: bool) -> Any:
        # of a vocabulary without its unknown token only some texts tell
        encode = self._fast.encode
        return _read(self.folder, lambda: encode(text, add_special_tokens=add_special_tokens))

    def encode_from(self, text: str, start: int) -> list[int] | None:
        """Ids of `text[start:]` as cut inside `text`; None if a token lies across `start`."""
        encoding = self._encoding(text, False)
        first = next(
            (i for i, span in enumerate(encoding.offsets) if span[1] > start), len(encoding)
        )
        if first < len(encoding) and encoding.offsets[first][0] < start:
            return None
        return encoding.ids[first:]

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """The text of `ids`."""
        return self._fast.decode(list(ids), skip_special_tokens=skip_special_tokens)

    def description(self) -> dict[str, Any]:
        """What a tokenizer.json says of it."""
        return json.loads(self._fast.to_str())

    def special_ids(self) -> dict[str, int]:
        """The special tokens, which decoded text does not show, by what they are written as."""
        added = self._fast.get_added_tokens_decoder()
        return {token.content: index for index, token in added.items() if token.special}

    def render(self, messages: list[dict[str, str]]) -> str:
        """Messages as the chat template writes them, up to where the answer begins.

        Encode it without special tokens: the template writes those.

        Raises:
          ValueError: there is no chat template, or it refuses the messages.
        """
        if self._template is None:
            if not has_chat_template(self.folder):
                raise ValueError(
                    f"{self.folder} has no chat template: use `easyspec generate` without --chat, "
                    "or put its chat_template.jinja there"
                )
            self._template = _read(self.folder, lambda: _templates(self.folder))
        for message in messages:
            check_text(message["content"])
        try:
            return self._template.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=True
            )
        except Exception as error:  # whatever a template raises: it is a program of its own
            raise ValueError(f"the chat template refuses these messages: {error}") from error


def check_text(text: Any) -> None:
    """Refuse what no tokenizer reads.

    Raises:
      ValueError: it is no text, or holds half a character, as bytes that are not UTF-8 become.
    """
    if not isinstance(text, str):
        raise ValueError(f"a text is needed, got {type(text).__name__}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        where = f"there is half a character at place {error.start}"
        raise ValueError(f"the text is not UTF-8: {where}") from None


def has_chat_template(folder: str | os.PathLike) -> bool:
    """Whether the tokenizer files of a folder hold a chat template."""
    folder = pathlib.Path(folder)
    if (folder / "chat_template.jinja").is_file():
        return True
    files = ("tokenizer_config.json", "chat_template.json")
    return any(_read_json(folder / name).get("chat_template") for name in files)


def read_generation_config(folder: str | os.PathLike) -> dict[str, Any]:
    """generation_config.json of a checkpoint; empty if there is none."""
    return _read_json(pathlib.Path(folder) / "generation_config.json")


def stop_ids(generation: dict[str, Any], config: Any) -> tuple[int, ...]:
    """The stop ids of a generation_config.json, else those of the model's configuration."""
    ids = stop_ids_of(generation.get("eos_token_id")) or config.eos_ids
    return tuple(i for i in ids if 0 <= i < config.vocab_size)  # others are never drawn


def _read_json(path: pathlib.Path) -> dict[str, Any]:
    return read_object(path) if path.is_file() else {}


def _read(path: pathlib.Path, read) -> Any:
    """What `read` returns; its errors, of any type, as one sentence."""
    try:
        return read()
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise  # Ctrl-C; but a panic of the tokenizers library is as any other error
        raise ValueError(f"the tokenizer in {path} cannot be read: {error}") from error


def _auto(folder: pathlib.Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)


def _templates(folder: pathlib.Path) -> Any:
    """Something with `apply_chat_template`; the general class, where it will do, imports faster."""
    if (folder / "tokenizer.json").is_file():
        from transformers import PreTrainedTokenizerFast

        found = PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
    else:
        found = _auto(folder)
    if not found.chat_template:  # a file of processors, which tokenizer classes do not read
        found.chat_template = _read_json(folder / "chat_template.json").get("chat_template")
    return found


class TextStream:
    """Turns tokens into text as they come, so that what was returned never changes.

    All returned texts together are `tokenizer.decode` of all tokens, cut before the first stop
    string. A token costs the decoding of a few tokens before it, however long the text.
    """

    def __init__(self, tokenizer: Any, stop_strings: Sequence[str] = ()):
        """Decode with anything that has `decode(ids) -> str`."""
        self.stopped = False  # a stop string was found; nothing more is returned
        self._tokenizer = tokenizer
        self._stops = tuple(stop_strings)
        self._window: list[int] = []  # the last printed ids, and those not yet printed
        self._fresh = 0  # _window[_fresh:] came after the last whole character
        self._printed = 0  # characters of the window's text that were returned or are held
        self._held = ""  # decoded, but may be the beginning of a stop string

    def push(self, ids: Sequence[int]) -> str:
        """The text that is certain once `ids` follow."""
        return self._release("".join([self._decode(i) for i in ids]))

    def until_stop(self, ids: Sequence[int]) -> list[int]:
        """Push `ids` up to the one that completes a stop string; returns those that were pushed."""
        for i, token in enumerate(ids):
            self.push([token])
            if self.stopped:
                return list(ids[: i + 1])
        return list(ids)

    def flush(self) -> str:
        """What was held back, as nothing follows."""
        text = self._held + self._tokenizer.decode(self._window)[self._printed :]
        self._window, self._fresh, self._printed, self._held = [], 0, 0, ""
        return "" if self.stopped else text

    def _decode(self, token: int) -> str:
        self._window.append(token)
        text = self._tokenizer.decode(self._window)
        if text.endswith(_INCOMPLETE) and len(self._window) < _MAX_WINDOW:
            end = text.find(_INCOMPLETE, self._printed)
            added = text[self._printed : end] if end > self._printed else ""
            self._printed += len(added)
            return added
        added = text[self._printed :]
        if added:
            # What follows needs some text before it, or it would lose its leading space.
            self._window = self._window[self._fresh :]
            self._fresh = len(self._window)
            self._printed = len(self._tokenizer.decode(self._window))
        elif self._printed:
            self._window.pop()  # a special token, which leaves no trace
        return added

    def _release(self, text: str) -> str:
        """`text` behind what was held, without a stop string or what may become one."""
        if self.stopped:
            return ""
        text = self._held + text
        found = [at for at in (text.find(stop) for stop in self._stops) if at >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        longest = min(max(map(len, self._stops), default=0), len(text) + 1)
        begun = (
            n
            for n in range(longest - 1, 0, -1)
            if any(s.startswith(text[-n:]) for s in self._stops)
        )
        keep = len(text) - next(begun, 0)
        self._held = text[keep:]
        return text[:keep]


class TextPrinter:
    """Prints an answer as it comes; marks, if asked to, what the draft proposed."""

    def __init__(self, tokenizer: Any, stop_strings: Sequence[str] = (), *, mark: bool = False):
        """Print to standard output: marks are colours on a terminal, else brackets."""
        self.text = ""  # without marks
        self._stream = TextStream(tokenizer, stop_strings)
        self._mark = mark
        colours = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
        self._marks = ("\033[4;32m", "\033[0m") if colours else ("[", "]")

    def piece(self, ids: Sequence[int], num_accepted: int) -> None:
        """Print one step's tokens. Text that had to wait for a token counts as that token's."""
        if not self._mark:
            self._print(self._stream.push(ids))
            return
        self._print(self._stream.push(ids[:num_accepted]), self._marks)
        self._print(self._stream.push(ids[num_accepted:]))

    def end(self) -> None:
        """Print what was held back, and say on stderr what the marks mean."""
        self._print(self._stream.flush())
        print(flush=True)
        if self._mark:
            looks = "in [brackets]" if self._marks[0] == "[" else "green and underlined"
            print(f"({looks}: proposed by the draft, accepted by the base)", file=sys.stderr)

    def _print(self, text: str, marks: tuple[str, str] = ("", "")) -> None:
        self.text += text
        if text:
            print(text.join(marks), end="", flush=True)


class Conversation:
    """A chat as token ids to which a turn only appends, so that caches of earlier turns stay valid.

    An answer's text, cut into tokens again, may give other ids than the model wrote. So its ids
    are kept, and only what the template writes behind it is encoded.
    """

    def __init__(self, tokenizer: Tokenizer, system: str | None = None):
        """Begin with a system message, if one is given."""
        self.messages = [{"role": "system", "content": system}] if system is not None else []
        self._tokenizer = tokenizer
        self._ids: list[int] = []  # prompt and answer of the last turn
        self._told: str | None = None  # their text; None: not known to be what the template writes

    def ask(self, text: str) -> list[int]:
        """Add a user's message; returns the prompt of the whole conversation."""
        self.messages.append({"role": "user", "content": text})
        whole = self._tokenizer.render(self.messages)
        ids = self._continue(whole)
        if ids is None:
            ids = self._tokenizer.encode(whole, add_special_tokens=False)
        self._ids, self._told = ids, whole
        return ids

    def answer(self, ids: Sequence[int], text: str, *, eos_ids: Sequence[int] = ()) -> None:
        """Add the answer: its tokens and text. A stop id at its end is the template's to write."""
        self.messages.append({"role": "assistant", "content": text})
        ids = list(ids[:-1]) if ids and ids[-1] in eos_ids else list(ids)
        if self._told is not None and self._tokenizer.decode(ids) == text:
            self._ids, self._told = [*self._ids, *ids], self._told + text
        else:  # cut at a stop string
            self._told = None

    def withdraw(self) -> None:
        """Forget the last user's message, which was not answered."""
        self.messages.pop()
        self._told = None

    def _continue(self, whole: str) -> list[int] | None:
        """The known ids and those of the rest of `whole`; None if it begins with another text."""
        if self._told is None or not whole.startswith(self._told):
            return None
        rest = self._tokenizer.encode_from(whole, len(self._told))
        return None if rest is None else self._ids + rest

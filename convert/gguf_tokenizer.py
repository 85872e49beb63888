"""tokenizer.json and tokenizer_config.json from the metadata of a GGUF file, without torch.

A GGUF file holds the vocabulary and either the merges (byte-level BPE, model "gpt2") or the scores
(SentencePiece BPE, model "llama"); how text is split before that is only named, by
`tokenizer.ggml.pre`, and is looked up here.
"""

from __future__ import annotations

import json
import pathlib
from collections.abc import Callable
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, processors
from tokenizers import pre_tokenizers as pre

from easyspec_jax.config import is_integer, is_number

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = range(1, 7)
_SPACE = "\u2581"

_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
_TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|"
    r"\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_GPT2 = None  # the split that is built into the byte-level step
_DIGITS = "digits"  # every digit alone, then the GPT-2 split
_SPLITS = {
    "default": _GPT2,
    "gpt-2": _GPT2,
    "gpt2": _GPT2,
    "smollm": _DIGITS,
    "llama-bpe": _LLAMA3,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "qwen2": _QWEN2,
    "tekken": _TEKKEN,
}
_WHOLE_WORDS_FIRST = ("llama-bpe", "llama3", "llama-v3", "tekken")  # a word in the vocabulary wins
_BEGINS = _WHOLE_WORDS_FIRST  # a BOS token goes first unless said


_IDS = ("bos", "eos", "eot", "eom", "unknown", "padding")


def _is_list(check) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list) and all(map(check, value))


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


# Keys under "tokenizer.": what a value must be, in words and as a test.
_TYPES: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "ggml.tokens": ("a list of texts", _is_list(_is_text)),
    "ggml.merges": ("a list of texts", _is_list(_is_text)),
    "ggml.scores": ("a list of numbers", _is_list(is_number)),
    "ggml.token_type": ("a list of the kinds 1 to 6", _is_list(lambda kind: kind in range(1, 7))),
    "ggml.model": ("a name", _is_text),
    "ggml.pre": ("a name", _is_text),
    "chat_template": ("a text", _is_text),
    **{
        f"ggml.{kind}_token_id": ("a token id", lambda i: is_integer(i) and i >= 0) for kind in _IDS
    },
    **{
        f"ggml.{flag}": ("true or false", lambda value: isinstance(value, bool))
        for flag in ("add_bos_token", "add_eos_token", "add_space_prefix")
    },
}


def check_tokenizer(metadata: dict[str, Any]) -> None:
    """Refuse a vocabulary of which `write_tokenizer` could not make a tokenizer.

    Raises:
      ValueError: the kind of tokenizer or its way of splitting is unknown, or a part is missing or
        not what it should be.
    """
    if "tokenizer.ggml.tokens" not in metadata:
        return
    for key, (what, fits) in _TYPES.items():
        value = metadata.get(f"tokenizer.{key}")
        if value is not None and not fits(value):
            raise ValueError(f"tokenizer.{key} must be {what}.")
    tokens = metadata["tokenizer.ggml.tokens"]
    model = metadata.get("tokenizer.ggml.model")
    if model not in ("gpt2", "llama"):
        raise ValueError(
            f"tokenizer.ggml.model {model!r} is not supported; only gpt2 and llama are."
        )
    name = metadata.get("tokenizer.ggml.pre", "default")
    if model == "gpt2" and name not in _SPLITS:
        raise ValueError(
            f"tokenizer.ggml.pre {name!r} is not supported; known are {', '.join(_SPLITS)}."
        )
    needed = "merges" if model == "gpt2" else "scores"
    if f"tokenizer.ggml.{needed}" not in metadata:
        raise ValueError(
            f"the file has a vocabulary of the kind {model} but no tokenizer.ggml.{needed}."
        )
    per_token = ("token_type", "scores") if model == "llama" else ("token_type",)
    for key in per_token:
        values = metadata.get(f"tokenizer.ggml.{key}")
        if values is not None and len(values) != len(tokens):
            raise ValueError(
                f"tokenizer.ggml.{key} has {len(values)} entries for {len(tokens)} tokens."
            )
    for key in ("remove_extra_whitespaces", "precompiled_charsmap"):
        if model == "llama" and metadata.get(f"tokenizer.ggml.{key}"):
            raise ValueError(f"tokenizer.ggml.{key} is set, which is not supported.")
    _check_vocabulary(metadata)


def _check_vocabulary(metadata: dict[str, Any]) -> None:
    """Refuse ids, tokens and merges that do not go together."""
    vocab, types = _vocab(metadata), _types(metadata)
    for kind in _IDS:
        index = metadata.get(f"tokenizer.ggml.{kind}_token_id")
        if index is None or (kind == "padding" and index >= len(types)):  # -1 is written for none
            continue
        if index >= len(types):
            where = f"the vocabulary's 0 .. {len(types) - 1}"
            raise ValueError(f"tokenizer.ggml.{kind}_token_id is {index}, outside {where}.")
        if types[index] == _UNUSED:
            raise ValueError(f"tokenizer.ggml.{kind}_token_id is {index}, an unused token.")
    if len(vocab) != sum(kind != _UNUSED for kind in types) or "" in vocab:
        raise ValueError("tokenizer.ggml.tokens holds a token twice, or an empty one.")
    if metadata["tokenizer.ggml.model"] == "gpt2":
        for merge in metadata["tokenizer.ggml.merges"]:
            left, _, right = merge.partition(" ")
            if not {left, right, left + right} <= vocab.keys():
                raise ValueError(
                    f"tokenizer.ggml.merges has {merge!r}: not two tokens, a space between them, "
                    "that make a third."
                )


def write_tokenizer(metadata: dict[str, Any], folder: pathlib.Path) -> None:
    """Write the tokenizer of a GGUF file into `folder`; nothing if the file has no vocabulary.

    Args:
      metadata: all keys and values of the file.

    Raises:
      ValueError: see `check_tokenizer`.
    """
    check_tokenizer(metadata)
    tokens = metadata.get("tokenizer.ggml.tokens")
    if tokens is None:
        return
    byte_level = metadata["tokenizer.ggml.model"] == "gpt2"
    tokenizer = _byte_level(metadata) if byte_level else _sentencepiece(metadata)
    types = _types(metadata)
    for kind, special in (((_CONTROL, _UNKNOWN), True), ((_USER_DEFINED,), False)):
        added = [
            AddedToken(t, normalized=False, special=special)
            for t, type_ in zip(tokens, types, strict=True)
            if type_ in kind
        ]
        (tokenizer.add_special_tokens if special else tokenizer.add_tokens)(added)
    _add_template(tokenizer, metadata)
    (folder / "tokenizer.json").write_text(tokenizer.to_str(pretty=True), encoding="utf-8")
    text = json.dumps(_tokenizer_config(metadata), indent=2, ensure_ascii=False)
    (folder / "tokenizer_config.json").write_text(text + "\n", encoding="utf-8")


def _byte_level(metadata: dict[str, Any]) -> Tokenizer:
    name = metadata.get("tokenizer.ggml.pre", "default")
    merges = [tuple(pair.split(" ", 1)) for pair in metadata["tokenizer.ggml.merges"]]
    bpe = models.BPE(_vocab(metadata), merges, ignore_merges=name in _WHOLE_WORDS_FIRST)
    tokenizer = Tokenizer(bpe)
    split = _SPLITS[name]
    if split is _GPT2:
        tokenizer.pre_tokenizer = pre.ByteLevel(add_prefix_space=False, use_regex=True)
    else:
        first = pre.Digits(individual_digits=True)
        if split is not _DIGITS:
            first = pre.Split(Regex(split), behavior="isolated")
        byte_level = pre.ByteLevel(add_prefix_space=False, use_regex=split is _DIGITS)
        tokenizer.pre_tokenizer = pre.Sequence([first, byte_level])
    if name == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sentencepiece(metadata: dict[str, Any]) -> Tokenizer:
    vocab = _vocab(metadata)
    unknown = _token(metadata, "unknown")
    tokenizer = Tokenizer(
        models.BPE(
            vocab, _merges(metadata, vocab), unk_token=unknown, fuse_unk=True, byte_fallback=True
        )
    )
    prefix = metadata.get("tokenizer.ggml.add_space_prefix", True)
    tokenizer.pre_tokenizer = pre.Metaspace(_SPACE, "first" if prefix else "never", split=False)
    steps = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence(steps + [decoders.Strip(" ", 1, 0)] * prefix)
    return tokenizer


def _merges(metadata: dict[str, Any], vocab: dict[str, int]) -> list[tuple[str, str]]:
    """The merges that scores stand for: pieces by falling score, each in every way to build it."""
    tokens, types = metadata["tokenizer.ggml.tokens"], _types(metadata)
    scores = metadata["tokenizer.ggml.scores"]
    pieces = [i for i, type_ in enumerate(types) if type_ in (_NORMAL, _USER_DEFINED)]
    merges, longest = [], max(map(len, vocab))
    for i in sorted(pieces, key=lambda i: (-scores[i], i)):
        whole = tokens[i]
        ends = range(max(1, len(whole) - longest), min(longest, len(whole) - 1) + 1)
        cuts = ((whole[:k], whole[k:]) for k in ends)
        cuts = [cut for cut in cuts if cut[0] in vocab and cut[1] in vocab]
        # Among equal scores the larger left id goes first, as transformers has it; in runs of
        # spaces that is the leftmost pair, as in SentencePiece.
        merges += sorted(cuts, key=lambda cut: (vocab[cut[0]], vocab[cut[1]]), reverse=True)
    return merges


def _vocab(metadata: dict[str, Any]) -> dict[str, int]:
    """Token to id; unused ids, which pad the embedding, have no token."""
    types = _types(metadata)
    tokens = enumerate(metadata["tokenizer.ggml.tokens"])
    return {token: i for i, token in tokens if types[i] != _UNUSED}


def _types(metadata: dict[str, Any]) -> list[int]:
    tokens = metadata["tokenizer.ggml.tokens"]
    return metadata.get("tokenizer.ggml.token_type") or [_NORMAL] * len(tokens)


def _token(metadata: dict[str, Any], kind: str) -> str | None:
    tokens = metadata["tokenizer.ggml.tokens"]
    index = metadata.get(f"tokenizer.ggml.{kind}_token_id")
    return None if index is None or index >= len(tokens) else tokens[index]


def _added(metadata: dict[str, Any], kind: str) -> list[str]:
    """The BOS or EOS token, where the tokenizer puts it around a text; else nothing."""
    default = metadata["tokenizer.ggml.model"] == "llama"
    default = kind == "bos" and (default or metadata.get("tokenizer.ggml.pre") in _BEGINS)
    wanted = metadata.get(f"tokenizer.ggml.add_{kind}_token", default)
    token = _token(metadata, kind)
    return [token] if wanted and token is not None else []


def _add_template(tokenizer: Tokenizer, metadata: dict[str, Any]) -> None:
    before, after = _added(metadata, "bos"), _added(metadata, "eos")
    if before or after:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=[*before, "$A", *after],
            pair=[*before, "$A:0", *after, *(f"{t}:1" for t in before), "$B:1"]
            + [f"{t}:1" for t in after],
            special_tokens=[(t, tokenizer.token_to_id(t)) for t in {*before, *after}],
        )


def _tokenizer_config(metadata: dict[str, Any]) -> dict[str, Any]:
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "add_bos_token": bool(_added(metadata, "bos")),
        "add_eos_token": bool(_added(metadata, "eos")),
    }
    for name, kind in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"), ("unk", "unknown")):
        if (token := _token(metadata, kind)) is not None:
            config[f"{name}_token"] = token
    if "tokenizer.chat_template" in metadata:
        config["chat_template"] = metadata["tokenizer.chat_template"]
    return config

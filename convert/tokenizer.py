"""The tokenizer files of a checkpoint, and the fingerprint by which two tokenizers are compared."""

from __future__ import annotations

import hashlib
import json
import pathlib
import shutil

from easyspec_jax.json_files import parse_object

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
)


def copy_tokenizer(source: pathlib.Path, folder: pathlib.Path) -> None:
    """Copy those tokenizer files that exist."""
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)


def has_tokenizer(folder: pathlib.Path) -> bool:
    """Whether a vocabulary is there."""
    return any((folder / n).exists() for n in ("tokenizer.json", "tokenizer.model", "vocab.json"))


def tokenizer_hash(folder: pathlib.Path) -> str | None:
    """sha256 of the ordinary (token, id) pairs, sorted by token; None without a tokenizer.json.

    Added tokens are left out, inside the vocabulary or not: fine-tunes rename and append them, and
    that does not change how text is cut.

    Raises:
      ValueError: the tokenizer.json has no vocabulary to hash.
    """
    path = pathlib.Path(folder) / "tokenizer.json"
    if not path.is_file():
        return None
    tokenizer = parse_object(path.read_bytes(), path.name)
    try:
        vocab = tokenizer["model"]["vocab"]
        if isinstance(vocab, list):  # Unigram: [token, score] pairs in the order of their ids
            vocab = {token: i for i, (token, _) in enumerate(vocab)}
        added = {token["content"] for token in tokenizer.get("added_tokens") or ()}
        pairs = sorted((token, i) for token, i in vocab.items() if token not in added)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            "tokenizer.json cannot be read: it must be JSON with a vocabulary at model.vocab "
            f"({type(error).__name__}: {error})."
        ) from None
    return hashlib.sha256(json.dumps(pairs).encode()).hexdigest()

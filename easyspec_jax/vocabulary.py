"""Drafts with another tokenizer: what two vocabularies share, and how one is read in the other.

Tokens are the same if their bytes are (Timor et al. 2025, arXiv 2502.05202, token-level
intersection): q lives on the tokens that both vocabularies have, and the base's other tokens are
never drafted. Whatever the base writes is read by the draft token for token: one it lacks as the
longest of its own tokens that ends alike. That costs acceptance and never text.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.sharding import Mesh

from easyspec_jax.checkpoint import METADATA_FILE, read_metadata
from easyspec_jax.hf_config import config_from_hf
from easyspec_jax.json_files import read_object
from easyspec_jax.sampling import Scores
from easyspec_jax.sharding import replicate
from easyspec_jax.text import Tokenizer, read_generation_config, stop_ids

LEAST = 0.05  # of the smaller vocabulary, or they are no pair
UNKNOWN = np.iinfo(np.int32).max  # an id that no model has is read as its unknown token
_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class SharedVocabulary(struct.PyTreeNode, kw_only=True):
    """The base's tokens in the eyes of a draft with another tokenizer.

    No two shared tokens are read as the same one. V is the base's number of tokens.
    """

    reading: Any  # i32[V], the draft's id that each of the base's is read as
    shared: Any  # bool[V], whether it is the same token, which may be drafted
    # hashes of the ordinary vocabularies, where they are known
    base: str | None = struct.field(pytree_node=False, default=None)
    draft: str | None = struct.field(pytree_node=False, default=None)

    def on(self, mesh: Mesh, vocab_size: int) -> SharedVocabulary:
        """The same on every device of a mesh, for a draft with so many ids."""
        shared = self.shared & (self.reading < vocab_size)
        reading = np.asarray(self.reading, np.int32)
        return self.replace(reading=replicate(reading, mesh), shared=replicate(shared, mesh))

    def read(self, tokens: jax.Array) -> jax.Array:
        """The draft's ids of i32[B, T] ids of the base."""
        return jnp.take(self.reading, tokens, mode="fill", fill_value=UNKNOWN)

    def offer(self, scores: Scores, vocab_size: int) -> Scores:
        """The draft's logits over the V ids of the base: -inf where it may not draft."""
        missing = max(vocab_size - self.reading.shape[0], 0)
        reading, shared = (
            jnp.pad(x, (0, missing))[:vocab_size] for x in (self.reading, self.shared)
        )
        found = jnp.take(scores.whole(), reading, axis=-1, mode="clip")
        return Scores.of(jnp.where(shared[None, None], found, -jnp.inf))

    @property
    def num_shared(self) -> int:
        """Tokens that may be drafted."""
        return int(np.asarray(self.shared).sum())

    def covered(self, ids: Sequence[int]) -> float:
        """The share of a text's tokens (ids of the base) that may be drafted."""
        shared = np.asarray(self.shared)
        return float(np.mean([i < shared.size and bool(shared[i]) for i in ids]))


def shared_vocabulary(base: str | os.PathLike, draft: str | os.PathLike) -> SharedVocabulary:
    """What the tokenizers of two models share.

    Special tokens are shared by what they do, never by name: the first stop ids of both are the
    same token. The draft reads every other stop id, and the token that begins a text, as its own.

    Args:
      base: a folder with a tokenizer, or what `load_model` takes.
      draft: the same.

    Raises:
      ValueError: no tokenizer there, one whose tokens stand for no known bytes, or two that share
        next to nothing.
    """
    ours, theirs = _Tokens(base), _Tokens(draft)
    ids = _by_bytes(theirs.bytes)
    reading, shared = np.full(ours.size, UNKNOWN, np.int32), np.zeros(ours.size, bool)
    for token in _by_bytes(ours.bytes).values():
        shared[token] = ours.bytes[token] in ids
    for token, text in ours.bytes.items():
        ends = (ids[text[i:]] for i in range(len(text)) if text[i:] in ids)
        reading[token] = next(ends, UNKNOWN)
    least = LEAST * min(len(ours.bytes), len(theirs.bytes))
    if shared.sum() < least:
        raise ValueError(
            f"the tokenizers of {base} and {draft} share {shared.sum():,} of {len(ours.bytes):,} "
            "tokens: nearly nothing could be drafted; use a draft with more of them"
        )
    if ours.begin is not None and theirs.begin is not None:
        reading[ours.begin] = theirs.begin
    if ours.ends and theirs.ends:
        reading[list(ours.ends)] = theirs.ends[0]
        shared[ours.ends[0]] = True
    return SharedVocabulary(reading=reading, shared=shared, base=ours.hash, draft=theirs.hash)


class _Tokens:
    """The tokens of a model's tokenizer by id, and what its special ones are for."""

    def __init__(self, model: str | os.PathLike):
        tokenizer = Tokenizer(model)
        folder, about = tokenizer.folder, tokenizer.description()
        self.bytes = token_bytes(about, str(model))
        added = about.get("added_tokens") or ()
        self.size = 1 + max([*self.bytes, *(token["id"] for token in added)])
        self.hash: str | None = None
        self.begin: int | None = None
        self.ends: tuple[int, ...] = ()
        if (folder / METADATA_FILE).is_file():
            self.hash = read_metadata(folder)[1]["tokenizer"]
        if (folder / "config.json").is_file():
            config = config_from_hf(read_object(folder / "config.json"))
            ends = stop_ids(read_generation_config(folder), config)
            special = {i for i in range(self.size) if i not in self.bytes}
            self.ends = tuple(i for i in ends if i in special)
            self.begin = config.bos_id if config.bos_id in special else None


def token_bytes(description: dict[str, Any], name: str) -> dict[int, bytes]:
    """The bytes that each token of a tokenizer stands for, without special tokens.

    Byte-level vocabularies write a byte as a character (a space as "Ġ"), those of SentencePiece a
    space as "▁" and single bytes as "<0x0A>"; added tokens are text as it is.

    Args:
      description: what a tokenizer.json says.
      name: of the tokenizer, for messages.

    Raises:
      ValueError: a vocabulary of another kind.
    """
    model, decoder = description.get("model") or {}, description.get("decoder") or {}
    steps = decoder.get("decoders") or [decoder]
    kinds, vocab = {step.get("type") for step in steps}, model.get("vocab")
    if isinstance(vocab, list):  # Unigram: [token, score] pairs in the order of their ids
        vocab = {token: i for i, (token, _) in enumerate(vocab)}
    known = kinds & {"ByteLevel", "Metaspace", "ByteFallback", "Fuse"}
    if not isinstance(vocab, dict) or not vocab or not known:
        raise ValueError(
            f"the tokens of {name} stand for no known bytes: only byte-level and SentencePiece "
            "vocabularies can be compared"
        )
    found = {}
    for token, i in vocab.items():
        text = _byte_level(token) if "ByteLevel" in kinds else _piece(token)
        if text:
            found[i] = text
    found.pop(vocab.get(model.get("unk_token"), model.get("unk_id")), None)
    for token in description.get("added_tokens") or ():
        found.pop(token["id"], None)
        if not token.get("special") and token.get("content"):
            found[token["id"]] = token["content"].encode()
    return found


def _by_bytes(tokens: dict[int, bytes]) -> dict[bytes, int]:
    """One id for every text: of several the last, as tokens of single bytes, which stand first, are
    for what has no other.
    """
    return {text: i for i, text in sorted(tokens.items())}


def _characters() -> dict[str, int]:
    """The byte that each character of a byte-level vocabulary stands for."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in plain]
    return {chr(b): b for b in plain} | {chr(256 + i): b for i, b in enumerate(others)}


_BYTE_OF = _characters()


def _byte_level(token: str) -> bytes:
    """The bytes of a token; none where it holds another character."""
    known = all(character in _BYTE_OF for character in token)
    return bytes(_BYTE_OF[character] for character in token) if known else b""


def _piece(token: str) -> bytes:
    """The bytes of a piece of SentencePiece."""
    byte = _BYTE.fullmatch(token)
    return bytes([int(byte[1], 16)]) if byte else token.replace("▁", " ").encode()

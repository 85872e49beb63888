"""What is asked for: the inputs of a call, checked, and what of them every step needs to know.

Anything that cannot be is refused in one clear sentence, before allocation.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import numpy as np
from flax import struct

from easyspec_jax.config import ModelConfig, Sampling, is_integer, is_number
from easyspec_jax.depth import Pacing
from easyspec_jax.model import Model
from easyspec_jax.sampling import Filters

MAX_NODES = 4096  # of one step's draft: masks grow with their square
EOS_SLOTS = 8  # stop ids are padded to a multiple of this, so that their number compiles nothing


class Request(struct.PyTreeNode, kw_only=True):
    """What a request fixes, for every function of the loop and of drafters; never donated."""

    filters: Filters  # q is filtered as p is
    eos_ids: jax.Array  # i32[E], padded with -1: nothing behind one of them is emitted
    key: jax.Array  # of the whole run; every step folds in its number
    # f32[], a row whose likeliest path falls below it drafts no further; None: never
    min_probability: jax.Array | None = None
    num_draft_tokens: int = struct.field(pytree_node=False)  # γ, at most; 0: autoregression
    tree_width: int = struct.field(pytree_node=False, default=1)  # w; 1 is a chain
    vocab_size: int = struct.field(pytree_node=False)  # V of the base: p and q cover these ids
    pacing: Pacing | None = None  # where every step chooses how much of γ it drafts


@dataclasses.dataclass(frozen=True, kw_only=True)
class Inputs:
    """The checked arguments of one call."""

    rows: list[np.ndarray]  # i32[T] each, T at least 1
    max_new_tokens: int
    sampling: Sampling
    eos_ids: np.ndarray  # i32[E], padded with -1
    seed: int
    logprobs: bool = False

    @property
    def longest(self) -> int:
        """Tokens of the longest prompt."""
        return max(row.size for row in self.rows)

    @property
    def total(self) -> int:
        """Tokens of the longest row when it is done, were there no end of the context."""
        return self.longest + self.max_new_tokens


def make_inputs(
    config: ModelConfig,
    prompts: Sequence[Sequence[int]] | np.ndarray | jax.Array,
    max_new_tokens: int,
    sampling: Sampling = Sampling(),  # noqa: B008
    eos_ids: Sequence[int] = (),
    seed: int = 0,
    logprobs: bool = False,
) -> Inputs:
    """The inputs of a call, for a base of this configuration.

    Raises:
      ValueError: on anything the base cannot do, naming the prompt or the option.
    """
    if not is_integer(max_new_tokens) or max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be a whole number above 0, got {max_new_tokens!r}")
    if not isinstance(sampling, Sampling):
        raise ValueError(f"sampling must be a Sampling, got {sampling!r}")
    if not is_integer(seed) or not -(2**63) <= seed < 2**63:
        raise ValueError(f"seed must be a whole number of 64 bits, got {seed!r}")
    inputs = Inputs(
        rows=check_prompts(config, prompts, config.max_len - 1),
        max_new_tokens=int(max_new_tokens),
        sampling=sampling,
        eos_ids=_check_eos(config, eos_ids),
        seed=int(seed),
        logprobs=logprobs,
    )
    window = config.sliding_window
    if window is not None and min(inputs.total, config.max_len) > window:
        raise ValueError(
            f"prompt and max_new_tokens make {inputs.total} tokens, but the model attends to a "
            f"sliding window of {window}: ask for fewer tokens"
        )
    return inputs


def check_prompts(config: ModelConfig, prompts: Any, most: int) -> list[np.ndarray]:
    """The token ids of all prompts, i32[T] each, T in 1 .. `most`.

    Raises:
      ValueError: on anything else, naming the prompt.
    """
    rows = [_check_prompt(config, i, prompt, most) for i, prompt in enumerate(_listed(prompts))]
    if not rows:
        raise ValueError("no prompts given")
    return rows


def _listed(prompts: Any) -> Iterable:
    try:
        return list(prompts)
    except TypeError:
        raise ValueError(f"prompts must be lists of token ids, got {prompts!r}") from None


def _check_prompt(config: ModelConfig, i: int, prompt: Any, most: int) -> np.ndarray:
    try:
        row = np.asarray(prompt)
    except ValueError:  # lists of several lengths
        row = np.zeros((0, 0))
    if row.ndim != 1:
        raise ValueError(f"prompt {i} is not a list of token ids: prompts are a list of such lists")
    if row.size == 0:
        raise ValueError(f"prompt {i} is empty: give at least one token, a beginning of text say")
    if not np.issubdtype(row.dtype, np.integer):
        raise ValueError(f"prompt {i} is not a list of token ids: it holds {row.dtype}")
    outside = (row < 0) | (row >= config.vocab_size)
    if outside.any():
        raise ValueError(
            f"prompt {i} has token id {int(row[outside][0])}, "
            f"outside the base's 0 .. {config.vocab_size - 1}"
        )
    if row.size > most:
        raise ValueError(
            f"prompt {i} has {row.size} tokens, but the base's context is "
            f"{config.max_len}: shorten it"
        )
    return row.astype(np.int32)


def _check_eos(config: ModelConfig, eos_ids: Any) -> np.ndarray:
    ids = list(eos_ids) if isinstance(eos_ids, Iterable) else [eos_ids]
    for i in ids:
        if not is_integer(i) or not 0 <= i < config.vocab_size:
            raise ValueError(
                f"eos_ids must be token ids in the base's 0 .. {config.vocab_size - 1}, got {i!r}"
            )
    slots = max(-(-len(ids) // EOS_SLOTS), 1) * EOS_SLOTS
    return np.array([*ids, *[-1] * (slots - len(ids))], np.int32)


def check_stop_strings(stop_strings: Any, tokenizer: Any) -> tuple[str, ...]:
    """The stop strings as a tuple.

    Raises:
      ValueError: not a list of texts, an empty one, or no tokenizer to find them with.
    """
    is_list = isinstance(stop_strings, Iterable) and not isinstance(stop_strings, str)
    stops = tuple(stop_strings) if is_list else ()
    if not is_list or not all(isinstance(s, str) and s for s in stops):
        raise ValueError(f"stop_strings must be a list of texts, none empty, got {stop_strings!r}")
    if stops and tokenizer is None:
        raise ValueError("stop_strings need a tokenizer to find them in the text")
    return stops


def check_pair(
    base: Model, drafter: Any, num_draft_tokens: Any, tree_width: Any, least: Any
) -> None:
    """Refuse a base, drafter and options that cannot work together; warn of a short draft context.

    Args:
      num_draft_tokens: None: as many as the drafter likes.
      least: the probability that drafting stops at, or None.

    Raises:
      ValueError: saying which.
    """
    if not isinstance(base, Model):
        raise ValueError(f"a base is needed, load_model(...) say, got {_kind(base)}")
    if isinstance(drafter, type) or not hasattr(drafter, "propose"):
        raise ValueError(
            f"a drafter is needed, LayerParallelDrafter(draft) say, got {_kind(drafter)}"
        )
    depth = drafter.depth if num_draft_tokens is None else num_draft_tokens
    numbers = {"tree_width": tree_width}
    if num_draft_tokens is not None:
        numbers["num_draft_tokens"] = num_draft_tokens
    for name, n in numbers.items():
        if not is_integer(n) or n < 1:
            raise ValueError(f"{name} must be a whole number above 0, got {n!r}")
    if depth >= base.config.max_len or depth * tree_width > MAX_NODES:
        raise ValueError(
            f"{depth} draft tokens in a tree of width {tree_width} are more than a step can draft: "
            f"at most {min(base.config.max_len - 1, MAX_NODES)}, all nodes together {MAX_NODES}"
        )
    if least is not None and (not is_number(least) or not 0 <= least <= 1):
        raise ValueError(f"min_draft_probability must be between 0 and 1, got {least!r}")
    if max(base.partition) > 1:
        raise ValueError("the base runs layer after layer: load it with group_size=1")
    drafter.check(base, depth, tree_width)
    check_taps(base, drafter)
    for draft in drafter.models():
        _check_draft(base, draft)


def check_taps(base: Model, drafter: Any) -> None:
    """Refuse a drafter that wants what the base has not.

    Raises:
      ValueError: one of its taps is no number in 0 .. L.
    """
    most = base.config.num_layers
    for tap in drafter.taps:
        if not is_integer(tap) or not 0 <= tap <= most:
            raise ValueError(
                f"the drafter taps the base before layer {tap!r}, but it has {most} layers: taps "
                f"are numbers in 0 .. {most}"
            )


def _kind(value: Any) -> str:
    """What a value is, for messages."""
    return f"the class {value.__name__}" if isinstance(value, type) else type(value).__name__


def check_tokenizers(base: str | None, draft: str | None, instead: str = "") -> None:
    """Refuse tokenizers that are known (by their hashes) to differ; `instead` ends the message.

    Raises:
      ValueError: they do.
    """
    if None not in (base, draft) and base != draft:
        raise ValueError(
            "base and draft have different tokenizers: ordinary tokens have other ids, "
            f"so a draft could never be accepted; use a draft of the same family{instead}"
        )


def _check_draft(base: Model, draft: Any) -> None:
    if not isinstance(draft, Model):
        raise ValueError(f"a drafter drafts with a model, got {_kind(draft)}")
    if draft.layout.mesh != base.layout.mesh:
        raise ValueError("base and draft are on different meshes: load both with the same mesh")
    instead = ", or a LayerParallelDrafter with a shared_vocabulary"
    check_tokenizers(base.tokenizer, draft.tokenizer, instead)
    ours, theirs = draft.config.context, base.config.context
    if ours < theirs:
        warnings.warn(
            f"the draft's context of {ours} tokens is shorter than the base's {theirs}: "
            "beyond it drafts are rarely accepted, which costs speed, "
            "never text",
            stacklevel=4,
        )

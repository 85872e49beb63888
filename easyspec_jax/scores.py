"""What a model thinks of a text: its scores for every next token."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import numpy as np

from easyspec_jax import model as models
from easyspec_jax.cache import KVCache
from easyspec_jax.memory import check_memory, device_bytes
from easyspec_jax.model import Model
from easyspec_jax.request import check_prompts
from easyspec_jax.sharding import mesh_jit, replicate, zeros


def logits(model: Model, tokens: Sequence[Sequence[int]] | np.ndarray | jax.Array) -> jax.Array:
    """Scores of the token behind each of a text's, before softmax: at least float32[B, T, V], the
    same on every device. Another length of text compiles anew.

    Args:
      tokens: texts of one length, i32[B, T].

    Raises:
      ValueError: texts of several lengths, an id outside the vocabulary, more tokens than the
        context has, or more than the devices hold.
    """
    rows = check_prompts(model.config, tokens, model.config.context)
    if len({row.size for row in rows}) > 1:
        raise ValueError("texts must be of one length: pad them behind, or score them one by one")
    text = np.stack(rows)
    cache = model.abstract_cache(*text.shape)
    scores = 2 * 4 * text.size * (model.config.vocab_size + model.config.num_heads * text.shape[1])
    check_memory(model.layout.mesh, {"cache": device_bytes(cache), "scores": scores})
    return _logits(model, replicate(text, model.layout.mesh), zeros(cache))


@mesh_jit()
def _logits(model: Model, tokens: jax.Array, cache: KVCache) -> jax.Array:
    return models.logits(model, models.forward(model, tokens, cache)[0])

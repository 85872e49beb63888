"""What a phase must move, whatever the program: every weight that a pass uses, once, all entries of
the caches that its attention looks at, once, and the entries that it writes.

Attention masks what it must not see, so it reads caches as they are allocated. Embeddings are rows
that are looked up; a tied head counts as the head alone. Where the layers of a group take turns, in
an exact pass over layers side by side on the mesh, the devices wait for each other: the weights and
entries of every turn count. Activations, logits and what sampling does with them are not counted:
they are what a program adds.
"""

from __future__ import annotations

import dataclasses

from easyspec_jax.cache import KVCache
from easyspec_jax.decode import Decoder
from easyspec_jax.drafter import Autoregression
from easyspec_jax.drafters.eagle import EagleDrafter
from easyspec_jax.drafters.layer_parallel import LayerParallelDrafter
from easyspec_jax.drafters.prompt_lookup import PromptLookupDrafter
from easyspec_jax.memory import device_bytes
from easyspec_jax.model import Model


@dataclasses.dataclass(frozen=True)
class Floor:
    """Bytes on the device that has most to do."""

    weights: float = 0.0
    cache_read: float = 0.0
    cache_written: float = 0.0

    @property
    def bytes(self) -> int:
        """All of them."""
        return round(self.weights + self.cache_read + self.cache_written)

    def __add__(self, other: Floor) -> Floor:
        pairs = zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)
        return Floor(*(a + b for a, b in pairs))


def pass_floor(
    model: Model, cache: KVCache, tokens: int, *, exact: bool = True, logits: bool = True
) -> Floor:
    """Of one pass of a model.

    Args:
      cache: its own, or shapes.
      tokens: T of each row.
      exact: layer after layer; False: the layers of a group at once.
      logits: False: nothing but the cache is wanted, as of a prompt, so that the last layer ends
        with its keys and values.
    """
    batch, row = cache.length.shape[0], model.layout.matrix_dtype(model.dtype)
    total = Floor(weights=batch * tokens * model.config.embed_dim * row.itemsize)
    share = tokens / cache.max_len  # of a cache's entries
    for block, kv in zip(model.params.blocks, cache.blocks, strict=True):
        size = len(block.mlp)
        turns = size / len(kv) if exact and model.layout.stacks(size) else 1
        read = turns * device_bytes(kv)
        weights = turns * device_bytes(block.attention) + device_bytes(block.mlp)
        total += Floor(weights, read, share * read)
    if logits:
        top = (model.params.final_norm, model.params.lm_head)
        return total + Floor(weights=device_bytes(top))
    last, slots = model.params.blocks[-1], cache.blocks[-1]
    unused = device_bytes((last.mlp[-1], last.attention[-1].wo))
    return total + Floor(-unused, -device_bytes(slots[-1]))


def step_floors(decoder: Decoder, batch: int, entries: int) -> dict[str, Floor]:
    """Of each phase of one step, the draft's for one level behind the first; nothing for a drafter
    whose passes are not known.

    Args:
      entries: S, the capacity of the caches.
    """
    gamma, width, drafter = decoder.num_draft_tokens, decoder.tree_width, decoder.drafter
    known = (Autoregression, PromptLookupDrafter, LayerParallelDrafter, EagleDrafter)
    if not isinstance(drafter, known):
        return {}
    base = decoder.base
    cache = base.abstract_cache(batch, entries)
    found = {"verify": pass_floor(base, cache, gamma * width + 1)}
    if isinstance(drafter, LayerParallelDrafter):
        draft = drafter.draft
        cache = draft.abstract_cache(batch, entries)
        found["calibrate"] = pass_floor(draft, cache, gamma + 1, exact=drafter.calibrate)
        if gamma > 1:
            found["draft"] = pass_floor(draft, cache, width, exact=False)
    if isinstance(drafter, EagleDrafter):
        head = drafter.head
        cache = head.model.abstract_cache(batch, entries)
        fuse = Floor(weights=device_bytes((head.fc, head.taps_norm)))
        found["calibrate"] = pass_floor(head.model, cache, gamma + 1) + fuse
        if gamma > 1:
            found["draft"] = pass_floor(head.model, cache, width)
    return found


def prefill_floor(decoder: Decoder, batch: int, entries: int, chunk: int) -> Floor | None:
    """Of absorbing so many prompt tokens of every row; None where it is not known."""
    total = Floor()
    if not step_floors(decoder, batch, entries):
        return None
    for model in (decoder.base, *decoder.drafter.models()):
        total += pass_floor(model, model.abstract_cache(batch, entries), chunk, logits=False)
    return total


def smallest_entry(decoder: Decoder, batch: int, entries: int) -> int:
    """Bytes on a device of the keys, or values, of a layer whose cache is the smallest, without
    scales.
    """
    models = (decoder.base, *decoder.drafter.models())
    blocks = [block for m in models for block in m.abstract_cache(batch, entries).blocks]
    return min(device_bytes(kv.numbers) // 2 for block in blocks for kv in block)

"""What the decoding loop knows of a drafter: a frozen pytree with pure methods, and nothing else.

A drafter's state is addressed by absolute position: every call forgets all at or beyond `start`, so
rolling back a rejected draft needs no method of its own. What a request fixes is passed beside the
state, which is donated.
"""

from __future__ import annotations

import os
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from easyspec_jax import sharding
from easyspec_jax.cache import KVCache
from easyspec_jax.depth import usual_depths
from easyspec_jax.model import Model
from easyspec_jax.request import Request
from easyspec_jax.sampling import Scores
from easyspec_jax.verify import Proposal, Verdict, verify_in_one_pass


def refuse_no_model(value: Any) -> None:
    """Refuse what users take for a model; other kinds are seen when a decoder is made, as jax puts
    placeholders where models are.

    Raises:
      ValueError: None, a path or a class.
    """
    if value is None or isinstance(value, str | os.PathLike | type):
        raise ValueError(f"a model is needed, load_model(...) say, got {value!r}")


class Drafter(struct.PyTreeNode):
    """A way of drafting: a subclass has at least `abstract_state`, `prefill` and `propose` of its
    own. Its annotated fields make it a frozen pytree: weights are leaves; options are not,
    `field: int = struct.field(pytree_node=False)`.
    """

    @property
    def depth(self) -> int:
        """How many tokens it likes to draft when nobody says; 0: it never drafts."""
        return 5

    def depths(self, most: int) -> tuple[int, ...]:
        """Of up to `most` levels those that a decoder may choose from step by step: from 0, a step
        without a draft, to `most`, or that alone. By default a few.
        """
        return usual_depths(most)

    @property
    def num_kinds(self) -> int:
        """How many kinds of drafts it makes, whose acceptance and costs differ."""
        return 1

    def foresee(
        self, request: Request, tokens: jax.Array, length: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """Of which kind the draft behind a text (the first length[b] of i32[B, S]) would be and how
        many levels it could have, i32[B] each, as far as that is known without drafting.
        """
        return jnp.zeros_like(length), jnp.full_like(length, request.num_draft_tokens)

    @property
    def shares_base_cache(self) -> bool:
        """Whether drafting writes the base's own cache, so that `verify` is its own as well."""
        return False

    @property
    def taps(self) -> tuple[int, ...]:
        """Where it wants the base's residual stream, numbers in 0 .. L: before that layer, L behind
        the last. None of it by default, which costs nothing.
        """
        return ()

    def check(self, base: Model, num_draft_tokens: int, tree_width: int) -> None:
        """Raise a ValueError of one sentence where it cannot draft γ levels of w nodes for this
        base. Any will do by default.
        """
        del base, num_draft_tokens, tree_width

    def models(self) -> tuple[Model, ...]:
        """The models it runs, for checks against the base; by default none."""
        return ()

    def abstract_state(self, batch: int, max_len: int, request: Request) -> Any:
        """The state for `batch` rows of at most `max_len` tokens as ShapeDtypeStructs; what carries
        no sharding is the same on every device. Raises a ValueError of one sentence where there can
        be no such state.
        """
        raise NotImplementedError

    def init(self, batch: int, max_len: int, request: Request) -> Any:
        """An empty state: by default zeros of `abstract_state`."""
        return sharding.zeros(self.abstract_state(batch, max_len, request))

    def prefill(
        self,
        state: Any,
        request: Request,
        tokens: jax.Array,
        start: jax.Array,
        num: jax.Array,
        features: jax.Array | None,
    ) -> Any:
        """Absorb prompt tokens (i32[B, C], `num` of them count) at positions start[b] and on, with
        the base's residual stream there at the taps, [B, C, taps, D]; None without taps, and for
        tokens of steps without a draft, whose features `skip` has seen.
        """
        raise NotImplementedError

    def propose(
        self,
        state: Any,
        request: Request,
        base_cache: KVCache,
        tokens: jax.Array,
        start: jax.Array,
        num: jax.Array,
        key: jax.Array,
    ) -> tuple[Proposal, Any, KVCache]:
        """Absorb the newly committed tokens (i32[B, W], `num` of them count), then draft behind
        them.

        A proposal has depth γ and γ·w nodes (or γ, from a drafter of chains), those that are not
        meant marked invalid. A row with num = 0 is finished, or waits (in a chain of models) for
        other rows: nobody reads what it drafts, and what it absorbed stays.
        """
        raise NotImplementedError

    def verify(
        self, base: Model, base_cache: KVCache, root: jax.Array, proposal: Proposal, state: Any
    ) -> tuple[jax.Array | Scores, KVCache, Any]:
        """Base logits [B, n + 1, V] at the root (i32[B]) and behind each node, the written cache,
        and anything for `observe`; `state` is what `propose` left. By default one base pass over
        the root and all nodes, and what it has at the taps: [B, n + 1, taps, D], or None.

        The root's entry is that at base_cache.length and node i's the one i + 1 behind it: there
        the loop looks for the accepted path.
        """
        del state
        return verify_in_one_pass(base, base_cache, root, proposal, self.taps)

    def observe(self, state: Any, verdict: Verdict, aux: Any) -> Any:
        """Learn from a verdict, of which row i + 1 of `aux` as it comes by default is node i; by
        default nothing.
        """
        del verdict, aux
        return state

    def skip(self, state: Any, verdict: Verdict, aux: Any) -> Any:
        """Learn from a step that drafted nothing, before which it absorbed nothing either and whose
        base pass was the default one (so is `aux`); by default as `observe` does.
        """
        return self.observe(state, verdict, aux)

    def report(self, state: Any) -> dict[str, Any]:
        """Counters of this drafter's own stages, by name; by default none. Those of one request
        stand in the state as a `stats.Tally`.
        """
        del state
        return {}


def no_proposal(batch: int) -> Proposal:
    """One without nodes."""
    none = jnp.zeros((batch, 0), jnp.int32)
    return Proposal(tokens=none, parents=none, valid=none.astype(bool), depth=0)


class Autoregression(Drafter):
    """Drafts nothing: every step is one base pass over one token."""

    @property
    def depth(self) -> int:
        """It never drafts."""
        return 0

    def abstract_state(self, batch: int, max_len: int, request: Request) -> tuple[()]:
        """There is nothing to remember."""
        del batch, max_len, request
        return ()

    def prefill(self, state, request, tokens, start, num, features) -> tuple[()]:
        """Nothing is absorbed."""
        del request, tokens, start, num, features
        return state

    def propose(self, state, request, base_cache, tokens, start, num, key):
        """A proposal without nodes."""
        del request, tokens, num, key
        return no_proposal(start.shape[0]), state, base_cache


class Waiting(Drafter):
    """A drafter in a step without a draft."""

    drafter: Drafter

    @property
    def taps(self) -> tuple[int, ...]:
        """What it taps meanwhile."""
        return self.drafter.taps

    def propose(self, state, request, base_cache, tokens, start, num, key):
        """A proposal without nodes."""
        return no_proposal(start.shape[0]), state, base_cache

    def observe(self, state, verdict, aux):
        """It may look on."""
        return self.drafter.skip(state, verdict, aux)

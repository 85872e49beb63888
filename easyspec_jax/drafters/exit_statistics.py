"""Which early exit is worth drafting from, told from shadow tokens (DEL, arXiv 2504.05598).

Every verified position says for every exit, drafting or not, whether its argmax, the shadow token,
is the last layer's; so do the last positions of a prompt. Decayed counts of that give each exit's
acceptance rate, and with it the tokens that a step would bring per layer it has to run.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import struct

from easyspec_jax.depth import chain_tokens

DECAY = 0.95  # ω: what a step's counts are worth one step later
NUM_PROMPT = 32  # positions that are counted of a prompt, its last


class ExitStatistics(struct.PyTreeNode, kw_only=True):
    """Decayed counts of shadow tokens by exit, and sums of their confidences (the probability an
    exit gave its own argmax).
    """

    matched: jax.Array  # f32[X], shadow tokens that were the last layer's
    mismatched: jax.Array  # f32[X], those that were not
    matched_confidence: jax.Array  # f32[X], sum over the matched
    mismatched_confidence: jax.Array  # f32[X]

    @classmethod
    def empty(cls, num_exits: int) -> ExitStatistics:
        """Nothing seen yet."""
        names = ("matched", "mismatched", "matched_confidence", "mismatched_confidence")
        return cls(**{name: jnp.zeros((num_exits,), jnp.float32) for name in names})

    @property
    def alpha(self) -> jax.Array:
        """f32[X], the share that matched; 0 without data."""
        return _ratio(self.matched, self.matched + self.mismatched)

    @property
    def threshold(self) -> jax.Array:
        """f32[X], tau: half way between the mean confidences of matches and of mismatches; 0, which
        no confidence falls below, where there are none of either kind.
        """
        right = _ratio(self.matched_confidence, self.matched)
        wrong = _ratio(self.mismatched_confidence, self.mismatched)
        both = (self.matched > 0) & (self.mismatched > 0)
        return jnp.where(both, (right + wrong) / 2, 0.0)

    def count(
        self, matches: jax.Array, confidences: jax.Array, counted: jax.Array
    ) -> ExitStatistics:
        """One more step: all that was is decayed, then the step's columns are added.

        Args:
          matches: bool[X, n], shadow tokens that are the last layer's.
          confidences: f32[X, n].
          counted: bool[n], which columns count.
        """
        return self._add(jnp.float32(DECAY), matches, confidences, counted)

    def count_prompt(
        self, matches: jax.Array, confidences: jax.Array, counted: jax.Array
    ) -> ExitStatistics:
        """A piece of a prompt, arguments as for `count`: its columns take the place of as many of
        the last `NUM_PROMPT`. So that many are all there is, and of fewer, behind another piece or
        in a later turn, what was before keeps the rest of its weight.
        """
        kept = 1 - counted.sum(dtype=jnp.float32) / NUM_PROMPT
        return self._add(kept, matches, confidences, counted)

    def _add(
        self, kept: jax.Array, matches: jax.Array, confidences: jax.Array, counted: jax.Array
    ) -> ExitStatistics:
        right = (matches & counted[None]).astype(jnp.float32)
        wrong = (~matches & counted[None]).astype(jnp.float32)
        new = ExitStatistics(
            matched=right.sum(axis=1),
            mismatched=wrong.sum(axis=1),
            matched_confidence=(right * confidences).sum(axis=1),
            mismatched_confidence=(wrong * confidences).sum(axis=1),
        )
        return jax.tree.map(lambda old, new: kept * old + new, self, new)


def token_per_layer(
    alpha: jax.Array, exits: tuple[int, ...], num_layers: int, max_tokens: int
) -> jax.Array:
    """Expected tokens of a step per layer it runs: (1 + a + ... + a^g) / (g·l + L) (DEL's TPL).

    Args:
      alpha: f32[X], acceptance rate of each exit.
      exits: l of each, layers below it.
      num_layers: L.
      max_tokens: the largest g.

    Returns:
      f32[X, max_tokens + 1], by exit and number g of drafted tokens.
    """
    drafted = jnp.arange(max_tokens + 1, dtype=jnp.int32)
    layers = drafted[None] * jnp.asarray(exits, jnp.int32)[:, None] + num_layers
    return chain_tokens([alpha] * max_tokens) / layers.astype(jnp.float32)


def choose_exit(
    statistics: ExitStatistics, exits: tuple[int, ...], num_layers: int, max_tokens: int
) -> tuple[jax.Array, jax.Array]:
    """The exit (an index, i32[]) and the number of drafted tokens (i32[]) that bring most tokens
    per layer; exits without data are not considered, and the first of equals is taken.
    """
    value = token_per_layer(statistics.alpha, exits, num_layers, max_tokens)
    seen = statistics.matched + statistics.mismatched > 0
    best = jnp.argmax(jnp.where(seen[:, None], value, -jnp.inf)).astype(jnp.int32)
    return best // (max_tokens + 1), best % (max_tokens + 1)


def _ratio(part: jax.Array, whole: jax.Array) -> jax.Array:
    return jnp.where(whole > 0, part / jnp.where(whole > 0, whole, 1.0), 0.0)

"""Early exit: the base drafts for itself with its first layers, and only the rest verifies.

Layers 1..E with the base's own norm and head draft into the base's own cache. What they write is
exact, so it stays, and verification goes on from the hidden states at E: layers E + 1..L run once
over the root and all drafted tokens. Where to exit and how far to draft is decided anew in every
step (DEL, arXiv 2504.05598), or fixed (LayerSkip, arXiv 2404.16710).
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import lax

from easyspec_jax import tree as trees
from easyspec_jax.cache import KVCache, run_if
from easyspec_jax.config import is_integer
from easyspec_jax.drafter import Drafter, refuse_no_model
from easyspec_jax.drafters.exit_statistics import NUM_PROMPT, ExitStatistics, choose_exit
from easyspec_jax.model import (
    Model,
    embed,
    logits,
    make_step,
    run_blocks,
    score,
)
from easyspec_jax.quantized import wide_type
from easyspec_jax.request import Request
from easyspec_jax.sampling import Scores, argmax
from easyspec_jax.sharding import shape_of
from easyspec_jax.stats import Tally
from easyspec_jax.verify import Proposal, Verdict

NUM_EXITS = 6  # by default


class ExitCounters(Tally, struct.PyTreeNode, kw_only=True):
    """What the steps of one request did. X exits."""

    chosen: jax.Array  # i32[X], steps that drafted from each exit
    num_steps: jax.Array  # i32[]
    num_drafted: jax.Array  # i32[], tokens drafted
    num_accepted: jax.Array  # i32[]
    layer_passes: jax.Array  # i32[], layers run, each over one token (drafting) or a window


class ExitState(struct.PyTreeNode, kw_only=True):
    """Between steps: where the next step drafts, why, and what was done so far. X exits."""

    statistics: ExitStatistics
    exit: jax.Array  # i32[], index of the exit of the next (while verifying: of this) step
    limit: jax.Array  # i32[], most tokens the next step drafts; 0: it does not
    # [X, 1, γ + 1, D], of a step: residual stream of root and drafted tokens at exits up to `exit`
    hidden: jax.Array
    drafted: jax.Array  # i32[], tokens drafted in the newest step
    counters: ExitCounters


class Draft(struct.PyTreeNode, kw_only=True):
    """A chain that grows while `more`: its newest token, drafted but not yet run, is run next."""

    tree: trees.Tree
    token: jax.Array  # i32[1, 1], the newest
    count: jax.Array  # i32[], tokens run to the exit, the root the first of them
    more: jax.Array  # bool[]
    hidden: jax.Array  # as in ExitState
    cache: KVCache  # of the base, its length that of the first token run


class Verified(struct.PyTreeNode, kw_only=True):
    """What a verification window found, for `observe`."""

    truth: jax.Array  # i32[γ + 1], the last layer's argmax behind the root and each drafted token
    shadow: jax.Array  # i32[X, γ + 1], each exit's
    confidence: jax.Array  # f32[X, γ + 1], the probability it gave it


class EarlyExitDrafter(Drafter):
    """Drafts chains with the first layers of the base itself, for one row at a time.

    Each step drafts from one of a few candidate exits, the one that brought most tokens per layer
    run according to decayed counts of the tokens before (Token-per-Layer, DEL), at most as many
    as that says and γ, and none where the plain step is the best. A drafted token whose confidence
    is below the exit's threshold is the last of its draft, and so is a stop id. The last 32
    positions of a prompt are counted before the first step. A model that was not trained for early
    exit gains nothing.

    Args:
      base: the very model that the `Decoder` decodes, not in groups.
      exits: candidates, each a number of layers that draft, strictly rising in 1 .. L - 1. Default:
        six (or all), evenly spread. Each costs a row of the head product per verified token, and
        32 rows per piece of a prompt.
      adaptive: False always drafts γ tokens (or up to a stop id) from the one exit in `exits`
        (LayerSkip), and nothing is counted.

    Raises:
      ValueError: a base in groups or of one layer, exits that are no such list, more or less than
        one exit with adaptive=False.
    """

    base: Model
    # None is settled when it is made
    exits: Any = struct.field(pytree_node=False, default=None, kw_only=True)
    adaptive: bool = struct.field(pytree_node=False, default=True, kw_only=True)

    def __post_init__(self):
        refuse_no_model(self.base)
        if getattr(self.base, "layout", None) is None:  # jax also puts placeholders there
            return
        if max(self.base.partition) > 1:
            raise ValueError("the base runs layer after layer: load it with group_size=1")
        exits = check_exits(self.exits, self.base.config.num_layers)
        if not self.adaptive and len(exits) != 1:
            raise ValueError(f"adaptive=False needs exactly one exit, got exits={exits}")
        object.__setattr__(self, "exits", exits)

    def depths(self, most: int) -> tuple[int, ...]:
        """It chooses itself."""
        return (most,)

    @property
    def shares_base_cache(self) -> bool:
        """What it drafts with is a part of the base's pass."""
        return True

    @property
    def taps(self) -> tuple[int, ...]:
        """The exits and the last layer, for prompts; `verify` has their streams by itself."""
        return (*self.exits, self.base.config.num_layers) if self.adaptive else ()

    def check(self, base: Model, num_draft_tokens: int, tree_width: int) -> None:
        """Refuse another base than the one it was made of, and trees."""
        del num_draft_tokens
        ours, theirs = jax.tree.leaves(self.base), jax.tree.leaves(base)
        if len(ours) != len(theirs) or any(a is not b for a, b in zip(ours, theirs, strict=True)):
            raise ValueError(
                "an early exit drafts with the base's own layers: make EarlyExitDrafter of the "
                "very model that the Decoder gets"
            )
        if tree_width > 1:
            raise ValueError(f"an early exit drafts chains: tree_width must be 1, got {tree_width}")

    def abstract_state(self, batch: int, max_len: int, request: Request) -> ExitState:
        """No cache: drafting uses the base's.

        Raises:
          ValueError: more than one row.
        """
        del max_len
        if batch > 1:
            raise ValueError(f"an early exit drafts for one prompt at a time, got {batch} prompts")
        x, gamma = len(self.exits), request.num_draft_tokens
        count, counts = (shape_of(shape, jnp.int32) for shape in ((), (x,)))
        shape = (x, 1, gamma + 1, self.base.config.embed_dim)
        return ExitState(
            statistics=jax.eval_shape(lambda: ExitStatistics.empty(x)),
            exit=count,
            limit=count,
            hidden=shape_of(shape, self.base.dtype),
            drafted=count,
            counters=ExitCounters(
                chosen=counts,
                num_steps=count,
                num_drafted=count,
                num_accepted=count,
                layer_passes=count,
            ),
        )

    def init(self, batch: int, max_len: int, request: Request) -> ExitState:
        """Nothing counted yet: behind a prompt of one token the first step drafts one token from
        the first exit.
        """
        first = 1 if self.adaptive else request.num_draft_tokens
        return super().init(batch, max_len, request).replace(limit=np.int32(first))

    def prefill(
        self,
        state: ExitState,
        request: Request,
        tokens: jax.Array,
        start: jax.Array,
        num: jax.Array,
        features: jax.Array | None,
    ) -> ExitState:
        """Count what the exits say of the last `NUM_PROMPT` of these tokens, or of all if they are
        fewer, and choose for the next step. The cache is the base's.
        """
        del start
        if features is None:
            return state
        n = min(NUM_PROMPT, tokens.shape[1])
        first = jnp.maximum(num[0] - n, 0)
        streams = lax.dynamic_slice_in_dim(features[0], first, n).swapaxes(0, 1)
        _, found, log_p = (x[..., 0] for x in score(self.base, streams).likeliest(1))
        statistics = state.statistics.count_prompt(
            found[:-1] == found[-1:],
            jnp.exp(log_p[:-1]),
            first + jnp.arange(n, dtype=jnp.int32) < num[0],
        )
        return self._choose(state, statistics, request.num_draft_tokens)

    def propose(
        self,
        state: ExitState,
        request: Request,
        base_cache: KVCache,
        tokens: jax.Array,
        start: jax.Array,
        num: jax.Array,
        key: jax.Array,
    ) -> tuple[Proposal, ExitState, KVCache]:
        """Run the root to the exit, draw a token there, run that, and so on; every token that was
        drawn is also run.
        """
        del start
        origin, gamma = base_cache.length, request.num_draft_tokens
        limit = jnp.minimum(state.limit, gamma)
        threshold = state.statistics.threshold[state.exit]
        keys = jax.random.split(key, gamma)
        root = jnp.take_along_axis(tokens, jnp.maximum(num - 1, 0)[:, None], axis=1)

        def draw(count, x, tree):
            scores = score(self.base, x).fit(request.vocab_size)
            if not request.filters.greedy:  # all are needed: they travel once
                scores = Scores.of(scores.whole())
            least = request.min_probability
            tree = trees.grow(tree, count, scores, request.filters, keys[count], least)
            # Only the next token is stopped, never one that was drawn: that would bias the text.
            stopped = tree.stopped | (tree.level(count) == request.eos_ids[None]).any(axis=1)
            if self.adaptive:
                stopped = stopped | (jnp.exp(scores.likeliest(1)[2][:, 0, 0]) < threshold)
            return tree.replace(stopped=stopped)

        def extend(draft):
            cache = draft.cache.rollback(origin + draft.count)
            hidden, cache = self._run_to_exit(
                draft.token, draft.hidden, draft.count, cache, state.exit
            )
            x = hidden[state.exit, :, draft.count][:, None]
            more = (draft.count < limit) & ~draft.tree.stopped[0]
            keep = lambda count, x, tree: tree  # noqa: E731
            tree = lax.cond(more, draw, keep, draft.count, x, draft.tree)
            return Draft(
                tree=tree,
                token=tree.level(draft.count),
                count=draft.count + 1,
                more=more,
                hidden=hidden,
                cache=cache,
            )

        drawn = not request.filters.greedy
        tree = trees.plant(num > 0, gamma, 1, request.vocab_size, drawn=drawn)
        draft = Draft(
            tree=tree,
            token=root,
            count=jnp.int32(0),
            more=jnp.bool_(True),
            hidden=state.hidden,
            cache=base_cache,
        )
        with jax.named_scope("draft"):
            draft = lax.while_loop(lambda d: d.more, extend, draft)
        drafted = draft.count - 1
        state = state.replace(hidden=draft.hidden, drafted=drafted)
        return draft.tree.proposal(drafted), state, draft.cache.rollback(origin)

    def _run_to_exit(
        self, tokens: jax.Array, hidden: jax.Array, count: jax.Array, cache: KVCache, at: jax.Array
    ) -> tuple[jax.Array, KVCache]:
        """`hidden` (as in `Draft`) with the residual stream of one token, number `count`, at all
        exits up to `at`, and the cache with the layers up to there written.
        """
        step, ends = make_step(self.base, cache, 1), self.exits

        def run(i, x, hidden, caches):
            """Layers up to exit i, whose caches are the first of these, and on to `at`."""
            begin = ends[i - 1] if i else 0
            mine, rest = caches[: ends[i] - begin], caches[ends[i] - begin :]
            x, mine = run_blocks(self.base, x, mine, step, first=begin)
            place = (jnp.full_like(count, i), jnp.zeros_like(count), count, jnp.zeros_like(count))
            hidden = lax.dynamic_update_slice(hidden, x[None], place)
            if rest:
                x, hidden, rest = run_if(at > i, functools.partial(run, i + 1), x, hidden, rest)
            return x, hidden, mine + rest

        x = embed(self.base, tokens)
        _, hidden, blocks = run(0, x, hidden, cache.blocks[: ends[-1]])
        return hidden, cache.replace(blocks=blocks + cache.blocks[ends[-1] :])

    def verify(
        self,
        base: Model,
        base_cache: KVCache,
        root: jax.Array,
        proposal: Proposal,
        state: ExitState,
    ) -> tuple[jax.Array, KVCache, Verified]:
        """The layers behind the exit over the root and all drafted tokens, in the smallest of a few
        compiled windows that holds them; scores beyond the window are zero.
        """
        del base, root  # drafting ran them already

        def run(levels, scores, found, cache):
            some, new, cache = self._run_from_exit(cache, state, levels + 1)
            scores = lax.dynamic_update_slice(scores, some, (0, 0, 0))
            put = lambda old, new: lax.dynamic_update_slice(old, new, (0,) * old.ndim)  # noqa: E731
            return scores, jax.tree.map(put, found, new), cache

        c, n, x = self.base.config, proposal.depth + 1, len(self.exits) if self.adaptive else 0
        found = Verified(
            truth=jnp.zeros((n,), jnp.int32),
            shadow=jnp.zeros((x, n), jnp.int32),
            confidence=jnp.zeros((x, n), jnp.float32),
        )
        scores = jnp.zeros((1, n, c.vocab_size), wide_type(self.base.dtype))
        smaller, wanted = -1, state.drafted
        for levels in window_sizes(proposal.depth):
            fits = (wanted <= levels) & (wanted > smaller)
            body = functools.partial(run, levels)
            scores, found, base_cache = run_if(fits, body, scores, found, base_cache)
            smaller = levels
        return scores, base_cache, found

    def _run_from_exit(
        self, cache: KVCache, state: ExitState, num: int
    ) -> tuple[jax.Array, Verified, KVCache]:
        """Scores [1, num, V] of `num` tokens whose residual stream at the exit is known, what they
        and all exits say of each token, and the cache with all layers written.
        """
        hidden = state.hidden[:, :, :num]
        step = make_step(self.base, cache, num)
        x = hidden[state.exit]
        streams, blocks = [hidden[0]], cache.blocks[: self.exits[0]]
        ends = (*self.exits[1:], self.base.config.num_layers)
        for i, (begin, end) in enumerate(zip(self.exits, ends, strict=True), start=1):
            if i < len(self.exits):
                segment = functools.partial(run_blocks, self.base, step=step, first=begin)
                x, new = run_if(state.exit < i, segment, x, cache.blocks[begin:end])
                streams.append(jnp.where(state.exit < i, x, hidden[i]))
            else:
                x, new = run_blocks(self.base, x, cache.blocks[begin:], step, first=begin)
            blocks += new
        streams = [*streams, x] if self.adaptive else [x]
        scores = logits(self.base, jnp.concatenate(streams))
        tokens = argmax(scores)
        found = Verified(truth=tokens[-1], shadow=tokens[:-1], confidence=confidences(scores[:-1]))
        return scores[-1:], found, cache.replace(blocks=blocks)

    def observe(self, state: ExitState, verdict: Verdict, aux: Verified) -> ExitState:
        """Count the shadow tokens up to the first draft token that was rejected (its column too),
        then choose exit and number of tokens for the next step.
        """
        accepted, num_layers = verdict.num_accepted[0], self.base.config.num_layers
        exits, counts = jnp.asarray(self.exits, jnp.int32), state.counters
        counters = ExitCounters(
            chosen=counts.chosen.at[state.exit].add((state.drafted > 0).astype(jnp.int32)),
            num_steps=counts.num_steps + 1,
            num_drafted=counts.num_drafted + state.drafted,
            num_accepted=counts.num_accepted + accepted,
            layer_passes=counts.layer_passes + state.drafted * exits[state.exit] + num_layers,
        )
        state = state.replace(counters=counters)
        if not self.adaptive:
            return state
        counted = jnp.arange(aux.truth.shape[0], dtype=jnp.int32) <= accepted
        statistics = state.statistics.count(aux.shadow == aux.truth[None], aux.confidence, counted)
        return self._choose(state, statistics, verdict.path.shape[1])

    def _choose(self, state: ExitState, statistics: ExitStatistics, max_tokens: int) -> ExitState:
        """The state with these statistics, and with exit and number of tokens as they say."""
        num_layers = self.base.config.num_layers
        exit, limit = choose_exit(statistics, self.exits, num_layers, max_tokens)
        return state.replace(statistics=statistics, exit=exit, limit=limit)

    def report(self, state: ExitState) -> dict[str, Any]:
        """Counters of all steps, before any cut at a stop: by exit how many steps drafted from it
        (and how many not at all), and of shadow tokens the decayed counts, alpha and threshold as
        they are now. A layer pass is one layer run once, over a token or a window; autoregression
        makes `num_layers` of them per token.
        """
        statistics, counters = jax.device_get((state.statistics, state.counters))
        names = ("matched", "mismatched", "alpha", "threshold") if self.adaptive else ()
        tokens = int(counters.num_accepted + counters.num_steps)
        return {
            "exits": list(self.exits),
            **{name: np.asarray(getattr(statistics, name)).tolist() for name in names},
            "chosen": counters.chosen.tolist(),
            "not_drafted": int(counters.num_steps - counters.chosen.sum()),
            "num_drafted": int(counters.num_drafted),
            "num_accepted": int(counters.num_accepted),
            "layer_passes": int(counters.layer_passes),
            "layer_passes_per_token": float(counters.layer_passes / max(tokens, 1)),
            "num_layers": self.base.config.num_layers,
        }


def check_exits(exits: Any, num_layers: int) -> tuple[int, ...]:
    """`exits` (None: six, or all, spread evenly) as a tuple of numbers of layers.

    Raises:
      ValueError: not strictly rising whole numbers in 1 .. num_layers - 1, or none.
    """
    if num_layers < 2:
        raise ValueError("a base of one layer has no earlier exit")
    if exits is None:
        num = min(NUM_EXITS, num_layers - 1)
        return tuple((i * num_layers + (num + 1) // 2) // (num + 1) for i in range(1, num + 1))
    try:
        found = tuple(exits)
    except TypeError:
        found = ()
    rising = all(map(is_integer, found)) and all(
        a < b for a, b in zip((0, *found), (*found, num_layers), strict=True)
    )
    if not found or not rising:
        raise ValueError(
            f"exits must be strictly rising numbers of layers in 1 .. {num_layers - 1}, "
            f"got {exits!r}"
        )
    return tuple(map(int, found))


def window_sizes(depth: int) -> tuple[int, ...]:
    """Numbers of drafted tokens that verification is compiled for: none, a third, all."""
    return tuple(sorted({0, -(-depth // 3), depth}))


def confidences(scores: jax.Array) -> jax.Array:
    """The probability of the argmax before temperature and filters, f32[...] of [..., V]."""
    scores = scores.astype(jnp.float32)
    return jnp.exp(scores.max(axis=-1) - jax.nn.logsumexp(scores, axis=-1))

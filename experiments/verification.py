"""Tokens per step of block and traversal verification against the rules that go down from the root.

    python experiments/verification.py --base CKPT --draft CKPT --set gsm8k=PATH --chat \
        --prompts-per-set 8 --group-size 4 --temperatures 0.8,1.0 --out FILE
    python experiments/verification.py --table FILE

At each step of a text both rules are asked, of the very draft that was drawn there, how likely they
accept i of its tokens; the means over drafts are what each accepts, and no draw of either enters.
Texts follow the new rule. Of a chain the first i tokens are given: the product of min(1, p / q), or
the block's weight. FILE gets a header, then a line a prompt; started again it measures the rest.
"""

from __future__ import annotations

import argparse
import itertools
import json
from typing import Any

import acceptance
import jax
import jax.numpy as jnp
import numpy as np
import prompt_sets
from flax import struct
from records import append
from tqdm import tqdm
from tuned import compare

import easyspec_jax as es
from easyspec_jax import verify
from easyspec_jax.sampling import Scores, make_filters, probabilities
from easyspec_jax.stats import Tally


class Expected(Tally, struct.PyTreeNode, kw_only=True):
    """Sums over steps of the probability that so many draft tokens are accepted."""

    block: jax.Array  # f32[B, γ]
    single: jax.Array  # f32[B, γ]


class Watched(struct.PyTreeNode, kw_only=True):
    """The drafter's own state, and what was counted."""

    cache: Any
    expected: Expected


class WatchedDrafter(es.LayerParallelDrafter):
    """Counts what both rules would accept of its drafts at `temperature`."""

    temperature: float = struct.field(pytree_node=False, default=1.0, kw_only=True)

    def abstract_state(self, batch, max_len, request):
        """A cache and two sums."""
        sums = jax.ShapeDtypeStruct((batch, request.num_draft_tokens), jnp.float32)
        cache = super().abstract_state(batch, max_len, request)
        return Watched(cache=cache, expected=Expected(block=sums, single=sums))

    def prefill(self, state, request, tokens, start, num, features):
        """As ever."""
        cache = super().prefill(state.cache, request, tokens, start, num, features)
        return state.replace(cache=cache)

    def propose(self, state, request, base_cache, tokens, start, num, key):
        """As ever."""
        proposal, cache, base_cache = super().propose(
            state.cache, request, base_cache, tokens, start, num, key
        )
        return proposal, state.replace(cache=cache), base_cache

    def verify(self, base, base_cache, root, proposal, state):
        """As ever; both rules' probabilities for `observe`."""
        scores, cache, _ = super().verify(base, base_cache, root, proposal, state)
        filters = make_filters(es.Sampling(temperature=self.temperature))
        p = probabilities(Scores.of(scores).whole(), filters)
        return scores, cache, accepted_by_both(p, proposal)

    def observe(self, state, verdict, aux):
        """One more step is counted."""
        del verdict
        return state.replace(expected=jax.tree.map(jnp.add, state.expected, aux))

    def report(self, state):
        """Sums by depth, of all rows."""
        named = {"block": state.expected.block, "single": state.expected.single}
        return {name: np.asarray(x, np.float64).sum(axis=0).tolist() for name, x in named.items()}


def accepted_by_both(p: jax.Array, proposal: es.Proposal) -> Expected:
    """How likely either rule accepts at least i tokens of what was drawn, for p f32[B, n + 1, V]:
    given the first i of a chain, or the whole tree.
    """
    if not proposal.is_chain:
        return Expected(block=accepted_from_leaves(p, proposal), single=from_root(p, proposal))
    gather = jax.vmap(lambda rows, node, token: rows[node, token])
    p_x, q_x = (gather(x, proposal.parents + 1, proposal.tokens) for x in (p, proposal.probs))
    ratio, block, single = p_x / q_x, [jnp.ones_like(p_x[:, 0])], [jnp.ones_like(p_x[:, 0])]
    for i in range(ratio.shape[1]):
        block.append(jnp.minimum(block[-1] * ratio[:, i], 1.0))
        single.append(single[-1] * jnp.minimum(ratio[:, i], 1.0))
    return Expected(block=jnp.stack(block[1:], axis=1), single=jnp.stack(single[1:], axis=1))


def accepted_from_leaves(p: jax.Array, proposal: es.Proposal) -> jax.Array:
    """The same under traversal verification, f32[B, γ]: the first node that is accepted, in the
    order of the leaves before their parents.
    """
    chance = jnp.where(proposal.valid, verify._traverse(p, proposal)[0], 0.0)
    related = verify.ancestry(proposal)
    up = related.astype(jnp.float32)
    apart = up @ verify._siblings_before(proposal).astype(jnp.float32) @ up.swapaxes(1, 2) > 0
    itself = jnp.eye(chance.shape[1], dtype=bool)[None]
    earlier = apart | (related.swapaxes(1, 2) & ~itself)
    first = chance * jnp.where(earlier, 1.0 - chance[:, None], 1.0).prod(axis=-1)
    return by_depth(first, related, proposal.depth)


def from_root(p: jax.Array, proposal: es.Proposal) -> jax.Array:
    """The same under recursive rejection sampling without replacement, which goes down from the
    root: nodes are asked as those of a tree of one level.
    """
    depth, width = proposal.depth, proposal.tokens.shape[1] // proposal.depth
    reached, found = jnp.ones_like(p[:, :1, 0]), []
    rank = verify._siblings_before(proposal).sum(axis=-1, dtype=jnp.int32)
    rank = jnp.where(proposal.valid, rank, -1)[..., None, None]
    ranks = jnp.arange(width, dtype=jnp.int32)[None, None, None]
    for d in range(depth):
        nodes = slice(d * width, (d + 1) * width)
        first, end = (0, 1) if d == 0 else (1 + (d - 1) * width, 1 + d * width)
        row = jnp.arange(first, end, dtype=jnp.int32)[None, None]
        hangs = proposal.parents[:, nodes, None] + 1 == row
        below = hangs[..., None] & (rank[:, nodes] == ranks)
        rows = p[:, first:end], proposal.probs[:, first:end]
        ones, tokens = jnp.ones_like(rows[0][..., 0]), proposal.tokens[:, nodes]
        chance = verify._reject_children(*rows, ones, below, tokens)[2]
        before = verify._siblings_before(proposal)[:, nodes, nodes]
        fails = jnp.where(before, 1.0 - chance[:, None], 1.0).prod(axis=-1)
        reached = chance * fails * jnp.where(hangs, reached[:, None], 0.0).sum(axis=-1)
        found.append(reached.sum(axis=1))
    return jnp.stack(found, axis=1)


def by_depth(first: jax.Array, related: jax.Array, depth: int) -> jax.Array:
    """How likely a path is longer than 0, 1, ..., [B, γ], when it ends at nodes with f32[B, n]."""
    length = related.sum(axis=-1, dtype=jnp.int32)[..., None]
    level = jnp.arange(depth, dtype=jnp.int32)[None, None]
    return jnp.where(length > level, first[..., None], 0.0).sum(axis=1)


def measure(args, prompts, missing):
    """Yield the record of each (temperature, prompt) when it is done."""
    mesh = es.make_mesh(1, 1)
    base = es.load_model(args.base, mesh)
    draft = es.load_model(args.draft, mesh, group_size=args.group_size, layout="grouped")
    for temperature, found in itertools.groupby(tqdm(missing, unit="prompt"), lambda x: x[0]):
        drafter = WatchedDrafter(draft, temperature=temperature)
        decoder = es.Decoder(
            base, drafter, num_draft_tokens=args.num_draft_tokens, tree_width=args.tree_width
        )
        for _, i in found:
            out = decoder.generate(
                [prompts[i]],
                max_new_tokens=args.max_new_tokens,
                sampling=es.Sampling(temperature=temperature),
                seed=args.seed + i,
            )
            yield {
                "temperature": temperature,
                "prompt": i,
                "steps": out.stats.steps,
                "emitted": out.stats.emitted,
                "accepted_histogram": out.stats.accepted_histogram,
                **{name: np.round(x, 4).tolist() for name, x in out.drafter_report.items()},
            }


def format_results(header, lines) -> str:
    """A Markdown table, a line for each temperature; 95 % intervals over prompts, paired."""
    o, prompts = header["options"], sum(map(len, header["prompt_tokens"].values()))
    table = [
        f"{o['draft']} in groups of {o['group_size']} drafts {o['num_draft_tokens']} deep and "
        f"{o['tree_width']} wide for {o['base']}: tokens per step on {prompts} prompts, "
        f"{o['max_new_tokens']} tokens each.",
        "",
        "| temperature | steps | from the root | block, traversal | more | ratio |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for temperature in o["temperatures"]:
        here = [line for line in lines if line["temperature"] == temperature]
        steps = [line["steps"] for line in here]
        arms = [
            {"steps": steps, "emitted": [sum(x[rule]) + x["steps"] for x in here]}
            for rule in ("block", "single")
        ]
        found = compare(*arms) if here else {}
        cells = [
            "{:.3f} ({:.3f}, {:.3f})".format(*found[name])
            for name in ("other", "mine", "difference", "ratio")
            if here
        ]
        table.append(f"| {temperature:g} | {sum(steps)} | {' | '.join(cells)} |")
    return "\n".join(table)


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--prompts-per-set", type=int, default=8)
    p.add_argument("--group-size", type=int, default=4)
    p.add_argument("--temperatures", type=lambda s: [float(t) for t in s.split(",")], default=[0.8])
    p.add_argument("--tree-width", type=int, default=1)
    p.add_argument("--seed", type=int, default=0)
    return prompt_sets.parse(p, argv, max_tokens=150)


def main(argv: list[str] | None = None) -> None:
    """Measure what is missing in the file, print it all; or print a file."""
    args = parse(argv)
    if args.table:
        print(format_results(*acceptance.read_results(args.table)))
        return
    prompts, header, lines = acceptance.open_run(args)
    done = {(line["temperature"], line["prompt"]) for line in lines}
    wanted = itertools.product(args.temperatures, range(len(prompts)))
    if missing := [x for x in wanted if x not in done]:
        for record in measure(args, prompts, missing):
            append(args.out, record)
            lines.append(record)
    print(format_results(header, lines))
    print(json.dumps(header | {"lines": lines}))


if __name__ == "__main__":
    main()

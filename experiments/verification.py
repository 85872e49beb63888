"""Tokens per step of block verification against the rule of token by token, on the same drafts.

    python experiments/verification.py --base CKPT --draft CKPT --set gsm8k=PATH --chat \
        --prompts-per-set 8 --group-size 4 --temperatures 0.8,1.0 --out FILE
    python experiments/verification.py --table FILE

Texts are decoded with block verification. At each of their steps both rules are asked, of the very
draft that was drawn there, how likely they accept its first i tokens, given these: the product of
min(1, p / q), and the block's weight. Their means over drafts are what each accepts, and no draw of
either enters. FILE gets a header, then a line for each prompt; started again it measures the rest.
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
from easyspec_jax.sampling import Scores, make_filters, probabilities
from easyspec_jax.stats import Tally
from easyspec_jax.text import Tokenizer


class Expected(Tally, struct.PyTreeNode, kw_only=True):
    """Sums over steps of the probability that so many draft tokens are accepted."""

    block: jax.Array  # f32[B, γ]
    single: jax.Array  # f32[B, γ]


class Watched(struct.PyTreeNode, kw_only=True):
    """The drafter's own state, and what was counted."""

    cache: Any
    expected: Expected


class WatchedDrafter(es.LayerParallelDrafter):
    """Drafts chains, and counts what both rules would accept of them at `temperature`."""

    temperature: float = struct.field(pytree_node=False, default=1.0, kw_only=True)

    def abstract_state(self, batch, max_len, request):
        """A cache and two sums."""
        sums = jax.ShapeDtypeStruct((batch, request.num_draft_tokens), jnp.float32)
        cache = super().abstract_state(batch, max_len, request)
        return Watched(cache=cache, expected=Expected(block=sums, single=sums))

    def prefill(self, state, request, tokens, start, num):
        """As ever."""
        cache = super().prefill(state.cache, request, tokens, start, num)
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
    """How likely either rule accepts at least i tokens of a drawn chain, given the first i, for
    p f32[B, γ + 1, V].
    """
    gather = jax.vmap(lambda rows, node, token: rows[node, token])
    p_x, q_x = (gather(x, proposal.parents + 1, proposal.tokens) for x in (p, proposal.probs))
    ratio, block, single = p_x / q_x, [jnp.ones_like(p_x[:, 0])], [jnp.ones_like(p_x[:, 0])]
    for i in range(ratio.shape[1]):
        block.append(jnp.minimum(block[-1] * ratio[:, i], 1.0))
        single.append(single[-1] * jnp.minimum(ratio[:, i], 1.0))
    return Expected(block=jnp.stack(block[1:], axis=1), single=jnp.stack(single[1:], axis=1))


def measure(args, prompts, missing):
    """Yield the record of each (temperature, prompt) when it is done."""
    mesh = es.make_mesh(1, 1)
    base = es.load_model(args.base, mesh)
    draft = es.load_model(args.draft, mesh, group_size=args.group_size, layout="grouped")
    for temperature, found in itertools.groupby(tqdm(missing, unit="prompt"), lambda x: x[0]):
        drafter = WatchedDrafter(draft, temperature=temperature)
        decoder = es.Decoder(base, drafter, num_draft_tokens=args.num_draft_tokens)
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
    o = header["options"]
    table = [
        f"{o['draft']} in groups of {o['group_size']} drafts {o['num_draft_tokens']} deep for "
        f"{o['base']}: tokens per step on {sum(map(len, header['prompt_tokens'].values()))} "
        f"prompts, {o['max_new_tokens']} tokens each.",
        "",
        "| temperature | steps | token by token | block | more | ratio |",
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
    p.add_argument("--seed", type=int, default=0)
    return prompt_sets.parse(p, argv, max_tokens=150)


def main(argv: list[str] | None = None) -> None:
    """Measure what is missing in the file, print it all; or print a file."""
    args = parse(argv)
    if args.table:
        print(format_results(*acceptance.read_results(args.table)))
        return
    sets = prompt_sets.read_prompts(
        Tokenizer(args.base), args.set, args.prompts_per_set, args.max_prompt_tokens, chat=args.chat
    )
    prompts = [ids for found in sets.values() for ids in found]
    header, lines = acceptance.open_results(args.out, acceptance.make_header(args, sets))
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

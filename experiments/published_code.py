"""Tokens per step at temperature > 0 by the rule of EasySpec's published code, beside ours.

    python experiments/published_code.py --base CKPT --draft CKPT --set gsm8k=PATH --chat --out FILE
    python experiments/published_code.py --table FILE

The rule is that of its demo (github yize-wu/EasyInfra). Candidates are the likeliest, not drawn;
every path asks each of its nodes for itself, u <= p / q; the path that gets furthest wins, and
behind it comes a draw from max(p - q, 0). It does NOT keep p: how far a step's first token is from
p is summed exactly. FILE gets a header, then a line for each arm and prompt and one for a small
vocabulary; started again with the same options the script measures the rest.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
from typing import Any
from unittest import mock

import acceptance
import jax
import jax.numpy as jnp
import numpy as np
import prompt_sets
from flax import struct
from jax import lax
from records import append
from tqdm import tqdm
from tuned import compare

import easyspec_jax as es
from easyspec_jax import loop, tree, verify
from easyspec_jax.layer_parallel import draft_runner
from easyspec_jax.model import forward, score
from easyspec_jax.request import make_inputs
from easyspec_jax.sampling import Scores, make_filters, probabilities, sample
from easyspec_jax.stats import Tally

RULES = {"ours": "lossless", "published": "published code, not lossless"}
SMALL = es.ModelConfig(
    vocab_size=6, embed_dim=8, mlp_dim=12, num_layers=4, num_heads=2, num_kv_heads=1, head_dim=4,
    max_len=32,
)  # fmt: skip
SMALL_ROWS, SMALL_WIDTHS = 1 << 16, (1, 3)


class Sums(Tally, struct.PyTreeNode, kw_only=True):
    """Over the steps of each row, f32[B]."""

    distance: jax.Array  # total variation between a step's first token and p
    accepted: jax.Array  # draft tokens, expected


class Watched(struct.PyTreeNode, kw_only=True):
    """The draft's cache, and what was summed."""

    cache: Any
    sums: Sums


class PublishedDrafter(es.LayerParallelDrafter):
    """Takes the likeliest candidates and keeps the q of every node with children; to be decoded
    `as_published` at `temperature`.
    """

    temperature: float = struct.field(pytree_node=False, default=1.0, kw_only=True)

    def abstract_state(self, batch, max_len, request):
        """A cache and two sums."""
        sums = Sums(**dict.fromkeys(("distance", "accepted"), jax.ShapeDtypeStruct((batch,), "f4")))
        return Watched(cache=super().abstract_state(batch, max_len, request), sums=sums)

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

    def _draft(self, hidden, cache, active, request, keys):
        """The likeliest nodes, with the q that their children were taken from."""
        origin, fuzzy, width = cache.length, draft_runner(self.parallel), request.tree_width

        def scored(hidden, q, row):
            scores = score(self.draft, hidden).fit(request.vocab_size)
            new = probabilities(scores.whole(), request.filters)
            return scores, lax.dynamic_update_slice_in_dim(q, new, row, axis=1)

        def run(tree, depth, carry):
            cache, q = carry
            placement = tree.placement(origin, depth)
            hidden, cache = forward(
                self.draft, tree.level(depth), cache, placement=placement, run_block=fuzzy
            )
            scores, q = scored(hidden, q, 1 + depth * width)
            return scores, (cache, q)

        rows = 1 + (request.num_draft_tokens - 1) * width
        q = jnp.zeros((hidden.shape[0], rows, request.vocab_size), jnp.float32)
        scores, q = scored(hidden, q, 0)
        proposal, (cache, q) = tree.draft(
            request, active, keys, scores, run, (cache, q), drawn=False
        )
        return proposal.replace(probs=q), cache

    def verify(self, base, base_cache, root, proposal, state):
        """As ever; what the rule makes of it for `observe`."""
        scores, cache, _ = super().verify(base, base_cache, root, proposal, state)
        filters = make_filters(es.Sampling(temperature=self.temperature))
        p = probabilities(Scores.of(scores).whole(), filters)
        chance = chances(paths(p, proposal)[1])
        length = jnp.arange(chance.shape[-1], dtype=jnp.float32)
        sums = Sums(
            distance=jnp.abs(first_token(p, proposal) - p[:, 0]).sum(axis=-1) / 2,
            accepted=(chance * length[None, None]).sum(axis=(1, 2)),
        )
        return scores, cache, sums

    def observe(self, state, verdict, aux):
        """One more step is summed."""
        del verdict
        return state.replace(sums=jax.tree.map(jnp.add, state.sums, aux))

    def report(self, state):
        """Sums over the steps of all rows."""
        sums = vars(jax.device_get(state.sums))
        return {name: round(float(x.sum(dtype=np.float64)), 4) for name, x in sums.items()}


def paths(p: jax.Array, proposal: es.Proposal) -> tuple[jax.Array, jax.Array]:
    """Nodes of every path that is asked, i32[B, m, γ], and p / q of each (p f32[B, n + 1, V]); -1
    where there is no node. Those to all nodes of a tree, of a chain the whole.
    """
    related = verify.ancestry(proposal)
    level = related.sum(axis=-1, dtype=jnp.int32) - 1
    depths = jnp.arange(proposal.depth, dtype=jnp.int32)[None, None]
    there = related[..., None] & (level[..., None] == depths)[:, None]
    node = jnp.arange(level.shape[1], dtype=jnp.int32)[None, None, :, None]
    nodes = jnp.where(there, node + 1, 0).sum(axis=2, dtype=jnp.int32) - 1
    at = jax.vmap(lambda rows, node, token: rows[node, token])
    p_x, q_x = (at(x, proposal.parents + 1, proposal.tokens) for x in (p, proposal.probs))
    ratio = jnp.where(proposal.valid, p_x / (q_x + 1e-12), -1.0)
    ratios = jax.vmap(lambda row, node: row[node])(ratio, nodes)
    ratios = jnp.where(nodes >= 0, ratios, -1.0)
    return (nodes[:, -1:], ratios[:, -1:]) if proposal.is_chain else (nodes, ratios)


def left(p: jax.Array, proposal: es.Proposal) -> jax.Array:
    """What a path's last token is drawn from where it ends, f32[B, n + 1, V]: the root, node 0, 1,
    ..., of which the last level's keep p.
    """
    spare = p.shape[1] - proposal.probs.shape[1]
    q = jnp.pad(proposal.probs, ((0, 0), (0, spare), (0, 0)))
    rest = jnp.maximum(p - q, 0.0)
    total = rest.sum(axis=-1, keepdims=True)
    return jnp.where(total > 0, rest / jnp.where(total > 0, total, 1.0), p)


def accept_as_published(scores, proposal, filters, key) -> es.verify.Verdict:
    """In place of `accept_path`; does not keep p."""
    p = probabilities(Scores.of(scores).whole(), filters)
    accept_key, sample_key = jax.random.split(key)
    nodes, ratios = paths(p, proposal)
    asked = jax.random.uniform(accept_key, ratios.shape, jnp.float32) <= ratios
    lengths = jnp.cumprod(asked, axis=-1, dtype=jnp.int32).sum(axis=-1, dtype=jnp.int32)
    best = lengths.argmax(axis=1)[:, None]
    num = jnp.take_along_axis(lengths, best, axis=1)
    path = jnp.take_along_axis(nodes, best[..., None], axis=1)[:, 0]
    last = jnp.take_along_axis(path, jnp.maximum(num - 1, 0), axis=1)
    end = jnp.where(num > 0, last + 1, 0)
    rest = jnp.take_along_axis(left(p, proposal), end[..., None], axis=1)[:, 0]
    return verify.Verdict(
        num_accepted=num[:, 0],
        path=jnp.maximum(path, 0),
        next_token=sample(sample_key, rest),
        tries=(jnp.arange(proposal.depth, dtype=jnp.int32)[None] <= num).astype(jnp.int32),
    )


def as_published():
    """A context in which loops that are traced decide so."""
    return mock.patch.object(loop, "accept_path", accept_as_published)


def chances(ratios: jax.Array) -> jax.Array:
    """How likely path i wins with its first k nodes, f32[B, m, γ + 1]: no other gets further, and
    none before it as far.
    """
    reached = jnp.cumprod(jnp.clip(ratios, 0.0, 1.0), axis=-1)
    reached = jnp.pad(reached, ((0, 0), (0, 0), (1, 0)), constant_values=1.0)
    reached = jnp.pad(reached, ((0, 0), (0, 0), (0, 1)))
    further, as_far = reached[..., 1:], reached[..., :-1]  # than k; k or more
    exactly, at_most, fewer = as_far - further, 1.0 - further, 1.0 - as_far
    before = jnp.cumprod(fewer, axis=1)[:, :-1]
    behind = jnp.cumprod(at_most[:, ::-1], axis=1)[:, ::-1][:, 1:]
    ones = jnp.ones_like(exactly[:, :1])
    before, behind = jnp.concatenate((ones, before), 1), jnp.concatenate((behind, ones), 1)
    return exactly * before * behind


def first_token(p: jax.Array, proposal: es.Proposal) -> jax.Array:
    """The distribution of a step's first token under the rule, f32[B, V]."""
    nodes, ratios = paths(p, proposal)
    chance = chances(ratios)
    tokens = jnp.take_along_axis(proposal.tokens, nodes[..., 0], axis=1)
    drawn = chance[..., 0].sum(axis=1, keepdims=True) * left(p, proposal)[:, 0]
    return jax.vmap(lambda row, x, c: row.at[x].add(c))(drawn, tokens, chance[..., 1:].sum(axis=-1))


def look(decoder: es.Decoder, prompts: list[list[int]], temperature: float):
    """p and the proposal of the first step behind each prompt, on one device."""
    sampling, seen = es.Sampling(temperature=temperature), []
    inputs = make_inputs(decoder.base.config, prompts, 2, sampling)

    def spy(scores, proposal, filters, key):
        seen.append((probabilities(Scores.of(scores).whole(), filters), proposal))
        return accept_as_published(scores, proposal, filters, key)

    @jax.jit
    def first_step(request, state):
        loop.step(decoder.base, decoder.drafter, request, state)
        return seen.pop()

    with mock.patch.object(loop, "accept_path", spy):
        return first_step(*decoder.prefill(inputs))


def two_tokens(decoder: es.Decoder, prompt: list[int], temperature: float):
    """Probabilities of the first two tokens behind a prompt, f64[V, V] each: under the rule, and of
    the base.
    """
    texts = [prompt, *([*prompt, x] for x in range(decoder.base.config.vocab_size))]
    p, proposal = look(decoder, texts, temperature)
    nodes, ratios = paths(p, proposal)
    found = (p, first_token(p, proposal), left(p, proposal), chances(ratios))
    p, first, rest, chance = (np.asarray(x, np.float64) for x in found)
    tokens, nodes = np.asarray(proposal.tokens[0]), np.asarray(nodes[0])
    found = chance[0, :, 0].sum() * rest[0, 0][:, None] * first[1:]
    for path, chance_of in zip(nodes, chance[0], strict=True):
        found[tokens[path[0]]] += chance_of[1] * rest[0, path[0] + 1]
        found[tokens[path[0]], tokens[path[1]]] += chance_of[2:].sum()
    return found, p[0, 0][:, None] * p[1:, 0]


def small_decoders(temperature: float, width: int, depth: int = 5) -> dict[str, es.Decoder]:
    """A random model that drafts for itself in groups of 4, by rule."""
    mesh = es.make_mesh(1, 1)
    base, draft = (
        es.random_model(SMALL, mesh, seed=1, dtype="float32", group_size=size) for size in (1, 4)
    )
    drafters = {
        "ours": es.LayerParallelDrafter(draft),
        "published": PublishedDrafter(draft, temperature=temperature),
    }
    options = {"num_draft_tokens": depth, "tree_width": width}
    return {rule: es.Decoder(base, drafter, **options) for rule, drafter in drafters.items()}


def small_vocabulary(temperature: float, width: int) -> dict[str, Any]:
    """Total variation of two tokens from the base's: of the rule, summed, and of ours, drawn."""
    decoders, prompt = small_decoders(temperature, width), [3, 1]
    found, p = two_tokens(decoders["published"], prompt, temperature)

    def distance(q):
        return float(np.abs(q - p).sum() / 2)

    out = decoders["ours"].generate(
        [prompt] * SMALL_ROWS, max_new_tokens=2, sampling=es.Sampling(temperature=temperature)
    )
    drawn = np.zeros_like(p)
    np.add.at(drawn, tuple(np.array(out.tokens).T), 1 / SMALL_ROWS)
    perfect = np.random.default_rng(0).multinomial(SMALL_ROWS, (p / p.sum()).ravel(), 100)
    noise = [distance(n.reshape(p.shape) / SMALL_ROWS) for n in perfect]
    return {
        "small_vocabulary": width,
        "published": round(distance(found), 4),
        "ours": round(distance(drawn), 4),
        "as_many_draws_of_p": round(float(np.mean(noise)), 4),
    }


def measure(args, prompts, missing):
    """Yield the record of each (prompt, rule, width) when it is done."""
    mesh = es.make_mesh(1, 1)
    base = es.load_model(args.base, mesh)
    draft = es.load_model(args.draft, mesh, group_size=args.group_size, layout="grouped")
    drafters = {
        "ours": es.LayerParallelDrafter(draft),
        "published": PublishedDrafter(draft, temperature=args.temperature),
    }
    for i, rule, width in tqdm(missing, unit="answer"):
        decoder = es.Decoder(
            base, drafters[rule], num_draft_tokens=args.num_draft_tokens, tree_width=width
        )
        with as_published() if rule == "published" else contextlib.nullcontext():
            out = decoder.generate(
                [prompts[i]],
                max_new_tokens=args.max_new_tokens,
                sampling=es.Sampling(temperature=args.temperature),
                seed=args.seed + i,
            )
        yield {
            "prompt": i,
            "rule": rule,
            "is": RULES[rule],
            "width": width,
            "steps": out.stats.steps,
            "emitted": out.stats.emitted,
            "accepted_histogram": out.stats.accepted_histogram,
            **out.drafter_report,
        }


def format_results(header, lines) -> str:
    """Markdown: tokens per step by width with 95 % intervals over prompts, paired where both rules
    have the prompt; and the small vocabulary.
    """
    o = header["options"]
    table = [
        f"{o['draft']} in groups of {o['group_size']} drafts {o['num_draft_tokens']} deep for "
        f"{o['base']} at temperature {o['temperature']:g}: tokens per step, {o['max_new_tokens']} "
        "tokens a prompt; total variation between p and a step's first token by the rule.",
        "",
        f"| width | prompts | ours, {RULES['ours']} | {RULES['published']} | ratio | from p |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for width in o["widths"]:
        arms = {
            rule: {
                x["prompt"]: x for x in lines if (x.get("rule"), x.get("width")) == (rule, width)
            }
            for rule in RULES
        }
        both = sorted(arms["ours"].keys() & arms["published"].keys())
        if not both:
            continue
        ours, published = ([arms[rule][i] for i in both] for rule in RULES)
        counts = [
            {k: [x[k] for x in arm] for k in ("emitted", "steps")} for arm in (published, ours)
        ]
        found = compare(*counts)
        cells = [
            "{:.2f} ({:.2f}, {:.2f})".format(*found[name]) for name in ("other", "mine", "ratio")
        ]
        distance = sum(x["distance"] for x in published) / sum(counts[0]["steps"])
        table.append(f"| {width} | {len(both)} | {' | '.join(cells)} | {distance:.2f} |")
    table += [
        "",
        f"Total variation of two tokens from the base's, {SMALL.vocab_size} ids:",
        "",
        f"| width | published code, summed | ours, {SMALL_ROWS} draws | as many draws of p |",
        "| --- | --- | --- | --- |",
    ]
    for x in lines:
        if "small_vocabulary" in x:
            cells = (x[name] for name in ("published", "ours", "as_many_draws_of_p"))
            table.append(f"| {x['small_vocabulary']} | {' | '.join(map('{:.4f}'.format, cells))} |")
    return "\n".join(table)


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--prompts-per-set", type=int, default=2)
    p.add_argument("--group-size", type=int, default=4)
    p.add_argument("--temperature", type=float, default=0.8)
    demo = "tree widths (default: a chain, and the demo's tree)"
    p.add_argument(
        "--widths", type=lambda s: [int(w) for w in s.split(",")], default=[1, 12], help=demo
    )
    p.add_argument("--seed", type=int, default=0)
    return prompt_sets.parse(p, argv, max_tokens=150)


def main(argv: list[str] | None = None) -> None:
    """Measure what is missing in the file, print it all; or print a file."""
    args = parse(argv)
    if args.table:
        print(format_results(*acceptance.read_results(args.table)))
        return
    prompts, header, lines = acceptance.open_run(args)
    done = {(x.get("prompt"), x.get("rule"), x.get("width")) for x in lines}
    wanted = itertools.product(range(len(prompts)), RULES, args.widths)
    small = {x.get("small_vocabulary") for x in lines}
    for width in (w for w in SMALL_WIDTHS if w not in small):
        lines.append(small_vocabulary(args.temperature, width))
        append(args.out, lines[-1])
    if missing := [x for x in wanted if x not in done]:
        for record in measure(args, prompts, missing):
            append(args.out, record)
            lines.append(record)
    print(format_results(header, lines))
    print(json.dumps(header | {"lines": lines}))


if __name__ == "__main__":
    main()

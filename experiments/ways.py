"""Tokens per step by way of running a group and by when the draft is calibrated.

    python experiments/ways.py --base CKPT --draft CKPT --set text=FILE --prompts-per-set 10 \
        --group-size 4 --temperatures 0,0.8 --out FILE
    python experiments/ways.py --table FILE

Calibration: every step; after a step that lost a draft token ("mismatch": entries of other steps
stay as groups wrote them; "refill": they are made exact at the next such step); never. Every
prompt is decoded by itself, its counts are kept, intervals are paired. Nothing here is a timing.
"""

from __future__ import annotations

import argparse
import itertools
import json
from typing import Any

import acceptance
import jax
import jax.numpy as jnp
import prompt_sets
from flax import struct
from jax import lax
from records import append
from tqdm import tqdm
from tuned import compare

import easyspec_jax as es
from easyspec_jax.layer_parallel import PARALLEL, draft_runner, run_exact
from easyspec_jax.loop import put_rows, window
from easyspec_jax.model import forward
from easyspec_jax.text import Tokenizer

CALIBRATION = ("always", "refill", "mismatch", "never")
ROOM = 6  # steps that one exact pass can make up for


class State(struct.PyTreeNode, kw_only=True):
    """What `MismatchDrafter` remembers."""

    cache: Any
    text: jax.Array  # i32[B, S]
    exact: jax.Array  # i32[B], entries before this one are exact


class MismatchDrafter(es.LayerParallelDrafter):
    """Absorbs the tokens of a step in groups if its whole draft was accepted; for one row."""

    refill: bool = struct.field(pytree_node=False, default=False, kw_only=True)

    def _window(self, request):
        return (request.num_draft_tokens + 1) * ROOM

    def abstract_state(self, batch, max_len, request):
        """The draft's cache and the text so far."""
        max_len += self._window(request)
        return State(
            cache=self.draft.abstract_cache(batch, max_len),
            text=jax.ShapeDtypeStruct((batch, max_len), jnp.int32),
            exact=jax.ShapeDtypeStruct((batch,), jnp.int32),
        )

    def prefill(self, state, request, tokens, start, num):
        """Exactly."""
        return State(
            cache=super().prefill(state.cache, request, tokens, start, num),
            text=put_rows(state.text, tokens, start),
            exact=start + num,
        )

    def propose(self, state, request, base_cache, tokens, start, num, key):
        """As its parent, behind one pass or the other."""
        keys = jax.random.split(key, request.num_draft_tokens)
        text, end, width = put_rows(state.text, tokens, start), start + num, self._window(request)

        def absorb(tokens, start, run_block):
            cache = state.cache.rollback(start)
            hidden, cache = forward(self.draft, tokens, cache, num=end - start, run_block=run_block)
            last = jnp.maximum(end - start - 1, 0)[:, None, None]
            return jnp.take_along_axis(hidden, last, axis=1), cache

        def leave():
            return *absorb(tokens, start, draft_runner(self.parallel)), state.exact

        def repair():
            first = state.exact if self.refill else start
            recent = window(text, first, width if self.refill else tokens.shape[1])
            return *absorb(recent, first, run_exact), end

        room = end - state.exact + tokens.shape[1] <= width
        whole = (num == tokens.shape[1]) & (room if self.refill else True)
        hidden, cache, exact = lax.cond(whole.all(), leave, repair)
        proposal, cache = self._draft(hidden, cache, num > 0, request, keys)
        state = State(cache=cache.rollback(end), text=text, exact=exact)
        return proposal, state, base_cache


def make_drafter(draft, parallel, calibrate):
    """The drafter of an arm."""
    if calibrate in ("refill", "mismatch"):
        return MismatchDrafter(draft, parallel=parallel, refill=calibrate == "refill")
    return es.LayerParallelDrafter(draft, parallel=parallel, calibrate=calibrate != "never")


def measure(args, prompts, arms, known):
    """Yield the record of each arm when it is done; `known` are the records of others."""
    whole = {
        (a["temperature"], a["parallel"]): sum(a["accepted_whole"])
        for a in known
        if a["calibrate"] == "always"
    }
    mesh = es.make_mesh(1, 1)
    base = es.load_model(args.base, mesh)
    drafts = {
        size: es.load_model(args.draft, mesh, group_size=size) for size in {1, args.group_size}
    }
    with tqdm(total=len(prompts) * (len(arms) + 1), unit="prompt") as progress:
        expected = acceptance.answer(es.Decoder(base), 0.0, prompts, args, progress)[0]
        for temperature, size, parallel, calibrate in arms:
            if calibrate in ("refill", "mismatch") and not whole[temperature, parallel]:
                continue  # it calibrates every step as well
            drafter = make_drafter(drafts[size], parallel, calibrate)
            decoder = es.Decoder(base, drafter, num_draft_tokens=args.num_draft_tokens)
            tokens, stats = acceptance.answer(decoder, temperature, prompts, args, progress)
            if calibrate == "always":
                whole[temperature, parallel] = sum(s.accepted_per_depth[-1] for s in stats)
            same = sum(a == b for a, b in zip(tokens, expected, strict=True))
            yield {
                "temperature": temperature,
                "group_size": size,
                "parallel": parallel,
                "calibrate": calibrate,
                "emitted": [s.emitted for s in stats],
                "steps": [s.steps for s in stats],
                "accepted_whole": [s.accepted_per_depth[-1] for s in stats],
                "tokens_per_step": round(acceptance.pool(stats).tokens_per_step, 4),
                "identical": None if temperature else same,
            }
            jax.clear_caches()


def format_results(header, arms):
    """A Markdown table for each temperature."""
    o, lines = header["options"], []
    for temperature, found in itertools.groupby(arms, lambda arm: arm["temperature"]):
        found = list(found)
        usual = next(
            (a for a in found if _way(a) == (o["group_size"], "attention", "always")), None
        )
        lines += ["", f"{o['base']} + {o['draft']}, temperature {temperature:g}:", ""]
        lines += ["| group size | at once | calibrated | tokens per step | more than attention, "
                  "always | steps accepted whole | identical |", "|" + " --- |" * 7]  # fmt: skip
        for arm in found:
            whole = sum(arm["accepted_whole"]) / sum(arm["steps"])
            more = ""
            if usual is not None:
                more = "{:+.2f} ({:+.2f}, {:+.2f})".format(*compare(arm, usual)["difference"])
            cells = [*map(str, _way(arm)), f"{arm['tokens_per_step']:.2f}", more, f"{whole:.0%}"]
            lines.append(f"| {' | '.join(cells)} | {arm['identical']} of {len(arm['steps'])} |")
    return "\n".join(lines)


def _way(arm):
    return arm["group_size"], arm["parallel"], arm["calibrate"]


def parse(argv=None):
    """The command line."""
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--prompts-per-set", type=int, default=10)
    p.add_argument("--group-size", type=int, default=4)
    p.add_argument("--temperatures", type=lambda s: [float(t) for t in s.split(",")], default=[0.0])
    p.add_argument("--seed", type=int, default=0)
    return prompt_sets.parse(p, argv, max_tokens=256)


def main(argv=None):
    """Measure what is missing in the file, print it all; or print a file."""
    args = parse(argv)
    if args.table:
        print(format_results(*acceptance.read_results(args.table)))
        return
    sets = prompt_sets.read_prompts(
        Tokenizer(args.base), args.set, args.prompts_per_set, args.max_prompt_tokens, chat=args.chat
    )
    header, arms = acceptance.open_results(args.out, acceptance.make_header(args, sets))
    done = {(arm["temperature"], *_way(arm)) for arm in arms}
    ways = [(1, "attention", "always")]
    ways += [(args.group_size, *way) for way in itertools.product(PARALLEL, CALIBRATION)]
    missing = [(t, *way) for t in args.temperatures for way in ways if (t, *way) not in done]
    prompts = [ids for found in sets.values() for ids in found]
    for record in measure(args, prompts, missing, list(arms)):
        append(args.out, record)
        arms.append(record)
    print(format_results(header, arms))
    print(json.dumps(header | {"arms": arms}))


if __name__ == "__main__":
    main()

"""Tokens per step by way of running a group and by when the draft is calibrated.

    python experiments/ways.py --base CKPT --draft CKPT --set text=FILE --prompts-per-set 10 \
        --group-size 4 --temperatures 0,0.8 --out FILE
    python experiments/ways.py --table FILE

The base writes its texts once; every arm then drafts along them. A token y that the base drew from
p is the draft's with probability min(1, q(y) / p(y)), the joint law of speculative sampling seen
from its result, so all arms share texts and random numbers. Nothing here is a timing.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json

import acceptance
import jax
import jax.numpy as jnp
import numpy as np
import prompt_sets
from records import append
from tqdm import tqdm
from tuned import compare

import easyspec_jax as es
from easyspec_jax.layer_parallel import PARALLEL, draft_runner, run_exact
from easyspec_jax.model import forward, logits
from easyspec_jax.sharding import zeros
from easyspec_jax.text import Tokenizer

# Every step; only after one that lost a draft token, then making exact all entries that were left
# ("refill") or its own alone; never.
CALIBRATION = ("always", "refill", "mismatch", "never")
ROOM = 3  # steps that one exact pass can make up for


def write_texts(base, prompts, args, temperature):
    """The base's texts, i32[B, S], behind prompts of different lengths, and log p of each token."""
    new, gamma = args.max_new_tokens, args.num_draft_tokens
    sampling = es.Sampling(temperature=temperature)
    out = es.Decoder(base).generate(
        prompts, max_new_tokens=new + gamma + 1, sampling=sampling, seed=args.seed
    )
    width = max(map(len, prompts)) + new + (gamma + 1) * (ROOM + 1)
    texts = np.zeros((len(prompts), width), np.int32)
    for row, prompt, tokens in zip(texts, prompts, out.tokens, strict=True):
        row[: len(prompt) + len(tokens)] = [*prompt, *tokens]
    if not temperature:
        return texts, np.zeros(texts.shape, np.float32)
    return texts, np.concatenate([_log_p(base, row[None], temperature) for row in texts])


@functools.partial(jax.jit, static_argnames="temperature")
def _log_p(base, text, temperature):
    cache = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), base.abstract_cache(*text.shape))
    scores = logits(base, forward(base, text, cache)[0]) / temperature
    found = jnp.take_along_axis(jax.nn.log_softmax(scores[:, :-1]), text[:, 1:, None], axis=-1)
    return jnp.pad(found[..., 0], ((0, 0), (1, 0)))


@functools.partial(jax.jit, static_argnames="run_block")
def _pass(draft, tokens, cache, start, num, *, run_block):
    """Logits [B, V] behind the last of `num` tokens, and the cache."""
    hidden, cache = forward(draft, tokens, cache.rollback(start), num=num, run_block=run_block)
    last = jnp.maximum(num - 1, 0)[:, None, None]
    return logits(draft, jnp.take_along_axis(hidden, last, axis=1))[:, 0], cache


@jax.jit
def _select(rows, one, other):
    """For rows that are True scores and cache entries ([K * B, S, H]) of one, else of the other."""

    def select(a, b):
        tiled = jnp.tile(rows, len(a) // len(rows))
        return jnp.where(tiled.reshape(-1, *(1,) * (a.ndim - 1)), a, b)

    return jax.tree.map(select, one, other)


class Arm:
    """One way to draft, along the texts of a base."""

    def __init__(self, draft, prompts, texts, log_p, args, temperature, parallel, calibrate):
        """The prompts but for their last tokens are absorbed."""
        self.draft, self.texts, self.log_p = draft, texts, log_p
        self.gamma, self.temperature, self.calibrate = args.num_draft_tokens, temperature, calibrate
        self.fuzzy = draft_runner(parallel)
        self.draws = np.random.default_rng(args.seed).random(texts.shape)
        self.length = np.array([len(p) for p in prompts], np.int32)
        self.limit = self.length + args.max_new_tokens
        self.absorbed = self.exact = self.length - 1
        self.cache = zeros(draft.abstract_cache(len(prompts), texts.shape[1]))
        longest = max(map(len, prompts))
        self._run(np.zeros_like(self.length), self.absorbed, longest, run_exact)

    def _run(self, first, end, width, run_block, keep=True):
        tokens = self.texts[np.arange(len(first))[:, None], first[:, None] + np.arange(width)]
        scores, cache = _pass(
            self.draft, tokens, self.cache, first, end - first, run_block=run_block
        )
        if keep:
            self.cache = cache
        return scores, cache

    def step(self):
        """How many tokens each row's draft is right about; the rows then go on."""
        window, length = self.gamma + 1, self.length
        if self.calibrate == "never":
            scores, _ = self._run(self.absorbed, length, window, self.fuzzy)
        elif self.calibrate == "always":
            scores, _ = self._run(self.absorbed, length, window, run_exact)
        else:
            first, width = self.absorbed, window
            whole = length - self.absorbed == window
            if self.calibrate == "refill":
                first, width = self.exact, window * ROOM
                whole &= length - self.exact + window <= width
            left = self._run(self.absorbed, length, window, self.fuzzy, keep=False)
            repaired = self._run(first, length, width, run_exact, keep=False)
            scores, self.cache = _select(whole, left, repaired)
            self.exact = np.where(whole, self.exact, length)
        accepted = [self._right(scores, length)]
        for i in range(1, self.gamma):
            scores, _ = self._run(length + i - 1, length + i, 1, self.fuzzy)
            accepted.append(self._right(scores, length + i))
        num = np.cumprod(accepted, axis=0).sum(axis=0)
        new = np.minimum(num + 1, self.limit - length).astype(np.int32)
        self.absorbed, self.length = length, length + new
        return np.minimum(num, new), new > 0

    def _right(self, scores, at):
        y, rows = self.texts[np.arange(len(at)), at], np.arange(len(at))
        scores = np.asarray(scores, np.float64)
        if not self.temperature:
            return scores.argmax(axis=-1) == y
        scores /= self.temperature
        scores -= scores.max(axis=-1, keepdims=True)
        log_q = scores[rows, y] - np.log(np.exp(scores).sum(axis=-1))
        return np.log(self.draws[rows, at]) < log_q - self.log_p[rows, at]

    def run(self):
        """Steps of every prompt, and those whose whole draft was accepted."""
        steps, whole = np.zeros_like(self.length), np.zeros_like(self.length)
        while (self.length < self.limit).any():
            num, active = self.step()
            steps += active
            whole += active & (num == self.gamma)
        return steps.tolist(), whole.tolist()


def measure(args, prompts, missing):
    """Yield the record of each arm when it is done."""
    mesh = es.make_mesh(1, 1)
    base = es.load_model(args.base, mesh)
    texts = {t: write_texts(base, prompts, args, t) for t in {t for t, *_ in missing}}
    del base
    drafts = {s: es.load_model(args.draft, mesh, group_size=s) for s in {1, args.group_size}}
    for temperature, size, parallel, calibrate in tqdm(missing, unit="arm"):
        how = (args, temperature, parallel, calibrate)
        steps, whole = Arm(drafts[size], prompts, *texts[temperature], *how).run()
        yield {
            "temperature": temperature,
            "group_size": size,
            "parallel": parallel,
            "calibrate": calibrate,
            "emitted": [args.max_new_tokens] * len(prompts),
            "steps": steps,
            "accepted_whole": whole,
            "tokens_per_step": round(args.max_new_tokens * len(prompts) / sum(steps), 4),
        }


def format_results(header, arms):
    """A Markdown table for each temperature."""
    o, lines = header["options"], []
    for temperature, found in itertools.groupby(arms, lambda arm: arm["temperature"]):
        found = list(found)
        usual = next(a for a in found if _way(a)[1:] == ("attention", "always") and _way(a)[0] > 1)
        lines += ["", f"{o['base']} + {o['draft']}, temperature {temperature:g}:", ""]
        titles = "group size | at once | calibrated | tokens per step | ratio | accepted whole"
        lines += [f"| {titles} |", "|" + " --- |" * 6]
        for arm in found:
            whole = sum(arm["accepted_whole"]) / sum(arm["steps"])
            ratio = "{:.3f} ({:.3f}, {:.3f})".format(*compare(arm, usual)["ratio"])
            cells = [*map(str, _way(arm)), f"{arm['tokens_per_step']:.2f}", ratio, f"{whole:.0%}"]
            lines.append(f"| {' | '.join(cells)} |")
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
    for record in measure(args, [ids for found in sets.values() for ids in found], missing):
        append(args.out, record)
        arms.append(record)
    print(format_results(header, arms))
    print(json.dumps(header | {"arms": arms}))


if __name__ == "__main__":
    main()

"""What automatic depth makes of texts whose drafts are known: played back with tables of costs.

    python experiments/playback.py --base CKPT --draft CKPT --set text=FILE --out FILE
    python experiments/playback.py --table FILE

The base writes an answer to every prompt, and the draft says of each of its tokens whether it would
have drafted it: a greedy chain is accepted as far as that goes. So every depth can be played back
without a clock. At a --temperature a token x of the text was an accepted draft token with
probability min(1, q(x) / p(x)), whatever depth was chosen, and --draws of that are played (blocks,
as they are verified, are accepted a little further). FILE gets a header and a line a prompt; the
table has a row for each set and table of costs: the best fixed depth's time, or the base's, over
that of `depth.Pace`.
"""

from __future__ import annotations

import argparse
import functools
import statistics
from typing import Any

import jax
import numpy as np
import prompt_sets
import scipy.special
from acceptance import make_header, open_results, read_results
from records import append
from tqdm import tqdm

import easyspec_jax as es
from easyspec_jax.depth import Pace, Pacing, usual_depths
from easyspec_jax.text import Tokenizer

DEPTHS = usual_depths(8)
# Of a step of each depth, where one without a draft is 1: measured for TinyLlama and stories15M in
# float32; the same with drafts a little dearer; in bfloat16 (results/auto_pair.jsonl); cheap
# drafts, and dear ones.
COSTS = {
    "two cores": (1, 1.205, 1.29, 1.65, 1.9, 2.24),
    "two cores, busy": (1, 1.3, 1.45, 1.7, 2.1, 2.45),
    "bfloat16": (1, 1.06, 1.13, 1.18, 1.68, 1.87),
    "cheap": (1, 1.1, 1.16, 1.22, 1.34, 1.52),
    "dear": (1, 1.5, 1.9, 2.3, 3.1, 4.3),
}
Record = dict[str, Any]


def logits_of(model: es.Model, text: list[int], start: int) -> np.ndarray:
    """Of every token from `start` on, f32[n, V]."""
    padded = text + [0] * (-len(text) % 64)
    return np.asarray(es.logits(model, [padded])[0][start - 1 : len(text) - 1])


def hits_of(draft: es.Model, prompt: list[int], answer: list[int]) -> str:
    """A letter for every token of the answer, as far as the draft's context goes: 1 where its
    likeliest token is it.
    """
    text = (prompt + answer)[: draft.config.max_len]
    best = np.argmax(logits_of(draft, text, len(prompt)), axis=-1)
    return "".join(str(int(hit)) for hit in best == text[len(prompt) :])


def chances_of(
    base: es.Model, draft: es.Model, prompt: list[int], answer: list[int], temperature: float
) -> np.ndarray:
    """How likely each token of an answer that was drawn at this temperature was an accepted draft
    token, f[n]: a draft token x is accepted with probability min(q(x), p(x)), so that behind a text
    of p's tokens that is min(1, q(x) / p(x)) (Leviathan et al. 2023, algorithm 1).
    """
    text = (prompt + answer)[: draft.config.max_len]
    told = np.asarray(text[len(prompt) :])
    p, q = (
        scipy.special.log_softmax(logits_of(m, text, len(prompt)) / temperature, axis=-1)[
            np.arange(len(told)), told
        ]
        for m in (base, draft)
    )
    return np.exp(np.minimum(q - p, 0.0))


def drawn(chances: np.ndarray, draws: int, seed: int) -> list[str]:
    """Hits of so many draws of them."""
    found = np.random.default_rng(seed).random((draws, len(chances))) < chances
    return ["".join(str(int(hit)) for hit in row) for row in found]


def taken(hits: str, at: int, depth: int) -> int:
    """Draft tokens that are accepted of so many, behind `at` tokens."""
    rest = hits[at : at + depth]
    return len(rest) - len(rest.lstrip("1"))


def fixed(hits: str, costs: tuple[float, ...], depth: int) -> float:
    """Time of a text with drafts of one depth, in steps without one."""
    at, spent = 0, 0.0
    while at < len(hits):
        at += taken(hits, at, depth) + 1
        spent += costs[DEPTHS.index(depth)]
    return spent


@jax.jit
def _choose(pace: Pace, pacing: Pacing) -> Pace:
    row = np.zeros(1, np.int32)
    return pace.choose(pacing, row, row + np.int32(DEPTHS[-1]), np.ones(1, bool))


@functools.partial(jax.jit, static_argnames="depth")
def _learn(pace: Pace, depth: int, num: np.ndarray) -> Pace:
    return pace.learn(depth, num, np.ones(1, bool))


def automatic(hits: str, costs: tuple[float, ...]) -> float:
    """The same where the rule chooses."""
    table = np.asarray([costs], np.float32)
    pacing = Pacing(costs=table, catch_up=np.float32(0), depths=DEPTHS)
    pace, at, spent = Pace.begin(1, 1, DEPTHS[-1]), 0, 0.0
    while at < len(hits):
        pace = _choose(pace, pacing)
        number = int(pace.choice)
        num = taken(hits, at, DEPTHS[number])
        pace = _learn(pace, DEPTHS[number], np.asarray([num], np.int32))
        at, spent = at + num + 1, spent + costs[number]
    return spent


def compare(texts: list[str], costs: tuple[float, ...]) -> float:
    """The best fixed depth's time a token over the rule's, means over texts."""

    def mean(spent):
        return statistics.mean(spent(hits) / len(hits) for hits in texts)

    best = min(mean(lambda hits, d=depth: fixed(hits, costs, d)) for depth in DEPTHS)
    return best / mean(lambda hits: automatic(hits, costs))


def table(header: Record, lines: list[Record]) -> str:
    """A row for each set: the first tokens alone, all, and texts that become others."""
    sets: dict[str, list[str]] = {}
    for line in lines:
        hits = line["hits"]
        sets.setdefault(line["set"], []).extend([hits] if isinstance(hits, str) else hits)
    kinds = [(f"{name}, first 48", [hits[:48] for hits in texts]) for name, texts in sets.items()]
    kinds += list(sets.items())
    names = list(sets)
    for first, second in zip(names, names[1:] + names[:1], strict=True):
        pairs = zip(sets[first], sets[second], strict=False)
        kinds.append((f"{first}, then {second}", [a + b for a, b in pairs]))
    rows = [["texts", *COSTS], ["---"] * (1 + len(COSTS))]
    for kind, texts in kinds:
        rows.append([kind, *(f"{compare(texts, costs):.3f}" for costs in COSTS.values())])
    o = header["options"]
    about = f"{o['base']} + {o['draft']}, {len(lines)} texts, temperature {o.get('temperature', 0)}"
    return "\n".join([about, "", *(f"| {' | '.join(row)} |" for row in rows)])


def main(argv: list[str] | None = None) -> None:
    """Write what is missing in the file and print its table; or print a file's."""
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--num-prompts", type=int, default=8, help="of each set")
    p.add_argument("--skip", type=int, default=0, help="the first prompts of each set")
    p.add_argument("--temperature", type=float, default=0.0)
    p.add_argument("--draws", type=int, default=8, help="of every text, at a temperature")
    p.add_argument("--seed", type=int, default=0)
    args = prompt_sets.parse(p, argv, 200)
    if args.table:
        print(table(*read_results(args.table)))
        return
    tokenizer = Tokenizer(args.base)
    sets = prompt_sets.read_prompts(
        tokenizer, args.set, args.skip + args.num_prompts, args.max_prompt_tokens, chat=args.chat
    )
    sets = {name: found[args.skip :] for name, found in sets.items()}
    header, lines = open_results(args.out, make_header(args, sets))
    mesh = es.make_mesh()
    base, draft = es.load_model(args.base, mesh), es.load_model(args.draft, mesh)
    done = {(line["set"], line["prompt"]) for line in lines}
    for name, prompts in tqdm(sets.items(), unit="set"):
        numbers = range(args.skip, args.skip + len(prompts))
        if done.issuperset((name, i) for i in numbers):
            continue
        answers = es.Decoder(base).generate(  # all, as what is drawn hangs on the batch
            prompts,
            max_new_tokens=args.max_new_tokens,
            sampling=es.Sampling(temperature=args.temperature),
            seed=args.seed,
        )
        for i, prompt, answer in zip(numbers, prompts, answers.tokens, strict=True):
            if (name, i) in done:
                continue
            if args.temperature:
                chances = chances_of(base, draft, prompt, answer, args.temperature)
                hits: Any = drawn(chances, args.draws, args.seed + i)
            else:
                hits = hits_of(draft, prompt, answer)
            line = {"set": name, "prompt": i, "hits": hits}
            append(args.out, line)
            lines.append(line)
    print(table(header, lines))


if __name__ == "__main__":
    main()

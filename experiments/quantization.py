"""What rounded weights cost: a base's predictions of given texts, or a draft's acceptance.

    python experiments/quantization.py --base CKPT --set gsm8k=FILE --num-prompts 5 --out FILE
    python experiments/quantization.py --base CKPT --draft CKPT --group-sizes 1,4 \
        --set text=experiments/prompts/stories.txt --num-prompts 10 --tokens 48 --out FILE

Without a draft, prompts are texts that the float base and its rounded copies predict token by
token. With one they are answered greedily, the base in floats, only the draft rounded: answers stay
the same, tokens per step do not. On CPUs rounded weights are kept as floats, which say what the
codes say. Nothing here is timed. The last line of stdout is one JSON document.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import pathlib
import sys
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from inspect_layers import compare_distributions, rounded
from prompt_sets import FILES, read_prompts
from records import append, commit, machine, without_places
from tqdm import tqdm
from tuned import compare

import easyspec_jax as es
from easyspec_jax.checkpoint import stored_quantization
from easyspec_jax.memory import device_bytes
from easyspec_jax.sources import read_config
from easyspec_jax.text import Tokenizer, read_generation_config, stop_ids
from easyspec_jax.tuner.stale_passes import answer, regroup

Record = dict[str, Any]
Kinds = dict[str, es.Quantization | None]
MAX_PROMPT = 150  # tokens of what is answered
FIGURES = ("more_nats", "argmax_agreement", "kl", "overlap")


def read_kinds(text: str) -> Kinds:
    """What "int8,int4:32" means, by name, behind the floats.

    Raises:
      ValueError: no such kind, or no group size.
    """
    kinds: Kinds = {"float": None}
    for name in text.split(","):
        kind, colon, size = name.partition(":")
        group = int(size) if size.isdecimal() else size
        kinds[name] = es.Quantization(kind, group if colon else None)
    return kinds


def bits_of(kinds: Kinds, config: es.ModelConfig) -> dict[str, float]:
    """Bits that a weight takes, by kind, with scales and with norms in bfloat16, all averaged.

    Raises:
      ValueError: groups do not divide the inputs of a matrix.
    """
    held = {}
    for name, how in kinds.items():
        how = None if how is None else dataclasses.replace(how, keep_codes=True)
        mesh, options = es.make_mesh(1, 1), {"dtype": "bfloat16", "quantization": how}
        held[name] = device_bytes(es.abstract_model(config, mesh, **options).params)
    return {name: 16 * n / held["float"] for name, n in held.items()}


def log_probs(model: es.Model, text: list[int], length: int) -> np.ndarray:
    """f32[n, V], what the model says of each token of the text but the first; it is padded to
    `length`, for all to run in one program.
    """
    scores = es.logits(model, [text + [0] * (length - len(text))])[0]
    return np.asarray(jax.nn.log_softmax(scores[: len(text) - 1]))


def pooled(means: list[float], sizes: list[int]) -> tuple[float, float]:
    """The mean over all tokens, and its standard error over texts: that of a ratio of sums."""
    values, n = np.array(means, np.float64), np.array(sizes)
    mean = values @ n / n.sum()
    spread = np.square(n * (values - mean)).sum() * len(n) / (len(n) - 1)
    return float(mean), float(spread**0.5 / n.sum())


def predictions(base: es.Model, texts: list[list[int]], kinds: Kinds) -> Iterator[Record]:
    """How the base and its rounded copies predict the texts: perplexity, and per token, against the
    float base, nats lost and the figures of `compare_distributions`.
    """
    length, sizes = max(map(len, texts)), [len(text) - 1 for text in texts]
    true: list[np.ndarray] = []
    for name, how in tqdm(kinds.items(), unit="kind"):
        model = base if how is None else es.quantize_model(base, how)
        rows = []
        for i, text in enumerate(tqdm(texts, desc=name, unit="text", leave=False)):
            q = log_probs(model, text, length)
            if how is None:
                true.append(q)
            p, at = true[i], (np.arange(len(q)), text[1:])
            nats = {"nats": -q[at].mean(), "more_nats": (p[at] - q[at]).mean()}
            rows.append(nats | compare_distributions(p.astype(np.float64), q.astype(np.float64)))
        del model  # before the next is made
        record: Record = {"kind": name}
        for key in rows[0]:
            mean, stderr = pooled([row[key] for row in rows], sizes)
            record |= {key: mean, f"{key}_stderr": stderr}
        yield record | {"perplexity": math.exp(record["nats"])}


def acceptance(
    base: es.Model, draft: es.Model, prompts: list, kinds: Kinds, args: argparse.Namespace
) -> Iterator[Record]:
    """Tokens and steps of every prompt, by kind of the draft's weights and size of its groups."""
    eos_ids = stop_ids(read_generation_config(args.base), base.config)
    expected = None
    for name, how in tqdm(kinds.items(), unit="kind"):
        model = draft if how is None else es.quantize_model(draft, how)
        for size in args.group_sizes:
            drafter = es.LayerParallelDrafter(regroup(model, size))
            decoder = es.Decoder(base, drafter, num_draft_tokens=args.num_draft_tokens)
            outs = list(answer(decoder, prompts, args.tokens, eos_ids=eos_ids))
            tokens = [row for out in outs for row in out.tokens]
            expected = expected or tokens
            rows = [row for out in outs for row in out.stats.rows]
            counts = {key: [getattr(row, key) for row in rows] for key in ("emitted", "steps")}
            same = sum(a == b for a, b in zip(tokens, expected, strict=True))
            yield {"kind": name, "group_size": size, "identical": same} | counts


def format_results(record: Record) -> str:
    """A Markdown table."""
    bits, arms, drafts = record["bits"], record["arms"], "steps" in record["arms"][0]
    names = ["perplexity", "nats more", "same likeliest token", "KL", "overlap"]
    if drafts:
        names = ["groups of", "tokens per step", "of the float draft's", "same answers"]
    names = ["weights", "bits", *names]
    lines = [f"| {' | '.join(names)} |", "| --- " * len(names) + "|"]
    for arm in arms:
        cells = [arm["kind"], f"{bits[arm['kind']]:.2f}"]
        if drafts:
            first = next(one for one in arms if one["group_size"] == arm["group_size"])
            found, same = compare(arm, first), f"{arm['identical']} of {len(arm['steps'])}"
            ratio = "{:.2f} ({:.2f}, {:.2f})".format(*found["ratio"])
            cells += [str(arm["group_size"]), f"{found['mine'][0]:.2f}", ratio, same]
        else:
            figures = [f"{arm[key]:.4f} ± {arm[f'{key}_stderr']:.4f}" for key in FIGURES]
            cells += [f"{arm['perplexity']:.3f}", *figures]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--base", required=True, help="converted checkpoint")
    p.add_argument("--draft", help="converted checkpoint; the base's own for self-drafting")
    sets = {"metavar": "NAME=PATH", "help": f"repeatable: {', '.join(FILES)}"}
    p.add_argument("--set", action="append", required=True, **sets)
    p.add_argument("--num-prompts", type=int, default=5, help="of each set")
    p.add_argument("--chat", action="store_true", help="each prompt is a user's message")
    p.add_argument("--tokens", type=int, default=128, help="of a text or of an answer, at most")
    kinds = "int8,fp8,int4,int4:64,int4:32"
    p.add_argument("--kinds", default=kinds, help="with inputs that share a scale (%(default)s)")
    sizes = {"type": lambda text: [int(n) for n in text.split(",")], "default": [1, 4]}
    p.add_argument("--group-sizes", **sizes, help="draft layers that run at once")
    p.add_argument("--num-draft-tokens", type=int, default=5)
    p.add_argument("--out", type=pathlib.Path, help="JSONL file to append the results to")
    return p.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Measure, append to the file, print a table."""
    args = parse(argv)
    kinds, mesh = read_kinds(args.kinds), es.make_mesh(1, 1)
    config, metadata = read_config(args.draft or args.base)
    if stored_quantization(metadata) is not None:
        raise ValueError("the model's matrices are codes already: it must be converted to floats")
    bits = bits_of(kinds, config)
    longest = MAX_PROMPT if args.draft else sys.maxsize
    found = read_prompts(Tokenizer(args.base), args.set, args.num_prompts, longest, chat=args.chat)
    prompts = [ids for of_set in found.values() for ids in of_set]
    texts = [ids[: args.tokens] for ids in prompts if len(ids[: args.tokens]) > 1]
    if len(texts) < 2:
        raise ValueError("errors are over texts: two are needed, of at least two tokens each")
    base = es.load_model(args.base, mesh)
    if args.draft:
        draft = base if args.draft == args.base else es.load_model(args.draft, mesh)
        arms = acceptance(base, draft, prompts, kinds, args)
    else:
        arms = predictions(base, texts, kinds)
    record = {"machine": machine(), "commit": commit(), "options": without_places(vars(args))}
    record |= {"bits": rounded(bits), "prompt_tokens": [len(ids) for ids in prompts]}
    record["arms"] = rounded(list(arms))
    print(format_results(record), append(args.out, record), sep="\n")


if __name__ == "__main__":
    main()

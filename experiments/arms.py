"""The ways to decode that the benchmark compares: own drafters, and transformers."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable, Iterator

import easyspec_jax as es
from easyspec_jax.engine import PREFILL_CHUNKS

LAYERED = ("exact", "calibrated", "uncalibrated")  # with a draft model, in groups or not
PEERS = ("transformers", "assisted", "assisted-constant")
HEADS = ("eagle", "lookup-eagle")  # an EAGLE-3 head, alone and behind prompt lookup
OTHERS = ("prompt-lookup", "fallback", *HEADS, "early-exit", "polybasic")
ARMS = ("autoregression", *LAYERED, *OTHERS, *PEERS)
NEED_DRAFT = (*LAYERED, "fallback", "polybasic")
LOOKUPS = ("prompt-lookup", "fallback", "lookup-eagle")  # know no probabilities
# no trees
CHAINS = ("autoregression", "fallback", "lookup-eagle", "early-exit", "polybasic")
Answer = tuple[list[int], es.Stats | None]


@dataclasses.dataclass
class Arm:
    """One way to decode."""

    run: Callable[[list[int], int], Answer]  # prompt, seed -> new tokens and statistics
    decoder: es.Decoder | None = None  # None: not ours
    compile_seconds: float = 0.0

    def shape(self, ids: list[int], max_new_tokens: int) -> tuple[int, ...]:
        """Prompts of equal shape share their compiled programs; a peer compiles nothing."""
        if self.decoder is None:
            return (len(ids),)
        chunk = next((c for c in PREFILL_CHUNKS if c >= len(ids) - 1), PREFILL_CHUNKS[-1])
        return self.decoder.capacity(len(ids) + max_new_tokens), chunk


def own_arms(args: argparse.Namespace, base: es.Model) -> dict[str, Arm]:
    """Autoregression and the speculative arms asked for, in each group size and tree width."""
    decoders = {}
    for name, full, drafter in _drafters(args, base):
        depth = args.num_draft_tokens + (args.mu if name == "polybasic" else 0)
        least = None if name in LOOKUPS else args.min_draft_probability
        for width in [1] if name in CHAINS else args.tree_width:
            several = name not in CHAINS and len(args.tree_width) > 1
            decoders[full + (f", width {width}" if several else "")] = es.Decoder(
                base,
                drafter,
                num_draft_tokens=depth,
                tree_width=width,
                min_draft_probability=least,
            )
    sampling = es.Sampling(temperature=args.temperature)

    def arm(decoder):
        def run(ids, seed):
            options = {"max_new_tokens": args.max_new_tokens, "sampling": sampling, "seed": seed}
            out = decoder.generate([ids], **options)
            return out.tokens[0], out.stats

        return Arm(run, decoder)

    return {name: arm(decoder) for name, decoder in decoders.items()}


def _drafters(args, base) -> Iterator[tuple[str, str, es.Drafter | None]]:
    """Kind, name and drafter of every arm of ours, in the order asked for."""
    drafts = {}

    def draft(size):
        if size not in drafts:
            drafts[size] = es.load_model(
                args.draft, base.layout.mesh, group_size=size, dtype=args.dtype
            )
        return drafts[size]

    for name in args.arms:
        if name == "autoregression":
            yield name, name, None
        elif name == "prompt-lookup":
            yield name, name, es.PromptLookupDrafter(max_ngram=args.max_ngram)
        elif name in HEADS:
            drafter = es.EagleDrafter.load(args.head, base)
            yield name, name, drafter if name == "eagle" else _behind_lookup(args, drafter)
        elif name == "early-exit":
            yield name, name, es.EarlyExitDrafter(base, exits=args.exits)
        elif name == "polybasic":
            lightest = es.LayerParallelDrafter(draft(1))
            yield name, name, es.PolybasicDrafter(_middle(args, base), lightest, mu=args.mu)
        elif name in (*LAYERED, "fallback"):
            sizes = [1] if name == "exact" else args.group_size
            for size in sizes:
                full = name + (f", group {size}" if len(sizes) > 1 else "")
                drafter = es.LayerParallelDrafter(draft(size), calibrate=name != "uncalibrated")
                if name == "fallback":
                    drafter = _behind_lookup(args, drafter)
                yield name, full, drafter


def _behind_lookup(args, drafter: es.Drafter) -> es.Drafter:
    """Prompt lookup first, and this where it finds nothing."""
    lookup = es.PromptLookupDrafter(max_ngram=args.max_ngram, min_ngram=min(args.max_ngram, 3))
    return es.FallbackDrafter(lookup, drafter)


def _middle(args, base) -> es.Model:
    """The polybasic arm's model between base and draft."""
    if args.middle:
        return es.load_model(args.middle, base.layout.mesh, dtype=args.dtype)
    return es.quantize_model(base, f"int{args.middle_bits}")


def peer_arms(args: argparse.Namespace) -> dict[str, Arm]:
    """`generate` of transformers in float32, alone and assisted by the draft."""
    names = [name for name in args.arms if name in PEERS]
    if not names:
        return {}
    import torch
    from transformers import AutoModelForCausalLM, GenerationConfig

    def load(folder, **config):
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        # No stop id nor anything else of the checkpoint's: all arms write equally many tokens.
        model.generation_config = GenerationConfig(pad_token_id=0, **config)
        return model

    base, options = load(args.base_hf), {"transformers": {}}
    if "assisted" in names:
        options["assisted"] = {"assistant_model": load(args.draft_hf)}
    if "assisted-constant" in names:
        constant = load(  # the generator asks the assistant how many, not the call
            args.draft_hf,
            num_assistant_tokens=args.num_draft_tokens,
            num_assistant_tokens_schedule="constant",
            assistant_confidence_threshold=0.0,
        )
        options["assisted-constant"] = {"assistant_model": constant}
    draw = {"do_sample": True, "temperature": args.temperature, "top_k": 0, "top_p": 1.0}
    if args.temperature == 0:
        draw = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}

    def arm(more):
        def run(ids, seed):
            torch.manual_seed(seed)
            x, n = torch.tensor([ids]), args.max_new_tokens
            with torch.inference_mode():
                out = base.generate(
                    x, attention_mask=torch.ones_like(x), max_new_tokens=n, **draw, **more
                )
            return out[0, len(ids) :].tolist(), None

        return Arm(run)

    return {name: arm(options[name]) for name in names}


def check_peers(args: argparse.Namespace, base: es.Model) -> None:
    """Refuse to compare transformers on the CPU in float32 with anything else.

    Raises:
      ValueError: its arms were asked for.
    """
    device = base.layout.mesh.devices.flat[0]
    if set(args.arms) & {*PEERS} and (device.platform, base.dtype) != ("cpu", "float32"):
        raise ValueError(
            "the arms of transformers run on the CPU in float32: compare them with a base that "
            f"does, not in {base.dtype.name} on {device.platform}"
        )

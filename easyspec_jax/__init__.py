"""Lossless low-latency LLM decoding in JAX: speculative decoding with a layer-parallel draft
(EasySpec, arXiv 2502.02493).

import easyspec_jax as es

mesh = es.make_mesh(layer=4, tensor=2)
tokenizer = es.Tokenizer("ckpt/base")
base = es.load_model("ckpt/base", mesh)
draft = es.load_model("ckpt/draft", mesh, group_size=4)
decoder = es.Decoder(base, es.LayerParallelDrafter(draft))
out = decoder.generate([tokenizer.encode("Once upon a time")], max_new_tokens=128)
print(tokenizer.decode(out.tokens[0]), out.stats.tokens_per_step)
"""

from easyspec_jax.compile_options import CompileOptions
from easyspec_jax.config import ModelConfig, RopeScaling, Sampling
from easyspec_jax.decode import Decoder, Generation
from easyspec_jax.depth import AutoDepth
from easyspec_jax.distributed import initialize_distributed
from easyspec_jax.drafter import Drafter
from easyspec_jax.drafters.eagle import EagleDrafter
from easyspec_jax.drafters.early_exit import EarlyExitDrafter
from easyspec_jax.drafters.fallback import FallbackDrafter
from easyspec_jax.drafters.layer_parallel import LayerParallelDrafter
from easyspec_jax.drafters.polybasic import PolybasicDrafter
from easyspec_jax.drafters.prompt_lookup import PromptLookupDrafter
from easyspec_jax.hf_config import config_from_hf
from easyspec_jax.layer_parallel import make_partition
from easyspec_jax.loading import (
    abstract_model,
    load_model,
    quantize_model,
    random_model,
    save_model,
)
from easyspec_jax.model import Model
from easyspec_jax.quantized import Quantization
from easyspec_jax.request import Request
from easyspec_jax.scores import logits
from easyspec_jax.session import Piece, Session
from easyspec_jax.sharding import LayoutRules, make_mesh
from easyspec_jax.stats import Stats
from easyspec_jax.text import Tokenizer
from easyspec_jax.verify import Proposal, Verdict
from easyspec_jax.vocabulary import SharedVocabulary, shared_vocabulary

__all__ = [
    "AutoDepth",
    "CompileOptions",
    "Decoder",
    "Drafter",
    "EagleDrafter",
    "EarlyExitDrafter",
    "FallbackDrafter",
    "Generation",
    "LayerParallelDrafter",
    "LayoutRules",
    "Model",
    "ModelConfig",
    "Piece",
    "PolybasicDrafter",
    "PromptLookupDrafter",
    "Proposal",
    "Quantization",
    "Request",
    "RopeScaling",
    "Sampling",
    "Session",
    "SharedVocabulary",
    "Stats",
    "Tokenizer",
    "Verdict",
    "abstract_model",
    "config_from_hf",
    "initialize_distributed",
    "load_model",
    "logits",
    "make_mesh",
    "make_partition",
    "quantize_model",
    "random_model",
    "save_model",
    "shared_vocabulary",
]

__version__ = "0.1.0"

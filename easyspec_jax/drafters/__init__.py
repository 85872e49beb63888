"""Ways of drafting, one per file; `base` says what the decoding loop asks of each."""

from easyspec_jax.drafters.base import Drafter, DrafterBase, DraftOptions
from easyspec_jax.drafters.early_exit import EarlyExitDrafter
from easyspec_jax.drafters.layer_parallel import LayerParallelDrafter
from easyspec_jax.drafters.polybasic import PolybasicDrafter
from easyspec_jax.drafters.prompt_lookup import PromptLookupDrafter

__all__ = [
    "DraftOptions",
    "Drafter",
    "DrafterBase",
    "EarlyExitDrafter",
    "LayerParallelDrafter",
    "PolybasicDrafter",
    "PromptLookupDrafter",
]

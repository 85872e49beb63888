"""Ways of drafting, one per file; `base` says what the decoding loop asks of each."""

from easyspec_jax.drafters.base import Drafter, DrafterBase, DraftOptions
from easyspec_jax.drafters.layer_parallel import LayerParallelDrafter
from easyspec_jax.drafters.polybasic import PolybasicDrafter

__all__ = ["DraftOptions", "Drafter", "DrafterBase", "LayerParallelDrafter", "PolybasicDrafter"]

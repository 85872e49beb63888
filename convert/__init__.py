"""Hugging Face folders, hub ids and GGUF files to checkpoints: `python -m convert SRC DST`.

The only part of the project that reads safetensors or GGUF files; pickles are never read.
"""

from convert.tokenizer import tokenizer_hash
from convert.write import convert

__all__ = ["convert", "tokenizer_hash"]

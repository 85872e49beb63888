"""Ways of drafting, one per file; `base` says what the decoding loop asks of each."""

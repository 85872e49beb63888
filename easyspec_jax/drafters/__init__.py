"""Ways of drafting, one per file; `easyspec_jax.drafter` says what the loop asks of each."""

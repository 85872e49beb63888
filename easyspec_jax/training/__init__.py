"""Training a head that drafts for a base (EAGLE-3); `easyspec train-head`."""

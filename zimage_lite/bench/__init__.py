"""How fast, and in how much memory: tiers of GPUs, measured here or predicted."""

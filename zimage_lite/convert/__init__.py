"""Checkpoints into smaller ones: recipes, the streaming converter, and what it wrote."""

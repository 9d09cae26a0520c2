"""LoRA training: pictures and captions in, a small file that teaches them out."""

"""What a format costs in pictures: the same prompts through several models."""

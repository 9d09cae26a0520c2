"""The tokenizer that goes with a converted text encoder, so that what is written draws by itself."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..checkpoint.checkpoint import Checkpoint
from ..checkpoint.gguf import encoded_values
from ..checkpoint.model_files import find_tokenizer
from ..checkpoint.tokenizer import PromptTokenizer, tokenizer_to_gguf
from .recipe import Target


def tokenizer_to_add(source: Path, text_encoder: Checkpoint, note: Callable[[str], None]) -> PromptTokenizer | None:
    """What the output's tokenizer/ has to be made of; None if the source has one to copy, or none can be found."""
    if (source / "tokenizer").is_dir():
        return None
    found = find_tokenizer(source, text_encoder)
    if found is None:
        note(
            f"no tokenizer came with the text encoder, whose {text_encoder.config.vocab_size} tokens are not Qwen3's: "
            "to draw, put its tokenizer.json into the output's folder tokenizer, or name it with --tokenizer"
        )
    return found


def tokenizer_metadata(checkpoint: Checkpoint, source: Path, to: Target) -> dict[str, Any]:
    """A text encoder in a GGUF file carries its tokenizer, if there is one."""
    if checkpoint.component != "text_encoder" or to.container != "gguf":
        return {}
    if "tokenizer.ggml.tokens" in checkpoint.metadata:
        return encoded_values(next(iter(checkpoint.tensors.values())).parts[""].path, "tokenizer.")
    found = find_tokenizer(source, checkpoint)
    return tokenizer_to_gguf(found, checkpoint.config.vocab_size) if found else {}

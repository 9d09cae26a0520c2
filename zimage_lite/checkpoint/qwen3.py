"""Qwen3's tokenizer, which ships with this package (qwen3_tokenizer/README.md: origin, licence, layout), so that files
that bring none can be drawn from.

A byte-level BPE is its merges: token 256 + k is what merge k makes of two earlier ones, so half a megabyte holds all
151643 tokens. Building the engine takes about half a second (0.45 s on one core of a Zen 3 EPYC, as long as reading
Qwen's own tokenizer.json takes), so it waits for the first prompt.
"""

from __future__ import annotations

import zlib
from functools import cached_property
from importlib.resources import files
from typing import TYPE_CHECKING

from ..config import TextEncoderConfig
from .tokenizer import PromptTokenizer, byte_level_bpe

if TYPE_CHECKING:
    from tokenizers import Tokenizer

Vocabulary = tuple[dict[str, int], list[tuple[str, str]]]  # token -> id, and merges in order of rank

N_TOKENS = 151643
CONTROL = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>",
    "<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>",
    "<|image_pad|>", "<|video_pad|>",
)  # fmt: skip
USER_DEFINED = (  # one token each as well, but part of a text
    "<tool_call>", "</tool_call>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>", "<|fim_pad|>",
    "<|repo_name|>", "<|file_sep|>", "<tool_response>", "</tool_response>", "<think>", "</think>",
)  # fmt: skip
# Their ids follow those of the merges: 151643, 151644, ... -> whether it is for control.
ADDED = dict.fromkeys(CONTROL, True) | dict.fromkeys(USER_DEFINED, False)


class Qwen3Tokenizer(PromptTokenizer):
    """The built-in one."""

    def __init__(self) -> None:
        self.source = "the built-in tokenizer of Qwen3"
        self.highest_id = N_TOKENS + len(ADDED) - 1

    @cached_property
    def tokenizer(self) -> Tokenizer:  # type: ignore[override]
        return byte_level_bpe(*qwen3_vocabulary(), ADDED, self.source)


def is_vocabulary_of_qwen3(rows: int) -> bool:
    """Whether an embedding table of so many rows may be Qwen3's: a row for every token, and no more than its own."""
    return N_TOKENS + len(ADDED) <= rows <= TextEncoderConfig.vocab_size


def qwen3_vocabulary() -> Vocabulary:
    """Ids 0 to 151642, and the merges, without the added tokens."""
    raw = zlib.decompress((files("zimage_lite.checkpoint") / "qwen3_tokenizer" / "merges.zlib").read_bytes())
    n = N_TOKENS - 256
    a0, a1, a2, b0, b1, b2 = (raw[i * n : (i + 1) * n] for i in range(6))
    tokens = list(byte_characters().values())
    merges = []
    for low, middle, high, low_2, middle_2, high_2 in zip(a0, a1, a2, b0, b1, b2, strict=True):
        pair = tokens[low | middle << 8 | high << 16], tokens[low_2 | middle_2 << 8 | high_2 << 16]
        merges.append(pair)
        tokens.append(pair[0] + pair[1])
    return {token: n for n, token in enumerate(tokens)}, merges


def byte_characters() -> dict[int, str]:
    """The printable character that stands for each byte in a byte-level BPE since GPT-2, in the order of Qwen's ids."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}

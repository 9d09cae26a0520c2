"""Who stays in memory. A pure function of sizes and budgets: no torch, no files, the same answer on any machine.

Blocks run one after another, every step the same, so a block that stays saves its whole read in every step, and
which one stays does not matter. They are kept spread evenly, so that later the copies of the others can hide behind
the compute of those that stay.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ..errors import BudgetError
from ..units import format_gb


@dataclass(frozen=True)
class Plan:
    """resident: blocks that stay once loaded; the others come from the file each time they run."""

    resident: frozenset[str]
    streamed: tuple[str, ...]
    predicted_bytes: int


def plan_blocks(phase: str, block_bytes: Mapping[str, int], fixed_bytes: int, budget_bytes: int, limit: str) -> Plan:
    """block_bytes: block -> its packed size, in the order they run. fixed_bytes: all else that is held at once
    (the process, other weights, activations, the unpacked copy of one weight). limit: the flag that sets the budget, or
    what else does.

    Raises BudgetError, naming the smallest budget that works, if one block at a time is too much.
    """
    largest = max(block_bytes.values(), default=0)
    total = sum(block_bytes.values())
    if fixed_bytes + total <= budget_bytes:
        return Plan(frozenset(block_bytes), (), fixed_bytes + total)
    least = fixed_bytes + largest
    if least > budget_bytes:
        fix = f"the smallest that works is {limit} {_round_up(least)}"
        if not limit.startswith("--"):
            fix = f"it takes {_round_up(least)}, so close other programs, or use a smaller format or image"
        raise BudgetError(f"{phase} does not fit {limit}", got=format_gb(budget_bytes), fix=fix)
    # One slot of the largest size is kept free for whichever block is passing through.
    spare = budget_bytes - least
    names = list(block_bytes)
    kept: list[str] = []
    for count in range(len(names) - 1, -1, -1):
        kept = [names[i * len(names) // count] for i in range(count)] if count else []
        if sum(block_bytes[name] for name in kept) <= spare:
            break
    resident = frozenset(kept)
    streamed = tuple(name for name in names if name not in resident)
    return Plan(resident, streamed, least + sum(block_bytes[name] for name in kept))


def _round_up(n_bytes: int) -> str:
    """To the next tenth of a GB, as one types it."""
    return f"{-(-n_bytes // 100_000_000) / 10:g}GB"


def activation_bytes(tokens: int, dim: int, ffn_dim: int, n_heads: int, item_bytes: int) -> int:
    """Peak of one transformer block's activations: residual, normed input, q, k, v with a float32 copy each while they
    are rotated, or the two feed-forward halves and their product. Attention is fused, but its CPU version keeps
    per-thread score tiles, which the constant term covers."""
    attention = tokens * dim * (6 * item_bytes + 4 * 4)
    feed_forward = tokens * (3 * dim + 3 * ffn_dim) * item_bytes
    return max(attention, feed_forward) + n_heads * 2**20


def decode_bytes(pixels: int, widest: int, item_bytes: int) -> int:
    """Peak of the VAE decoder: input, normed input and output of a convolution at full size and the width of the last
    level but one, and the convolution's own workspace, which was as large again on the CPU."""
    return 4 * pixels * widest * item_bytes

"""Results that hold NaN or infinity: which weights are damaged, or where the compute dtype overflows."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from ..checkpoint.checkpoint import Checkpoint
from ..convert.catalog import without_unused
from ..errors import UserError
from ..model.transformer import Watch

_PIECE_WEIGHTS = 2**22


def all_finite(results: Iterable[Tensor]) -> bool:
    return all(bool(torch.isfinite(result).all()) for result in results)


def require_finite(results: Iterable[Tensor], checkpoint: Checkpoint, what: str, dtype: torch.dtype) -> None:
    """Raise UserError if a result holds NaN or infinity. checkpoint: of the weights; dtype: what is computed in."""
    if not all_finite(results):
        raise_if_damaged(checkpoint)
        raise overflow(f"{what} has", dtype)


def raise_if_damaged(checkpoint: Checkpoint) -> None:
    """Read every weight once, in pieces, and raise UserError naming the first tensor that holds NaN or infinity.

    Called when a result is not finite: looking at all weights beforehand would read 12 GB for nothing.
    """
    for tensor in without_unused(checkpoint).tensors.values():
        step = tensor.piece_rows(_PIECE_WEIGHTS)
        for start in range(0, tensor.rows, step):
            tensor.read_float(start, min(start + step, tensor.rows))


def raise_at_first_non_finite(step: str, dtype: torch.dtype) -> Watch:
    """For `Transformer.forward`: raises UserError at the first part whose output holds NaN or infinity. To be used
    when the weights are known to be finite. step: which one, in words; dtype: what is computed in."""

    def watch(name: str, output: Tensor) -> None:
        if not all_finite([output]):
            raise overflow(f"{step}: {name} gives", dtype)

    return watch


def overflow(what: str, dtype: torch.dtype) -> UserError:
    advice = {
        torch.float16: "try --dtype bf16 or --dtype fp32",
        torch.bfloat16: "try --dtype fp32",
        torch.float32: "they overflow even in fp32: use another checkpoint, or weaker LoRAs",
    }
    return UserError(f"{what} NaN or infinite values, though all weights are finite", fix=advice[dtype])

"""8-bit linears as torch alone computes them, one operation after another: what the fused chain is compared with."""

from __future__ import annotations

from weakref import ReferenceType, ref

import torch
from torch import Tensor, nn
from zimage_kernels.rotation import hadamard_matrix

from zimage_lite.model.linear import Linear
from zimage_lite.quant.int8 import rotation_group


class Rows:
    """Activations in 8 bits with a scale for each row. Several linears that take the same tensor share the codes.

    rotation: [group, group] in the dtype of the activations, multiplied as a dense matrix; None for none.
    """

    def __init__(self, rotation: Tensor | None) -> None:
        self.rotation = rotation
        self._last: tuple[ReferenceType[Tensor], Tensor, Tensor] | None = None

    def of(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Codes [tokens, features] int8 and scale [tokens, 1] float32."""
        if self._last is None or self._last[0]() is not x:
            turned = x if self.rotation is None else rotated(x, self.rotation)
            scale = turned.abs().amax(-1, keepdim=True).float().div_(127)
            self._last = ref(x), (turned / scale).round_().clamp_(-127, 127).to(torch.int8), scale
        return self._last[1:]


def rotated(x: Tensor, matrix: Tensor) -> Tensor:
    return (x.unflatten(-1, (-1, len(matrix))) @ matrix).flatten(-2)


class EagerInt8(nn.Module):
    """In place of a `Linear`: quantize, torch._int_mm, two scales, cast."""

    group = None  # it takes 16-bit activations

    def __init__(self, weight: Tensor, rows: Rows) -> None:
        """weight: [out_features, in_features] float, rotated here if rows are."""
        super().__init__()
        if rows.rotation is not None:
            weight = rotated(weight.float(), rows.rotation.float())
        self.scale = weight.abs().amax(1).float() / 127
        self.codes = (weight / self.scale[:, None]).round_().clamp_(-127, 127).to(torch.int8)
        self.rows = rows

    def forward(
        self, x: Tensor, scale_log2: int = 0, backend: str = "reference", out_dtype: torch.dtype | None = None
    ) -> Tensor:
        codes, scale = self.rows.of(x)
        y = (torch._int_mm(codes, self.codes.T) * scale).mul_(self.scale)
        return (y.mul_(2.0**scale_log2) if scale_log2 else y).to(out_dtype or x.dtype)


def replace_linears(block: nn.Module, rotate: bool) -> None:
    """Those of attention and feed-forward, whose weights are bound, by EagerInt8."""
    packed = {m: m.packed for m in block.modules() if isinstance(m, Linear) and m.packed is not None}
    first, weight = next(iter(packed.items()))
    matrix = hadamard_matrix(rotation_group(weight.shape[1])).to(weight.parts[""].device, first.dtype)
    rows = Rows(matrix if rotate else None)
    for owner in list(block.modules()):
        for name, child in list(owner.named_children()):
            if child in packed:
                setattr(owner, name, EagerInt8(packed[child].dequantize(first.dtype), rows))

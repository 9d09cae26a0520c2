"""A weight in whatever format it is stored in, and what one can do with it: unpack it, multiply by it, and, as it is
frozen, by its transpose, which is all that a gradient takes to pass through it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from zimage_kernels import Backend, dequantize, unpacks, use_triton

from .formats import Format, Options, Parts
from .pieces import from_float8

TORCH_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip

# On the CPU a weight is unpacked and multiplied in pieces of 8 MB, which stay in the cache: 1.3 times as fast as whole
# with q8_0 on two threads of a Zen 4, and the unpacked weight (157 MB) never exists.
CPU_PIECE_WEIGHTS = 2**21
# On a GPU in pieces that still fill it: to unpack each of a weight's 39 M elements torch takes up to 10 bytes for a
# moment, the kernel only the 2 of the result.
GPU_PIECE_WEIGHTS = 2**24
_ROW_STEP = 16


def rows_columns(shape: tuple[int, ...]) -> tuple[int, int]:
    """How a tensor of any rank lies in rows: (3840,) -> (1, 3840); (64, 16, 3, 3) -> (64, 144)."""
    if len(shape) < 2:
        return 1, math.prod(shape)
    return shape[0], math.prod(shape[1:])


def piece_rows(format: Format, columns: int, weights: int) -> int:
    """Rows of a piece of so many weights. In multiples of 16 every piece begins at a multiple of 16 bytes, in any
    format: kernels compiled for that are faster, and none has to be compiled for anything else."""
    group = max(format.row_group, _ROW_STEP)
    return max(weights // columns // group, 1) * group


def all_finite(x: Tensor) -> bool:
    """A sum is finite only if every term is, and takes a fortieth of the time of looking at each (one Zen 4 thread)."""
    wide = from_float8(x)  # summing bfloat16 itself is three times as slow
    return math.isfinite(wide.sum()) or bool(torch.isfinite(wide).all())


@dataclass(frozen=True)
class QTensor:
    """One logical tensor, packed. parts: as `format.layout` says, on any device. first_row: where the tensor starts in
    parts that cannot be cut and hold more than it."""

    format: Format
    shape: tuple[int, ...]
    parts: Parts
    options: Options = field(default_factory=dict)
    first_row: int = 0

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.parts.values())

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Unpack to `shape` in `dtype`. A plain tensor that has the dtype already is returned without a copy."""
        if self.format.family == "plain":
            return self.parts[""].to(dtype).reshape(self.shape)
        rows, columns = rows_columns(self.shape)
        wide = self.format.codec.dequantize(self.parts, columns, self.options)
        return wide[self.first_row : self.first_row + rows].to(dtype).reshape(self.shape)

    def linear(self, x: Tensor, backend: Backend = "reference") -> Tensor:
        """x @ W.T. x: [tokens, columns] in the compute dtype -> [tokens, rows] in the same. backend: that unpacks W,
        if it can; else its codec does. A gradient of x comes by `linear_back`, from the bytes that are there then."""
        if x.requires_grad and torch.is_grad_enabled():
            return cast(Tensor, _Frozen.apply(x, self, backend))
        pieces = [self] if self.parts[""].dtype == x.dtype else self.pieces()
        products = [piece._linear(x, backend) for piece in pieces]
        return products[0] if len(products) == 1 else torch.cat(products, dim=-1)

    def linear_back(self, dy: Tensor, backend: Backend = "reference") -> Tensor:
        """dy @ W. dy: [tokens, rows] in the compute dtype -> [tokens, columns] in the same; what pieces of W give is
        added up in float32."""
        if self.parts[""].dtype == dy.dtype:
            return self._linear_back(dy, backend)
        total, at = torch.zeros(len(dy), self.shape[1], device=dy.device), 0
        for piece in self.pieces():
            total += piece._linear_back(dy[:, at : at + piece.shape[0]], backend)
            at += piece.shape[0]
        return total.to(dy.dtype)

    def pieces(self) -> Iterator[QTensor]:
        """So many rows as are unpacked at once, as views; the whole if its parts cannot be cut."""
        (rows, columns), step = self.shape, self.shape[0]
        if self.format.row_group and self.parts[""].ndim == 2:
            limit = CPU_PIECE_WEIGHTS if self.parts[""].device.type == "cpu" else GPU_PIECE_WEIGHTS
            step = piece_rows(self.format, columns, limit)
        for start in range(0, rows, step):
            yield self._rows(start, min(start + step, rows))

    def _linear(self, x: Tensor, backend: Backend) -> Tensor:
        fused = getattr(self.format.codec, "linear", None)
        if fused is not None:
            return fused(x, self.parts, self.options)
        return F.linear(x, self._unpacked(x, backend))

    def _linear_back(self, dy: Tensor, backend: Backend) -> Tensor:
        fused = getattr(self.format.codec, "linear_back", None)
        if fused is not None:
            return cast(Tensor, fused(dy, self.parts, self.options))
        return dy @ self._unpacked(dy, backend)

    def _unpacked(self, x: Tensor, backend: Backend) -> Tensor:
        """As x is. The kernel does in one pass what takes torch dozens of launches and several bytes for a weight."""
        name, columns = self.format.name, self.shape[1]
        if not unpacks(name, self.parts, self.options, columns) or not use_triton(backend, x.device):
            return self.dequantize(x.dtype)
        wide = torch.empty(self.shape, dtype=x.dtype, device=x.device)
        dequantize(name, self.parts, self.options, wide, self.first_row)
        return wide

    def _rows(self, start: int, stop: int) -> QTensor:
        """Rows [start, stop), as views."""
        rows, columns = self.shape
        if (start, stop) == (0, rows):
            return self
        layout = self.format.layout(stop - start, columns, self.options)
        parts = {
            suffix: part[start : start + layout[suffix][1][0]] if part.ndim == 2 else part
            for suffix, part in self.parts.items()
        }
        options = self.format.codec.at_row(self.options, start)
        return replace(self, shape=(stop - start, columns), parts=parts, options=options)

    def is_finite(self) -> bool:
        """Whether every weight is a number. Looks at the float parts where there are any, else unpacks."""
        floats = [part for part in self.parts.values() if part.is_floating_point()] or [self.dequantize()]
        return all(map(all_finite, floats))

    def to(self, device: torch.device | str) -> QTensor:
        return replace(self, parts={suffix: _moved(part, device) for suffix, part in self.parts.items()})


def _moved(part: Tensor, device: torch.device | str) -> Tensor:
    """8-bit floats as bytes, for torch takes none to Apple's GPUs."""
    if part.is_floating_point() and part.itemsize == 1:
        return part.view(torch.uint8).to(device).view(part.dtype)
    return part.to(device)


class _Frozen(torch.autograd.Function):
    """A product with a weight that is not learned. Nothing is kept for the way back but where the weight lies."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: QTensor, backend: Backend) -> Tensor:
        ctx.weight, ctx.backend = weight, backend
        return weight.linear(x.detach(), backend)

    @staticmethod
    def backward(ctx: Any, *given: Any) -> tuple[Tensor, None, None]:
        (dy,) = given
        return ctx.weight.linear_back(dy, ctx.backend), None, None

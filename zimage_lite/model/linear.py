"""Layers whose weights come and go.

A skeleton's parameters live on the meta device and only say which shapes are wanted. `bind` puts real weights in,
`release` takes them out again; neither copies. A linear keeps its weight packed and unpacks it when it multiplies;
small tensors (norms, biases, convolutions) are unpacked once, when they are bound. An int8 weight is multiplied as it
is where the input is int8, too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor, nn
from zimage_kernels import GROUPS, Backend, Int8Rows, linear_int8, rms_norm

from ..quant.tensor import QTensor
from .side_path import SidePath, unrotated

Activation = Tensor | Int8Rows  # [tokens, features]: in the compute dtype, or rotated int8 with a scale for each row

# Passes blocks on one by one, each bound before it is yielded. `iter` does for blocks that are all bound.
Stream = Callable[[Iterable[nn.Module]], Iterable[nn.Module]]


class Linear(nn.Module):
    """x @ W.T + b with W in any format. x: [tokens, in_features] -> [tokens, out_features]."""

    def __init__(self, in_features: int, out_features: int, bias: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features, device="meta"), requires_grad=False)
        self.bias = nn.Parameter(torch.empty(out_features, device="meta"), requires_grad=False) if bias else None
        self.packed: QTensor | None = None
        self.side: SidePath | None = None
        self.dtype = torch.float32  # to compute in

    def forward(
        self, x: Activation, scale_log2: int = 0, backend: Backend = "reference", out_dtype: torch.dtype | None = None
    ) -> Tensor:
        """Returns 2^scale_log2 times the product, in the compute dtype. A 16-bit x is overwritten by x times that, so
        that float16 holds the product; the sums of 8 bits are wide enough, and may come out in another out_dtype.

        Int8Rows must be rotated by `group`. backend: that multiplies them, or unpacks the weight."""
        side = self.side
        bias = side.plain_bias(self.bias) if side else self.bias
        if isinstance(x, Int8Rows):
            return self._of_int8(x, bias, scale_log2, out_dtype or self.dtype, backend)
        assert self.packed is not None, "no weight is bound"
        x = x.mul_(2.0**scale_log2) if scale_log2 else x
        y = side.added(self.packed.linear(side.given(x), backend), x) if side else self.packed.linear(x, backend)
        return _with_bias(y, bias, scale_log2)

    def _of_int8(
        self, x: Int8Rows, bias: Tensor | None, scale_log2: int, dtype: torch.dtype, backend: Backend
    ) -> Tensor:
        side = self.side
        if side is None or side.rides:
            return linear_int8(*x, *self.scaled_rows, bias, self.low_rank(x, backend), scale_log2, dtype, backend)
        z = linear_int8(*x, *self.int8_rows, None, None, scale_log2, self.dtype, backend)
        y = side.added(z, unrotated(x, self.group or 0, self.dtype).mul_(2.0**scale_log2))
        return _with_bias(y, bias, scale_log2).to(dtype)

    @property
    def group(self) -> int | None:
        """The rotation group of the 8-bit rows that it multiplies (0: not rotated); None if the weight is not int8, or
        an adapter changes what it multiplies."""
        packed = self.packed
        if self.side is not None and self.side.changes_input:
            return None
        if packed is None or packed.format.name != "int8" or packed.shape[1] % 16:  # linear_int8 loads 16 bytes
            return None
        return packed.options["group"] if packed.options["group"] in GROUPS else None

    @property
    def int8_rows(self) -> Int8Rows:
        """An int8 weight as the kernels read it."""
        assert self.packed is not None, "no weight is bound"
        return Int8Rows(self.packed.parts[""], self.packed.parts["_scale"].view(-1))

    # For `swiglu_int8`, which multiplies by two weights at once:

    @property
    def rides(self) -> bool:
        """Whether an 8-bit product can take all that adapters add, which is no bias."""
        return self.side is None or (self.side.rides and self.side.bias is None)

    @property
    def scaled_rows(self) -> Int8Rows:
        """The int8 weight with the factors that adapters have for its outputs."""
        codes, scale = self.int8_rows
        return Int8Rows(codes, self.side.scaled(scale) if self.side else scale)

    def low_rank(self, x: Int8Rows, backend: Backend) -> tuple[Tensor, Tensor] | None:
        """What adapters add, as the kernels take it."""
        return self.side.low_rank(x, self.group or 0, backend) if self.side else None


class RMSNorm(nn.Module):
    """Normalises over the last axis, in float32. x: [..., dim] -> the same shape in the dtype of the weight."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(dim, device="meta"), requires_grad=False)
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)


def shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    """Every weight that the module wants: name -> shape."""
    return {name: tuple(parameter.shape) for name, parameter in module.named_parameters()}


def _with_bias(y: Tensor, bias: Tensor | None, scale_log2: int) -> Tensor:
    """y: 2^scale_log2 times the product."""
    return y if bias is None else y + bias.to(y.dtype) * 2.0**scale_log2


def bind(module: nn.Module, tensors: Mapping[str, QTensor], dtype: torch.dtype) -> None:
    """Give the module (and its children) the named weights, which lie on the device already. dtype: to compute in."""
    for name, tensor in tensors.items():
        path, _, leaf = name.rpartition(".")
        owner = module.get_submodule(path)
        if isinstance(owner, Linear) and leaf == "weight":
            owner.packed, owner.dtype = tensor, dtype
        else:
            setattr(owner, leaf, nn.Parameter(tensor.dequantize(dtype), requires_grad=False))


def attach(module: nn.Module, sides: Mapping[str, SidePath], deltas: Mapping[str, Tensor]) -> None:
    """What adapters add to weights that are bound already, until `release`. sides: of linears, by their names in the
    module; deltas: of vectors (norms, pad tokens), float32."""
    for name, side in sides.items():
        owner = module.get_submodule(name)
        assert isinstance(owner, Linear)
        owner.side = side
    for name, delta in deltas.items():
        path, _, leaf = name.rpartition(".")
        owner = module.get_submodule(path)
        inner = getattr(owner, leaf)
        owner, leaf = (inner, "weight") if isinstance(inner, nn.Module) else (owner, leaf)
        weight = getattr(owner, leaf)
        changed = (weight.float() + delta.view(weight.shape)).to(weight.dtype)
        setattr(owner, leaf, nn.Parameter(changed, requires_grad=False))


def release(module: nn.Module) -> None:
    """Put the whole module back on the meta device."""
    for owner in module.modules():
        if isinstance(owner, Linear):
            owner.packed = owner.side = None
        for name, parameter in owner.named_parameters(recurse=False):
            if parameter.device.type != "meta":
                setattr(owner, name, nn.Parameter(torch.empty_like(parameter, device="meta"), requires_grad=False))

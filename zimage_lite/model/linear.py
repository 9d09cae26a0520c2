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
        self.dtype = torch.float32  # to compute in

    def forward(
        self, x: Activation, scale_log2: int = 0, backend: Backend = "reference", out_dtype: torch.dtype | None = None
    ) -> Tensor:
        """Returns 2^scale_log2 times the product, in the compute dtype. A 16-bit x is overwritten by x times that, so
        that float16 holds the product; the sums of 8 bits are wide enough, and may come out in another out_dtype.

        Int8Rows must be rotated by `group`. backend: that multiplies them, or unpacks the weight."""
        if isinstance(x, Int8Rows):
            dtype, weight = out_dtype or self.dtype, self.int8_rows
            return linear_int8(*x, *weight, self.bias, scale_log2=scale_log2, out_dtype=dtype, backend=backend)
        assert self.packed is not None, "no weight is bound"
        y = self.packed.linear(x.mul_(2.0**scale_log2) if scale_log2 else x, backend)
        return y if self.bias is None else y + self.bias

    @property
    def group(self) -> int | None:
        """The rotation group of the 8-bit rows that it multiplies (0: not rotated); None if the weight is not int8."""
        packed = self.packed
        if packed is None or packed.format.name != "int8" or packed.shape[1] % 16:  # linear_int8 loads 16 bytes
            return None
        return packed.options["group"] if packed.options["group"] in GROUPS else None

    @property
    def int8_rows(self) -> Int8Rows:
        """An int8 weight as the kernels read it."""
        assert self.packed is not None, "no weight is bound"
        return Int8Rows(self.packed.parts[""], self.packed.parts["_scale"].view(-1))


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


def bind(module: nn.Module, tensors: Mapping[str, QTensor], dtype: torch.dtype) -> None:
    """Give the module (and its children) the named weights, which lie on the device already. dtype: to compute in."""
    for name, tensor in tensors.items():
        path, _, leaf = name.rpartition(".")
        owner = module.get_submodule(path)
        if isinstance(owner, Linear) and leaf == "weight":
            owner.packed, owner.dtype = tensor, dtype
        else:
            setattr(owner, leaf, nn.Parameter(tensor.dequantize(dtype), requires_grad=False))


def release(module: nn.Module) -> None:
    """Put the whole module back on the meta device."""
    for owner in module.modules():
        if isinstance(owner, Linear):
            owner.packed = None
        for name, parameter in owner.named_parameters(recurse=False):
            if parameter.device.type != "meta":
                setattr(owner, name, nn.Parameter(torch.empty_like(parameter, device="meta"), requires_grad=False))

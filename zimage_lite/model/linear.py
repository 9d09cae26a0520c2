"""Layers whose weights come and go.

A skeleton's parameters live on the meta device and only say which shapes are wanted. `bind` puts real weights in,
`release` takes them out again; neither copies. A linear keeps its weight packed and unpacks it when it multiplies;
small tensors (norms, biases, convolutions) are unpacked once, when they are bound.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor, nn
from zimage_kernels import rms_norm

from ..quant.tensor import QTensor

# Passes blocks on one by one, each bound before it is yielded. `iter` does for blocks that are all bound.
Stream = Callable[[Iterable[nn.Module]], Iterable[nn.Module]]


class Linear(nn.Module):
    """x @ W.T + b with W in any format. x: [tokens, in_features] -> [tokens, out_features]."""

    def __init__(self, in_features: int, out_features: int, bias: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features, device="meta"), requires_grad=False)
        self.bias = nn.Parameter(torch.empty(out_features, device="meta"), requires_grad=False) if bias else None
        self.packed: QTensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        assert self.packed is not None, "no weight is bound"
        y = self.packed.linear(x)
        return y if self.bias is None else y + self.bias


class RMSNorm(nn.Module):
    """Normalises over the last axis, in float32."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(dim, device="meta"), requires_grad=False)
        self.eps = eps

    def forward(self, x: Tensor, scale: float = 1.0, dtype: torch.dtype | None = None) -> Tensor:
        """x: [..., dim], `scale` times what is to be normalised. Returns the same shape in `dtype`, or else in the
        dtype of the weight."""
        weight = self.weight if dtype is None else self.weight.to(dtype)
        return rms_norm(x, weight, self.eps * scale**2)


def shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    """Every weight that the module wants: name -> shape."""
    return {name: tuple(parameter.shape) for name, parameter in module.named_parameters()}


def bind(module: nn.Module, tensors: Mapping[str, QTensor], dtype: torch.dtype) -> None:
    """Give the module (and its children) the named weights, which lie on the device already. dtype: to compute in."""
    for name, tensor in tensors.items():
        path, _, leaf = name.rpartition(".")
        owner = module.get_submodule(path)
        if isinstance(owner, Linear) and leaf == "weight":
            owner.packed = tensor
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

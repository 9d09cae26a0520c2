"""Adapters as trainers write them, for a tiny model: the file, and in float64 what it does to each weight.

Every kind is W + m (W'' - W), so a description keeps for each module W -> W'' - W, worked out beside the tensors from
the formula of its trainer and by no code of ours.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from zimage_lite.config import TransformerConfig

TINY = TransformerConfig(
    in_channels=4, dim=64, n_layers=2, n_refiner_layers=1, n_heads=4, cap_feat_dim=32, axes_dims=(4, 6, 6)
)
"""The model of the fixtures: small enough that float64 costs nothing, with square, wide and tall linears."""

_ENDS = {
    "to_q": (64, 64), "to_k": (64, 64), "to_v": (64, 64), "to_out.0": (64, 64),
    "feed_forward.w1": (170, 64), "feed_forward.w3": (170, 64), "feed_forward.w2": (64, 170),
    "adaLN_modulation.0": (256, 64), "norm_q": (1, 16), "attention_norm1": (1, 64), "ffn_norm2": (1, 64),
    "x_pad_token": (1, 64), "all_x_embedder.2-1": (64, 16), "t_embedder.mlp.0": (1024, 256), "cap_embedder.1": (64, 32),
}  # fmt: skip

BLOCKS = ("layers.0", "layers.1", "noise_refiner.0", "context_refiner.0")
ATTENTION = [f"{block}.attention.{name}" for block in BLOCKS for name in ("to_q", "to_k", "to_v", "to_out.0")]
FEED_FORWARD = [f"layers.{i}.feed_forward.w{j}" for i in (0, 1) for j in (1, 2, 3)]
KOHYA = ("lora_down.weight", "lora_up.weight")

Change = Callable[[Tensor], Tensor]


def size(module: str) -> tuple[int, int]:
    """[rows, columns] of a module of the tiny model."""
    return next(size for end, size in _ENDS.items() if module.endswith(end))


def qkv(block: str) -> tuple[str, ...]:
    return tuple(f"{block}.attention.to_{x}" for x in "qkv")


def w31(block: str) -> tuple[str, ...]:
    return f"{block}.feed_forward.w3", f"{block}.feed_forward.w1"


def kohya(module: str, prefix: str = "lora_unet_") -> str:
    return prefix + module.replace(".", "_")


@dataclass
class Described:
    """tensors: of the file; changes: modules, one or several fused ones, and W -> W'' - W of all their rows, float64;
    biases: module -> what is added to its bias."""

    tensors: dict[str, Tensor] = field(default_factory=dict)
    changes: list[tuple[tuple[str, ...], Change]] = field(default_factory=list)
    biases: dict[str, Tensor] = field(default_factory=dict)
    metadata: dict[str, str] = field(default_factory=dict)
    config: Mapping[str, object] | None = None  # then it is a folder of PEFT's
    _random: torch.Generator = field(default_factory=lambda: torch.Generator().manual_seed(7))

    def random(self, *shape: int, scale: float = 0.3) -> Tensor:
        return scale * torch.randn(shape, generator=self._random)

    def add(self, name: str, *shape: int, dtype: torch.dtype = torch.float32, scale: float = 0.3) -> Tensor:
        """A random tensor of the file -> what of it is stored, in float64."""
        self.tensors[name] = self.random(*shape, scale=scale).to(dtype)
        return self.tensors[name].double()

    def say(self, name: str, value: float, dtype: torch.dtype = torch.float32, shape: tuple[int, ...] = ()) -> None:
        self.tensors[name] = torch.full(shape, value, dtype=dtype)

    def change(self, modules: str | tuple[str, ...], change: Tensor | Change) -> None:
        modules = (modules,) if isinstance(modules, str) else modules
        self.changes.append((modules, change if callable(change) else lambda weight: change))

    def lora(
        self,
        spelled: str,
        modules: str | tuple[str, ...],
        rank: int = 4,
        alpha: float | None = None,
        ends: tuple[str, str] = ("lora_A.weight", "lora_B.weight"),
        scale: float | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> Tensor:
        """scale: that the file does not say. Returns dW."""
        rows, columns = _size_of(modules)
        a = self.add(f"{spelled}.{ends[0]}", rank, columns, dtype=dtype)
        b = self.add(f"{spelled}.{ends[1]}", rows, rank, dtype=dtype)
        if alpha is not None:
            self.say(f"{spelled}.alpha", alpha)
        own = scale if scale is not None else 1.0 if alpha is None else alpha / rank
        self.change(modules, own * (b @ a))
        return own * (b @ a)

    def loha(self, spelled: str, modules: str | tuple[str, ...], rank: int, alpha: float) -> Tensor:
        (rows, columns), factors = _size_of(modules), []
        for number in (1, 2):
            a = self.add(f"{spelled}.hada_w{number}_a", rows, rank)
            factors.append(a @ self.add(f"{spelled}.hada_w{number}_b", rank, columns))
        self.say(f"{spelled}.alpha", alpha)
        self.change(modules, alpha / rank * factors[0] * factors[1])
        return alpha / rank * factors[0] * factors[1]

    def lokr(
        self,
        spelled: str,
        modules: str | tuple[str, ...],
        w1: tuple[int, int],
        ranks: tuple[int, int] = (0, 0),
        alpha: float = 1.0,
        alpha_dtype: torch.dtype = torch.float32,
    ) -> Tensor:
        """w1: its shape; ranks: of w1 and w2, 0 for one tensor."""
        rows, columns = _size_of(modules)
        assert rows % w1[0] == 0 and columns % w1[1] == 0
        shapes, factors = (w1, (rows // w1[0], columns // w1[1])), []
        for number, (shape, rank) in enumerate(zip(shapes, ranks, strict=True), 1):
            name = f"{spelled}.lokr_w{number}"
            if rank:
                factors.append(self.add(f"{name}_a", shape[0], rank) @ self.add(f"{name}_b", rank, shape[1]))
            else:
                factors.append(self.add(name, *shape))
        self.say(f"{spelled}.alpha", alpha, alpha_dtype)
        scale = alpha / (ranks[1] or ranks[0]) if any(ranks) else 1.0
        self.change(modules, scale * torch.kron(*factors))
        return scale * torch.kron(*factors)

    def dora(self, name: str, modules: str | tuple[str, ...], by_column: bool, shape: tuple[int, ...] = ()) -> None:
        """A magnitude for the change that was described last. shape: in the file, of all rows or columns."""
        _, inner = self.changes.pop()
        count = _size_of(modules)[by_column]
        magnitude = self.random(*(shape or (count,))).abs() + 0.5
        self.tensors[name] = magnitude

        def changed(weight: Tensor) -> Tensor:
            whole = weight + inner(weight)
            norm = whole.norm(dim=0 if by_column else 1, keepdim=True)
            return whole * magnitude.double().view(norm.shape) / norm - weight

        self.change(modules, changed)

    def write(self, folder: Path, name: str = "adapter") -> Path:
        """-> the path to open."""
        if self.config is None:
            save_file(self.tensors, folder / f"{name}.safetensors", self.metadata or None)
            return folder / f"{name}.safetensors"
        (folder / name).mkdir()
        save_file(self.tensors, folder / name / "adapter_model.safetensors", self.metadata or None)
        (folder / name / "adapter_config.json").write_text(json.dumps(self.config))
        return folder / name


def _size_of(modules: str | tuple[str, ...]) -> tuple[int, int]:
    sizes = [size(module) for module in ((modules,) if isinstance(modules, str) else modules)]
    return sum(rows for rows, _ in sizes), sizes[0][1]

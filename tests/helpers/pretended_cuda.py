"""A CUDA device that is none: its tensors lie on the CPU and are computed there, to the bit what the CPU computes, but
they say that they lie on a GPU, refuse to meet those that do not, and are counted as its allocator would.

What it cannot show: rounding of another device, kernels, the order of streams (tests/memory/test_cuda.py has that).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.cuda._utils import _get_device_index
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map

CUDA = torch.device("cuda", 0)
TOTAL_BYTES, FREE_BYTES = 6 * 2**30, 5 * 10**9
_WAITING = ("_local_scalar_dense", "is_nonzero", "equal", "nonzero", "repeat_interleave", "item")
_MIXED = ("index", "index_put", "index_put_", "_index_put_impl_")  # take indices of the CPU, too


class OnGpu(Tensor):
    """inner: the same values, on the CPU. To C++ it is a tensor of the CPU, for this torch may have no CUDA at all."""

    inner: Tensor
    device = property(lambda self: CUDA)  # type: ignore[assignment]
    is_cuda, is_cpu = property(lambda self: True), property(lambda self: False)  # type: ignore[assignment]
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, inner: Tensor) -> OnGpu:
        made = Tensor._make_wrapper_subclass(
            cls, inner.size(), strides=inner.stride(), storage_offset=inner.storage_offset(), dtype=inner.dtype
        )  # type: ignore[attr-defined]
        made.inner = inner
        return made

    def cpu(self, *_: Any) -> Tensor:
        return self.to("cpu")

    def numpy(self, **_: Any) -> Any:
        raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() first.")

    __array__ = numpy

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


class _Factories(TorchDispatchMode):
    """For operations that take no tensor."""

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


class Allocator:
    """Bytes of the storages that are alive, by operation: what one takes inside itself is not seen. taken: how many so
    far; runs_out_at: the one for which there is no memory. waits: operations
    for which the calling thread waits until the GPU has done all that it was asked before."""

    def __init__(self) -> None:
        self.waits: list[str] = []
        self.backwards = False  # on the way through the graph of something on the GPU
        self.alive: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak_bytes = self.taken = 0
        self.runs_out_at: int | None = None

    def take(self, tensor: Tensor) -> None:
        self.taken += 1
        if self.taken == self.runs_out_at:
            raise torch.OutOfMemoryError("CUDA out of memory")
        storage = tensor.untyped_storage()
        self.alive[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self.peak_bytes = max(self.peak_bytes, self.held_bytes)

    @property
    def held_bytes(self) -> int:
        self.alive = {key: one for key, one in self.alive.items() if not one[0].expired()}
        return sum(n_bytes for _, n_bytes in self.alive.values())


_allocator = Allocator()


def _run(func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
    given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    on_gpu, name = any(isinstance(one, OnGpu) for one in given), func.overloadpacket.__name__
    asked = kwargs.get("device")
    there = on_gpu if asked is None else torch.device(asked).type == "cuda"
    if _allocator.backwards and asked is not None and torch.device(asked).type == "cpu":
        there = on_gpu or not given  # a gradient's own, for which C++ asks where it thinks that we are
    others = [one for one in given if not isinstance(one, OnGpu) and one.device.type == "cpu" and one.ndim]
    if on_gpu and others and name not in (*_MIXED, "_to_copy", "copy_"):
        raise RuntimeError(f"{func}: on cuda:0 and on the CPU, of shape {[tuple(one.shape) for one in others]}")
    if (name in _WAITING and on_gpu) or (name in ("_to_copy", "copy_") and _crosses(func, args, there, kwargs)):
        _allocator.waits.append(f"{name} {[tuple(one.shape) for one in given]}")
    if asked is not None and torch.device(asked).type == "cuda":
        kwargs = {**kwargs, "device": "cpu"}
    kwargs.pop("pin_memory", None)
    out = func(*tree_map(_inner, args), **tree_map(_inner, kwargs))
    if not there or name == "copy_":
        return args[0] if name == "copy_" else out
    return return_and_correct_aliasing(func, args, kwargs, _placed(out, given))


def _crosses(func: Any, args: tuple, there: bool, kwargs: dict[str, Any]) -> bool:
    """Whether a copy goes from one device to the other, and says nothing of not waiting."""
    if func.overloadpacket.__name__ == "copy_":
        into, source, *flags = args
        ends, flagged = (isinstance(into, OnGpu), isinstance(source, OnGpu)), any(flags)
    else:
        ends, flagged = (isinstance(args[0], OnGpu), there), False
    return ends[0] != ends[1] and not (flagged or kwargs.get("non_blocking"))


def _placed(out: Any, given: list[Tensor]) -> Any:
    """On the GPU, and counted if it is no part of what was given."""
    before = {_inner(one).untyped_storage()._cdata for one in given}

    def placed(one: Any) -> Any:
        if not isinstance(one, Tensor) or one.device.type == "meta":
            return one
        if one.untyped_storage()._cdata not in before:
            _allocator.take(one)
        return OnGpu(one)

    return tree_map(placed, out)


def _inner(value: Any) -> Any:
    return value.inner if isinstance(value, OnGpu) else value


def _moving(plain: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Tensor.to, which in C++ would ask CUDA."""

    def to(self: Tensor, *args: Any, copy: bool = False, **kwargs: Any) -> Tensor:
        if args and isinstance(args[0], Tensor):
            args = args[0].device, args[0].dtype, *args[1:]
        device, dtype, *_ = torch._C._nn._parse_to(*args, **kwargs)
        if not isinstance(self, OnGpu) and (device is None or device.type != "cuda"):
            return plain(self, *args, copy=copy, **kwargs)
        device, dtype = device or self.device, dtype or self.dtype
        if (device.type, dtype, copy) == (self.device.type, self.dtype, False):
            return self
        return torch.ops.aten._to_copy.default(self, dtype=dtype, device=device)

    return to


def _noted(plain: Callable[..., None]) -> Callable[..., None]:
    """Tensor.backward."""

    def backward(self: Tensor, *args: Any, **kwargs: Any) -> None:
        _allocator.backwards = isinstance(self, OnGpu)
        try:
            plain(self, *args, **kwargs)
        finally:
            _allocator.backwards = False

    return backward


class _Event:
    def __init__(self, **_: Any) -> None:
        pass

    def elapsed_time(self, end: _Event) -> float:
        return 1.0

    def __getattr__(self, name: str) -> Callable[..., bool]:
        return lambda *_: True


class _Device(nullcontext):
    """As a context manager."""


@contextmanager
def pretended_cuda(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int] = (8, 6)) -> Iterator[Allocator]:
    """Meanwhile there is such a device, in this thread; others may compute with what lies on it. Yields its
    allocator."""
    tensor, fractions = torch.tensor, [1.0]

    def fraction(device: Any) -> float:
        _get_device_index(device)  # as torch's own: raises ValueError for a device without a number
        return fractions[-1]

    def set_fraction(fraction: float, device: Any) -> None:
        assert 0 < fraction <= 1
        _get_device_index(device)
        fractions.append(fraction)

    _allocator.__init__()  # type: ignore[misc]
    facts = {"name": "NVIDIA GeForce RTX 3060 Laptop GPU", "total_memory": TOTAL_BYTES, "multi_processor_count": 30}
    cudart = SimpleNamespace(cudaHostRegister=lambda *_: 0, cudaHostUnregister=lambda *_: 0)
    answers: dict[str, Callable[..., Any]] = {
        "_lazy_init": lambda: None,
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "get_device_capability": lambda device=None: capability,
        "get_device_properties": lambda device=None: SimpleNamespace(**facts),
        "mem_get_info": lambda device=None: (FREE_BYTES - _allocator.held_bytes, TOTAL_BYTES),
        "memory_allocated": lambda device=None: _allocator.held_bytes,
        "memory_reserved": lambda device=None: _allocator.held_bytes,
        "max_memory_allocated": lambda device=None: _allocator.peak_bytes,
        "max_memory_reserved": lambda device=None: _allocator.peak_bytes,
        "reset_peak_memory_stats": lambda device=None: setattr(_allocator, "peak_bytes", _allocator.held_bytes),
        "empty_cache": lambda: None,
        "get_per_process_memory_fraction": fraction,
        "set_per_process_memory_fraction": set_fraction,
        "Stream": lambda device=None: _Event(),
        "Event": _Event,
        "current_stream": lambda device=None: _Event(),
        "synchronize": lambda device=None: None,
        "stream": lambda stream: nullcontext(),
        "device": _Device,
        "cudart": lambda: cudart,
    }
    with monkeypatch.context() as patch:
        for name, answer in answers.items():
            patch.setattr(torch.cuda, name, answer)
        patch.setattr(Tensor, "to", _moving(Tensor.to))
        patch.setattr(Tensor, "backward", _noted(Tensor.backward))
        patch.setattr(torch, "tensor", lambda data, *, device=None, **more: tensor(data, **more).to(device or "cpu"))
        with _Factories():
            yield _allocator

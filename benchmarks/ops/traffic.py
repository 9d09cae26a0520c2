"""How many bytes of activations go through memory, if every operation reads its operands once and writes its results.

torch's own operations are counted as they are dispatched: views and allocations move nothing. One of our ops is one
pass when its kernel runs, whatever the launcher does around it. Nothing here needs a GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from types import ModuleType
from typing import Any
from unittest.mock import patch

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_MOVE_NOTHING = ("aten::empty", "aten::new_empty", "aten::set_")


class Traffic(TorchDispatchMode):
    """`n_bytes` counts what runs inside. weights: what is read of them is left out."""

    def __init__(self, weights: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.n_bytes = 0
        self._weights = {_place(weight) for weight in weights}
        self._inside_a_kernel = False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        name, mutates = func._schema.name, func._schema.is_mutable
        if not self._inside_a_kernel and not name.startswith(_MOVE_NOTHING):
            given = args[1:] if name == "aten::copy_" else args  # what it overwrites is not read
            self._count(_tensors(given, kwargs), _tensors(result), mutates)
        return result

    @contextmanager
    def kernels(self, ops: Mapping[ModuleType, Iterable[str]]) -> Iterator[None]:
        """Inside, each of these ops is one pass: modules, and the names that they call them by."""
        with ExitStack() as replaced:
            for module, names in ops.items():
                for name in names:
                    replaced.enter_context(patch.object(module, name, self._one_pass(getattr(module, name))))
            yield

    def _one_pass(self, op: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            self._inside_a_kernel = True
            try:
                result = op(*args, **kwargs)
            finally:
                self._inside_a_kernel = False
            self._count(_tensors(args, kwargs), _tensors(result), False)
            return result

        return call

    def _count(self, reads: list[Tensor], results: list[Tensor], mutates: bool) -> None:
        places = {_place(tensor) for tensor in reads}
        written = [tensor for tensor in results if mutates or _place(tensor) not in places]
        if not written:
            return  # a view
        once = {(tensor.data_ptr(), tensor.shape): tensor for tensor in reads if _place(tensor) not in self._weights}
        self.n_bytes += sum(map(_n_bytes, (*once.values(), *written)))


def _tensors(*nested: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(nested) if isinstance(leaf, Tensor)]


def _place(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _n_bytes(tensor: Tensor) -> int:
    """Of an expanded tensor, what there is of it."""
    return min(tensor.nbytes, tensor.untyped_storage().nbytes())

"""What clients may name: the models that the server was started with, and the adapters in its folder. They see names,
never paths, and a name that is not in the list finds nothing."""

from __future__ import annotations

from pathlib import Path

from ..adapters.tags import adapters_in
from ..errors import UserError
from .options import ServeOptions


class UnknownError(UserError):
    """There is nothing of that name."""


class Catalog:
    def __init__(self, options: ServeOptions) -> None:
        self._models, self._lora_dir = dict(options.models), options.lora_dir

    @property
    def models(self) -> list[str]:
        """The default one first."""
        return list(self._models)

    def place_of(self, model: str) -> str:
        """What `--model` takes. Raises UnknownError."""
        if model not in self._models:
            raise UnknownError("model", got=repr(model)[:60], expected=f"one of {', '.join(self._models)}")
        return self._models[model]

    def loras(self) -> dict[str, Path]:
        """As the folder is now."""
        return dict(adapters_in(self._lora_dir)) if self._lora_dir else {}

    def lora(self, name: object) -> Path:
        """Raises UnknownError."""
        known = self.loras()
        if not isinstance(name, str) or name not in known:
            few = ", ".join(sorted(known)[:10]) or "none, as the server has no --lora-dir"
            raise UnknownError("LoRA", got=repr(name)[:60], expected=f"one of {few}")
        return known[name]

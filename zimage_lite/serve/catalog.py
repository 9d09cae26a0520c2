"""What clients may name: the models and ControlNets that the server was started with, and the adapters in its folder.
They see names, never paths, and a name that is not in the list finds nothing."""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from ..adapters.tags import adapters_in, with_tags
from ..config import DEFAULT_SIZE, GenerateOptions, SchedulerConfig
from ..errors import UserError
from .options import GIVEN, ServeOptions

_DEFAULTS = ("width", "height", "steps", "guidance", "shift")


class UnknownError(UserError):
    """There is nothing of that name."""


def _nothing(sha256: object) -> None:
    """Is kept."""


class Catalog:
    """kept: the file of a picture that was sent before, by its hash."""

    def __init__(self, options: ServeOptions, kept: Callable[[object], Path | None] = _nothing) -> None:
        self._kept = kept
        self._models, self.controls, self._lora_dir = dict(options.models), dict(options.controls), options.lora_dir
        self._given = re.compile(rf"{re.escape(str(options.folder / GIVEN))}[/\\][0-9a-f]{{64}}")

    @property
    def models(self) -> list[str]:
        """The default one first."""
        return list(self._models)

    def place_of(self, model: str) -> str:
        """What `--model` takes. Raises UnknownError."""
        if model not in self._models:
            raise UnknownError("model", got=repr(model)[:60], expected=f"one of {', '.join(self._models)}")
        return self._models[model]

    def control(self, name: object) -> str:
        """What `--control` takes. Raises UnknownError."""
        if not isinstance(name, str) or name not in self.controls:
            known = ", ".join(self.controls) or "none, as the server has none"
            raise UnknownError("ControlNet", got=repr(name)[:60], expected=f"one of {known}")
        return self.controls[name]

    def loras(self) -> dict[str, Path]:
        """As the folder is now."""
        return dict(adapters_in(self._lora_dir)) if self._lora_dir else {}

    def lora(self, name: object) -> Path:
        """Raises UnknownError."""
        known = self.loras()
        if not isinstance(name, str) or name not in known:
            few = ", ".join(sorted(known)[:10]) or "none, as the server has no folder of them"
            raise UnknownError("LoRA", got=repr(name)[:60], expected=f"one of {few}")
        return known[name]

    def picture(self, sha256: object) -> Path:
        """One that was sent before. Raises UnknownError."""
        if (path := self._kept(sha256)) is None:
            raise UnknownError("a picture that is kept no longer, or never was; send it again")
        return path

    def shown(self, text: str) -> str:
        """What is said of files, by the names that clients know, not by where they lie."""
        text = self._given.sub("the picture", text)
        places = {place: name for name, place in (*self._models.items(), *self.controls.items())}
        if self._lora_dir:
            places[str(self._lora_dir)] = "the server's folder"
        spelled = {text: name for place, name in places.items() for text in (place, str(Path(place)))}
        for place in sorted(spelled, key=len, reverse=True):
            if len(Path(place).parts) > 1:
                text = text.replace(place, spelled[place])
        return text

    def tagged(self, request: GenerateOptions) -> GenerateOptions:
        """With the adapters that its prompt names as <lora:NAME:STRENGTH>. Raises UnknownError."""
        try:
            return with_tags(request, self._lora_dir)
        except UserError as error:
            raise UnknownError(self.shown(str(error))) from error

    def scheduler(self, model: str) -> SchedulerConfig:
        """What tells a distilled model; Turbo's for one that lies in no folder of this machine."""
        from ..checkpoint.model_files import scheduler_config

        return scheduler_config(self._folder(model)) if self._folder(model) else SchedulerConfig()

    def size(self, model: str) -> tuple[int, int]:
        """Width and height that it draws best."""
        from ..checkpoint.model_card import default_size

        return default_size(self._folder(model)) if self._folder(model) else (DEFAULT_SIZE, DEFAULT_SIZE)

    def sees(self, model: str) -> bool:
        """Whether it has a vision tower, for pictures beside the prompt; as far as that can be told from its folder."""
        from ..checkpoint.detect import VISION
        from ..checkpoint.model_files import find_component

        try:
            return find_component(self._folder(model), VISION) is not None
        except UserError:
            return True  # several: it says so when it is opened

    def defaults(self) -> dict[str, dict[str, float]]:
        """Of each model, what is drawn with where a request says nothing; a broken one says so when it is opened."""
        found = {}
        for model in self.models:
            with suppress(UserError):
                request = self.scheduler(model).completed(GenerateOptions(), self.size(model))
                found[model] = {name: getattr(request, name) for name in _DEFAULTS}
        return found

    def _folder(self, model: str) -> Path | None:
        from ..checkpoint.model_card import model_folder

        folder = model_folder(self.place_of(model))
        return folder if folder.is_dir() else None

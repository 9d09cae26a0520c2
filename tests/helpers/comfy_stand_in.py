"""As much of ComfyUI as our nodes import, so that they run without it: what they ask of our own package is tested
everywhere, what they ask of ComfyUI only where there is one (see comfy_server.py)."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

NODES = Path(__file__).parents[2] / "integrations" / "comfyui"


class Interrupted(BaseException):
    """As ComfyUI's, which no `except Exception` stops."""


class Described:
    """An input, an output or a schema: what it was made with."""

    def __init__(self, id: str = "", *args: Any, **said: Any) -> None:
        self.id, self.args, self.said = id, args, said


class NodeOutput(tuple[Any, ...]):
    def __new__(cls, *values: Any, ui: Any = None) -> NodeOutput:
        return super().__new__(cls, values)


class Kind:
    Input = Output = Described


class Io(ModuleType):
    Schema, NodeOutput, ComfyNode, Input, Output = Described, NodeOutput, object, Described, Described

    def __getattr__(self, name: str) -> Any:
        return Kind

    def Custom(self, name: str) -> type[Kind]:
        return Kind


class Bar:
    """Counts, and is interrupted at `stops_at`."""

    stops_at = -1

    def __init__(self, total: int) -> None:
        self.current, self.previews = 0, 0

    def update_absolute(self, value: int, total: int | None = None, preview: Any = None) -> None:
        self.current = value
        if value == Bar.stops_at:
            raise Interrupted


def _module(name: str, **content: Any) -> ModuleType:
    made = ModuleType(name)
    vars(made).update(content)
    return made


def stand_ins(models: Path) -> dict[str, ModuleType]:
    """models: the folder of that name."""
    known: dict[str, tuple[list[str], set[str]]] = {
        name: ([str(models / name)], set())
        for name in ("diffusion_models", "text_encoders", "vae", "loras", "model_patches", "diffusers", "checkpoints")
    }

    def names(kind: str) -> list[str]:
        folders, ends = known[kind]
        files = [file for folder in folders for file in sorted(Path(folder).glob("*"))]
        return [file.name for file in files if not ends or file.suffix in ends]

    def place(kind: str, name: str) -> str | None:
        found = [Path(folder) / name for folder in known[kind][0] if (Path(folder) / name).is_file()]
        return str(found[0]) if found else None

    management = _module(
        "comfy.model_management",
        unload_all_models=lambda: None,
        soft_empty_cache=lambda: None,
        throw_exception_if_processing_interrupted=lambda: None,
    )
    latest = _module(
        "comfy_api.latest",
        io=Io("io"),
        ui=SimpleNamespace(PreviewText=Described),
        ComfyExtension=object,
    )
    return {
        "folder_paths": _module(
            "folder_paths",
            models_dir=str(models),
            folder_names_and_paths=known,
            get_filename_list=names,
            get_full_path=place,
            get_folder_paths=lambda kind: known[kind][0],
        ),
        "comfy": _module("comfy", model_management=management),
        "comfy.model_management": management,
        "comfy.utils": _module("comfy.utils", ProgressBar=Bar),
        "comfy_api": _module("comfy_api", latest=latest),
        "comfy_api.latest": latest,
    }


@contextmanager
def our_nodes(models: Path) -> Iterator[Mapping[str, Any]]:
    """Our nodes by their ids, loaded as ComfyUI loads them."""
    there, name = stand_ins(models), "zimage_lite_nodes"
    before = dict(sys.modules)
    sys.modules.update(there)
    try:
        spec = importlib.util.spec_from_file_location(name, NODES / "__init__.py")
        assert spec and spec.loader
        sys.modules[name] = package = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(package)
        extension = importlib.import_module(f"{name}.nodes.extension")
        importlib.import_module(f"{name}.nodes.places").register()
        yield {node.define_schema().said["node_id"]: node for node in extension.NODES}
    finally:
        for module in [*there, *(loaded for loaded in sys.modules if loaded.startswith(name))]:
            del sys.modules[module]
        sys.modules.update({module: before[module] for module in there if module in before})

"""Names in ComfyUI's lists <-> files: what lies in its models/ folders, our kinds of files among it."""

from __future__ import annotations

from pathlib import Path

import folder_paths

from zimage_lite.checkpoint.checkpoint import components_in
from zimage_lite.checkpoint.model_card import DEMO, model_folder
from zimage_lite.checkpoint.model_files import COMFY_FOLDERS
from zimage_lite.checkpoint.weight_files import WEIGHT_SUFFIXES
from zimage_lite.errors import UserError

MODELS = "zimage_lite"  # models/zimage_lite: one folder a model, as quantize writes them
OF_PARTS = "(the parts below)"  # in the place of a model
OWN = "(the model's)"  # in the place of a part

# Our names of kinds of files -> ComfyUI's folders of them.
_FOLDERS = {
    "transformer": "diffusion_models",
    "text_encoder": "text_encoders",
    "vae": "vae",
    "lora": "loras",
    "control": "model_patches",
}


def register() -> None:
    """ComfyUI lists files by their ends; ours may be GGUF, so the same folders get a second list."""
    known = folder_paths.folder_names_and_paths
    known.setdefault(MODELS, ([str(Path(folder_paths.models_dir) / MODELS)], {"folder"}))
    for kind, folder in _FOLDERS.items():
        known[_key(kind)] = (known[folder][0], set(WEIGHT_SUFFIXES))


def files(kind: str) -> list[str]:
    """Of a kind, for a combo."""
    return folder_paths.get_filename_list(_key(kind))


def file(kind: str, name: str) -> Path:
    """Raises UserError for one that is gone."""
    found = folder_paths.get_full_path(_key(kind), name)
    if found is None:
        raise UserError(
            f"{name}: no such file in models/{_FOLDERS[kind]} any more", fix="press R to read the lists anew"
        )
    return Path(found)


def part(kind: str, name: str) -> Path | None:
    """A part that replaces the model's, if there is one."""
    return None if name == OWN else file(kind, name)


def models() -> list[str]:
    """Whole models: the demo, folders, and files with all parts in one."""
    return [DEMO, *_folders(), *folder_paths.get_filename_list("checkpoints")]


def model(name: str) -> str | Path | None:
    """What `zimage_lite.load` takes. Raises UserError."""
    if name in (DEMO, OF_PARTS):
        return DEMO if name == DEMO else None
    found = _folders().get(name) or folder_paths.get_full_path("checkpoints", name)
    if found is None:
        raise _gone(name, MODELS)
    return Path(found)


def sources() -> list[str]:
    """What can be quantized."""
    return [*models(), *(name for kind in ("transformer", "text_encoder", "control") for name in _in_folder(kind))]


def sources_of(kind: str) -> list[str]:
    """What has such a part: whole models by their names, files as FOLDER/NAME."""
    return [*_in_folder(kind), *models()]


def source(name: str) -> Path:
    """Of either list. Raises UserError."""
    folder, _, rest = name.partition("/")
    kind = next((kind for kind, own in _FOLDERS.items() if own == folder), None)
    return file(kind, rest) if kind else model_folder(model(name) or DEMO)


def is_whole(path: Path) -> bool:
    """Whether a file has more than one part of a model in it."""
    return len(components_in(path)) > 1


def model_home() -> Path:
    """Where a new model goes."""
    return Path(folder_paths.get_folder_paths(MODELS)[0])


def _in_folder(kind: str) -> list[str]:
    return [f"{_FOLDERS[kind]}/{name}" for name in files(kind)]


def _gone(name: str, folder: str) -> UserError:
    return UserError(f"{name}: not in models/{folder} any more", fix="press R to read the lists anew")


def _folders() -> dict[str, Path]:
    """By their names: a folder with the parts of a model in it, in diffusers' layout or in ComfyUI's."""
    parts = {*COMFY_FOLDERS, *(folder for folders in COMFY_FOLDERS.values() for folder in folders)}
    places = [Path(place) for key in (MODELS, "diffusers") for place in folder_paths.get_folder_paths(key)]
    inside = [one for place in places if place.is_dir() for one in sorted(place.iterdir()) if one.is_dir()]
    return {one.name: one for one in inside if any((one / name).is_dir() for name in parts)}


def _key(kind: str) -> str:
    return f"{MODELS}_{kind}"

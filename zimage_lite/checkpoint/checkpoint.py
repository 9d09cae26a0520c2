"""One component of the model, open but not loaded: canonical tensor names, their places in files, and the sizes.

Opening reads headers only, so it takes milliseconds and no memory, whatever the size of the weights.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from pathlib import Path
from typing import Any

from ..config import ControlConfig, TextEncoderConfig, TransformerConfig, VaeConfig, VisionConfig
from ..errors import FileFormatError, WrongModelError
from ..quant.tensor import rows_columns
from . import configs
from .architecture import architecture, refuse_other_encoder, text_encoder_values
from .container import TensorFile, file_stamp
from .controlnets import without_untrained
from .detect import CONTROLNET, VISION, contents, detect, is_adapter, refuse_relatives
from .json_file import read_json
from .names import LLAMA_CPP_QWEN3, NATIVE_TRANSFORMER, OLD_DIFFUSERS_VAE, NameMap, flux_vae
from .opening import open_tensor_file
from .packed import stored_tensors
from .stored import StoredTensor
from .weight_files import require_whole, weight_set

CONFIG_KEY = "zimage_lite.config"  # metadata of the files we write: what shapes cannot tell

ModelConfig = TransformerConfig | TextEncoderConfig | VaeConfig | ControlConfig | VisionConfig


@dataclass(frozen=True)
class Checkpoint:
    """`tensors`: canonical name -> where it lies. `config`: the sizes of the model that they make. `unused`: tensors of
    the file that were found to be no part of it."""

    component: str
    source: Path
    layout: str
    tensors: Mapping[str, StoredTensor]
    config: Any
    metadata: Mapping[str, Any] = field(default_factory=dict)
    stamps: Mapping[Path, tuple[int, ...]] = field(default_factory=dict)  # of the files when they were opened
    unused: tuple[str, ...] = ()

    def require_unchanged(self) -> None:
        """Raise UserError if a file was written to or replaced since it was opened."""
        for path, stamp in self.stamps.items():
            if file_stamp(path) != stamp:
                raise FileFormatError(
                    f"{path} changed while it was read", fix="wait until it is complete, then try again"
                )

    @cached_property
    def fingerprint(self) -> str:
        """A hash that tells these weights from others without reading them: by the files' names, sizes and times, and
        by what lies where in them. Of weights that lie in no file, by the name of the model."""
        files = [(path.name, *stamp[:2]) for path, stamp in sorted(self.stamps.items())]
        places = [
            (name, tensor.format.name, tensor.shape, tensor.first_row, entry.path.name, entry.offset, entry.nbytes)
            for name, tensor in sorted(self.tensors.items())
            for entry in tensor.parts.values()
        ]
        said = [self.component, self.source.name, repr(self.config), files, places]
        return hashlib.sha256(json.dumps(said).encode()).hexdigest()

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors.values())

    @property
    def main_format(self) -> str:
        """The format that holds the most bytes of the blocks, or of everything where there are none."""
        blocks = [tensor for name, tensor in self.tensors.items() if name.startswith(("layers.", "control_layers."))]
        return next(iter(_bytes_by_format(blocks or self.tensors.values())))

    def bytes_by_format(self) -> dict[str, tuple[int, int]]:
        """Format name -> (number of tensors, bytes), largest first."""
        return _bytes_by_format(self.tensors.values())

    def under(self, prefix: str) -> dict[str, StoredTensor]:
        """The tensors of one block, named as the block names them."""
        return {
            name.removeprefix(f"{prefix}."): tensor
            for name, tensor in self.tensors.items()
            if name.startswith(f"{prefix}.")
        }

    def restricted_to(self, shapes: Mapping[str, tuple[int, ...]]) -> Checkpoint:
        """Only the tensors that a model asks for, each in the model's shape. Raises if one is missing or misshapen."""
        missing = [name for name in shapes if name not in self.tensors]
        if missing:
            more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
            raise WrongModelError(
                f"{self.source}: tensor {missing[0]}{more} missing", fix="the file is incomplete, so get it again"
            )
        return replace(self, tensors={name: _shaped(self.tensors[name], shape) for name, shape in shapes.items()})


def _bytes_by_format(tensors: Iterable[StoredTensor]) -> dict[str, tuple[int, int]]:
    totals: dict[str, tuple[int, int]] = {}
    for tensor in tensors:
        count, nbytes = totals.get(tensor.format.name, (0, 0))
        totals[tensor.format.name] = count + 1, nbytes + tensor.nbytes
    return dict(sorted(totals.items(), key=lambda item: -item[1][1]))


def _shaped(tensor: StoredTensor, shape: tuple[int, ...]) -> StoredTensor:
    """[3840] for [1, 3840], and [512, 512, 1, 1] for [512, 512], are the same weights."""
    if tensor.shape == shape:
        return tensor
    same_rows = rows_columns(shape)[0] == tensor.rows or tensor.format.family == "plain"
    if not same_rows or [n for n in tensor.shape if n > 1] != [n for n in shape if n > 1]:
        raise WrongModelError(f"{tensor.where} (shape)", got=tensor.shape, expected=shape)
    return replace(tensor, shape=shape)


def open_checkpoint(
    path: Path, component: str | None = None, file_bytes: Mapping[Path, int] | None = None
) -> Checkpoint:
    """Open a weights file, or a folder with one component. Raises UserError if it is not `component`.

    file_bytes: sizes of files of which only the header is there so far.
    """
    folder = path if path.is_dir() else None
    files = [open_tensor_file(file, file_bytes) for file in (weight_set(path).files if folder else [_whole(path)])]
    given = read_json(folder / "config.json") if folder and (folder / "config.json").exists() else None
    stamps = {file.path: file.stamp for file in files if file.path not in (file_bytes or {})}
    return replace(checkpoint_of(files, path, component, given), stamps=stamps)


def checkpoint_of(
    files: list[TensorFile], path: Path, component: str | None = None, given: Mapping[str, Any] | None = None
) -> Checkpoint:
    """What the files make up together. path: where they lie; given: the values of a config.json beside them.

    Raises UserError if it is not `component`.
    """
    raw = [tensor for file in files for tensor in stored_tensors(file)]
    names = {tensor.name for tensor in raw}
    if len(names) < len(raw):
        raise FileFormatError(f"{path}: two files of this checkpoint hold the same tensor")
    found, prefix = detect(names, str(path), component, architecture(files[0].metadata))
    if found == "text_encoder":
        refuse_other_encoder(files[0].metadata, str(path))
    alone = len(contents(names, str(path))) == 1  # else what is not under the prefix belongs to the other components
    mine, unused = [], []
    for stored in raw:
        if stored.name.startswith(prefix) and not is_adapter(stored.name):
            mine.append(stored)
        elif stored.name.startswith(prefix) or alone:
            unused.append(stored.name)
    canonical = [tensor for stored in mine for tensor in _canonical(found, stored, prefix)]
    tensors = {tensor.name: tensor for tensor in canonical}
    if len(tensors) < len(canonical):
        raise FileFormatError(f"{path}: the same tensor is there twice, under two spellings")
    config = _config(found, tensors, _embedded_config(files[0]) if given is None else given, str(path))
    layout = _layout(found, files, prefix, names)
    return Checkpoint(found, path, layout, tensors, config, files[0].metadata, unused=tuple(unused))


def components_in(path: Path) -> tuple[str, ...]:
    """What a weights file holds: one component, or all of them if it is an all-in-one checkpoint. Raises UserError."""
    file = open_tensor_file(_whole(path))
    names = {tensor.name for tensor in stored_tensors(file)}
    return tuple(contents(names, str(path), architecture(file.metadata)))


def _whole(file: Path) -> Path:
    require_whole(file)
    return file


@cache
def _name_maps(component: str) -> tuple[NameMap, ...]:
    if component in ("transformer", CONTROLNET):
        return (NATIVE_TRANSFORMER,)
    if component == "text_encoder":
        return (LLAMA_CPP_QWEN3,)
    if component == VISION:
        return ()
    return (flux_vae(), OLD_DIFFUSERS_VAE)


def _canonical(component: str, stored: StoredTensor, prefix: str) -> Iterator[StoredTensor]:
    """Canonical names leave every map unchanged, so a file in any mixture of spellings comes out canonical."""
    names: tuple[str, ...] = (stored.name.removeprefix(prefix),)
    for name_map in _name_maps(component):
        names = tuple(new for name in names for new in name_map.to_canonical(name))
    if len(names) == 1:
        yield replace(stored, name=names[0])
        return
    rows = stored.rows // len(names)
    if rows * len(names) != stored.rows and not stored.name.endswith(".weight"):
        yield replace(stored, name=stored.name.removeprefix(prefix))  # not the matrix, so no model has it
        return
    if rows * len(names) != stored.rows:
        raise WrongModelError(
            f"{stored.where} (shape)", got=stored.shape, expected=f"rows for {len(names)} equal parts"
        )
    for i, name in enumerate(names):
        yield replace(stored, name=name, shape=(rows, *stored.shape[1:]), first_row=i * rows)


def _config(component: str, tensors: Mapping[str, StoredTensor], given: Mapping[str, Any], where: str) -> ModelConfig:
    if component == CONTROLNET:
        trained = without_untrained(tensors)
        return configs.control_config({name: tensor.shape for name, tensor in trained.items()}, given, where)
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    if component == "transformer":
        refuse_relatives(shapes, where)
        return configs.transformer_config(shapes, given, where)
    if component == "text_encoder":
        return configs.text_encoder_config(shapes, given, where)
    if component == VISION:
        return configs.vision_config(shapes, given, where)
    return configs.vae_config(shapes, given, where)


def _embedded_config(file: TensorFile) -> dict[str, Any]:
    """What the file itself says of its config: ours, or a Qwen3 GGUF's metadata."""
    text = file.metadata.get(CONFIG_KEY)
    if not isinstance(text, str):
        return text_encoder_values(file.metadata)
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise FileFormatError(f"{file.path}: metadata {CONFIG_KEY} is not JSON") from error
    return values if isinstance(values, dict) else {}


def _layout(component: str, files: list[TensorFile], prefix: str, names: set[str]) -> str:
    """For people: 'ComfyUI safetensors, prefix model.diffusion_model.', 'GGUF (lumina2)'."""
    if files[0].container == "gguf":
        return f"GGUF ({files[0].metadata.get('general.architecture', 'no metadata')})"
    foreign = any(
        name_map.to_canonical(name.removeprefix(prefix)) != (name.removeprefix(prefix),)
        for name_map in _name_maps(component)
        for name in names
    )
    style = "ComfyUI" if foreign or (prefix and component != "text_encoder") else "diffusers"
    shards = f", {len(files)} shards" if len(files) > 1 else ""
    return f"{style} safetensors" + (f", prefix {prefix}" if prefix else "") + shards

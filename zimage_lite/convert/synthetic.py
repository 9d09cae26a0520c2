"""`synthetic:FORMAT` or `synthetic:omni/FORMAT` as a MODEL, `synthetic:VERSION/FORMAT` as a ControlNet: random weights
of the true shapes, made in memory, so that a bare machine runs full size without a file. Speed and memory are those of
real weights in that format; pictures are noise.

The headers are exactly those that `quantize --to FORMAT` writes, and are opened like them, so names, formats, fused
tensors and byte counts cannot differ. Bytes come from patterns: a few rows of random weights, quantized by the format's
own codec when they are first needed, and repeated as often as a tensor is long. Reading costs one copy in memory, so
the time that a disk takes is the one thing that this does not imitate. All patterns of a full-size model together take
30 to 45 MB.
"""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..checkpoint.checkpoint import Checkpoint, ModelConfig, checkpoint_of, open_checkpoint
from ..checkpoint.container import Entry, Take, TensorFile, fresh
from ..checkpoint.detect import COMPONENTS, VISION
from ..checkpoint.model_card import DEMO, model_folder
from ..checkpoint.model_files import ModelFiles, require_fit
from ..checkpoint.tokenizer import tokenizer_from
from ..config import (
    DEFAULT_SIZE,
    ControlConfig,
    OmniConfig,
    SchedulerConfig,
    TextEncoderConfig,
    TransformerConfig,
    VaeConfig,
    VisionConfig,
)
from ..errors import UserError
from ..quant.formats import Format, Options
from .catalog import without_files
from .output_file import OutTensor, lay_out, metadata, output_tensors
from .recipe import KEEP, Target, as_it_is, target

PREFIX = "synthetic:"
_OMNI = "omni/"
_TRUE_TOWER = VisionConfig()
TRUE_CONFIGS: tuple[ModelConfig, ...] = (TransformerConfig(), TextEncoderConfig(), VaeConfig())

TRUE_CONTROLS = {  # ControlNets as they were released
    "1.0": ControlConfig(16, (0, 5, 10, 15, 20, 25), add_control_noise_refiner=None),
    "2.0": ControlConfig(add_control_noise_refiner="control_layers"),
    "2.1": ControlConfig(),
    "2.1-lite": ControlConfig(control_layers_places=(0, 10, 20)),
}

# 7 x 64. Shifted by a multiple of 64 rows, nf4's scales for 256 blocks of 64 weights still fit; and 448 divides neither
# 3840 nor any other number of rows of the true model, so that q, k and v, fused into one tensor, differ.
PATTERN_ROWS = 448
_PHASES = 7  # where in the pattern a tensor may begin, so that blocks of the same shape differ

Bytes = NDArray[np.uint8]
Tile = tuple[Bytes, int]  # bytes to repeat, and how many of them to skip at first


def is_synthetic(model: object) -> bool:
    """Whether MODEL names one of these."""
    return isinstance(model, str) and model.startswith(PREFIX)


def open_synthetic(
    model: str,
    overrides: Mapping[str, Path | None] | None = None,
    configs: tuple[ModelConfig, ...] = TRUE_CONFIGS,
    vision: VisionConfig = _TRUE_TOWER,
) -> ModelFiles:
    """model: "synthetic:FORMAT", or "synthetic:omni/FORMAT"; overrides: as in `open_model`; configs: sizes of
    transformer, text encoder and VAE; vision: of an Omni's tower.

    The tokenizer is the built-in demo's, whose ids are among Qwen's. Raises UserError for an unknown format.
    """
    sees, to = model.startswith(f"{PREFIX}{_OMNI}"), model.removeprefix(PREFIX).removeprefix(_OMNI)
    chosen = target(to, f"--model {PREFIX}FORMAT")
    if sees and configs is TRUE_CONFIGS:
        configs = (OmniConfig(), *TRUE_CONFIGS[1:])
    encoder = as_it_is() if chosen.text_encoder_to == KEEP else target(chosen.text_encoder_to)
    given = {name: path for name, path in (overrides or {}).items() if path is not None}
    parts: dict[str, Any] = {}
    for component, config, own in zip(COMPONENTS, configs, (chosen, encoder, as_it_is()), strict=True):
        path = given.get(component)
        parts[component] = open_checkpoint(path, component) if path else synthetic_checkpoint(config, own)
    if sees:
        path = given.get(VISION)
        parts[VISION] = open_checkpoint(path, VISION) if path else synthetic_checkpoint(vision, as_it_is())
    files = ModelFiles(
        name=f"{PREFIX}{_OMNI * sees}{chosen.name}",
        tokenizer=tokenizer_from(given.get("tokenizer") or model_folder(DEMO) / "tokenizer"),
        scheduler=SchedulerConfig(),
        default_size=(DEFAULT_SIZE, DEFAULT_SIZE),
        synthetic=True,
        replaced=tuple(sorted(given)),
        **parts,
    )
    require_fit(files)
    return files


def open_synthetic_control(control: str) -> Checkpoint:
    """control: "synthetic:VERSION/FORMAT", such as "synthetic:2.1-lite/int8". Raises UserError."""
    version, _, to = control.removeprefix(PREFIX).partition("/")
    if version not in TRUE_CONTROLS or not to:
        known = ", ".join(TRUE_CONTROLS)
        raise UserError("--control", got=control, expected=f"{PREFIX}VERSION/FORMAT, of the versions {known}")
    return synthetic_checkpoint(TRUE_CONTROLS[version], target(to, f"--control {PREFIX}VERSION/FORMAT"))


def synthetic_checkpoint(config: ModelConfig, to: Target) -> Checkpoint:
    """A component of these sizes as `quantize` would write it, its weights made up."""
    source = without_files(config)
    path = Path(f"{PREFIX}{to.name}")
    tensors = {tensor.name: tensor for tensor in output_tensors(source, to)}
    info = metadata(source, to)
    patterns: dict[Pattern, Pattern] = {}
    entries: dict[str, Entry] = {}
    for array, offset in lay_out(list(tensors.values()), to, info).arrays:
        if array.part:
            tensor, suffix = tensors[array.part[0]], array.part[1]
            pattern = _pattern(tensor)
            tile = partial(patterns.setdefault(pattern, pattern).tile, suffix, tensor)
        else:
            tile = partial(_constant, array.content)
        entries[array.name] = MadeEntry(path, array.name, array.kind, array.shape, offset, array.nbytes, tile)
    container = "gguf" if to.container == "gguf" else "safetensors"
    return checkpoint_of([TensorFile(path, container, entries, info)], path, source.component)


@dataclass(frozen=True)
class MadeEntry(Entry):
    """An array whose bytes are a tile, repeated."""

    tile: Callable[[], Tile] = field(compare=False, repr=False)

    def read(self, start: int = 0, nbytes: int | None = None, into: Take = fresh) -> Tensor:
        """As of a file: the same bytes each time, whatever start and nbytes."""
        nbytes = self.nbytes - start if nbytes is None else nbytes
        buffer = into(nbytes)
        out = buffer.numpy()  # torch refuses to write into what another thread made in inference mode
        tile, skipped = self.tile()
        done, at = 0, (start + skipped) % max(tile.size, 1)
        while done < nbytes:
            n = min(tile.size - at, nbytes - done)
            out[done : done + n] = tile[at : at + n]
            done, at = done + n, 0
        return buffer

    def _advise(self, start: int, nbytes: int, advice: str) -> None:
        """There is no disk."""


@dataclass(frozen=True)
class Pattern:
    """Random rows in a format. turn: in formats where one byte holds far-apart rows, how many rows apart."""

    format: Format
    rows: int
    columns: int
    mean: float
    std: float
    turn: int

    @cached_property
    def options(self) -> Options:
        return self.format.codec.options(self.columns)

    @cached_property
    def parts(self) -> dict[str, Bytes]:
        generator = torch.Generator().manual_seed(self.columns)
        x = torch.randn(self.rows, self.columns, generator=generator).mul_(self.std).add_(self.mean)
        if self._stacked:  # the second half lands in the high bits
            x = torch.cat([x, x.roll(-self.turn, 0)])
        packed = self.format.codec.quantize(x, self.options, "fast")
        return {suffix: part.contiguous().reshape(-1).view(torch.uint8).numpy() for suffix, part in packed.items()}

    def tile(self, suffix: str, tensor: OutTensor) -> Tile:
        """The bytes that a part of this tensor repeats."""
        tile = self.parts[suffix]
        shape, two = self._shape(suffix, self.rows), self._shape(suffix, 2 * self.rows)
        if suffix == getattr(self.format.codec, "state_part", None):
            return _constant(_resized(bytes(tile), tensor))
        if shape == two:  # a table, or a scale for all
            return tile, 0
        if self._stacked:  # the scales of the other half are the same, turned
            tile = tile[: tile.size * shape[0] // two[0]] if suffix else tile
            shape = shape if suffix else two
        row_bytes = tile.size // shape[0]
        return tile, zlib.crc32(tensor.name.encode()) % _PHASES * (shape[0] // _PHASES) * row_bytes

    def _shape(self, suffix: str, rows: int) -> tuple[int, ...]:
        return self.format.layout(rows, self.columns, self.options)[suffix][1]

    @property
    def _stacked(self) -> bool:
        return self.format.row_group == 0


def _pattern(tensor: OutTensor) -> Pattern:
    rows = min(tensor.rows, PATTERN_ROWS)
    turn = tensor.rows // 2 % rows if tensor.format.row_group == 0 else 0
    return Pattern(tensor.format, rows, tensor.columns, *distribution(tensor.sources[0].name, tensor.shape), turn)


def distribution(name: str, shape: tuple[int, ...]) -> tuple[float, float]:
    """Mean and deviation of a tensor, by its canonical name: norms of one, weights that keep the variance, and all else
    small, so that activations keep a realistic size."""
    if "norm" in name or name in ("cap_embedder.0.weight", "siglip_embedder.0.weight"):
        return (0.0, 0.02) if name.endswith(".bias") else (1.0, 0.0)
    if len(shape) < 2 or "pad_token" in name:
        return 0.0, 0.02
    return 0.0, 1 / math.sqrt(math.prod(shape[1:]))


def _constant(content: bytes) -> Tile:
    return np.frombuffer(content, np.uint8), 0


def _resized(state: bytes, tensor: OutTensor) -> bytes:
    """bitsandbytes' JSON, which says the tensor's shape."""
    fields = {**json.loads(state), "shape": [tensor.rows, tensor.columns]}
    return json.dumps(fields).encode().ljust(len(state))

"""The streaming converter: reads some rows, quantizes them, writes them where they belong.

A row chunk is independent of all others, so a few threads each carry chunks from the source file to the output file,
and peak memory is that of the chunks in flight, whatever the size of the tensors. A chunk is small enough to stay in
the cache (4 MB of float32) while a dozen element-wise passes go over it.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, as_completed, wait
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..checkpoint import gguf, safetensors
from ..checkpoint.checkpoint import CONFIG_KEY, Checkpoint
from ..checkpoint.names import LLAMA_CPP_QWEN3, NATIVE_TRANSFORMER, natural_order
from ..checkpoint.stored import StoredTensor
from ..checkpoint.writer import open_writer
from ..errors import UserError
from . import int8
from .formats import DTYPE_BYTES, FORMATS, Format
from .recipe import Recipe, text_encoder_recipe, transformer_recipe
from .tensor import QTensor, rows_columns

CHUNK_WEIGHTS = 2**20
MARKER_ALIGNMENT = 64
SAFE_WEIGHT = 60_000  # up to here no float16, be it a weight or a scale, overflows

# llama.cpp's general.file_type
_FILE_TYPES = {"f32": 0, "f16": 1, "q4_0": 2, "q4_1": 3, "q8_0": 7, "bf16": 32}

OnBytes = Callable[[int], None]  # source bytes just converted


@dataclass(frozen=True)
class OutTensor:
    """A tensor of the output under its name there, and the canonical tensors whose rows it holds, in order."""

    name: str
    format: Format
    shape: tuple[int, ...]
    sources: tuple[StoredTensor, ...]
    options: Mapping[str, Any] = field(default_factory=dict)

    def layout(self) -> dict[str, tuple[str, tuple[int, int]]]:
        return self.format.layout(*rows_columns(self.shape))


@dataclass(frozen=True)
class _Array:
    """One array of the output file."""

    name: str
    kind: str
    shape: tuple[int, ...]
    part: tuple[str, str] | None = None  # output tensor and part suffix
    content: bytes = b""  # of a marker

    @property
    def nbytes(self) -> int:
        if self.kind in DTYPE_BYTES:
            rows, columns = rows_columns(self.shape)
            return rows * columns * DTYPE_BYTES[self.kind]
        row = FORMATS[self.kind]
        rows, columns = rows_columns(self.shape)
        return rows * columns // row.block * row.block_bytes


def recipe_for(component: str, target: Format) -> Recipe:
    return transformer_recipe(target) if component == "transformer" else text_encoder_recipe(target)


def container_of(target: Format) -> str:
    return "safetensors" if target.container == "safetensors" else "gguf"


def output_tensors(source: Checkpoint, target: Format) -> list[OutTensor]:
    """What `target` makes of a checkpoint, in execution order, under the names that other programs expect."""
    recipe = recipe_for(source.component, target)
    out = []
    for name, members in _names(source, container_of(target)).items():
        parts = tuple(source.tensors[member] for member in members)
        shape = parts[0].shape
        if len(parts) > 1:
            shape = (sum(part.shape[0] for part in parts), *shape[1:])
        if name.endswith("pad_token"):
            shape = (1, shape[-1])  # diffusers and ComfyUI refuse [3840]; stable-diffusion.cpp takes both
        row = recipe.format_of(members[0], shape, parts[0].format)
        out.append(OutTensor(name, row, shape, parts, row.codec.options(rows_columns(shape)[1])))
    return sorted(out, key=lambda tensor: (_block_order(tensor.name), -math.prod(tensor.shape), tensor.name))


def _names(source: Checkpoint, container: str) -> dict[str, tuple[str, ...]]:
    """Name in the output -> the canonical tensors that it holds."""
    if source.component == "transformer":
        return NATIVE_TRANSFORMER.to_foreign(source.tensors)
    names = LLAMA_CPP_QWEN3.to_foreign(source.tensors)
    # What the map does not know is a language model's head, which nobody needs: the embedding is tied.
    known = {name: members for name, members in names.items() if members != (name,)}
    return known if container == "gguf" else {f"model.{members[0]}": members for members in known.values()}


def _block_order(name: str) -> tuple[int, list[tuple[int, int, str]]]:
    """Everything outside the blocks first, then blocks in the order they run."""
    group, _, rest = name.removeprefix("model.").partition(".")
    groups = ("context_refiner", "noise_refiner", "layers", "blk")
    return (groups.index(group) + 1, natural_order(rest.partition(".")[0])) if group in groups else (0, [])


def convert(
    source: Checkpoint,
    target: Format,
    out: Path,
    *,
    metadata: Mapping[str, Any] | None = None,
    device: str = "cpu",
    on_bytes: OnBytes = lambda n: None,
) -> None:
    """Write `source` to the file `out` in the target format. metadata: GGUF key-values to add.

    Raises UserError for NaN weights, a full disk or a damaged source; then nothing is left of the output.
    """
    tensors = output_tensors(source, target)
    arrays = _arrays(tensors, container_of(target))
    info = {**_metadata(source, target), **(metadata or {})}
    specs = [(array.name, array.kind, array.shape) for array in arrays]
    if container_of(target) == "gguf":
        header, offsets = gguf.encode_header(specs, info)
    else:
        header, offsets = safetensors.encode_header(specs, {key: str(value) for key, value in info.items()})
    places = {array.part: offset for array, offset in zip(arrays, offsets, strict=True) if array.part}
    total = max((offset + array.nbytes for array, offset in zip(arrays, offsets, strict=True)), default=len(header))
    with open_writer(out, header, total) as writer:
        for array, offset in zip(arrays, offsets, strict=True):
            if array.content:
                writer.write(offset, torch.frombuffer(bytearray(array.content), dtype=torch.uint8))

        def carry(chunk: _Chunk) -> int:
            for suffix, part in _encode(chunk, device).items():
                row_bytes = part.nbytes // (chunk.stop - chunk.start)
                writer.write(places[chunk.tensor.name, suffix] + chunk.first_row * row_bytes, part)
            return chunk.source_bytes

        for n_bytes in _run(carry, _chunks(tensors)):
            on_bytes(n_bytes)


def _arrays(tensors: list[OutTensor], container: str) -> list[_Array]:
    if container == "gguf":
        return [_Array(tensor.name, tensor.format.name, tensor.shape, (tensor.name, "")) for tensor in tensors]
    arrays = []
    for tensor in tensors:
        for suffix, (dtype, shape) in tensor.layout().items():
            arrays.append(_Array(tensor.name + suffix, dtype, shape if suffix else tensor.shape, (tensor.name, suffix)))
        if tensor.format.family == "int8":
            text = json.dumps(int8.to_marker(tensor.options), separators=(",", ":"))
            text += " " * (-len(text) % MARKER_ALIGNMENT)  # so that what follows stays aligned
            layer = tensor.name.removesuffix(".weight")
            arrays.append(_Array(f"{layer}.comfy_quant", "U8", (len(text),), content=text.encode()))
    # Inside a block the large arrays come first: their sizes are round, so everything after them is aligned as well.
    return sorted(arrays, key=lambda array: (_block_order(array.name), -array.nbytes))


def _metadata(source: Checkpoint, target: Format) -> dict[str, Any]:
    config = json.dumps(asdict(source.config))
    if source.component == "transformer":
        info: dict[str, Any] = {"general.architecture": "lumina2", "general.name": "Z-Image"}
    else:
        c = source.config
        info = {
            "general.architecture": "qwen3",
            "general.name": "Qwen3",
            "qwen3.block_count": c.num_hidden_layers,
            "qwen3.context_length": c.max_position_embeddings,
            "qwen3.embedding_length": c.hidden_size,
            "qwen3.feed_forward_length": c.intermediate_size,
            "qwen3.attention.head_count": c.num_attention_heads,
            "qwen3.attention.head_count_kv": c.num_key_value_heads,
            "qwen3.attention.key_length": c.head_dim,
            "qwen3.attention.value_length": c.head_dim,
            "qwen3.attention.layer_norm_rms_epsilon": c.rms_norm_eps,
            "qwen3.rope.freq_base": c.rope_theta,
        }
    if container_of(target) == "gguf":
        info |= {"general.quantization_version": 2, "general.file_type": _FILE_TYPES[target.name]}
        return info | {CONFIG_KEY: config}
    return {"format": "pt", CONFIG_KEY: config}


@dataclass(frozen=True)
class _Chunk:
    """Rows [start, stop) of a source; they become the rows from `first_row` on of an output tensor."""

    tensor: OutTensor
    source: StoredTensor
    start: int
    stop: int
    first_row: int

    @property
    def source_bytes(self) -> int:
        return self.source.nbytes * (self.stop - self.start) // self.source.rows


def _chunks(tensors: list[OutTensor]) -> Iterator[_Chunk]:
    for tensor in tensors:
        first = 0
        for source in tensor.sources:
            step = max(CHUNK_WEIGHTS // max(source.columns, 1), 1)
            for start in range(0, source.rows if source.columns else 0, step):
                yield _Chunk(tensor, source, start, min(start + step, source.rows), first + start)
            first += source.rows


def _encode(chunk: _Chunk, device: str) -> Mapping[str, Tensor]:
    """The chunk's parts as they go into the file. Raises UserError for NaN or infinity."""
    tensor, source = chunk.tensor, chunk.source
    if tensor.format == source.format and tensor.options == source.options:
        packed = source.read(chunk.start, chunk.stop)
        if not packed.is_finite():
            raise source.not_finite()
        return packed.parts
    wide = source.read_float(chunk.start, chunk.stop).to(device)
    parts = tensor.format.codec.quantize(wide, tensor.options)
    low, high = torch.aminmax(wide)
    if max(-low, high) > SAFE_WEIGHT and not QTensor(tensor.format, tuple(wide.shape), parts).is_finite():
        largest = f"{max(-low, high):.3g}"
        raise UserError(f"{source.where} is too large for {tensor.format.name}", got=largest, fix="choose bf16 or int8")
    return {suffix: part.cpu() for suffix, part in parts.items()}


def _run(work: Callable[[_Chunk], int], chunks: Iterator[_Chunk]) -> Iterator[int]:
    """Results of the work, on as many threads as there are cores, with two chunks waiting for each."""
    workers = min(os.cpu_count() or 1, 8)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    pool = ThreadPoolExecutor(workers)
    pending: set[Future[int]] = set()
    try:
        for chunk in chunks:
            if len(pending) >= 2 * workers:
                done, pending = wait(pending, return_when=FIRST_COMPLETED)
                yield from (future.result() for future in done)
            pending.add(pool.submit(work, chunk))
        yield from (future.result() for future in as_completed(pending))
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(threads)

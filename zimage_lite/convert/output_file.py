"""What a converted file will hold, known before a single weight is read: names, formats, places, metadata.

The tensors of a block lie next to each other, in the order they run, so that a block is one contiguous read.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from typing import Any

from ..checkpoint import gguf, safetensors
from ..checkpoint.checkpoint import CONFIG_KEY, Checkpoint
from ..checkpoint.controlnets import NAMES_KEY, names_of
from ..checkpoint.detect import CONTROLNET, VISION
from ..checkpoint.names import LLAMA_CPP_QWEN3, NATIVE_TRANSFORMER, natural_order
from ..checkpoint.stored import StoredTensor
from ..errors import UserError
from ..quant.formats import DTYPE_BYTES, GGML_TYPES, Format, Layout, Options
from ..quant.tensor import rows_columns
from .recipe import Target

RECIPE_KEY = "zimage_lite.recipe"  # metadata: the target's name and the user's overrides
MERGED_KEY = "zimage_lite.merged"  # metadata: adapters in the weights, JSON; see `merging`
MARKER_ALIGNMENT = 64


@dataclass(frozen=True)
class OutTensor:
    """A tensor of the output under its name there, and what its rows are read from, in order. members: the canonical
    tensors that they are, of which several may be read as one."""

    name: str
    format: Format
    shape: tuple[int, ...]
    sources: tuple[StoredTensor, ...]
    options: Options = field(default_factory=dict)
    members: tuple[StoredTensor, ...] = ()

    @property
    def rows(self) -> int:
        return rows_columns(self.shape)[0]

    @property
    def columns(self) -> int:
        return rows_columns(self.shape)[1]

    @cached_property
    def layout(self) -> Layout:
        return self.format.layout(self.rows, self.columns, self.options)

    def stored_shape(self, suffix: str) -> tuple[int, ...]:
        """Of a part, as other programs expect it in the file."""
        if self.format.family == "plain":
            return self.shape
        return self.format.codec.stored(self.rows, self.columns, self.options)[suffix]

    @cached_property
    def nbytes(self) -> int:
        return sum(DTYPE_BYTES[dtype] * math.prod(shape) for dtype, shape in self.layout.values())


@dataclass(frozen=True)
class Array:
    """One array of the output file."""

    name: str
    kind: str
    shape: tuple[int, ...]
    nbytes: int
    part: tuple[str, str] | None = None  # output tensor and part suffix
    content: bytes = b""  # of a marker


@dataclass(frozen=True)
class OutputFile:
    """header: the file's first bytes. places: (tensor, part suffix) -> offset. markers: offset -> content."""

    header: bytes
    places: Mapping[tuple[str, str], int]
    markers: Mapping[int, bytes]
    total_bytes: int
    arrays: tuple[tuple[Array, int], ...]  # with their offsets


def output_tensors(source: Checkpoint, target: Target) -> list[OutTensor]:
    """What `target` makes of a checkpoint, in execution order, under the names that other programs expect.

    Raises UserError for an override that fits nothing.
    """
    recipe = target.recipe(source.component)
    n_layers = _n_layers(source.tensors)
    out = []
    for name, members in _names(source, target.container).items():
        stored = tuple(source.tensors[member] for member in members)
        parts = _joined(stored)
        shape = parts[0].shape
        if len(parts) > 1:
            shape = (sum(part.shape[0] for part in parts), *shape[1:])
        if name.endswith("pad_token"):
            shape = (1, shape[-1])  # diffusers and ComfyUI refuse [3840]; stable-diffusion.cpp takes both
        row = recipe.format_of((*members, name), shape, parts[0].format, n_layers)
        out.append(OutTensor(name, row, shape, parts, row.codec.options(rows_columns(shape)[1]), stored))
    return sorted(out, key=lambda tensor: (_block_order(tensor.name), -math.prod(tensor.shape), tensor.name))


def require_overrides_fit(target: Target, source: Checkpoint) -> None:
    """Raise UserError if a pattern of the user's fits no tensor: it would be a typing error without a trace."""
    names = [(*members, name) for name, members in _names(source, target.container).items()]
    for rule in target.overrides:
        if not any(rule.fits(spellings, 0) for spellings in names):
            sample = ", ".join(names[len(names) // 2][-2:])
            raise UserError(f"{rule.tensors!r} fits no tensor", expected=f"a pattern of names such as {sample}")


def _joined(parts: tuple[StoredTensor, ...]) -> tuple[StoredTensor, ...]:
    """Slices of one stored array, in its order and as they are there, become that array again, so that its bytes can
    be passed on."""
    first, expected = parts[0], parts[0].first_row
    for part in parts:
        if not part.is_as_stored or part.parts != first.parts or part.first_row != expected:
            return parts
        expected += part.rows
    if len(parts) == 1:
        return parts
    return (replace(first, shape=(sum(part.shape[0] for part in parts), *first.shape[1:])),)


def _n_layers(names: Iterable[str]) -> int:
    found = (re.match(r"layers\.(\d+)\.", name) for name in names)
    return max((int(match[1]) + 1 for match in found if match), default=0)


def _names(source: Checkpoint, container: str) -> dict[str, tuple[str, ...]]:
    """Name in the output -> the canonical tensors that it holds."""
    if source.component in ("transformer", CONTROLNET):
        if container in ("gguf", "comfy"):
            return NATIVE_TRANSFORMER.to_foreign(source.tensors)
        return {name: (name,) for name in source.tensors}
    if source.component in ("vae", VISION):
        return {name: (name,) for name in source.tensors}
    names = LLAMA_CPP_QWEN3.to_foreign(source.tensors)
    return names if container == "gguf" else {f"model.{members[0]}": members for members in names.values()}


def _block_order(name: str) -> tuple[int, list[tuple[int, int, str]]]:
    """Everything outside the blocks first, then blocks in the order they run."""
    group, _, rest = name.removeprefix("model.").partition(".")
    groups = (
        "context_refiner",
        "siglip_refiner",
        "noise_refiner",
        "control_noise_refiner",
        "control_layers",
        "layers",
        "blk",
    )
    return (groups.index(group) + 1, natural_order(rest.partition(".")[0])) if group in groups else (0, [])


def lay_out(tensors: list[OutTensor], target: Target, info: Mapping[str, Any]) -> OutputFile:
    """info: metadata of the file."""
    arrays = _gguf_arrays(tensors) if target.container == "gguf" else _safetensors_arrays(tensors, target)
    specs = [(array.name, array.kind, array.shape) for array in arrays]
    if target.container == "gguf":
        header, offsets = gguf.encode_header(specs, info)
    else:
        header, offsets = safetensors.encode_header(specs, {key: str(value) for key, value in info.items()})
    placed = list(zip(arrays, offsets, strict=True))
    return OutputFile(
        header,
        {array.part: offset for array, offset in placed if array.part},
        {offset: array.content for array, offset in placed if array.content},
        max((offset + array.nbytes for array, offset in placed), default=len(header)),
        tuple(placed),
    )


def _gguf_arrays(tensors: list[OutTensor]) -> list[Array]:
    return [Array(t.name, _ggml_type(t.format), t.shape, t.nbytes, (t.name, "")) for t in tensors]


def _ggml_type(row: Format) -> str:
    assert row.name in GGML_TYPES, f"{row.name} is no ggml type"
    return row.name


def _safetensors_arrays(tensors: list[OutTensor], target: Target) -> list[Array]:
    arrays = []
    for tensor in tensors:
        for suffix, (dtype, shape) in tensor.layout.items():
            n_bytes = DTYPE_BYTES[dtype] * math.prod(shape)
            name = tensor.format.part_name(tensor.name, suffix)
            arrays.append(Array(name, dtype, tensor.stored_shape(suffix), n_bytes, (tensor.name, suffix)))
        if tensor.format.container == "comfy":
            text = json.dumps(tensor.format.codec.marker(tensor.options), separators=(",", ":"))
            text += " " * (-len(text) % MARKER_ALIGNMENT)  # so that what follows stays aligned
            layer = tensor.name.removesuffix(".weight")
            arrays.append(Array(f"{layer}.comfy_quant", "U8", (len(text),), len(text), content=text.encode()))
    # Inside a block the large arrays come first: their sizes are round, so everything after them is aligned as well.
    return sorted(arrays, key=lambda array: (_block_order(array.name), -array.nbytes))


def metadata(source: Checkpoint, target: Target) -> dict[str, Any]:
    """The file's own metadata: what llama.cpp, diffusers and this program want to know."""
    recipe = " ".join([target.name, *(f"{rule.tensors}={rule.to}" for rule in target.overrides)])
    own = {CONFIG_KEY: json.dumps(asdict(source.config)), RECIPE_KEY: recipe}
    if source.component == CONTROLNET and (names := names_of(source)):
        own[NAMES_KEY] = names
    if merged := source.metadata.get(MERGED_KEY):
        own[MERGED_KEY] = merged
    if target.container != "gguf":
        return {"format": "pt", **own}
    file = {"general.quantization_version": 2, "general.file_type": target.file_type}
    if source.component == "transformer":
        return {"general.architecture": "lumina2", "general.name": "Z-Image", **file, **own}
    if source.component == CONTROLNET:
        return {"general.architecture": "z_image_control", "general.name": "Z-Image ControlNet", **file, **own}
    c = source.config
    qwen3 = {
        "block_count": c.num_hidden_layers,
        "context_length": c.max_position_embeddings,
        "embedding_length": c.hidden_size,
        "feed_forward_length": c.intermediate_size,
        "attention.head_count": c.num_attention_heads,
        "attention.head_count_kv": c.num_key_value_heads,
        "attention.key_length": c.head_dim,
        "attention.value_length": c.head_dim,
        "attention.layer_norm_rms_epsilon": c.rms_norm_eps,
        "rope.freq_base": c.rope_theta,
    }
    info = {"general.architecture": "qwen3", "general.name": "Qwen3"}
    return {**info, **{f"qwen3.{key}": value for key, value in qwen3.items()}, **file, **own}


def quantization_config(target: Target, tensors: Iterable[OutTensor]) -> dict[str, Any]:
    """What diffusers and transformers want to read in config.json of a folder with such weights.

    Raises UserError for a choice of kept tensors that cannot be told to them.
    """
    if target.container not in ("bnb", "quanto"):
        return {}
    linears = [t for t in tensors if t.name.endswith(".weight") and len(t.shape) == 2 and "embed_tokens" not in t.name]
    names = {t.name: t.name.removeprefix("model.").removesuffix(".weight") for t in linears}
    kept = [names[t.name] for t in linears if t.format.family == "plain"]
    if target.container == "quanto":
        leaves = {name.rpartition(".")[2] for name in kept}  # diffusers compares with the last part of a name
        for tensor in linears:
            leaf = names[tensor.name].rpartition(".")[2]
            if tensor.format.family != "plain" and leaf in leaves:
                raise UserError(
                    f"{target.name}: diffusers cannot tell {tensor.name} from a kept one that ends in .{leaf}.weight",
                    fix="keep all of that name, or none",
                )
        return {
            "quantization_config": {
                "quant_method": "quanto",
                "weights_dtype": target.name.removeprefix("q"),
                "modules_to_not_convert": sorted(leaves),
            }
        }
    four = target.name == "nf4"
    return {
        "quantization_config": {
            "quant_method": "bitsandbytes",
            "load_in_4bit": four,
            "load_in_8bit": not four,
            "_load_in_4bit": four,
            "_load_in_8bit": not four,
            "bnb_4bit_quant_type": "nf4" if four else "fp4",  # fp4 is the default that 8-bit files carry
            "bnb_4bit_compute_dtype": "bfloat16" if four else "float32",
            "bnb_4bit_use_double_quant": four,
            "bnb_4bit_quant_storage": "uint8",
            "llm_int8_threshold": 6.0,
            "llm_int8_skip_modules": kept,
            "llm_int8_enable_fp32_cpu_offload": False,
            "llm_int8_has_fp16_weight": False,
        }
    }

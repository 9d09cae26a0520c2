"""What each format costs on the true model: bits, bytes, and which group of tensors gets what. Nothing is read."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

from torch import nn
from zimage_kernels import KINDS

from ..checkpoint.checkpoint import Checkpoint, ModelConfig
from ..checkpoint.detect import CONTROLNET, VISION
from ..checkpoint.stored import StoredTensor
from ..config import ControlConfig, OmniConfig, TextEncoderConfig, TransformerConfig, VaeConfig, VisionConfig
from ..model.controlnet import ControlNet
from ..model.linear import shapes
from ..model.omni import transformer
from ..model.text_encoder import TextEncoder
from ..model.vae import Decoder, Encoder
from ..model.vision import VisionTower
from ..quant.formats import FORMATS, Format
from .fidelity import Sums, TensorError, by_group
from .output_file import OutTensor, output_tensors
from .recipe import Target, target, targets

_CONTAINERS = ("gguf", "comfy", "bnb", "quanto")
_COMPONENTS = {
    TransformerConfig: "transformer",
    OmniConfig: "transformer",
    TextEncoderConfig: "text_encoder",
    VaeConfig: "vae",
    ControlConfig: CONTROLNET,
    VisionConfig: VISION,
}

_TRUE: dict[str, ModelConfig] = {
    "transformer": TransformerConfig(),
    "omni": OmniConfig(),
    "text_encoder": TextEncoderConfig(),
    VISION: VisionConfig(),
}


@dataclass(frozen=True)
class Cost:
    """Some tensors of the true model in the formats that a recipe gives them."""

    name: str
    formats: tuple[str, ...]
    weights: int
    bytes: int

    @property
    def bits_per_weight(self) -> float:
        return self.bytes * 8 / self.weights


def costs(chosen: Target, component: str = "transformer") -> list[Cost]:
    """One for each group of tensors, and one for all together."""
    tensors = output_tensors(_true_model(component), chosen)
    entries = [
        TensorError(t.name, t.sources[0].name, t.format.name, t.nbytes, Sums(t.rows * t.columns)) for t in tensors
    ]
    found = [_cost(group, members) for group, members in by_group(entries).items()]
    return [*found, _cost("all", entries)]


def _cost(name: str, entries: list[TensorError]) -> Cost:
    formats = tuple(sorted({entry.format for entry in entries}))
    return Cost(name, formats, sum(entry.sums.count for entry in entries), sum(entry.nbytes for entry in entries))


def all_targets() -> list[tuple[Target, Cost]]:
    """Every recipe and what its transformer takes: by container, the largest first."""
    found = [(target(name), costs(target(name))[-1]) for name in targets()]
    return sorted(found, key=lambda item: (_CONTAINERS.index(item[0].container), -item[1].bytes))


def computed(chosen: Target) -> str:
    """How this runtime multiplies the weights of its main format, in words."""
    main = FORMATS[chosen.recipes["transformer"].format]
    if main.name == "int8":
        return "multiplied as it is"
    if main.name in KINDS:
        return "re-encoded to int8"
    return "unpacked first" if main.lossy else "computed in 16 or 32 bits"


@dataclass(frozen=True)
class Part:
    """A tensor under its canonical name, or that of the first of those it holds."""

    name: str
    format: Format
    rows: int
    columns: int
    n_bytes: int


def true_parts(component: str, chosen: Target) -> list[Part]:
    """The tensors of the released model as this target stores them."""
    tensors = output_tensors(_true_model(component), chosen)
    return [Part(t.sources[0].name, t.format, t.rows, t.columns, t.nbytes) for t in tensors]


def stored_parts(checkpoint: Checkpoint) -> list[Part]:
    """The tensors of a checkpoint as they are stored."""
    tensors = without_unused(checkpoint).tensors
    return [Part(name, t.format, t.rows, t.columns, t.packed_bytes) for name, t in tensors.items()]


def kept(chosen: Target, component: str = "transformer") -> tuple[int, int]:
    """What stays 16-bit although it could shrink: its bytes, and what they would be in the recipe's main format."""
    row = FORMATS[chosen.recipes[component].format]
    able = [
        t for t in output_tensors(_true_model(component), chosen) if t.format.family == "plain" and _shrinks(t, row)
    ]
    return sum(t.nbytes for t in able), sum(row.nbytes(t.rows, t.columns) for t in able)


def _shrinks(tensor: OutTensor, row: Format) -> bool:
    matrix = tensor.name.endswith(".weight") and tensor.rows > 1
    return row.lossy and matrix and row.fits(tensor.columns)


@cache
def _true_model(component: str) -> Checkpoint:
    """Names and shapes of the released model, in bfloat16, without files."""
    return without_files(_TRUE[component])


def without_files(config: ModelConfig) -> Checkpoint:
    """Names and shapes of a component as it is released, in bfloat16, without bytes."""
    bf16 = FORMATS["bf16"]
    tensors = {name: StoredTensor(name, bf16, shape, {}) for name, shape in component_shapes(config).items()}
    return Checkpoint(_COMPONENTS[type(config)], Path(), "", tensors, config)


def without_unused(checkpoint: Checkpoint) -> Checkpoint:
    """The tensors that its component has; what else is there (EMA copies, a language model's head) becomes unused."""
    known = component_shapes(checkpoint.config)
    unused = tuple(tensor.stored_name for name, tensor in checkpoint.tensors.items() if name not in known)
    tensors = {name: tensor for name, tensor in checkpoint.tensors.items() if name in known}
    return replace(checkpoint, tensors=tensors, unused=(*checkpoint.unused, *dict.fromkeys(unused)))


def component_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor of a component under its canonical name, in the order of the model."""
    if isinstance(config, TransformerConfig):
        return shapes(transformer(config))
    if isinstance(config, ControlConfig):
        return shapes(ControlNet(config))
    if isinstance(config, VisionConfig):
        return shapes(VisionTower(config))
    if isinstance(config, VaeConfig):
        return shapes(nn.ModuleDict({"encoder": Encoder(config), "decoder": Decoder(config)}))
    # The runtime leaves out the last layer and norm, and gathers embedding rows from the file, which has them all.
    layers = shapes(TextEncoder(replace(config, num_hidden_layers=config.num_hidden_layers + 1)))
    table = (config.vocab_size, config.hidden_size)
    return {"embed_tokens.weight": table, **layers, "norm.weight": (config.hidden_size,)}

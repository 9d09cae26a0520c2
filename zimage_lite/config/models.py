"""What checkpoints say of themselves, with the true model's sizes as defaults."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, TypeVar

from ..errors import UserError
from .image import GenerateOptions
from .limits import INFINITE, PATCH_SIZE, VAE_FACTOR

_Config = TypeVar("_Config")


class BlockSizes:
    """What the blocks of a transformer, and of what stands beside it, are made by."""

    dim: int
    n_heads: int
    norm_eps: float

    @property
    def head_dim(self) -> int:
        return self.dim // self.n_heads

    @property
    def ffn_dim(self) -> int:
        return int(self.dim / 3 * 8)

    @property
    def conditioning_dim(self) -> int:
        """Width of the time embedding that drives adaLN."""
        return min(self.dim, 256)


@dataclass(frozen=True)
class TransformerConfig(BlockSizes):
    """The S3-DiT. Names are those of diffusers' transformer/config.json."""

    in_channels: int = 16
    dim: int = 3840
    n_layers: int = 30
    n_refiner_layers: int = 2
    n_heads: int = 30
    norm_eps: float = 1e-5
    cap_feat_dim: int = 2560
    rope_theta: float = 256.0
    t_scale: float = 1000.0
    axes_dims: tuple[int, ...] = (32, 48, 48)

    @property
    def patch_dim(self) -> int:
        return self.in_channels * PATCH_SIZE**2

    def __post_init__(self) -> None:
        _require_positive(self)
        if self.dim % self.n_heads or sum(self.axes_dims) != self.head_dim or any(d % 2 for d in self.axes_dims):
            raise UserError(
                "transformer config does not add up",
                got=f"dim {self.dim}, n_heads {self.n_heads}, axes_dims {self.axes_dims}",
                expected="even axes_dims that sum to dim / n_heads",
            )


@dataclass(frozen=True)
class OmniConfig(TransformerConfig):
    """The S3-DiT that also sees pictures, as Omni-Base and Edit. siglip_feat_dim: width of what the vision tower makes
    of them."""

    siglip_feat_dim: int = 1152


@dataclass(frozen=True)
class VisionConfig:
    """The SigLIP2 vision tower (so400m, patch16, naflex). Names are those of transformers' siglip/config.json."""

    hidden_size: int = 1152
    num_hidden_layers: int = 27
    num_attention_heads: int = 16
    intermediate_size: int = 4304
    num_patches: int = 256  # positions that it has learned, of a square
    patch_size: int = 16
    num_channels: int = 3
    layer_norm_eps: float = 1e-6

    @property
    def patch_dim(self) -> int:
        return self.num_channels * self.patch_size**2

    @property
    def grid(self) -> int:
        """Positions that it has learned, each way."""
        return math.isqrt(self.num_patches)

    def __post_init__(self) -> None:
        _require_positive(self)
        if self.hidden_size % self.num_attention_heads or self.grid**2 != self.num_patches:
            raise UserError(
                "vision tower config does not add up",
                got=f"width {self.hidden_size}, {self.num_attention_heads} heads, {self.num_patches} patches",
                expected="heads that divide the width, patches of a square",
            )


@dataclass(frozen=True)
class ControlConfig(BlockSizes):
    """A ControlNet of the Fun Union family, 2.1 by default. Names are those of diffusers' config.json.

    control_layers_places: for each block of the ControlNet, the layer of the transformer that its hint follows; the
    same for control_refiner_layers_places and the noise refiner. add_control_noise_refiner: which blocks see the image
    tokens first, and whether they give hints: "control_noise_refiner", blocks of their own that do (2.1);
    "control_layers", the same as later (2.0); None, plain blocks that do not (1.0).
    """

    control_in_dim: int = 33
    control_layers_places: tuple[int, ...] = tuple(range(0, 30, 2))
    control_refiner_layers_places: tuple[int, ...] = (0, 1)
    add_control_noise_refiner: str | None = "control_noise_refiner"
    dim: int = 3840
    n_refiner_layers: int = 2
    n_heads: int = 30
    norm_eps: float = 1e-5

    @property
    def patch_dim(self) -> int:
        return self.control_in_dim * PATCH_SIZE**2

    @property
    def inpaints(self) -> bool:
        """Whether it also takes a mask and the masked picture."""
        return self.control_in_dim == 33

    @property
    def version(self) -> str:
        """As its authors count."""
        if self.add_control_noise_refiner is None:
            return "1.0"
        lite = " lite" if len(self.control_layers_places) < 5 else ""
        return ("2.0" if self.add_control_noise_refiner == "control_layers" else "2.1") + lite

    def __post_init__(self) -> None:
        for places in (self.control_layers_places, self.control_refiner_layers_places):
            if list(places) != sorted({*places, 0}) or places[0] < 0:
                raise UserError("places of a ControlNet's hints", got=places, expected="0, then ever higher ones")
        if self.control_in_dim not in (16, 33):
            raise UserError("control_in_dim", got=self.control_in_dim, expected="16, or 33 with a mask and a picture")
        if self.add_control_noise_refiner not in ("control_noise_refiner", "control_layers", None):
            raise UserError("add_control_noise_refiner", got=self.add_control_noise_refiner, expected="a known kind")
        if min(self.dim, self.n_heads, self.n_refiner_layers, self.norm_eps) <= 0 or self.dim % self.n_heads:
            raise UserError(
                "ControlNet config does not add up", got=f"dim {self.dim}, n_heads {self.n_heads}",
                expected="dim a multiple of n_heads",
            )  # fmt: skip


@dataclass(frozen=True)
class TextEncoderConfig:
    """Qwen3. Names are those of transformers' text_encoder/config.json."""

    vocab_size: int = 151936
    hidden_size: int = 2560
    num_hidden_layers: int = 36
    num_attention_heads: int = 32
    num_key_value_heads: int = 8
    head_dim: int = 128
    intermediate_size: int = 9728
    rms_norm_eps: float = 1e-6
    rope_theta: float = 1e6
    max_position_embeddings: int = 40960

    @property
    def layers_used(self) -> int:
        """The prompt embedding is the residual stream before the last layer, so that layer is never needed."""
        return self.num_hidden_layers - 1

    def __post_init__(self) -> None:
        _require_positive(self)
        if self.max_position_embeddings >= 2**32:
            raise UserError("max_position_embeddings", got=self.max_position_embeddings, expected="less than 2^32")
        if self.num_attention_heads % self.num_key_value_heads or self.head_dim % 2 or self.num_hidden_layers < 2:
            raise UserError(
                "text encoder config does not add up",
                got=f"{self.num_attention_heads} heads, {self.num_key_value_heads} key-value heads, "
                f"head_dim {self.head_dim}, {self.num_hidden_layers} layers",
                expected="heads a multiple of key-value heads, an even head_dim, at least 2 layers",
            )


@dataclass(frozen=True)
class VaeConfig:
    """The Flux-1 autoencoder. Names are those of diffusers' vae/config.json."""

    in_channels: int = 3
    latent_channels: int = 16
    block_out_channels: tuple[int, ...] = (128, 256, 512, 512)
    layers_per_block: int = 2
    norm_num_groups: int = 32
    scaling_factor: float = 0.3611
    shift_factor: float = 0.1159

    def __post_init__(self) -> None:
        _require_positive(self, but="shift_factor")
        if 2 ** (len(self.block_out_channels) - 1) != VAE_FACTOR or any(
            width % self.norm_num_groups for width in self.block_out_channels
        ):
            raise UserError(
                "VAE config does not add up",
                got=f"block_out_channels {self.block_out_channels}, norm_num_groups {self.norm_num_groups}",
                expected="4 levels, each a multiple of norm_num_groups",
            )


@dataclass(frozen=True)
class SchedulerConfig:
    """Flow matching. Turbo was distilled with shift 3, Base wants 6: of what it says, that tells them apart."""

    shift: float = 3.0

    @property
    def undistilled(self) -> bool:
        """Z-Image Base, which needs many steps and guidance."""
        return self.shift == 6.0

    @property
    def steps(self) -> int:
        """Its default."""
        return 30 if self.undistilled else 8

    @property
    def least_steps(self) -> int:
        """That its authors name."""
        return 28 if self.undistilled else 8

    @property
    def guidance(self) -> float:
        """Its default, as diffusers counts."""
        return 4.0 if self.undistilled else 0.0

    def completed(self, request: GenerateOptions, size: tuple[int, int]) -> GenerateOptions:
        """What was left open is what the model says of itself; the size of what is made from a picture is its own.
        size: the model's width and height."""
        named = any(source is not None for source in (request.image, request.latents, request.references))
        width, height = (None, None) if named else size
        return replace(
            request,
            width=width if request.width is None else request.width,
            height=height if request.height is None else request.height,
            steps=self.steps if request.steps is None else request.steps,
            guidance=self.guidance if request.guidance is None else request.guidance,
            shift=self.shift if request.shift is None else request.shift,
        )

    def __post_init__(self) -> None:
        _require_positive(self)


def from_mapping(kind: type[_Config], values: Mapping[str, Any], where: str) -> _Config:
    """Build a config dataclass from JSON: unknown keys are ignored, wrong types refused with `where` named."""
    known: dict[str, Any] = {}
    for field in fields(kind):  # type: ignore[arg-type]
        if values.get(field.name) is not None:
            known[field.name] = _checked(values[field.name], field.default, f"{where}: {field.name}")
    return kind(**known)


def _checked(value: Any, default: Any, where: str) -> Any:
    if isinstance(default, tuple):
        if not isinstance(value, list | tuple) or not value or not all(_is_int(item) for item in value):
            raise UserError(where, got=repr(value)[:60], expected="a list of whole numbers")
        return tuple(value)
    if isinstance(default, int) and _is_int(value):
        return value
    if isinstance(default, float) and (_is_int(value) or isinstance(value, float)) and abs(value) < INFINITE:
        return float(value)
    raise UserError(where, got=repr(value)[:60], expected=f"a number such as {default}")


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _require_positive(config: Any, but: str = "") -> None:
    for field in fields(config):
        value = getattr(config, field.name)
        if field.name != but and min(value if isinstance(value, tuple) else (value,)) <= 0:
            raise UserError(f"{type(config).__name__}.{field.name}", got=value, expected="more than 0")

"""Every setting and its default, in one place. Model sizes come from the checkpoint; these are the true model's.

Pure data: importing this module loads neither torch nor any other heavy library.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from dataclasses import InitVar, dataclass, fields
from typing import Any, TypeVar

from .errors import UserError

SEQUENCE_MULTIPLE = 32  # caption and image are each padded to this with learned pad tokens
PATCH_SIZE = 2  # latent pixels per token, each way
VAE_FACTOR = 8  # image pixels per latent pixel, each way
VAE_QUERIES = 1024  # of its attention, at a time
SIZE_MULTIPLE = VAE_FACTOR * PATCH_SIZE
TOKENS_PER_PASS = 1024  # prompts are encoded and refined together up to this many tokens
MOST_PER_ROUND = 64  # images are denoised before the first of them is decoded
MAX_PROMPT_TOKENS = 512  # as diffusers truncates
DEFAULT_SIZE = 1024  # pixels each way, where the model's card names no other
# Compute capabilities on which attention beside 8-bit products adds up weights x values in float16, twice as fast on
# GeForce: those of the kernels (HALF_RATE_SUMS), for the planner, which imports no torch.
FLOAT16_SUMS = frozenset({(8, 6), (8, 9), (12, 0)})
MAX_STEPS = 1000  # as many as the model was trained with
MAX_LORA_STRENGTH = 100  # as ComfyUI has it
RANDOM_SEED = -1  # stands for one that is drawn

DEVICES = ("auto", "cpu", "cuda", "mps")
DTYPES = ("auto", "bf16", "fp16", "fp32")
BACKENDS = ("auto", "triton", "reference")
COMPUTES = ("auto", "int8", "16bit")

_INFINITE = 1e30  # no setting is this large; also refuses NaN, which compares with nothing
_Config = TypeVar("_Config")


@dataclass(frozen=True)
class TransformerConfig:
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
    def head_dim(self) -> int:
        return self.dim // self.n_heads

    @property
    def ffn_dim(self) -> int:
        return int(self.dim / 3 * 8)

    @property
    def conditioning_dim(self) -> int:
        """Width of the time embedding that drives adaLN."""
        return min(self.dim, 256)

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

    def __post_init__(self) -> None:
        _require_positive(self)


@dataclass(frozen=True)
class Lora:
    """An adapter by its path (a file, a PEFT folder, OWNER/NAME[/FILE] of the Hub), and how strong it is: 1 as it was
    trained, 0 not at all, negative turned round."""

    path: str
    strength: float = 1.0

    def __post_init__(self) -> None:
        if not abs(self.strength) <= MAX_LORA_STRENGTH:
            expected = f"a number from -{MAX_LORA_STRENGTH} to {MAX_LORA_STRENGTH}"
            raise UserError(f"{self.path}: strength", got=self.strength, expected=expected)

    @classmethod
    def parsed(cls, text: str) -> Lora:
        """PATH or PATH:STRENGTH. A drive's letter is no strength."""
        path, colon, number = text.rpartition(":")
        try:
            return cls(path, float(number)) if colon and path else cls(text)
        except ValueError:
            return cls(text)


@dataclass(frozen=True)
class GenerateOptions:
    """One image, as asked for. None: what the model says of itself.

    seed: -1 draws one. guidance: as diffusers counts, 0 is off; cfg: the same as ComfyUI counts, 1 is off. loras: of
    Lora, or texts "PATH:STRENGTH"; they add up.
    """

    prompt: str = ""
    width: int | None = None
    height: int | None = None
    steps: int | None = None
    seed: int = 0
    guidance: float | None = None
    negative: str = ""
    shift: float | None = None
    loras: tuple[Lora, ...] = ()
    cfg: InitVar[float | None] = None

    @property
    def size(self) -> tuple[int, int]:
        """Width and height, once they are known."""
        assert self.width is not None and self.height is not None, "Pipeline.complete fills them in"
        return self.width, self.height

    @property
    def step_count(self) -> int:
        """Steps, once they are known."""
        assert self.steps is not None, "Pipeline.complete fills it in"
        return self.steps

    def __post_init__(self, cfg: float | None) -> None:
        if cfg is not None:
            object.__setattr__(self, "guidance", self._guidance_of(cfg))
        loras = tuple(lora if isinstance(lora, Lora) else Lora.parsed(lora) for lora in self.loras)
        object.__setattr__(self, "loras", loras)
        if self.seed == RANDOM_SEED:
            object.__setattr__(self, "seed", secrets.randbelow(2**32))  # as many as other programs have
        if self.steps is not None and not 1 <= self.steps <= MAX_STEPS:
            raise UserError("--steps", got=self.steps, expected=f"a number from 1 to {MAX_STEPS} (Turbo is made for 8)")
        for flag, pixels in (("--width", self.width), ("--height", self.height)):
            if pixels is None:
                continue
            if pixels < SIZE_MULTIPLE or pixels % SIZE_MULTIPLE:
                below = max(pixels // SIZE_MULTIPLE, 1) * SIZE_MULTIPLE
                near = f"{below} or {below + SIZE_MULTIPLE}" if pixels > SIZE_MULTIPLE else f"{below}"
                raise UserError(flag, got=pixels, expected=f"a multiple of {SIZE_MULTIPLE}, such as {near}")
        if not 0 <= self.seed < 2**63:
            raise UserError("--seed", got=self.seed, expected="a whole number from 0 to 2^63 - 1, or random")
        if self.guidance is not None and not 0 <= self.guidance < _INFINITE:
            raise UserError("--guidance", got=self.guidance, expected="0 (off) or more")
        if self.shift is not None and not 0 < self.shift < _INFINITE:
            raise UserError("--shift", got=self.shift, expected="more than 0 (Turbo 3, Base 6)")

    def _guidance_of(self, cfg: float) -> float:
        if self.guidance is not None:
            raise UserError("--cfg and --guidance are one setting, counted in two ways", fix="name one of them")
        if not 1 <= cfg < _INFINITE:
            raise UserError("--cfg", got=cfg, expected="1 (off) or more")
        return round(cfg - 1, 6)  # 4.1 is 3.1, and not a rounding error less


@dataclass(frozen=True)
class RuntimeOptions:
    """Where and how to run. `None` budgets mean: what is free now."""

    device: str = "auto"
    dtype: str = "auto"
    backend: str = "auto"
    vram_bytes: int | None = None
    ram_bytes: int | None = None
    cache: bool = True  # keep prompt embeddings on the disk
    compute: str = "auto"

    def __post_init__(self) -> None:
        choices = {"device": DEVICES, "dtype": DTYPES, "backend": BACKENDS, "compute": COMPUTES}
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise UserError(f"--{name}", got=repr(getattr(self, name)), expected=f"one of {', '.join(known)}")


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
    if isinstance(default, float) and (_is_int(value) or isinstance(value, float)) and abs(value) < _INFINITE:
        return float(value)
    raise UserError(where, got=repr(value)[:60], expected=f"a number such as {default}")


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _require_positive(config: Any, but: str = "") -> None:
    for field in fields(config):
        value = getattr(config, field.name)
        if field.name != but and min(value if isinstance(value, tuple) else (value,)) <= 0:
            raise UserError(f"{type(config).__name__}.{field.name}", got=value, expected="more than 0")

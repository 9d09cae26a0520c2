"""What the planner is told about Z-Image: the three phases as blocks with sizes, products and traffic, and what each
phase holds beside them. From the true model's shapes in any format, or from a model folder; no weight is read.

Assumed of the computation, as it is designed: adaLN vectors are computed once on the CPU and their weights never sent;
blocks in another format than int8 are re-encoded to int8 on the device, one at a time, before they compute; blocks that
are kept in 16 bits compute in 16 bits; norms, gates and quantization are fused (30 times the tokens x width x 2 bytes
of traffic per block). The text encoder unpacks its weights to 16 bits.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from .catalog import Part, stored_parts, true_parts
from .checkpoint.model_files import ModelFiles
from .config import (
    PATCH_SIZE,
    SEQUENCE_MULTIPLE,
    VAE_FACTOR,
    TextEncoderConfig,
    TransformerConfig,
    VaeConfig,
)
from .memory.machine import Work
from .memory.plan import Block, Phase, activation_bytes, decode_bytes
from .model.linear import shapes
from .model.vae import Decoder
from .quant.recipe import KEEP, as_it_is, target
from .quant.tensor import CPU_PIECE_WEIGHTS

_TRAFFIC = 30  # of a block's fused element-wise work, in tokens x width x 2 bytes
_CPU_UNPACKING_BYTES = 6 * CPU_PIECE_WEIGHTS
_LATENT_COPIES = 3  # the latent, the model's answer and their sum, in float32
_CAPTION_TOKENS = 128  # a long prompt


@dataclass(frozen=True)
class Model:
    """Sizes of the three parts. name: for people."""

    name: str
    transformer: tuple[Part, ...]
    text_encoder: tuple[Part, ...]
    vae_bytes: int
    transformer_config: TransformerConfig
    text_encoder_config: TextEncoderConfig
    vae_config: VaeConfig


@dataclass(frozen=True)
class Job:
    """What is to be drawn. batch: images at once."""

    width: int
    height: int
    steps: int = 8
    guided: bool = False
    batch: int = 1
    caption_tokens: int = _CAPTION_TOKENS

    @property
    def sequences(self) -> int:
        return self.batch * (2 if self.guided else 1)

    @property
    def image_tokens(self) -> int:
        return _padded(self.width * self.height // (VAE_FACTOR * PATCH_SIZE) ** 2)


def true_model(format_name: str) -> Model:
    """Z-Image-Turbo as `quantize --to` would write it. Raises UserError for a format that cannot be written."""
    chosen = target(format_name, "--format")
    encoder = as_it_is() if chosen.text_encoder_to == KEEP else target(chosen.text_encoder_to)
    vae = VaeConfig()
    return Model(
        name=f"Z-Image-Turbo in {chosen.name}",
        transformer=tuple(true_parts("transformer", chosen)),
        text_encoder=tuple(true_parts("text_encoder", encoder)),
        vae_bytes=2 * sum(math.prod(shape) for shape in shapes(Decoder(vae)).values()),
        transformer_config=TransformerConfig(),
        text_encoder_config=TextEncoderConfig(),
        vae_config=vae,
    )


def model_of(files: ModelFiles) -> Model:
    """A model that is there. Its headers have been read."""
    decoder = [tensor for name, tensor in files.vae.tensors.items() if name.startswith("decoder.")]
    return Model(
        name=f"{files.name} ({files.transformer.main_format})",
        transformer=tuple(stored_parts(files.transformer)),
        text_encoder=tuple(stored_parts(files.text_encoder)),
        vae_bytes=2 * sum(tensor.rows * tensor.columns for tensor in decoder),
        transformer_config=files.transformer.config,
        text_encoder_config=files.text_encoder.config,
        vae_config=files.vae.config,
    )


def phases(model: Model, job: Job) -> list[Phase]:
    """encode, denoise and decode."""
    return [_encode(model, job), _denoise(model, job), _decode(model.vae_config, model.vae_bytes, job)]


def _denoise(model: Model, job: Job) -> Phase:
    c, image, caption = model.transformer_config, job.image_tokens, _padded(job.caption_tokens)
    sequences = job.sequences
    weights = [part for part in model.transformer if "adaLN" not in part.name]
    adaln = sum(part.n_bytes for part in model.transformer if "adaLN" in part.name)

    def blocks(group: str, count: int, tokens: int, each: int) -> list[Block]:
        """each: sequences of so many tokens."""
        found = [(f"{group}.{i}", _under(weights, f"{group}.{i}")) for i in range(count)]
        attention = each * 4 * c.dim * tokens**2
        return [
            Block(name, sum(p.n_bytes for p in parts), _transformer_work(parts, each * tokens, c.dim, attention))
            for name, parts in found
        ]

    n_refiners = c.n_refiner_layers
    prelude = blocks("context_refiner", n_refiners, caption, 2 if job.guided else 1)
    main = blocks("noise_refiner", n_refiners, image, sequences) + blocks(
        "layers", c.n_layers, image + caption, sequences
    )
    streamed = ("context_refiner.", "noise_refiner.", "layers.")
    rest = [part for part in weights if not part.name.startswith(streamed)]
    held = {
        "embedders": 2 * sum(part.rows * part.columns for part in rest),
        "adaLN vectors": 2 * job.steps * (n_refiners + c.n_layers) * 4 * c.dim,
        "latents": _LATENT_COPIES * 4 * sequences * c.in_channels * job.width * job.height // VAE_FACTOR**2,
        "captions": 2 * (2 if job.guided else 1) * caption * c.dim,
    }
    tokens = sequences * (image + caption)
    scratch = max(_reencoded(_under(weights, block.name)) for block in [*prelude, *main])
    return Phase(
        name="denoise",
        blocks=tuple(main),
        passes=job.steps,
        prelude=tuple(prelude),
        read_once_bytes=adaln,
        gpu_fixed={
            **held,
            "activations": activation_bytes(tokens, c.dim, c.ffn_dim, c.n_heads, 2),
            **({"re-encoded block": scratch} if scratch else {}),
        },
        cpu_fixed={
            **{name: 2 * n_bytes for name, n_bytes in held.items()},
            "activations": activation_bytes(tokens, c.dim, c.ffn_dim, c.n_heads, 4),
            "unpacking": _CPU_UNPACKING_BYTES,
        },
    )


def _encode(model: Model, job: Job) -> Phase:
    """One pass over all prompts: with guidance, the negative one as well."""
    c, prompts = model.text_encoder_config, 2 if job.guided else 1
    tokens, blocks = prompts * job.caption_tokens, []
    attention = prompts * 4 * c.num_attention_heads * c.head_dim * job.caption_tokens**2
    matrices = [part for part in model.text_encoder if part.name.startswith("layers.")]
    for i in range(c.layers_used):
        parts = _under(matrices, f"layers.{i}")
        n_bytes, weights = sum(part.n_bytes for part in parts), _linear_weights(parts)
        unpacking = n_bytes + 4 * weights if _weight_only(parts) else n_bytes
        blocks.append(Block(f"layers.{i}", n_bytes, Work(2 * weights * tokens, attention, unpacking)))
    largest = max((part.rows * part.columns for part in matrices), default=0)

    def held(item_bytes: int) -> dict[str, int]:
        activations = activation_bytes(tokens, c.hidden_size, c.intermediate_size, c.num_attention_heads, item_bytes)
        return {"activations": activations, "embeddings": tokens * c.hidden_size * item_bytes}

    return Phase(
        name="encode",
        blocks=tuple(blocks),
        gpu_fixed={**held(2), "unpacked weight": 2 * largest},
        cpu_fixed={**held(4), "unpacking": _CPU_UNPACKING_BYTES},
        on_cpu=True,
    )


def _decode(config: VaeConfig, weight_bytes: int, job: Job) -> Phase:
    """The whole image at once, one image after another; its weights always stay. On the CPU where the GPU is too small.

    The only place that knows how much memory and work decoding takes.
    """
    pixels, widest = job.width * job.height, config.block_out_channels[1]
    convolutions, attention = _decoder_flops(config, pixels)
    work = Work(convolutions, attention, 8 * decode_bytes(pixels, widest, 2))
    return Phase(
        name="decode",
        blocks=(Block("decoder", weight_bytes, work),),
        passes=job.batch,
        gpu_fixed={"pixels in work": decode_bytes(pixels, widest, 2)},
        ram_fixed={"images": 3 * pixels * job.batch},
        cpu_fixed={"pixels in work": decode_bytes(pixels, widest, 4), "images": 3 * pixels * job.batch},
        on_cpu=True,
    )


def _decoder_flops(config: VaeConfig, pixels: int) -> tuple[float, float]:
    """Of convolutions and linears, and of the attention in the middle."""
    widths, total = list(reversed(config.block_out_channels)), 0.0
    area = pixels / VAE_FACTOR**2
    total += 18 * area * widths[0] * (config.latent_channels + 4 * widths[0]) + 8 * area * widths[0] ** 2
    for i, width in enumerate(widths):
        before = widths[max(i - 1, 0)]
        total += 18 * area * (before + (2 * config.layers_per_block + 1) * width) * width
        if i + 1 < len(widths):
            area *= 4
            total += 18 * area * width**2
    total += 18 * area * widths[-1] * config.in_channels
    return total, 4 * widths[0] * (pixels / VAE_FACTOR**2) ** 2


def _transformer_work(parts: Sequence[Part], tokens: int, dim: int, attention: float) -> Work:
    weights = _linear_weights(parts)
    int8 = any(part.format.lossy for part in parts)
    reencoding = sum(part.n_bytes for part in parts if _is_reencoded(part)) + _reencoded(parts)
    return Work(2 * weights * tokens, attention, _TRAFFIC * tokens * dim * 2 + reencoding, int8)


def _under(parts: Iterable[Part], block: str) -> list[Part]:
    return [part for part in parts if part.name.startswith(f"{block}.")]


def _linear_weights(parts: Iterable[Part]) -> int:
    return sum(part.rows * part.columns for part in parts if part.rows > 1)


def _weight_only(parts: Iterable[Part]) -> bool:
    return any(part.format.lossy for part in parts)


def _is_reencoded(part: Part) -> bool:
    return part.format.lossy and part.format.name != "int8"


def _reencoded(parts: Iterable[Part]) -> int:
    """Bytes of these weights once they are int8."""
    return sum(part.rows * part.columns for part in parts if _is_reencoded(part))


def _padded(tokens: int) -> int:
    return -(-tokens // SEQUENCE_MULTIPLE) * SEQUENCE_MULTIPLE

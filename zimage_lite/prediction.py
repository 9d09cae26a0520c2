"""What the planner is told about Z-Image: the three phases as blocks with sizes, products and traffic, and what each
phase holds beside them. From the true model's shapes in any format, or from a model folder; no weight is read.

Assumed of the computation, as it is designed: adaLN vectors are computed once on the CPU and their weights never sent;
blocks in another format than int8 are re-encoded to int8 on the device, one at a time, before they compute; blocks that
are kept in 16 bits compute in 16 bits; norms, gates and quantization are fused (30 times the tokens x width x 2 bytes
of traffic per block). The text encoder unpacks its weights to 16 bits.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from .catalog import Part, stored_parts, true_parts
from .checkpoint.model_files import ModelFiles
from .config import (
    PATCH_SIZE,
    SEQUENCE_MULTIPLE,
    TOKENS_PER_PASS,
    VAE_FACTOR,
    TextEncoderConfig,
    TransformerConfig,
    VaeConfig,
)
from .memory.machine import Machine, Work
from .memory.plan import Block, Phase, activation_bytes
from .memory.plan_vae import decode_ways
from .model.linear import shapes
from .model.vae import Decoder
from .quant.recipe import KEEP, as_it_is, target
from .quant.tensor import CPU_PIECE_WEIGHTS

_TRAFFIC = 30  # of a block's fused element-wise work, in tokens x width x 2 bytes
_CPU_UNPACKING_BYTES = 6 * CPU_PIECE_WEIGHTS
_LATENT_COPIES = 3  # the latent, the model's answer and their sum, in float32
_CAPTION_TOKENS = 128  # a long prompt
_BATCHES = (1, 2, 4, 8)  # images at once
# What is computed for twice as many images is charged so much more, so that they are denoised together only where that
# saves more than what this prediction may be wrong by. As part of the time it keeps "the fastest" well ordered.
_BATCH_CHARGE = 1.05
_LAUNCHES_PER_CONVOLUTION = 10  # with its norm, activation and what joins them


@dataclass(frozen=True)
class Model:
    """Sizes of the three parts. name: for people."""

    name: str
    transformer: tuple[Part, ...]
    text_encoder: tuple[Part, ...]
    vae_weights: int
    transformer_config: TransformerConfig
    text_encoder_config: TextEncoderConfig
    vae_config: VaeConfig


@dataclass(frozen=True)
class Job:
    """What is to be drawn: `images` of one size. prompt_tokens: of each text that is encoded, what to steer away from
    included."""

    width: int
    height: int
    steps: int = 8
    guided: bool = False
    images: int = 1
    prompt_tokens: tuple[int, ...] = (_CAPTION_TOKENS,)

    @property
    def pixels(self) -> int:
        return self.width * self.height

    @property
    def latents(self) -> int:
        """Pixels of the latent image."""
        return self.pixels // VAE_FACTOR**2

    @property
    def image_tokens(self) -> int:
        return _padded(self.latents // PATCH_SIZE**2)

    @property
    def prompt_batches(self) -> list[tuple[int, ...]]:
        """As they are encoded: together while they have at most TOKENS_PER_PASS."""
        found: list[tuple[int, ...]] = []
        for tokens in self.prompt_tokens:
            if found and sum(found[-1]) + tokens <= TOKENS_PER_PASS:
                found[-1] += (tokens,)
            else:
                found.append((tokens,))
        return found


def true_model(format_name: str) -> Model:
    """Z-Image-Turbo as `quantize --to` would write it. Raises UserError for a format that cannot be written."""
    chosen = target(format_name, "--format")
    encoder = as_it_is() if chosen.text_encoder_to == KEEP else target(chosen.text_encoder_to)
    vae = VaeConfig()
    return Model(
        name=f"Z-Image-Turbo in {chosen.name}",
        transformer=tuple(true_parts("transformer", chosen)),
        text_encoder=tuple(true_parts("text_encoder", encoder)),
        vae_weights=sum(math.prod(shape) for shape in shapes(Decoder(vae)).values()),
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
        vae_weights=sum(tensor.rows * tensor.columns for tensor in decoder),
        transformer_config=files.transformer.config,
        text_encoder_config=files.text_encoder.config,
        vae_config=files.vae.config,
    )


def phases(model: Model, job: Job, machine: Machine) -> list[list[Phase]]:
    """encode, denoise and decode: of each, the ways there are on this machine."""
    devices = ["gpu", "cpu"] if machine.gpu else ["cpu"]
    batches = [batch for batch in _BATCHES if batch <= job.images]
    return [
        [_encode(model, job, device, machine) for device in devices],
        [_denoise(model, job, batch, devices[0], machine) for batch in batches],
        [way for device in devices for way in _decode(model, job, device, machine)],
    ]


def _denoise(model: Model, job: Job, batch: int, device: str, machine: Machine) -> Phase:
    """So many images at once."""
    c, item, caption = model.transformer_config, _item_bytes(device, machine), _padded(max(job.prompt_tokens))
    image, sequences = job.image_tokens, batch * (2 if job.guided else 1)
    weights = [part for part in model.transformer if not _of_time(part)]
    time_weights = sum(part.n_bytes for part in model.transformer if _of_time(part))
    charge = _BATCH_CHARGE ** math.log2(batch)

    def blocks(group: str, count: int, tokens: int, attention: float) -> list[Block]:
        found = [(f"{group}.{i}", _under(weights, f"{group}.{i}")) for i in range(count)]
        return [
            Block(name, sum(p.n_bytes for p in parts), _transformer_work(parts, tokens, c.dim, attention, charge))
            for name, parts in found
        ]

    def attention(tokens: int) -> float:
        return 4.0 * c.dim * tokens**2

    refined = [[_padded(tokens) for tokens in prompts] for prompts in job.prompt_batches]
    together = max(map(sum, refined))
    n_refiners, whole = c.n_refiner_layers, image + caption
    prelude = blocks("context_refiner", n_refiners, together, max(sum(map(attention, batch)) for batch in refined))
    main = blocks("noise_refiner", n_refiners, sequences * image, sequences * attention(image)) + blocks(
        "layers", c.n_layers, sequences * whole, sequences * attention(whole)
    )
    streamed = ("context_refiner.", "noise_refiner.", "layers.")
    rest = [part for part in weights if not part.name.startswith(streamed)]
    tokens = max(sequences * whole, together)
    scratch = max(_reencoded(_under(weights, block.name)) for block in [*prelude, *main])
    fixed = {
        "embedders": item * sum(part.rows * part.columns for part in rest),
        "adaLN vectors": 2 * job.steps * (n_refiners + c.n_layers) * 4 * c.dim,
        "latents": _LATENT_COPIES * 4 * sequences * c.in_channels * job.latents,
        "captions": item * sum(map(sum, refined)) * c.dim,
        "activations": activation_bytes(tokens, c.dim, c.ffn_dim, c.n_heads, item),
    }
    fixed |= (
        {"unpacking": _CPU_UNPACKING_BYTES} if device == "cpu" else {"re-encoded block": scratch} if scratch else {}
    )
    return Phase(
        name="denoise",
        blocks=tuple(main),
        passes=job.steps * -(-job.images // batch),
        prelude=tuple(prelude),
        prelude_passes=len(refined),
        read_once_bytes=time_weights,
        device=device,
        fixed=fixed,
        way=batch,
    )


def _encode(model: Model, job: Job, device: str, machine: Machine) -> Phase:
    c, item, batches = model.text_encoder_config, _item_bytes(device, machine), job.prompt_batches
    tokens, blocks = max(map(sum, batches)), []
    attention = max(sum(4 * c.num_attention_heads * c.head_dim * n**2 for n in batch) for batch in batches)
    matrices = [part for part in model.text_encoder if part.name.startswith("layers.")]
    for i in range(c.layers_used):
        parts = _under(matrices, f"layers.{i}")
        n_bytes, weights = sum(part.n_bytes for part in parts), _linear_weights(parts)
        unpacking = n_bytes + 4 * weights if _weight_only(parts) else n_bytes
        blocks.append(Block(f"layers.{i}", n_bytes, Work(2 * weights * tokens, attention, unpacking)))
    largest = max((part.rows * part.columns for part in matrices), default=0)
    activations = activation_bytes(tokens, c.hidden_size, c.intermediate_size, c.num_attention_heads, item)
    return Phase(
        name="encode",
        blocks=tuple(blocks),
        passes=len(batches),
        device=device,
        fixed={
            "activations": activations,
            "embeddings": sum(job.prompt_tokens) * c.hidden_size * item,
            "unpacking": _CPU_UNPACKING_BYTES if device == "cpu" else 2 * largest,
        },
    )


def _decode(model: Model, job: Job, device: str, machine: Machine) -> Iterator[Phase]:
    """One image after another, each whole or in bands of rows. The weights always stay."""
    item, config = _item_bytes(device, machine), model.vae_config
    whole = decode_ways(config, job.height, job.width, item)[0]
    traffic = 8 * whole.device_bytes  # of what is done to each element between the products
    dtype = machine.gpu_dtype if device == "gpu" else machine.cpu_dtype
    images = {"image": 3 * job.pixels, "latents": 4 * config.latent_channels * job.latents * job.images}
    for way in decode_ways(config, job.height, job.width, item):
        if (dtype == "fp16" and not way.rows_per_band) or (device == "cpu" and way.spilled):
            continue  # only bands scale their maps so that 16 bits hold them; and in RAM the maps are already
        work = Work(
            way.flops,
            way.attention_flops,
            traffic * way.flops / whole.flops,
            host_bytes=way.traffic_bytes,
            launches=_LAUNCHES_PER_CONVOLUTION * way.reads,
        )
        fixed = {"pixels in work": way.device_bytes}
        yield Phase(
            name="decode",
            blocks=(Block("decoder", item * model.vae_weights, work),),
            passes=job.images,
            device=device,
            fixed=fixed if device == "gpu" else {**fixed, **images},
            ram_fixed={**images, "maps": way.host_bytes} if device == "gpu" else {},
            way=way,
        )


def _item_bytes(device: str, machine: Machine) -> int:
    return 4 if (machine.gpu_dtype if device == "gpu" else machine.cpu_dtype) == "fp32" else 2


def _of_time(part: Part) -> bool:
    """Needed once per schedule, on the CPU."""
    return "adaLN_modulation" in part.name or part.name.startswith("t_embedder.")


def _transformer_work(parts: Sequence[Part], tokens: int, dim: int, attention: float, charge: float) -> Work:
    weights = _linear_weights(parts)
    int8 = any(part.format.lossy for part in parts)
    reencoding = sum(part.n_bytes for part in parts if _is_reencoded(part)) + _reencoded(parts)
    traffic = _TRAFFIC * tokens * dim * 2 + reencoding
    return Work(charge * 2 * weights * tokens, charge * attention, charge * traffic, int8)


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

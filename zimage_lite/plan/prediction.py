"""What the planner is told about Z-Image: its phases as blocks with sizes, products and traffic, and what each phase
holds beside them. From sizes alone; no weight is read.

Assumed of the computation, as it is designed: adaLN vectors are computed once on the CPU and their weights never sent;
blocks in another format than int8 are re-encoded to int8 on the device, one at a time, before they compute, or on a CPU
that multiplies in 8 bits while they are read; blocks that
are kept in 16 bits compute in 16 bits; norms, gates and quantization are fused (30 times the tokens x width x 2 bytes
of traffic per block), and so is what follows an 8-bit product, except before compute capability 8.0, where its int32
sums are written and read. The text encoder unpacks its weights to 16 bits.

Bytes hold for that and for the reference alike, which unpacks a piece of a weight where the kernels re-encode a block:
the larger of the two counts.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from ..adapters.load import Load, most_of
from ..config import TOKENS_PER_PASS
from ..convert.catalog import Part
from ..memory.machine import Machine, Work
from ..memory.plan import Block, Phase, activation_bytes
from ..memory.workers import READERS
from ..model.controlnet import visits
from ..model.transformer import is_time_weight
from .control_terms import beside, control_bytes, idle
from .cpu_terms import ELEMENTWISE_FLOPS, cpu_unpacking_flops, holes, reencoding_flops
from .footprint import (
    ITEM_BYTES,
    STREAM_BYTES,
    arena_bytes,
    by_block,
    int8_parts,
    is_reencoded,
    is_rotated,
    reencoded_bytes,
    reencoding_bytes,
    time_bytes,
    unpacking_bytes,
)
from .job import Job, batched, padded, reference_jobs
from .kept import embedding_bytes, latent_bytes, picture_bytes, reference_bytes, vector_bytes
from .model_sizes import Model
from .vae_phases import ways_to_decode, ways_to_encode_pictures
from .vision_terms import ways_to_look

_SUM_TRAFFIC = 8  # bytes for each output of an 8-bit product that torch makes
_TRAFFIC = 30  # of a block's fused element-wise work, in tokens x width x 2 bytes
# Re-encoding is bound by instructions rather than memory, by the compiled code between a half and all of a copy's speed
# on a laptop: half until it is measured. What is rotated already (comfy_int) has little to compute.
_REENCODING_TIMES = 2
_MAKING = "re-encoding"
# Making what adapters add of their files takes the CPU as long as so many operations of a product for each byte of it:
# 13 ms for the 9 MB of a block at rank 32 (2 threads of a Sapphire Rapids).
_MADE = 300
_LATENT_COPIES = 3  # the latent, the model's answer and their sum, in float32
_BATCHES = (1, 2, 4, 8)  # images at once
# What is computed for twice as many images is charged so much more, so that they are denoised together only where that
# saves more than what this prediction may be wrong by. As part of the time it keeps "the fastest" well ordered.
_BATCH_CHARGE = 1.05
_INT8_RATE = 4  # times that of 16 bits with 32-bit sums, on every GeForce since Turing


def phases(model: Model, job: Job, machine: Machine) -> list[list[Phase]]:
    """picture, look (if there are any), encode, denoise and decode: of each, the ways there are on this machine."""
    encoded = [*([job] if job.pictures else []), *reference_jobs(job).values()]
    pictures = [ways_to_encode_pictures(model, one, machine) for one in encoded]
    looks = [ways_to_look(model, job, machine)] if job.references else []
    return [
        *pictures,
        *looks,
        ways_to_encode(model, job.prompt_tokens, machine),
        ways_to_denoise(model, job, machine),
        ways_to_decode(model, job, machine),
    ]


def ways_to_encode(model: Model, prompt_tokens: Sequence[int], machine: Machine) -> list[Phase]:
    return [_encode(model, prompt_tokens, device, machine) for device in machine.devices]


def ways_to_denoise(model: Model, job: Job, machine: Machine) -> list[Phase]:
    """So many images at once, always where computing is fastest. On a CPU, what adapters add is made once and kept, or
    with each block: from the file it took 9 to 36 % of a step."""
    device, batches = machine.devices[0], [batch for batch in _BATCHES if batch <= max(job.shares or (job.images,))]
    keeping = (True, False) if device == "cpu" and any(job.adapters) else (False,)
    return [_denoise(model, job, batch, device, machine, keeps) for batch in batches for keeps in keeping]


def _denoise(model: Model, job: Job, batch: int, device: str, machine: Machine, keeps: bool) -> Phase:
    """So many images at once."""
    c, caption = model.transformer_config, padded(max(job.prompt_tokens)) + job.look_tokens
    dtype = machine.dtype(device)
    item, stream = ITEM_BYTES[dtype], STREAM_BYTES[dtype]
    image, sequences = job.image_tokens + job.seen_tokens, batch * (2 if job.guided else 1)
    parts = [*model.transformer, *beside(job.controls)]
    time_weights = [part for part in parts if is_time_weight(part.name)]
    stored, rest = by_block([part for part in parts if not is_time_weight(part.name)])
    counted = _Counted(c.dim, stored, most_of(job.adapters, dtype), keeps, _BATCH_CHARGE ** math.log2(batch), machine)
    load = counted.load

    def blocks(group: str, count: int, tokens: int, attention: float) -> list[Block]:
        names, controls = [f"{group}.{i}" for i in range(count)], [control.config for control in job.controls]
        return [counted.block(name, tokens, attention) for name in visits(group, names, controls)]

    def attention(tokens: int) -> float:
        return 4.0 * c.dim * tokens**2

    refined = batched([padded(tokens) + job.look_tokens for tokens in job.round_tokens], int)
    pads = sum(map(sum, refined))
    together = min(pads, max(TOKENS_PER_PASS, caption))  # in another order more may go into one pass
    n_refiners, whole = c.n_refiner_layers, image + caption
    most = max(sum(map(attention, batch)) for batch in refined)
    prelude = [counted.block(f"{group}.{i}", together, most) for group in _refining(job) for i in range(n_refiners)]
    main = blocks("noise_refiner", n_refiners, sequences * image, sequences * attention(image)) + blocks(
        "layers", c.n_layers, sequences * whole, sequences * attention(whole)
    )
    unpacking = _most_unpacking(list(counted.of_blocks.values()), device, machine)
    tokens = max(sequences * whole, together)
    activations = activation_bytes(tokens, c.dim, c.ffn_dim, c.n_heads, item, stream)
    latent = latent_bytes(model, job)
    host = _beside_denoising(model, job, dtype, load)
    return Phase(
        name="denoise",
        blocks=tuple(main),
        passes=job.passes * job.batches(batch),
        prelude=tuple(prelude),
        prelude_passes=len(refined),
        read_once_bytes=sum(part.n_bytes for part in time_weights),
        device=device,
        fixed={
            "embedders": item * sum(part.rows * part.columns for part in rest) + load.rest,
            "adaLN vectors": vector_bytes(model, job, dtype),
            "latents": latent * _LATENT_COPIES * sequences,
            "captions": stream * pads * (c.dim + c.cap_feat_dim) + reference_bytes(model, job),
            **control_bytes(job, batch, sequences * whole * c.dim * stream, item),
            "activations": activations + (tokens + pads) * c.head_dim * 4,  # the angles of the parts stay, too
            "unpacking": unpacking,
            **({"adapters": sum(load.bytes.values())} if keeps else {}),
            **(host | _on_cpu(activations, unpacking, counted.reencoding) if device == "cpu" else {}),
        },
        # On the CPU the first block takes the place of the time weights.
        ram_fixed={**host, "time weights": time_bytes(time_weights) + load.time} if device == "gpu" else {},
        idle=idle(job, (block.name for block in main), job.batches(batch)),
        way=batch,
        keeps=keeps,
    )


@dataclass(frozen=True)
class _Counted:
    """The transformer's blocks as the first device computes them. stored: their weights; keeps: see `Phase`; charge:
    for more images at once."""

    dim: int
    stored: Mapping[str, Sequence[Part]]
    load: Load
    keeps: bool
    charge: float
    machine: Machine

    @property
    def device(self) -> str:
        return self.machine.devices[0]

    @property
    def in_int8(self) -> bool:
        """Whether a CPU keeps what it re-encodes."""
        return self.device == "cpu" and self.machine.cpu_int8

    @cached_property
    def of_blocks(self) -> Mapping[str, Sequence[Part]]:
        """As they lie where they are computed with."""
        return {name: int8_parts(own) for name, own in self.stored.items()} if self.in_int8 else self.stored

    @property
    def reencoding(self) -> dict[str, int]:
        return _reencoding(self.stored, self.machine) if self.in_int8 else {}

    def block(self, name: str, tokens: int, attention: float) -> Block:
        """attention: operations."""
        parts = self.of_blocks[name]
        work = _transformer_work(parts, tokens, self.dim, attention, self.charge, self.device, self.machine)
        work = _with_adapters(work, self.load, name, self.charge * tokens, self.device)
        making = reencoding_flops(self.stored[name]) if self.in_int8 else 0
        added = 0 if self.keeps else self.load.bytes.get(name, 0)
        return Block(name, arena_bytes(parts) + added, work, making + _MADE * added)


def _on_cpu(activations: int, unpacking: int, reencoding: dict[str, int]) -> dict[str, int]:
    return holes(activations, unpacking + reencoding.get(_MAKING, 0)) | reencoding


def _refining(job: Job) -> tuple[str, ...]:
    """What runs over captions before the first step."""
    return ("context_refiner", "siglip_refiner") if job.references else ("context_refiner",)


def _beside_denoising(model: Model, job: Job, dtype: str, load: Load) -> dict[str, int]:
    """Bytes in RAM, wherever it computes."""
    return {
        "embeddings": embedding_bytes(model, job, dtype),
        "done latents": latent_bytes(model, job) * job.round_images,
        **({"references": reference_bytes(model, job)} if job.references else {}),
        **({"pictures": pictures} if (pictures := picture_bytes(model, job)) else {}),
        **({"adapters in the making": READERS * load.making} if load.making else {}),
    }


def _most_unpacking(blocks: Sequence[Sequence[Part]], device: str, machine: Machine) -> int:
    """Bytes for a moment. An int8 matrix that the CPU multiplies as it is takes none."""
    dtype = machine.dtype(device)

    def most(parts: Iterable[Part]) -> int:
        return max((unpacking_bytes(part, device, dtype) for part in parts), default=0)

    if device == "cpu":
        as_it_is = machine.cpu_int8
        return most(p for parts in blocks for p in parts if not (as_it_is and p.format.name == "int8" and p.rows > 1))
    beside = most(part for parts in blocks for part in _unpacked(parts))
    return max(most(part for parts in blocks for part in parts), max(map(_reencoded, blocks)) + beside)


def _reencoding(blocks: Mapping[str, Sequence[Part]], machine: Machine) -> dict[str, int]:
    """Bytes in RAM while blocks become int8, if any does. What rotates them is compiled, and stays."""
    parts = [part for own in blocks.values() for part in own if is_reencoded(part.format) and part.rows > 1]
    if not parts:
        return {}
    loops = 0 if all(is_rotated(part.format) for part in parts) else machine.loops_bytes
    return {_MAKING: max(map(reencoding_bytes, parts)), "compiled loops": loops}


def _encode(model: Model, prompt_tokens: Sequence[int], device: str, machine: Machine) -> Phase:
    c, batches, blocks = model.text_encoder_config, batched(prompt_tokens, int), []
    dtype, tokens = machine.dtype(device), max(map(sum, batches))
    item, stream = ITEM_BYTES[dtype], STREAM_BYTES[dtype]
    attention = max(sum(4 * c.num_attention_heads * c.head_dim * n**2 for n in batch) for batch in batches)
    of_layers, _ = by_block(model.text_encoder)
    for name in (f"layers.{i}" for i in range(c.layers_used)):
        parts = of_layers[name]
        n_bytes, weights = arena_bytes(parts), _linear_weights(parts)
        traffic = n_bytes + 4 * weights if _is_lossy(parts) else n_bytes
        other = cpu_unpacking_flops(parts) if device == "cpu" else 0
        blocks.append(Block(name, n_bytes, Work(2 * weights * tokens, attention, traffic, other_flops=other)))
    q_dim, kv_dim = (n * c.head_dim for n in (c.num_attention_heads, c.num_key_value_heads))
    activations = activation_bytes(
        tokens, c.hidden_size, c.intermediate_size, c.num_attention_heads, item, stream, q_dim, kv_dim, False
    )
    unpacking = max(unpacking_bytes(p, device, dtype) for block in blocks for p in of_layers[block.name])
    return Phase(
        name="encode",
        blocks=tuple(blocks),
        passes=len(batches),
        device=device,
        fixed={
            "activations": activations,
            "embeddings": c.hidden_size * (tokens * item + sum(prompt_tokens) * stream),  # of what goes in and out
            "unpacking": unpacking,
            **(holes(0, unpacking) if device == "cpu" else {}),  # there are a few tokens only
        },
    )


def _transformer_work(
    parts: Sequence[Part], tokens: int, dim: int, attention: float, charge: float, device: str, machine: Machine
) -> Work:
    flops, int8 = 2 * _linear_weights(parts) * tokens, any(map(_in_int8, parts))
    if device == "cpu":
        int8 = int8 and machine.cpu_int8
        other = ELEMENTWISE_FLOPS * tokens * dim + cpu_unpacking_flops(parts, int8)
        return Work(charge * flops, charge * attention, int8=int8, other_flops=charge * other)
    traffic = _TRAFFIC * tokens * dim * 2 + sum(map(_reencoding_traffic, parts))
    if machine.gpu and machine.gpu.unfused8:
        traffic += _SUM_TRAFFIC * tokens * sum(part.rows for part in parts if _in_int8(part))
    return Work(charge * flops, charge * attention, charge * traffic, int8)


def _with_adapters(work: Work, load: Load, block: str, tokens: float, device: str) -> Work:
    """Their products in 16 bits (float32 on the CPU), and what they read of each token once more."""
    flops = load.flops.get(block, 0) * tokens
    if device == "cpu":
        return replace(work, other_flops=work.other_flops + flops)
    flops *= _INT8_RATE if work.int8 else 1  # as many 8-bit operations as take so long
    traffic = work.traffic_bytes + load.columns.get(block, 0) * tokens
    return replace(work, linear_flops=work.linear_flops + flops, traffic_bytes=traffic)


def _reencoding_traffic(part: Part) -> float:
    """Bytes read and written, as many times as it takes longer than a copy."""
    if not is_reencoded(part.format):
        return 0.0
    times = 1 if is_rotated(part.format) else _REENCODING_TIMES
    return times * (part.n_bytes + reencoded_bytes(part.format, part.rows, part.columns))


def _linear_weights(parts: Iterable[Part]) -> int:
    return sum(part.rows * part.columns for part in parts if part.rows > 1)


def _is_lossy(parts: Iterable[Part]) -> bool:
    return any(part.format.lossy for part in parts)


def _in_int8(part: Part) -> bool:
    return part.format.name == "int8" or is_reencoded(part.format)


def _unpacked(parts: Sequence[Part]) -> list[Part]:
    """Of a block that computes in 8 bits: what is not in int8; and all of int8, too, where such a matrix may make what
    shares its input follow it."""
    others = [part for part in parts if not _in_int8(part)]
    mixed = any(part.rows > 1 for part in others)
    return others + [part for part in parts if mixed and part.format.name == "int8"]


def _reencoded(parts: Iterable[Part]) -> int:
    """Bytes of these weights once they are int8."""
    return sum(reencoded_bytes(part.format, part.rows, part.columns) for part in parts)

"""What training a LoRA takes: the transformer's blocks forwards and backwards, in each step. From sizes alone.

Two passes a step are planned as two alike: forwards a block is computed once; backwards once more, and then its
gradient, which is another product with every weight. What is preserved passes forwards once more, without the LoRA.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from ..adapters.joined import NOTHING, AdapterSet
from ..adapters.load import Load, load_of
from ..config import TOKENS_PER_PASS, VAE_FACTOR, TransformerConfig
from ..convert.catalog import Part
from ..memory.heap import KEPT_BYTES
from ..memory.machine import Machine, Work
from ..memory.plan import Block, Phase, activation_bytes
from ..memory.workers import READERS
from ..model.transformer import is_time_weight
from .cpu_terms import cpu_unpacking_flops, holes, holes_of_graph
from .footprint import ITEM_BYTES, STREAM_BYTES, arena_bytes, by_block, time_bytes, unpacking_bytes
from .job import padded
from .model_sizes import Model

PRESERVED_SHARE = 0.5  # of a step's pictures, where there is something to preserve
_PRESERVED_LEAST = 48  # pictures for words, however few there are of what is new
STEPS_AT_ONCE = 100  # whose adaLN vectors are computed together: 1 MB each in bfloat16
_STATE_BYTES = {"adamw": 8, "adamw8bit": 3}  # of each parameter; of the latter with its scales
_BITSANDBYTES_BYTES = 200_000_000  # of RAM, with torch's compiler, which it loads
# Of one block, for each token and each value of its width: what its graph keeps and the gradients under way, as counted
# on tensors (tools/live_bytes.py), attention by a kernel that keeps no scores.
_GRAPH_BYTES = {"bf16": 88, "fp32": 120}
# More, where each of several pictures has its own time: adaLN vectors are repeated for all tokens, in float32, too.
_VECTOR_BYTES = 20
_TRAFFIC = 30  # of a block's element-wise work, in tokens x width values
# What encoding pictures and captions leaves in the process: 14 to 17 MB with small models on a CPU.
_PREPARING_BYTES = 20_000_000


@dataclass(frozen=True)
class TrainJob:
    """resolution: the largest pictures have its square in pixels; caption_tokens: of each text, as it is encoded;
    assistant: adapters beside the weights meanwhile; preserved: the share of a step's pictures; prepared: pictures and
    captions are encoded."""

    resolution: int
    rank: int
    batch: int = 1
    optimizer: str = "adamw"
    caption_tokens: tuple[int, ...] = (128,) * 20
    pictures: int = 20
    steps: int = STEPS_AT_ONCE
    preserved: float = 0.0
    assistant: AdapterSet = field(default=NOTHING, compare=False)
    prepared: bool = False

    @property
    def picture_tokens(self) -> int:
        """With its caption, at most."""
        return padded((self.resolution // VAE_FACTOR // 2) ** 2) + padded(max(self.caption_tokens))


def ways_to_train(model: Model, job: TrainJob, machine: Machine) -> list[Phase]:
    """There is one. The machine computes in float32 or bfloat16: float16 is too narrow for gradients."""
    device, c = machine.devices[0], model.transformer_config
    dtype, tokens = machine.dtype(device), job.batch * job.picture_tokens
    item, stream = ITEM_BYTES[dtype], STREAM_BYTES[dtype]
    of_blocks, rest = by_block([part for part in model.transformer if not is_time_weight(part.name)])
    times, load = [part for part in model.transformer if is_time_weight(part.name)], load_of(job.assistant, dtype)

    def blocks(group: str, count: int, tokens: int, products: float) -> tuple[Block, ...]:
        names = [f"{group}.{i}" for i in range(count)]
        return tuple(_block(name, of_blocks[name], load, tokens, job, c.dim, products, device) for name in names)

    learned = parameters(c, job.rank)
    of_block = max(learned // c.n_layers, 1)
    unpacking = max(unpacking_bytes(part, device, dtype) for own in of_blocks.values() for part in own)
    host, pads = _host_bytes(model, job, dtype, load), min(sum(map(padded, job.caption_tokens)), TOKENS_PER_PASS)
    graph = _GRAPH_BYTES[dtype] + _VECTOR_BYTES * (job.batch > 1)
    activations = max(
        graph * tokens * c.dim + 2 * item * of_block,
        activation_bytes(max(pads, *job.caption_tokens), c.dim, c.ffn_dim, c.n_heads, item, stream),
    )
    return [
        Phase(
            name="train",
            blocks=(
                *blocks("noise_refiner", c.n_refiner_layers, tokens, 0.5 + 0.5 * job.preserved),  # in every second pass
                *blocks("layers", c.n_layers, tokens, 1.5 + 0.5 * job.preserved),
            ),
            passes=2 * min(job.steps, STEPS_AT_ONCE),
            prelude=blocks("context_refiner", c.n_refiner_layers, pads, 1.0),
            read_once_bytes=sum(part.n_bytes for part in times),
            device=device,
            fixed={
                "embedders": item * sum(part.rows * part.columns for part in rest) + load.rest,
                "LoRA": 4 * learned,
                "its gradients": 4 * learned,
                "its optimizer": _STATE_BYTES[job.optimizer] * learned,
                "block inputs": int((c.n_layers + job.preserved) * tokens * c.dim * stream),
                "activations": activations,
                "unpacking": unpacking,
                **(_on_cpu(activations, unpacking, tokens * c.ffn_dim * item) | host if device == "cpu" else {}),
            },
            ram_fixed={**host, "time weights": time_bytes(times) + load.time} if device == "gpu" else {},
        )
    ]


def _on_cpu(activations: int, unpacking: int, widest: int) -> dict[str, int]:
    """Bytes that its heap keeps meanwhile."""
    kept = activations + holes_of_graph(activations, widest)
    return {**holes(kept, unpacking), "kept by the heap": KEPT_BYTES}


def preserved_pictures(new: int, words: Sequence[str], prompts: Sequence[str]) -> int:
    """How many train-lora draws beside so many new ones."""
    return (max(new, _PRESERVED_LEAST) if words else 0) + len(prompts)


def parameters(config: TransformerConfig, rank: int) -> int:
    """Of the LoRA: four square linears and three of the feed-forward in each layer."""
    return config.n_layers * rank * (4 * 2 * config.dim + 3 * (config.dim + config.ffn_dim))


def _block(
    name: str, parts: Sequence[Part], load: Load, tokens: int, job: TrainJob, dim: int, products: float, device: str
) -> Block:
    """products: with each weight in a pass, in times of the tokens."""
    flops = products * tokens * (2 * _linear_weights(parts) + load.flops.get(name, 0))
    attention = products * 4.0 * dim * tokens**2 / job.batch
    if device == "cpu":
        work = Work(flops, attention, other_flops=2 * products * cpu_unpacking_flops(parts))
    else:
        unpacked = 2 * products * sum(part.n_bytes + 4 * part.rows * part.columns for part in parts)
        work = Work(flops, attention, unpacked + products * _TRAFFIC * tokens * dim * 4)
    return Block(name, arena_bytes(parts) + load.bytes.get(name, 0), work)


def _linear_weights(parts: Iterable[Part]) -> int:
    return sum(part.rows * part.columns for part in parts if part.rows > 1)


def _host_bytes(model: Model, job: TrainJob, dtype: str, load: Load) -> dict[str, int]:
    """Bytes in RAM, wherever it computes: what was made of the pictures and captions, and what steps take of it."""
    c, tokens = model.transformer_config, sum(map(padded, job.caption_tokens))
    latent = 4 * c.in_channels * (job.resolution // VAE_FACTOR) ** 2
    return {
        "latents": latent * (job.pictures + 3 * job.batch),
        "captions": STREAM_BYTES[dtype] * tokens * (c.dim + c.cap_feat_dim) + 4 * tokens * c.head_dim,
        "adaLN vectors": ITEM_BYTES[dtype]
        * STEPS_AT_ONCE
        * job.batch
        * (4 * (c.n_refiner_layers + c.n_layers) + 1)
        * c.dim,
        **({} if job.prepared else {"preparing": _PREPARING_BYTES}),
        **({"bitsandbytes": _BITSANDBYTES_BYTES} if job.optimizer == "adamw8bit" else {}),
        **({"assistant in the making": READERS * load.making} if load.making else {}),
    }

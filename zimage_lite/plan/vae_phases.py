"""What the planner is told about the VAE: pictures are encoded before images are denoised, images decoded at the end,
one after another. Each goes through whole or in bands of rows; the weights always stay.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

from ..memory.machine import Machine, Work
from ..memory.plan import Block, Phase
from ..memory.plan_vae import VaePlan, decode_ways, encode_ways
from .cpu_terms import holes_of_maps
from .footprint import ITEM_BYTES
from .job import Job
from .kept import embedding_bytes, latent_bytes, picture_bytes, reference_bytes, vector_bytes
from .model_sizes import Model

_LAUNCHES_PER_CONVOLUTION = 10  # with its norm, activation and what joins them


def ways_to_encode_pictures(model: Model, job: Job, machine: Machine) -> list[Phase]:
    dtype = machine.dtype(machine.devices[0])
    kept = {"embeddings": embedding_bytes(model, job, dtype), **_pictures(model, job, job.open_bytes)}
    vectors = {"adaLN vectors": vector_bytes(model, job, dtype)}
    return list(_ways(_Task("picture", "encoder", encode_ways, job.pictures, kept, vectors), model, job, machine))


def ways_to_decode(model: Model, job: Job, machine: Machine) -> list[Phase]:
    dtype = machine.dtype(machine.devices[0])
    kept = {
        "image": 3 * job.pixels,
        "latents": latent_bytes(model, job) * job.round_images,
        "embeddings": embedding_bytes(model, job, dtype),
        **_pictures(model, job, job.back_bytes),
    }
    vectors = {"adaLN vectors": vector_bytes(model, job, dtype)}  # for the next round
    return list(_ways(_Task("decode", "decoder", decode_ways, job.images, kept, vectors), model, job, machine))


def _pictures(model: Model, job: Job, open_bytes: int) -> dict[str, int]:
    """With the one that is open at the time, and what is kept of references."""
    n_bytes = picture_bytes(model, job) + open_bytes + reference_bytes(model, job)
    return {"pictures": n_bytes} if n_bytes else {}


@dataclass(frozen=True)
class _Task:
    """kept, waiting: bytes that lie in RAM meanwhile, and where it computes."""

    name: str
    half: str  # of the VAE
    ways: Callable[..., tuple[VaePlan, ...]]
    passes: int
    kept: Mapping[str, int]
    waiting: Mapping[str, int] = field(default_factory=dict)


def _ways(task: _Task, model: Model, job: Job, machine: Machine) -> Iterator[Phase]:
    for device in machine.devices:
        dtype, gpu = machine.dtype(device), device == "gpu"
        item = ITEM_BYTES[dtype]
        plans = task.ways(model.vae_config, job.height, job.width, item, gpu)
        traffic = 8 * plans[0].device_bytes / plans[0].flops  # of what is done to each element between the products
        for plan in plans[dtype == "fp16" :]:  # only bands scale their maps so that float16 holds them
            work = Work(
                plan.flops,
                plan.attention_flops,
                traffic * plan.flops,
                host_bytes=plan.traffic_bytes,
                launches=_LAUNCHES_PER_CONVOLUTION * plan.reads,
            )
            fixed = {"pixels in work": plan.device_bytes, **task.waiting}
            yield Phase(
                name=task.name,
                blocks=(Block(task.half, item * model.vae_weights[task.half], work),),
                passes=task.passes,
                device=device,
                fixed=fixed if gpu else {**fixed, **task.kept, **holes_of_maps(plan.device_bytes)},
                ram_fixed={**task.kept, "maps": plan.host_bytes} if gpu else {},
                way=plan,
            )

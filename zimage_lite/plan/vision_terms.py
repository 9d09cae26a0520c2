"""What the planner is told about references: the vision tower that looks at them, and what of them waits."""

from __future__ import annotations

from ..memory.machine import Machine, Work
from ..memory.plan import Block, Phase, activation_bytes
from .cpu_terms import cpu_unpacking_flops, holes
from .footprint import ITEM_BYTES, STREAM_BYTES, arena_bytes, by_block, unpacking_bytes
from .job import Job
from .kept import embedding_bytes, picture_bytes, reference_bytes, vector_bytes
from .model_sizes import Model


def ways_to_look(model: Model, job: Job, machine: Machine) -> list[Phase]:
    return [_look(model, job, device, machine) for device in machine.devices]


def _look(model: Model, job: Job, device: str, machine: Machine) -> Phase:
    """A pass for each reference."""
    c, dtype = model.vision_config, machine.dtype(device)
    assert c is not None
    tokens = max(shape.patches for shape in job.references)
    item, stream = ITEM_BYTES[dtype], STREAM_BYTES[dtype]
    of_layers, rest = by_block(model.vision)
    blocks = []
    for name in (f"encoder.layers.{i}" for i in range(c.num_hidden_layers)):  # parts come as they lie
        parts = of_layers[name]
        n_bytes, weights = arena_bytes(parts), sum(part.rows * part.columns for part in parts if part.rows > 1)
        other = cpu_unpacking_flops(parts) if device == "cpu" else 0
        work = Work(2.0 * weights * tokens, 4.0 * c.hidden_size * tokens**2, n_bytes, other_flops=other)
        blocks.append(Block(name, n_bytes, work))
    unpacking = max(unpacking_bytes(part, device, dtype) for parts in of_layers.values() for part in parts)
    waiting = {
        "embeddings": embedding_bytes(model, job, machine.dtype(machine.devices[0])),
        "references": reference_bytes(model, job) + job.open_bytes,
        **({"pictures": pictures} if (pictures := picture_bytes(model, job)) else {}),
    }
    vectors = {"adaLN vectors": vector_bytes(model, job, machine.dtype(machine.devices[0]))}
    fixed = {
        "embedder": item * sum(part.rows * part.columns for part in rest),
        "activations": activation_bytes(
            tokens, c.hidden_size, c.intermediate_size, c.num_attention_heads, item, stream, fused=False
        ),
        "patches": (item + 4) * tokens * (c.patch_dim + c.hidden_size),
        "unpacking": unpacking,
    }
    on_cpu = {**waiting, **vectors, **holes(0, unpacking)}
    return Phase(
        name="look",
        blocks=tuple(blocks),
        passes=job.looks,
        device=device,
        fixed={**fixed, **(on_cpu if device == "cpu" else vectors)},
        ram_fixed={} if device == "cpu" else waiting,
    )

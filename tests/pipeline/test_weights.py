"""A component's weights: brought, given back, and what cannot be read told."""

from __future__ import annotations

import os
import shutil
import threading
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from trained_loras import save_lora

from zimage_lite.adapters.joined import NOTHING
from zimage_lite.adapters.library import AdapterLibrary
from zimage_lite.checkpoint.model_files import open_model
from zimage_lite.config import Lora
from zimage_lite.errors import UserError
from zimage_lite.memory.hardware import Hardware
from zimage_lite.memory.machine import Machine
from zimage_lite.memory.placement import GRANULE_BYTES
from zimage_lite.memory.plan import DEVICE, FILE, PAGEABLE, PINNED, Plan
from zimage_lite.memory.planner import budgets_in_force, plan_phases
from zimage_lite.model.linear import Linear, Stream
from zimage_lite.pipeline import weights as loading
from zimage_lite.pipeline.drawing import Pipeline
from zimage_lite.plan.job import Job
from zimage_lite.plan.model_sizes import model_of
from zimage_lite.plan.prediction import phases

CPU = Hardware(torch.device("cpu"), torch.float32)


def made(model: Path, ram_bytes: int = 10**10) -> tuple[loading.Component, Plan]:
    """The transformer of a tiny model, and how it is denoised once with 16 x 16 pixels within so much."""
    component, sizes = Pipeline(open_model(model)).denoising.component, model_of(open_model(model))
    there = Machine("test", 10**11, process_bytes=0)
    ways = phases(sizes, Job(16, 16, steps=1), there)[1]
    return component, plan_phases([ways], there, budgets_in_force(there, ram_bytes=ram_bytes))[0]


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("budget", ["free", "tight"])
def test_a_component_gives_everything_back(tiny: Path, budget: str, fails: bool) -> None:
    component, plan = made(tiny)
    if budget == "tight":
        fixed = sum(plan.fixed.values())
        component, plan = made(tiny, ram_bytes=fixed + 2 * GRANULE_BYTES)
        assert not plan.resident and plan.slots <= 2
    transformer, threads = component.model, threading.active_count()
    blocks = [*transformer.noise_refiner, *transformer.layers]
    try:
        with loading.opened(component, plan, CPU) as weights:
            arena = weights._arena.untyped_storage()
            rest = packed(transformer)
            with weights.prelude(2) as stream:
                for _ in range(2):
                    assert [packed(transformer) - rest for _ in stream(transformer.context_refiner)] == [7, 7]
            with weights.passes(2) as stream:
                for _ in range(2):
                    counts = [packed(transformer) - rest for _ in stream(blocks)]
                if fails:
                    raise ZeroDivisionError
            # Seven linears each: that of the modulation is not among them.
            assert counts == ([7] * 5 if plan.streamed else [35] * 5)
            (_, moved) = weights.moved
            assert moved.read_bytes == sum(component.block_bytes[name] for name in plan.sizes) * (
                2 if plan.streamed else 1
            )
    except ZeroDivisionError:
        assert fails
    assert packed(transformer) == 0 and threading.active_count() == threads
    assert torch._C._storage_Use_Count(arena._cdata) == 1  # ours; `weights` and `stream`, too, are still here
    assert {parameter.device.type for parameter in transformer.parameters()} == {"meta"}


def test_what_cannot_be_read_is_told(tiny: Path, tmp_path: Path) -> None:
    """From the thread that reads to the one that computes."""
    shutil.copytree(tiny, tmp_path / "model")
    component, plan = made(tmp_path / "model")
    (file,) = (tmp_path / "model" / "transformer").glob("*.safetensors")
    with pytest.raises(UserError, match=r"ends early|cannot be read"), loading.opened(component, plan, CPU) as weights:
        os.truncate(file, file.stat().st_size // 2)
        with weights.passes(1) as stream:
            list(stream([*component.model.noise_refiner, *component.model.layers]))


HOMES = (DEVICE, PINNED, PAGEABLE, FILE)


@pytest.mark.slow
@pytest.mark.parametrize("first", range(len(HOMES)))
def test_adapters_change_and_weights_stay(tiny: Path, tmp_path: Path, first: int) -> None:
    """Blocks in every home, as beside a GPU: copied from staging buffers and from RAM. Each set's output is that of
    itself alone, to the bit, and what stays is read once."""
    component, plan = made(tiny)
    transformer, library = component.model, AdapterLibrary(component.model.config, lambda _: None)
    files = [save_lora(tmp_path / "a.safetensors", transformer.config), tmp_path / "b.safetensors"]
    save_lora(files[1], transformer.config, rank=20, seed=1, ends=("to_q", "w2"))
    a, b = (library.of((Lora(str(file)),)) for file in files)
    blocks, x = [*transformer.noise_refiner, *transformer.layers], torch.randn(3, transformer.config.dim)

    def linears(stream: Stream) -> list[torch.Tensor]:
        return [block.attention.to_q(x) for block in stream(blocks)]

    homes = {name: HOMES[(first + i) % len(HOMES)] for i, name in enumerate(plan.homes)}
    room = max(plan.sizes.values()) + 2**20
    beside = replace(
        plan, homes=homes, sizes=dict.fromkeys(plan.sizes, room), slots=2, slot_bytes=room, staging=2,
        staging_bytes=room,
    )  # fmt: skip
    roomy, truths = replace(plan, sizes=beside.sizes), []
    for adapters in (a, b, NOTHING):
        own = replace(component, adapters=adapters)
        with loading.opened(own, roomy, CPU) as weights, weights.passes(1) as stream:
            truths.append(linears(stream))
    assert not any(torch.equal(one[0], other[0]) for one, other in combinations(truths, 2))
    with loading.opened(replace(component, adapters=a), beside, CPU) as weights:
        for adapters, truth in zip((a, b, NOTHING, a), [*truths, truths[0]], strict=True):
            weights.change(adapters)
            with weights.passes(2) as stream:
                for _ in range(2):
                    assert all(map(torch.equal, linears(stream), truth))
        reads = [moved.read_bytes for moved in weights.moved]
    stays = sum(component.block_bytes[name] for name, home in homes.items() if home == DEVICE)
    assert reads[0] - reads[3] == stays


def test_a_block_that_never_came_is_read_whole_later(tiny: Path, tmp_path: Path) -> None:
    """Passes may end early, as after numbers that are not finite. One staging buffer, so that little is read ahead."""
    component, plan = made(tiny)
    transformer = component.model
    blocks = [*transformer.noise_refiner, *transformer.layers]
    lora = save_lora(tmp_path / "a.safetensors", transformer.config)
    adapters = AdapterLibrary(transformer.config, lambda _: None).of((Lora(str(lora)),))
    room = max(plan.sizes.values()) + 2**20
    staged = replace(
        plan, homes=dict.fromkeys(plan.homes, DEVICE), sizes=dict.fromkeys(plan.sizes, room), staging=1,
        staging_bytes=room,
    )  # fmt: skip
    with loading.opened(component, staged, CPU) as weights:
        weights._arena.zero_()
        with weights.passes(1) as stream:
            next(iter(stream(blocks)))
        weights.change(adapters)
        with weights.passes(1) as stream:
            list(stream(blocks))
        found = blocks[-1].attention.to_q.packed.dequantize()
    truth = component.checkpoint.tensors["layers.2.attention.to_q.weight"].read().dequantize()
    assert torch.equal(found, truth)


def packed(module: torch.nn.Module) -> int:
    return sum(isinstance(part, Linear) and part.packed is not None for part in module.modules())


def test_weights_that_are_not_numbers_are_named(tiny: Path, tmp_path: Path, refused) -> None:
    (file,) = (tiny / "transformer").glob("*.safetensors")
    tensors = load_file(file)
    tensors["layers.1.feed_forward.w3.weight"][5, 5] = float("nan")
    save_file(tensors, tmp_path / "damaged.safetensors")
    line = refused(
        "generate", "cat", "--model", tiny, "--transformer", tmp_path / "damaged.safetensors", "--width", 64,
        "--height", 64, "--steps", 1, "-o", tmp_path / "out.png",
    )  # fmt: skip
    assert "layers.1.feed_forward.w3.weight" in line and "damaged.safetensors" in line
    assert not (tmp_path / "out.png").exists()

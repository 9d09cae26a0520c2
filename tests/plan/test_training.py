"""What training a LoRA is planned to take, against what it is made of."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from live_bytes import LiveBytes
from packing import packed_as

from zimage_lite.cli import run
from zimage_lite.config import TransformerConfig
from zimage_lite.memory.gpus import find_gpu
from zimage_lite.memory.machine import machine
from zimage_lite.memory.planner import budgets_in_force, plan_phases
from zimage_lite.model.linear import bind
from zimage_lite.model.rope import rope_angles
from zimage_lite.model.transformer import Transformer
from zimage_lite.plan.model_sizes import true_model
from zimage_lite.plan.training import _GRAPH_BYTES, _VECTOR_BYTES, TrainJob, parameters, ways_to_train
from zimage_lite.train.lora import TrainedLora
from zimage_lite.train.passes import of_tokens

GIB = 2**30


def test_the_lora_has_as_many_parameters() -> None:
    config = TransformerConfig(dim=256, n_layers=3, n_refiner_layers=2, n_heads=2)
    lora = TrainedLora(Transformer(config), 5, 0, torch.device("cpu"))
    assert parameters(config, 5) == sum(own.numel() for own in lora.parameters)
    assert parameters(TransformerConfig(), 16) == 35_020_800  # 210 modules


@pytest.mark.slow
@pytest.mark.parametrize("pictures", [1, 2])
@pytest.mark.parametrize(("name", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_a_graph_takes_what_is_planned(name: str, dtype: torch.dtype, pictures: int) -> None:
    """All tensors of one block's graph and of the way back through it, on the CPU: at most 10 % less than planned."""
    config, tokens = replace(TransformerConfig(), dim=384, n_heads=3, n_layers=1), 256
    model = Transformer(config)
    block, plain = model.layers[0], {torch.float32: "f32", torch.bfloat16: "bf16"}[dtype]
    weights = {name: torch.randn(own.shape) * own.shape[-1] ** -0.5 for name, own in block.named_parameters()}
    bind(block, {name: packed_as(plain, weight) for name, weight in weights.items()}, dtype)
    lora = TrainedLora(model, 4, 0, torch.device("cpu"))
    for own in lora.parameters:
        own.grad = torch.zeros_like(own)
    rope = rope_angles(torch.arange(tokens)[:, None].expand(-1, 3), config.axes_dims, config.rope_theta)
    rows, lengths = torch.randn(4, pictures, 384).to(dtype), [tokens // pictures] * pictures
    x = torch.randn(tokens, 384).to(dtype).requires_grad_()
    with LiveBytes() as live, lora.beside("layers.0", dtype):
        vectors = of_tokens(rows, lengths) if pictures > 1 else rows[:, 0]
        block(x, rope, lengths, vectors, model.compute).backward(torch.ones_like(x))
    graph = _GRAPH_BYTES[name] + _VECTOR_BYTES * (pictures > 1)
    planned = graph * tokens * 384 + 2 * dtype.itemsize * parameters(config, 4)
    assert 0.9 * planned <= live.peak_bytes <= planned


@pytest.mark.parametrize(("gpu", "gib"), [("RTX 3060 Laptop", 6), ("RTX 4060 Laptop", 8)])
@pytest.mark.parametrize("resolution", [512, 1024])
def test_a_laptop_trains_the_true_model(gpu: str, gib: int, resolution: int) -> None:
    """With 16 GB of RAM; what does not fit passes through."""
    there = machine(find_gpu(gpu), 16 * 10**9)
    ways = ways_to_train(true_model("int8"), TrainJob(resolution, 16), there)
    (plan,) = plan_phases([ways], there, budgets_in_force(there))
    assert plan.peak_vram_bytes < gib * GIB
    wide = ways_to_train(true_model("int8"), TrainJob(resolution, 64), there)
    (wider,) = plan_phases([wide], there, budgets_in_force(there))
    assert len(wider.resident) <= len(plan.resident)


def test_what_is_preserved_passes_once_more() -> None:
    """Of three products with every weight there are three and a half, where half of the pictures are preserved."""
    there, model = machine(find_gpu("RTX 4060 Laptop"), 16 * 10**9), true_model("int8")
    (plain,), (kept,) = (ways_to_train(model, TrainJob(512, 16, 2, preserved=share), there) for share in (0.0, 0.5))
    pairs = [pair for pair in zip(plain.blocks, kept.blocks, strict=True) if pair[0].name.startswith("layers.")]
    assert all(b.work.linear_flops == pytest.approx(a.work.linear_flops * 3.5 / 3) for a, b in pairs)


def test_it_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["plan", "--train", "--gpu", "RTX 3060 Laptop", "--width", "512", "--rank", "8", "--batch", "2"]
    assert run(command) == 0
    out = capsys.readouterr().out
    assert "a LoRA of rank 8, 512x512, 2 a step, RTX 3060 Laptop 6GB" in out and "1000 steps: " in out
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a fox\na hare\n", encoding="utf-8")
    said = []
    for preserve in ([], ["--preserve", "dog"], ["--preserve-prompts", str(prompts)]):
        assert run([*command, *preserve, "--json"]) == 0
        said.append(json.loads(capsys.readouterr().out))
    plain, words, lines = said
    assert [one["preserved"] for one in said] == [0, 48, 2]
    assert words["step_ms"] == lines["step_ms"] > plain["step_ms"]
    assert words["peak_ram_bytes"] > lines["peak_ram_bytes"] > plain["peak_ram_bytes"]
    for alone in (["--rank", "8"], ["--preserve", "dog"]):
        assert run(["plan", "--gpu", "RTX 3060 Laptop", *alone]) == 2
        assert "--preserve-prompts are of a training; add --train" in capsys.readouterr().err

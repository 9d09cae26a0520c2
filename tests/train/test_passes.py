"""Gradients of a LoRA beside frozen weights: those of diffusers and peft on the same weights unpacked."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from threading import Semaphore
from typing import Any
from weakref import ReferenceType, ref

import pytest
import torch
from foreign import write_model
from learning import CPU, Peft, batch_for, learning_lora, transformer
from make_checkpoint import SIZES as MODELS
from marking import always
from oracles import relative_error

from zimage_lite.checkpoint.model_files import ModelFiles, open_model
from zimage_lite.cli import run
from zimage_lite.convert.synthetic import open_synthetic
from zimage_lite.memory.hardware import Hardware
from zimage_lite.memory.machine import Machine
from zimage_lite.memory.placement import GRANULE_BYTES
from zimage_lite.memory.plan import FILE, Plan
from zimage_lite.memory.planner import budgets_in_force, plan_phases
from zimage_lite.memory.workers import HostLink, Threads
from zimage_lite.model.transformer import Modulation, Transformer
from zimage_lite.pipeline.denoise import BLOCKS
from zimage_lite.pipeline.weights import Component, opened
from zimage_lite.plan.job import Job
from zimage_lite.plan.model_sizes import model_of
from zimage_lite.plan.prediction import ways_to_denoise
from zimage_lite.train import passes
from zimage_lite.train.lora import TrainedLora, trained_linears
from zimage_lite.train.passes import Batch, gradients, of_tokens
from zimage_lite.units import round_up

FORMATS = ("bf16", "int8", "int4", "q4_k_m")
SIZES = ((8, 12), (16, 8))
F32, BF16 = torch.float32, torch.bfloat16


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model") / "bf16")


def in_format(model: Path, name: str) -> Path:
    out = model.parent / name
    if not out.exists():
        assert run(["quantize", str(model), "--to", name, "-o", str(out)]) == 0
    return out


Found = tuple[float, dict[str, torch.Tensor]]  # the loss; "module.A", "module.B" -> its gradient


def named(pairs: Mapping[str, tuple[torch.nn.Parameter, ...]]) -> dict[str, torch.Tensor]:
    return {f"{name}.{half}": own.grad for name, pair in pairs.items() for half, own in zip("AB", pair, strict=True)}


def own_gradients(folder: Path, dtype: torch.dtype, **kept: int) -> Found:
    """Of two pictures of different sizes, captions and times at once."""
    model = transformer(folder, dtype)
    lora = learning_lora(model)
    loss = gradients(model, lora, replace(batch_for(model, SIZES, dtype)[0], **kept), dtype, iter)
    return loss, named(lora.pairs)


def peft_gradients(folder: Path, dtype: torch.dtype, **kept: int) -> Found:
    """The same, one picture after the other, beside weights that were unpacked."""
    model = transformer(folder)
    lora = learning_lora(model)
    theirs = Peft(folder, lora, dtype)
    batch, told = batch_for(model, SIZES, F32)
    loss = theirs.loss(replace(batch, **kept), told, dtype)
    loss.backward()
    return loss.item(), named({module: theirs.pair(module) for module in lora.pairs})


@pytest.mark.slow  # importing diffusers and peft
@pytest.mark.parametrize("name", always("int8", of=FORMATS))
def test_gradients_are_those_of_the_unpacked_weights(model: Path, name: str) -> None:
    loss, found = own_gradients(in_format(model, name), F32)
    expected, truth = peft_gradients(in_format(model, name), F32)
    assert loss == pytest.approx(expected, rel=1e-5)
    assert set(found) == set(truth) and len(found) == 2 * 2 * 7  # two layers of seven linears
    for key, gradient in found.items():
        assert relative_error(gradient, truth[key]) <= 1e-4, key


@pytest.mark.slow
@pytest.mark.parametrize("preserved", [1, 2])
def test_what_is_preserved_is_held_to_the_answers_without_the_lora(model: Path, preserved: int) -> None:
    kept = {"preserved": preserved, "weight": 3}
    loss, found = own_gradients(model, F32, **kept)
    expected, truth = peft_gradients(model, F32, **kept)
    assert loss == pytest.approx(expected, rel=1e-5)
    assert all(relative_error(found[key], truth[key]) <= 1e-4 for key in truth)


@pytest.mark.slow
def test_what_is_preserved_teaches_nothing_at_first(model: Path) -> None:
    """To the bit: then both answers come of the same operations."""
    ours = transformer(model)
    lora = TrainedLora(ours, 4, 0, CPU)
    batch = replace(batch_for(ours, SIZES, F32)[0], preserved=2)
    assert gradients(ours, lora, batch, F32, iter) == 0
    assert not any(own.grad.any() for own in lora.parameters if own.grad is not None)


@pytest.mark.full_size
@pytest.mark.parametrize("name", FORMATS)
def test_in_bf16_they_are_as_near_as_those_of_diffusers(model: Path, name: str) -> None:
    """Both against float32, all gradients together: what is rounded elsewhere is not rounded more."""
    folder = in_format(model, name)
    _, truth = own_gradients(folder, F32)
    found = [own_gradients(folder, BF16), peft_gradients(folder, BF16)]
    ours, theirs = (relative_error(joined(own, truth), joined(truth, truth)) for _, own in found)
    assert ours <= 1.5 * theirs <= 0.1


def joined(found: Mapping[str, torch.Tensor], names: Iterable[str]) -> torch.Tensor:
    return torch.cat([found[name].flatten() for name in names])


def component_of(files: ModelFiles, ram_bytes: int | None = None) -> tuple[Component, Plan]:
    there = Machine("test", 10**11, process_bytes=0)
    ways = ways_to_denoise(model_of(files), Job(128, 128, steps=1), there)
    (plan,) = plan_phases([ways], there, budgets_in_force(there, ram_bytes=ram_bytes))
    return Component(Transformer(files.transformer.config), files.transformer, BLOCKS), plan


@pytest.mark.slow
@pytest.mark.parametrize("name", always("int8", of=("bf16", "int8", "q4_k_m")))
def test_streamed_gradients_are_the_plain_ones_to_the_bit(model: Path, name: str) -> None:
    """Of two steps, within room for two blocks; the plain ones by one backward pass through all that is bound."""
    folder = in_format(model, name)
    ours = transformer(folder)
    plain, batch = learning_lora(ours), batch_for(ours, SIZES, F32)[0]
    with ExitStack() as stack:
        for i in range(len(ours.layers)):
            stack.enter_context(plain.beside(f"layers.{i}", F32))
        vectors = replace(batch, modulations=[expanded(batch)])
        loss = batch.loss(ours(batch.noisy(F32), list(batch.captions), vectors.modulation))
        loss.backward()

    component, plan = component_of(open_model(folder))
    _, plan = component_of(open_model(folder), sum(plan.fixed.values()) + 2 * GRANULE_BYTES)
    assert not plan.resident and plan.slots <= 2
    streamed = learning_lora(component.model)
    refiners = frozenset(name for name in plan.homes if name.startswith("noise_refiner"))
    idle = [frozenset[str](), refiners] * 2
    with opened(component, plan, Hardware(CPU, F32)) as weights, weights.passes(4, idle, turning=True) as stream:
        for _ in range(2):
            for parameter in streamed.parameters:
                parameter.grad = None
            assert gradients(component.model, streamed, batch, F32, stream) == loss.item()
    found, truth = named(streamed.pairs), named(plain.pairs)
    assert all(torch.equal(found[key], truth[key]) for key in truth)
    assert all(linear.side is None for linear in trained_linears(component.model).values())


def test_adaln_vectors_of_all_tokens_are_not_kept(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For two pictures, one of them preserved, they are four times what a block gets: none waits for the way back."""
    ours, made, waiting = transformer(model), list[ReferenceType[torch.Tensor]](), list[int]()

    def noted(rows: torch.Tensor, lengths: Sequence[int]) -> torch.Tensor:
        found = of_tokens(rows, lengths)
        made.append(ref(found))
        return found

    def stream(blocks: Iterable[torch.nn.Module]) -> Iterable[torch.nn.Module]:
        brought = list(blocks)
        if brought[0] is ours.layers[-1]:
            waiting.append(sum(one() is not None for one in made))
        return brought

    monkeypatch.setattr(passes, "of_tokens", noted)
    batch = replace(batch_for(ours, SIZES, F32)[0], preserved=1)
    gradients(ours, learning_lora(ours), batch, F32, stream)
    assert len(made) > len(ours.layers) and waiting == [0]


def test_a_graph_outlives_the_copies_of_other_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Over a link the next block is copied while this one's gradient is computed, and autograd counts the changes of
    what a graph keeps: here norms, which lie in float32 where the block was copied to."""
    transformer, encoder, vae = MODELS["tiny"]
    configs = transformer, replace(encoder, vocab_size=640), vae
    component, plan = component_of(open_synthetic("synthetic:q4_k_m", configs=configs))
    homes, biggest = dict.fromkeys(plan.homes, FILE), max(plan.sizes.values())
    plan = replace(plan, homes=homes, slots=2, slot_bytes=biggest, staging=2, staging_bytes=biggest)
    allowed, asked, copy, ask = Semaphore(1), list[Any](), HostLink.copy, Threads.copy
    monkeypatch.setattr(HostLink, "copy", lambda *given: allowed.acquire(timeout=5) and copy(*given))
    monkeypatch.setattr(Threads, "copy", lambda *given: asked.append(ask(*given)) or asked[-1])
    blocks = [component.blocks[name] for name in homes]
    with opened(component, plan, Hardware(CPU, F32)) as weights, weights.passes(1) as stream:
        for number, block in enumerate(stream(blocks), start=1):
            norm: Any = block.attention_norm1
            x = torch.randn(2, norm.weight.numel(), requires_grad=True)
            y = norm(x).sum()
            allowed.release()
            for part in asked[number] if number < len(blocks) else ():
                part.result()
            y.backward()
            assert x.grad is not None and torch.isfinite(x.grad).all()


def expanded(batch: Batch) -> Modulation:
    """Of all tokens, for blocks that take one row for all."""
    whole = batch.modulation
    images = [round_up(latent[0].numel() // 4, 32) for latent in batch.latents]
    lengths = [image + len(caption.tokens) for image, caption in zip(images, batch.captions, strict=True)]
    return Modulation(of_tokens(whole.noise_refiner, images), of_tokens(whole.layers, lengths), whole.final)

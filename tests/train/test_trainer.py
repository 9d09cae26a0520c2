"""Whole trainings: the loss of diffusers and peft, step by step."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import cast

import pytest
import torch
from learning import Peft
from lessons import FEW, pipeline_of, write_lessons
from marking import always
from trained_loras import save_lora

from zimage_lite.api import quantize
from zimage_lite.checkpoint.model_files import open_model
from zimage_lite.config import Lora, TrainOptions
from zimage_lite.memory.machine import Machine
from zimage_lite.memory.placement import GRANULE_BYTES
from zimage_lite.memory.planner import budgets_in_force, plan_phases
from zimage_lite.plan.retry import Ways
from zimage_lite.plan.training import ways_to_train
from zimage_lite.train.dataset import examples_in
from zimage_lite.train.optimizer import WEIGHT_DECAY, AdamW
from zimage_lite.train.passes import Batch
from zimage_lite.train.trainer import LONGEST_GRADIENT, Trainer

FIFTY = replace(FEW, steps=50, rate=1e-2, rate_schedule="cosine")


def trainer_of(
    model: Path, folder: Path, options: TrainOptions, assistant: tuple[Lora, ...] = (), preserved: int = 0
) -> Trainer:
    examples = examples_in(write_lessons(folder), options.trigger)
    made = Trainer(pipeline_of(model), examples, options, assistant, preserved)
    made.prepare()
    made.begin()
    return made


@pytest.mark.slow
@pytest.mark.parametrize("timesteps", always("sigmoid", of=("sigmoid", "uniform")))
def test_losses_are_those_of_diffusers_and_peft(pupil: Path, tmp_path: Path, timesteps: str) -> None:
    """50 steps from the same start, with the same draws: pictures of two sizes, two at a time. 1e-4 of a loss near 2
    is what rounding comes to on the way."""
    ours = trainer_of(pupil, tmp_path / "lessons", replace(FIFTY, timesteps=timesteps))
    theirs = Peft(pupil, ours.lora)
    optimizer = torch.optim.AdamW(theirs.parameters, FIFTY.rate, weight_decay=WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=50)
    told = ours.pipeline.encode([example.caption for example in ours.examples])
    losses = list(ours.steps(0, 50))
    for step, loss in enumerate(losses):
        chosen, sigmas = ours.draws.chosen(step), ours.draws.sigmas(step)
        latents = [ours._latents[place] for place in chosen]
        noises = ours.draws.noises(step, latents)
        optimizer.zero_grad()
        expected = theirs.loss(Batch(latents, noises, sigmas, [], []), [told[place].clone() for place in chosen])
        expected.backward()
        torch.nn.utils.clip_grad_norm_(theirs.parameters, LONGEST_GRADIENT)
        optimizer.step()
        schedule.step()
        assert abs(loss - expected.item()) <= 1e-4 * expected.item(), step
    assert sum(losses[-10:]) < 0.9 * sum(losses[:10])  # else little would have been compared


@pytest.mark.slow
def test_streamed_it_learns_the_same_to_the_bit(pupil: Path, tmp_path: Path) -> None:
    """As planned within room for two blocks, over the end of a stretch of steps, a picture in each preserved."""
    free, tight = (trainer_of(pupil, tmp_path / "lessons", FEW, preserved=1) for _ in range(2))
    there = Machine("test", 10**11, process_bytes=0)
    ways = ways_to_train(tight.pipeline.sizes, tight.job, there)
    room = sum(ways[0].fixed.values()) + 2 * GRANULE_BYTES
    (plan,) = plan_phases([ways], there, budgets_in_force(there, ram_bytes=room))
    tight.ways = Ways(ways, plan)
    assert not plan.resident and not free.ways.plan.streamed
    assert [*free.steps(0, 3), *free.steps(3, 5)] == [*tight.steps(0, 3), *tight.steps(3, 5)]
    assert all(map(torch.equal, free.lora.parameters, tight.lora.parameters))


def test_what_is_kept_is_what_was_planned(pupil: Path, tmp_path: Path) -> None:
    """Tensors between two steps, of a training that is shorter than what is made at once."""
    trainer = trainer_of(pupil, tmp_path / "lessons", FEW)
    list(trainer.steps(0, 1))
    planned, optimizer = trainer.ways.plan.fixed, cast(AdamW, trainer.optimizer)
    kept = {
        "LoRA": trainer.lora.parameters,
        "its gradients": [own.grad for own in trainer.lora.parameters],
        "its optimizer": [moment for pair in optimizer.moments for moment in pair],
        "latents": trainer._latents,
        "captions": [part for told in trainer._captions.values() for part in (told.tokens, *told.rope)],
        "adaLN vectors": [part for own in trainer._times[1] for part in (own.noise_refiner, own.layers, own.final)],
    }
    for name, tensors in kept.items():
        assert 0.3 * planned[name] <= sum(tensor.nbytes for tensor in tensors) <= planned[name], name


@pytest.mark.slow
def test_an_assistant_is_as_if_it_were_part_of_the_weights(tiny: Path, tmp_path: Path) -> None:
    """Which it becomes here by `quantize --merge-lora`, rounded to 11 bits, adaLN included."""
    config = open_model(tiny).transformer.config
    lora = save_lora(tmp_path / "assistant.safetensors", config, ends=("to_q", "w2", "adaLN_modulation.0"))
    merged = tmp_path / "merged"
    quantize(tiny, merged, "f16", merge_loras=[str(lora)], text_encoder_to="keep")
    few = replace(FEW, steps=2)
    beside = list(trainer_of(tiny, tmp_path / "a", few, (Lora(str(lora)),)).steps(0, 2))
    within, without = (list(trainer_of(model, tmp_path / "a", few).steps(0, 2)) for model in (merged, tiny))
    assert beside == pytest.approx(within, rel=1e-4)
    assert abs(beside[0] - without[0]) > 5e-3 * without[0]  # 8e-3 here


@pytest.mark.full_size
def test_8_bits_learn_alike(pupil: Path, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    plain, short = (
        list(trainer_of(pupil, tmp_path / name, replace(FEW, optimizer=name)).steps(0, 7))
        for name in ("adamw", "adamw8bit")
    )
    assert short != plain and short == pytest.approx(plain, rel=0.02)

"""What the time does to the blocks, computed beforehand; and who is to blame when a step overflows."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from oracles import bound, relative_error, transformer_inputs

from zimage_lite.checkpoint.checkpoint import open_checkpoint
from zimage_lite.memory.hardware import Hardware
from zimage_lite.model.linear import release, shapes
from zimage_lite.model.transformer import Modulation, Transformer, is_time_weight
from zimage_lite.pipeline.weights import read_into

TIMES = torch.tensor([0.0, 0.3, 0.9])
CPU = Hardware(torch.device("cpu"), torch.float32)


def tensors(modulation: Modulation) -> tuple[torch.Tensor, ...]:
    return modulation.noise_refiner, modulation.layers, modulation.final


def test_modulations_are_those_of_diffusers(diffusers_pipeline, diffusers_folder: Path) -> None:
    theirs, folder = diffusers_pipeline.transformer, diffusers_folder / "transformer"
    ours = bound(Transformer(open_checkpoint(folder).config), folder).modulations(TIMES, torch.float32)
    assert len(ours) == len(TIMES)
    for time, modulation in zip(TIMES, ours, strict=True):
        with torch.inference_mode():
            condition = theirs.t_embedder(time[None] * theirs.t_scale)
            for blocks, rows in ((theirs.noise_refiner, modulation.noise_refiner), (theirs.layers, modulation.layers)):
                for block, row in zip(blocks, rows, strict=True):
                    vectors = block.adaLN_modulation(condition).view(4, -1)
                    truth = torch.stack((1 + vectors[0], vectors[1].tanh(), 1 + vectors[2], vectors[3].tanh()))
                    assert relative_error(row, truth) <= 1e-6
            truth = 1 + theirs.all_final_layer["2-1"].adaLN_modulation(condition)[0]
        assert relative_error(modulation.final, truth) <= 1e-6


@torch.inference_mode()
def test_time_weights_and_the_others_are_never_bound_together(diffusers_folder: Path) -> None:
    """Each half of the weights is enough for its half of the work, and the result is the same to the bit."""
    folder = diffusers_folder / "transformer"
    checkpoint = open_checkpoint(folder)
    whole = bound(Transformer(checkpoint.config), folder)
    (latent,), features, _ = transformer_inputs(26, 42, (9,))
    wanted = whole.modulations(TIMES, torch.float32)
    truth = whole([latent], whole.refine_captions(features), wanted[1])[0]

    model = Transformer(checkpoint.config)
    stored = checkpoint.restricted_to(shapes(model)).tensors
    names = {block: name for name, block in model.named_modules()}

    def stream(blocks: Iterable[torch.nn.Module]) -> Iterator[torch.nn.Module]:
        for block in blocks:
            own = checkpoint.under(names[block])
            read_into(block, {name: tensor for name, tensor in own.items() if is_time_weight(name)}, CPU)
            yield block
            release(block)

    time_weights = {name for name in stored if is_time_weight(name)}
    in_blocks = {name for name in time_weights if name.startswith(("noise_refiner.", "layers."))}
    assert len(in_blocks) == 2 * 5 and len(time_weights - in_blocks) == 4 + 2  # weight and bias; two linears, one
    read_into(model, {name: stored[name] for name in time_weights - in_blocks}, CPU)
    modulations = model.modulations(TIMES, torch.float32, stream)
    release(model)
    for ours, theirs in zip(modulations, wanted, strict=True):
        assert all(map(torch.equal, tensors(ours), tensors(theirs)))

    read_into(model, {name: tensor for name, tensor in stored.items() if name not in time_weights}, CPU)
    modulation = modulations[1].to(torch.device("cpu"))
    assert torch.equal(model([latent], model.refine_captions(features), modulation)[0], truth)

"""ControlNets in every format: what gets how many bits, and that what is written is the same ControlNet."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from control_files import save_control, tiny_config
from controls import make_control, our_answer, ours, their_weights
from oracles import bound, relative_error, transformer_inputs
from planned_files import n_bytes
from safetensors.torch import save_file

from zimage_lite.checkpoint.checkpoint import open_checkpoint
from zimage_lite.checkpoint.controlnets import names_of, settings
from zimage_lite.config import ControlConfig
from zimage_lite.convert.catalog import without_files
from zimage_lite.convert.complete import open_complete
from zimage_lite.convert.output_file import OutTensor, output_tensors
from zimage_lite.convert.quantize import quantize
from zimage_lite.convert.recipe import target, targets
from zimage_lite.convert.synthetic import synthetic_checkpoint
from zimage_lite.model.linear import shapes
from zimage_lite.model.transformer import Transformer

LITE = ControlConfig(control_layers_places=(0, 10, 20))


def planned(to: str, config: ControlConfig = LITE) -> dict[str, OutTensor]:
    return {tensor.name: tensor for tensor in output_tensors(without_files(config), target(to))}


@pytest.mark.parametrize("to", targets())
def test_hints_have_8_bits_or_more(to: str) -> None:
    main = target(to).recipes["transformer"].format
    for name, tensor in planned(to).items():
        bits = tensor.format.bits_per_weight()
        if "_proj.weight" in name:
            assert 8 <= bits <= 16.1, name
        elif "control_all_x_embedder" in name:
            assert bits >= 16, name
        elif ".feed_forward.w1." in name:  # in blocks of the refiner, too
            assert tensor.format.name == main


def test_sizes_of_int8_and_q4_k_m() -> None:
    """By hand, of 1008.3 million weights: a byte each; 4.5 bits each, of q, k and v 5.5, of w2 6.6 and of hints 8.5."""
    assert n_bytes(planned("int8")) == pytest.approx(1.01e9, rel=0.01)
    assert 0.62e9 < n_bytes(planned("q4_k_m")) < 0.72e9


def test_what_it_wants_is_known_by_any_name(tmp_path: Path) -> None:
    """Also in a folder, and quantized, and once more, under names that say nothing."""
    source = save_control(tmp_path / "Fun-Union-2.1-8steps.safetensors", tiny_config())
    quantize(source, tmp_path / "a.gguf", "q8_0")
    (tmp_path / "net").mkdir()
    quantize(tmp_path / "a.gguf", tmp_path / "net" / "b.safetensors", "int8")
    for place in (source, tmp_path / "a.gguf", tmp_path / "net"):
        found = open_complete(place)
        assert settings(found.config, names_of(found)).steps == 8


@pytest.fixture(scope="module")
def source(diffusers_pipeline: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("control") / "control.safetensors"
    save_file(their_weights(make_control(diffusers_pipeline.transformer, "2.1")), path)
    return path


@pytest.mark.parametrize("to", ["int8", "int4", "q8_0", "q4_k_m", "nf4", "qint8", "bf16"])
def test_what_is_written_is_the_same(source: Path, tmp_path: Path, to: str) -> None:
    """Of normal values the largest of a row or block is about 3 deviations, and a rounding to 127 steps wrong by
    3 / 127 / sqrt(12) = 0.7 % of one, to 7.5 steps by 12 %."""
    (written,) = quantize(source, tmp_path / f"out{target(to).suffix}", to)
    found, given = open_complete(written.path), open_complete(source)
    assert (found.component, found.config) == ("controlnet", given.config)
    assert found.config.version == "2.1 lite"
    for name, tensor in given.tensors.items():
        coarse = found.tensors[name].format.bits_per_weight() < 8
        error = relative_error(found.tensors[name].read_float(), tensor.read_float())
        assert error <= (0.13 if coarse else 0.012), name


def test_an_untrained_refiner_is_left_out(source: Path, tmp_path: Path) -> None:
    """And what is written says so without it."""
    weights = {name: tensor.read_float() for name, tensor in open_checkpoint(source).tensors.items()}
    weights |= {name: torch.zeros_like(t) for name, t in weights.items() if name.startswith("control_noise_refiner.")}
    weights = {name: t.view(open_checkpoint(source).tensors[name].shape).contiguous() for name, t in weights.items()}
    save_file(weights, tmp_path / "2.0.safetensors")
    notes = list[str]()
    (written,) = quantize(tmp_path / "2.0.safetensors", tmp_path / "out.safetensors", "int8", note=notes.append)
    found = open_complete(written.path)
    assert found.config.add_control_noise_refiner == "control_layers" and not found.unused
    assert "left out what the model has no use for" in notes[0]


def test_made_up_weights_are_a_controlnet() -> None:
    """For benchmarks: of the true size, without a file."""
    found = synthetic_checkpoint(LITE, target("int8"))
    assert (found.component, found.config) == ("controlnet", LITE)
    assert found.nbytes == n_bytes(planned("int8"))


@pytest.mark.slow
def test_8_bits_draw_nearly_the_same(
    diffusers_pipeline: Any, diffusers_folder: Path, source: Path, tmp_path: Path
) -> None:
    """Read back, bound and computed with: 0.7 % of error in a weight are as much in a product, ten in a row 2 %."""
    (written,) = quantize(source, tmp_path / "out.safetensors", "int8")
    folder = diffusers_folder / "transformer"
    model = bound(Transformer(open_checkpoint(folder).config), folder)
    assert isinstance(model, Transformer)
    latents, features, _ = transformer_inputs(16, 24, (9,))
    contexts = [torch.randn(33, 16, 24)]
    weights = their_weights(make_control(diffusers_pipeline.transformer, "2.1"))
    (truth,) = our_answer(model, ours("2.1", weights), latents, features, contexts)
    stored = open_complete(written.path).tensors
    read = {name: stored[name].read_float().view(shape) for name, shape in shapes(ours("2.1", weights)).items()}
    (found,) = our_answer(model, ours("2.1", read), latents, features, contexts)
    assert 0 < relative_error(found, truth) <= 0.02

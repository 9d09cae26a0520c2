"""Who is to blame for numbers that are not finite."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from oracles import bound, transformer_inputs
from safetensors.torch import load_file, save_file

from zimage_lite.checkpoint.checkpoint import open_checkpoint
from zimage_lite.checkpoint.model_files import open_model
from zimage_lite.config import GenerateOptions, RuntimeOptions
from zimage_lite.errors import UserError
from zimage_lite.model.transformer import Modulation, Transformer
from zimage_lite.pipeline.drawing import Pipeline

TIMES = torch.tensor([0.0, 0.3, 0.9])


@torch.inference_mode()
def test_what_is_watched(diffusers_folder: Path) -> None:
    folder = diffusers_folder / "transformer"
    model = bound(Transformer(open_checkpoint(folder).config), folder)
    (latent,), features, _ = transformer_inputs(32, 32, (9,))
    seen: dict[str, torch.Tensor] = {}
    captions, (modulation,) = model.refine_captions(features), model.modulations(TIMES[:1], torch.float32)
    model([latent], captions, modulation, watch=lambda name, x: seen.update({name: x.clone()}))
    blocks = ["noise_refiner.0", "noise_refiner.1", "layers.0", "layers.1", "layers.2"]
    assert list(seen) == ["embedder", *blocks, "final layer"]
    # The first layer, run alone on what it is said to get, gives what the second one is said to get.
    x = torch.cat([seen["noise_refiner.1"], captions[0].tokens])
    cos, sin = model.rope(model.positions(latent, captions[0]))
    rope = torch.cat([cos, captions[0].rope[0]]), torch.cat([sin, captions[0].rope[1]])
    assert torch.equal(model.layers[0](x, rope, [len(x)], modulation.layers[0]), seen["layers.0"])


@pytest.mark.parametrize(
    ("dtype", "advice"),
    [("fp16", "try --dtype bf16 or --dtype fp32"), ("bf16", "try --dtype fp32"), ("fp32", "use another checkpoint")],
)
def test_a_block_that_overflows_is_named(tiny: Path, tmp_path: Path, refused: Any, dtype: str, advice: str) -> None:
    (file,) = (tiny / "transformer").glob("*.safetensors")
    weights = load_file(file)
    weights["layers.1.ffn_norm2.weight"].fill_(3e38)  # finite, but normed values reach 3
    save_file(weights, tmp_path / "huge.safetensors")
    line = refused(
        "generate", "cat", "--model", tiny, "--transformer", tmp_path / "huge.safetensors", "--width", 64,
        "--height", 64, "--steps", 3, "--device", "cpu", "--dtype", dtype, "-o", tmp_path / "out.png",
    )  # fmt: skip
    assert "step 1 of 3: layers.1 gives NaN or infinite values, though all weights are finite; " in line
    assert advice in line


def test_a_later_step_that_overflows_is_named(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    honest = Transformer.modulations

    def huge_in_the_second(*args: Any) -> list[Modulation]:
        first, second, *others = honest(*args)
        layers = second.layers.clone()
        layers[2] *= 3e38
        return [first, replace(second, layers=layers), *others]

    monkeypatch.setattr(Transformer, "modulations", huge_in_the_second)
    pipeline = Pipeline(open_model(tiny), RuntimeOptions("cpu"))
    with pytest.raises(UserError, match=r"^step 2 of 4: layers\.2 gives NaN or infinite values"):
        pipeline.generate([GenerateOptions("cat", 64, 64, steps=4)])

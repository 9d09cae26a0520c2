"""Pictures with LoRAs: on any weights, in any memory, changing from one to the next, and none of it stays behind."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from budgeted import CAT, difference, free, held_bytes, tight
from marking import always
from oracles import psnr
from torch import Tensor
from trained_loras import save_lora

from zimage_lite import load, quantize
from zimage_lite.adapters.joined import JoinedModule
from zimage_lite.config import GenerateOptions, Lora
from zimage_lite.memory.meter import rss_bytes
from zimage_lite.memory.plan import Phase
from zimage_lite.model.transformer import Transformer
from zimage_lite.pictures.saving import recipe_of
from zimage_lite.pipeline import denoise as denoising
from zimage_lite.plan.prediction import ways_to_denoise

pytestmark = pytest.mark.slow  # whole pictures

STYLE, OTHER = "style.safetensors", "other.safetensors"


@pytest.fixture(scope="module")
def loras(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, config = tmp_path_factory.mktemp("loras"), free(tiny).model.transformer.config
    save_lora(folder / STYLE, config, rank=4)
    save_lora(folder / OTHER, config, rank=20, seed=1, ends=("to_q", "to_v", "w2"))
    return folder


def with_loras(request: GenerateOptions, *loras: tuple[Path, float]) -> GenerateOptions:
    return replace(request, loras=tuple(Lora(str(path), strength) for path, strength in loras))


def drawn(model: Path, *requests: GenerateOptions, **options: str) -> list[Tensor]:
    """In a pipeline of their own."""
    return load(model, device="cpu", **options).generate(requests)


def test_a_lora_is_what_it_is_merged(tiny: Path, loras: Path, tmp_path: Path) -> None:
    """Every linear of the model is changed, those of the time and of no block among them."""
    merged = tmp_path / "merged"
    quantize(tiny, merged, "bf16", merge_loras=[Lora(str(loras / STYLE), 0.7)])
    wanted, plain = (drawn(model, CAT)[0] for model in (merged, tiny))
    (got,) = drawn(tiny, with_loras(CAT, (loras / STYLE, 0.7)))
    # bfloat16 keeps 8 bits of the merged weights: 0.2 % of each, where the LoRA is 5 %.
    assert psnr(got, wanted, 255) > psnr(plain, wanted, 255) + 15


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_in_16_bits_it_is_the_same_lora(tiny: Path, loras: Path, dtype: str) -> None:
    """16 bits with a LoRA beside float32 with it: as far apart as they are without."""
    plain, changed = (
        [drawn(tiny, request, dtype=own)[0] for own in (dtype, "fp32")]
        for request in (CAT, with_loras(CAT, (loras / STYLE, 1.0)))
    )
    assert psnr(*changed, 255) > psnr(*plain, 255) - 3
    assert psnr(*changed, 255) > psnr(plain[0], changed[0], 255) + 6


@pytest.mark.parametrize("compute", ["16bit", "int8"])
def test_nothing_stays_behind(tiny: Path, loras: Path, tmp_path: Path, compute: str) -> None:
    """Each of one pipeline's pictures is that of a pipeline which has drawn nothing else, to the bit."""
    model = tmp_path / "int8"
    quantize(tiny, model, "int8")
    sets = [(), ((loras / STYLE, 1.0),), ((loras / OTHER, -0.5), (loras / STYLE, 0.3)), ((loras / STYLE, 0.0),), ()]
    requests = [with_loras(CAT, *chosen) for chosen in sets]
    alone = [drawn(model, request, compute=compute)[0] for request in requests]
    together = drawn(model, *requests, compute=compute)
    one = load(model, device="cpu", compute=compute)
    in_turn = [one.generate([request])[0] for request in requests]
    for i, wanted in enumerate(alone):
        assert torch.equal(together[i], wanted) and torch.equal(in_turn[i], wanted), i
    assert torch.equal(alone[0], alone[3]) and torch.equal(alone[0], alone[4])
    assert difference(alone[0], alone[1]) > 2 and difference(alone[1], alone[2]) > 2


def test_in_8_bits_it_is_the_same_lora(tiny: Path, loras: Path, tmp_path: Path) -> None:
    """int8 products with a LoRA beside 16-bit ones with it: as far apart as they are without."""
    quantize(tiny, tmp_path / "int8", "int8")
    plain, changed = (
        [drawn(tmp_path / "int8", request, compute=bits)[0] for bits in ("int8", "16bit")]
        for request in (CAT, with_loras(CAT, (loras / STYLE, 1.0)))
    )
    assert psnr(*changed, 255) > psnr(*plain, 255) - 3
    assert psnr(*changed, 255) > psnr(plain[0], changed[0], 255) + 6


@pytest.mark.parametrize("keeps", [True, False])
def test_blocks_that_come_and_go(
    tiny: Path, exact: None, loras: Path, monkeypatch: pytest.MonkeyPatch, keeps: bool
) -> None:
    """With a budget that holds two blocks: what is added to them is made once, or comes with them in each step. What is
    planned holds what is read, whose places are cut from the plan."""
    made: Counter[str] = Counter()

    def counted(joined: JoinedModule, buffer: Tensor) -> None:
        made[joined.module] += 1
        read_to(joined, buffer)

    read_to, request = JoinedModule.read_to, with_loras(CAT, (loras / STYLE, 1.0), (loras / OTHER, 0.5))
    wanted = free(tiny).generate([request])
    monkeypatch.setattr(denoising, "ways_to_denoise", partial(_ways, ways_to_denoise, keeps))
    streaming = tight(tiny, request=request)
    monkeypatch.setattr(JoinedModule, "read_to", counted)
    for _ in range(2):
        made.clear()
        assert torch.equal(*wanted, *streaming.generate([request]))
        assert {made[f"{name}.attention.to_q"] for name in streaming.plans["denoise"].sizes} == {1 if keeps else 2}
    plain = free(tiny)
    plain.generate([CAT])
    own, planned = plain.plans["denoise"].sizes, streaming.plans["denoise"]
    dim = streaming.model.transformer.config.dim
    linears = 4 * 4 * (4 + 4) * dim  # at least q, k, v and out of each block, float32, rank 4
    more = {name: planned.sizes[name] - size for name, size in own.items()}
    assert planned.fixed["adapters"] >= len(own) * linears if keeps else min(more.values()) >= linears


def _ways(real: Any, keeps: bool, *args: Any) -> list[Phase]:
    ways = real(*args)
    return [way for way in ways if way.keeps == keeps] or ways


@pytest.mark.parametrize("many", [24, pytest.param(1000, marks=pytest.mark.full_size)])
def test_many_pictures_take_no_more_memory(tiny: Path, loras: Path, many: int) -> None:
    sets = [((loras / STYLE, 1.0),), ((loras / OTHER, 0.5), (loras / STYLE, 1.0)), ()]
    pipeline, sizes = free(tiny), []
    for number in range(many):
        pipeline.generate([replace(with_loras(CAT, *sets[number % 3]), steps=1, seed=number)])
        sizes.append((rss_bytes(), held_bytes()))
    early, late = (max(rss for rss, _ in part) for part in (sizes[6:18], sizes[-12:]))
    assert late < 1.01 * early
    assert sizes[many // 3 * 3 - 1][1] <= sizes[8][1]  # of the same set


def test_weights_are_released(tiny: Path, loras: Path) -> None:
    pipeline = free(tiny)
    pipeline.generate([with_loras(CAT, (loras / STYLE, 1.0))])
    transformer = pipeline.denoising.transformer
    assert isinstance(transformer, Transformer)
    assert all(getattr(module, "side", None) is None for module in transformer.modules())


@pytest.mark.parametrize(
    "to", always("q4_0", "int8", "int4", of=["q8_0", "q4_0", "q4_k_m", "int8", "int4", "nf4", "fp8"])
)
def test_every_format_takes_it(loras: Path, tiny: Path, tmp_path: Path, to: str) -> None:
    """The change that a LoRA makes is that on 16-bit weights, but for what the format itself changes."""
    quantize(tiny, tmp_path / to, to)
    request = with_loras(CAT, (loras / STYLE, 1.0))
    before, after = (drawn(tmp_path / to, one, compute="16bit")[0].float() for one in (CAT, request))
    plain, wanted = (drawn(tiny, one)[0].float() for one in (CAT, request))
    change, truth = (after - before).flatten(), (wanted - plain).flatten()
    assert torch.nn.functional.cosine_similarity(change, truth, dim=0) > 0.5


def test_the_command_says_and_writes_it_down(loras: Path, tiny: Path, tmp_path: Path, capsys) -> None:
    from zimage_lite.cli import run

    out = tmp_path / "out.png"
    size = ("--width", "64", "--height", "48", "--steps", "1", "--device", "cpu")
    prompt = "a cat <lora:style:0.5> asleep"
    assert run(["generate", prompt, "--lora-dir", str(loras), "--model", str(tiny), "-o", str(out), *size]) == 0
    assert "note: style: LoRA on " in capsys.readouterr().err
    recipe = recipe_of(out)
    assert recipe["prompt"] == "a cat asleep"
    (lora,) = recipe["loras"]
    assert (lora["name"], lora["strength"]) == ("style", 0.5) and len(lora["sha256"]) == 64

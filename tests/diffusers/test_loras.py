"""LoRAs by diffusers' names: what they do is what diffusers does with them, in all spellings that we know."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from oracles import psnr
from safetensors.torch import load_file, save_file
from trained_loras import save_lora

from zimage_lite.errors import UserError

diffusers = pytest.importorskip("diffusers")

pytestmark = pytest.mark.slow  # loads diffusers, which takes seconds

LoRA = Callable[..., Path]


@pytest.fixture
def lora(theirs: Any, ours: Any, tmp_path: Path) -> LoRA:
    """Makes one, in a file of that name. It takes what diffusers has been taught before off it."""
    theirs.unload_lora_weights()

    def made(name: str, seed: int = 0, ends: tuple[str, ...] = ("to_q", "to_v", "to_out.0", "w1", "w2")) -> Path:
        return save_lora(tmp_path / name, ours.zimage_lite.model.transformer.config, seed=seed, ends=ends)

    return made


def test_two_loras_with_their_strengths(theirs, ours, draw, lora) -> None:
    pytest.importorskip("peft")
    plain, drawn = draw(ours), []
    files = {"first": lora("a.safetensors"), "second": lora("b.safetensors", 1)}
    for pipe in (theirs, ours):
        for name, file in files.items():
            pipe.load_lora_weights(str(file), adapter_name=name)
        alone = draw(pipe)  # the second
        pipe.set_adapters(["first", "second"], [2.5, -3.0])
        both = draw(pipe)
        half = draw(pipe, joint_attention_kwargs={"scale": 0.5})
        pipe.disable_lora()
        off = draw(pipe)
        pipe.enable_lora()
        pipe.delete_adapters("second")
        one = draw(pipe)
        pipe.unload_lora_weights()
        drawn.append([alone, both, half, off, one, draw(pipe)])
    for number, (truth, own) in enumerate(zip(*drawn, strict=True)):
        assert psnr(own, truth, 1) >= 80, number
        assert (psnr(own, plain, 1) < 60) == (number not in (3, 5)), number


def test_a_spelling_that_diffusers_does_not_know(ours, draw, lora, tmp_path) -> None:
    """As musubi writes it: no dots, and a plain alpha."""
    file = lora("a.safetensors")
    ours.load_lora_weights(file)
    truth = draw(ours)
    respelt = {}
    for name, tensor in load_file(file).items():
        module, _, side = name.removeprefix("diffusion_model.").partition(".lora_")
        half = {"A.weight": "lora_down.weight", "B.weight": "lora_up.weight"}[side]
        respelt[f"lora_unet_{module.replace('.', '_')}.{half}"] = tensor
        respelt[f"lora_unet_{module.replace('.', '_')}.alpha"] = torch.tensor(8.0)
    (tmp_path / "folder").mkdir()
    save_file(respelt, tmp_path / "folder" / "b.safetensors")
    ours.load_lora_weights(tmp_path / "folder", weight_name="b.safetensors")
    assert psnr(draw(ours), truth, 1) >= 60


def test_names_as_diffusers_gives_them(theirs, ours, lora) -> None:
    pytest.importorskip("peft")
    file = str(lora("a.safetensors", ends=("to_q",)))
    found = []
    for pipe in (theirs, ours):
        seen = [(pipe.get_active_adapters(), pipe.get_list_adapters())]
        steps: list[Callable[[Any], Any]] = [
            lambda pipe: pipe.load_lora_weights(file),
            lambda pipe: pipe.load_lora_weights(file, adapter_name="b"),
            lambda pipe: pipe.load_lora_weights(file),
            lambda pipe: pipe.set_adapters(["b", "default_0"], 0.5),
            lambda pipe: pipe.delete_adapters("b"),
            lambda pipe: pipe.unload_lora_weights(),
        ]
        for step in steps:
            step(pipe)
            seen.append((pipe.get_active_adapters(), pipe.get_list_adapters()))
        found.append(seen)
    assert found[0] == found[1]


def test_pipelines_of_diffusers_share_them(ours, lora) -> None:
    """Those that `from_pipe` of diffusers makes, too; which read files of LoRAs in a way of their own."""
    pytest.importorskip("peft")
    file = str(lora("a.safetensors"))
    made = diffusers.ZImageImg2ImgPipeline.from_pipe(ours)
    ours.load_lora_weights(file, adapter_name="a")
    ours.load_lora_weights(file, adapter_name="b")
    assert made.get_list_adapters() == {"transformer": ["a", "b"]}
    made.set_adapters("a", 0.3)
    assert ours.get_active_adapters() == ["a"] and ours.transformer.loras.named["a"].strength == 0.3
    made.unload_lora_weights()
    assert not ours.get_list_adapters()
    with pytest.raises(UserError, match=r"load_lora_weights of zimage_lite\.diffusers' pipelines"):
        made.load_lora_weights(file)


REFUSED: dict[str, tuple[Callable[[Any, Path], Any], str]] = {
    "a name twice": (lambda pipe, file: pipe.load_lora_weights(file, adapter_name="a"), "'a' is there already"),
    "an unknown name": (lambda pipe, file: pipe.set_adapters("c"), "got c, expected of a"),
    "one weight for two": (lambda pipe, file: pipe.set_adapters("a", [1.0, 2.0]), "expected 1, one for each"),
    "weights of parts": (lambda pipe, file: pipe.set_adapters("a", {"unet": 0.5}), "adapter_weights"),
    "too strong": (lambda pipe, file: pipe.set_adapters("a", 1e6), "strength"),
    "no LoRA": (lambda pipe, file: pipe.load_lora_weights(file.with_name("none.safetensors")), "none.safetensors"),
    "tensors": (lambda pipe, file: pipe.load_lora_weights(load_file(file)), "a dict of tensors"),
    "swapping": (lambda pipe, file: pipe.load_lora_weights(file, hotswap=True), "hotswap"),
    "a revision": (lambda pipe, file: pipe.load_lora_weights(file, revision="main"), "revision"),
    "merging": (lambda pipe, file: pipe.fuse_lora(), "--merge-lora"),
    "other attention arguments": (
        lambda pipe, file: pipe("x", 64, 64, 1, guidance_scale=0.0, joint_attention_kwargs={"mask": 1}), "got mask",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_is_refused_by_name(ours, lora, what) -> None:
    file = lora("a.safetensors", ends=("to_q",))
    ours.load_lora_weights(file, adapter_name="a")
    call, named = REFUSED[what]
    with pytest.raises(UserError, match=named):
        call(ours, file)
    assert ours.get_list_adapters() == {"transformer": ["a"]} and ours.get_active_adapters() == ["a"]


def test_weights_as_diffusers_takes_them(ours, lora) -> None:
    ours.load_lora_weights(lora("a.safetensors", ends=("to_q",)), adapter_name="a")
    for weights, strength in ((0.5, 0.5), ([0.7], 0.7), ({"transformer": 0.2}, 0.2), (None, 1.0)):
        ours.set_adapters("a", weights)
        assert ours.transformer.loras.named["a"].strength == strength

"""Our models called from a loop that is not ours: right at every call, and open no longer than they should be."""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from budgeted import free, held_bytes, tight
from oracles import PROMPT, relative_error, run_transformer, transformer_inputs
from torch import Tensor
from trained_loras import save_lora

from zimage_lite.checkpoint.model_files import open_model
from zimage_lite.config import Lora, RuntimeOptions
from zimage_lite.errors import UserError
from zimage_lite.model.transformer import Block
from zimage_lite.pipeline import denoiser
from zimage_lite.pipeline.denoiser import Asked
from zimage_lite.pipeline.drawing import Pipeline
from zimage_lite.pipeline.modules import Modules
from zimage_lite.pipeline.weights import Weights

TIME = 0.3
SLOW = pytest.mark.slow  # evaluated again and again


@pytest.fixture
def modules(diffusers_folder: Path) -> Modules:
    return Modules(Pipeline(open_model(diffusers_folder), RuntimeOptions(device="cpu", cache=False)))


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Callable[[Any, str], list[int]]:
    """Notes every call of a method."""

    def count(owner: Any, name: str) -> list[int]:
        calls, original = list[int](), getattr(owner, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            calls.append(1)
            return original(*args, **kwargs)

        monkeypatch.setattr(owner, name, call)
        return calls

    return count


def asked(*tokens: int, time: float = TIME, size: tuple[int, int] = (16, 16), **more: Any) -> Asked:
    latents, features, _ = transformer_inputs(*size, tokens)
    return Asked(latents, [time] * len(tokens), features, **more)


def alone(folder: Path, one: Asked, place: int) -> Tensor:
    """What a transformer that is read whole gives for one latent."""
    inputs = [one.latents[place]], [one.features[place]], torch.tensor([one.times[place]])
    return run_transformer(folder, open_model(folder).transformer.config, inputs, torch.float32)[0]


def require_right(folder: Path, one: Asked, outputs: list[Tensor]) -> None:
    assert len(outputs) == len(one.latents)
    for place, output in enumerate(outputs):
        assert not output.is_inference()
        assert relative_error(output, alone(folder, one, place)) <= 1e-5


def test_the_transformer_is_diffusers(diffusers_pipeline, modules) -> None:
    one = asked(9, 40)
    with torch.no_grad():
        given = [latent[:, None] for latent in one.latents]
        truth = diffusers_pipeline.transformer(given, torch.tensor(one.times), one.features)[0]
    for ours, theirs in zip(modules.denoise(one), truth, strict=True):
        assert relative_error(ours, theirs[:, 0]) <= 1e-5


@pytest.mark.slow
@SLOW
def test_weights_stay_from_call_to_call(diffusers_folder, modules, counted) -> None:
    opened, refined = counted(Weights, "__init__"), counted(Weights, "prelude")
    both, other = asked(9, 40), asked(9, 40, time=0.6)
    one = Asked(both.latents[1:], [TIME], both.features[1:])
    for call in (both, other, one, both):  # guidance ends, and begins again
        require_right(diffusers_folder, call, modules.denoise(call))
    assert len(opened) == len(refined) == 1
    larger = Asked(asked(9, 40, size=(24, 16)).latents, both.times, both.features)
    require_right(diffusers_folder, larger, modules.denoise(larger))
    assert len(opened) == 2 and len(refined) == 1  # what is told stays what it is


@pytest.mark.slow
def test_prompts_in_turn_are_refined_once(diffusers_folder, modules, counted) -> None:
    """As of programs that ask for the two sides of guidance one after the other."""
    both, opened = asked(9, 40), counted(Weights, "__init__")
    sides = [Asked([latent], [TIME], [features]) for latent, features in zip(both.latents, both.features, strict=True)]
    for side in (*sides, *sides):
        require_right(diffusers_folder, side, modules.denoise(side))
    assert len(opened) == 2


def test_a_prompt_that_is_changed_in_place(diffusers_folder, modules) -> None:
    one = asked(9)
    before = modules.denoise(one)[0]
    one.features[0].mul_(-1)
    after = modules.denoise(one)
    require_right(diffusers_folder, one, after)
    assert relative_error(after[0], before) > 0.01


@pytest.mark.slow
@SLOW
def test_few_prompts_are_kept(modules, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(denoiser, "_CAPTIONS", 2)
    for tokens in range(3, 8):
        modules.denoise(asked(tokens))
    assert len(modules.denoiser._captions) == 3  # the last, and two before it


def test_latents_at_several_times(diffusers_folder, modules) -> None:
    first = asked(9, 9, 40)
    mixed = Asked(first.latents, [0.1, 0.8, 0.1], first.features)
    require_right(diffusers_folder, mixed, modules.denoise(mixed))


@pytest.mark.slow
@SLOW
def test_times_that_are_known_are_computed_at_once(diffusers_folder, modules, counted) -> None:
    modules.denoiser.ahead = lambda: (0.1, 0.3, 0.9)
    read = counted(denoiser, "modulations")
    for time in (0.1, 0.3, 0.9):
        one = asked(9, time=time)
        require_right(diffusers_folder, one, modules.denoise(one))
    assert len(read) == 1
    modules.denoise(asked(9, time=0.5))
    assert len(read) == 2


@pytest.mark.slow
@SLOW
def test_more_passes_than_are_planned_ahead(tiny: Path, exact, monkeypatch: pytest.MonkeyPatch) -> None:
    """With blocks that come and go."""
    wanted = Modules(free(tiny)).denoise(asked(9))[0]
    monkeypatch.setattr(denoiser, "_PASSES", 2)
    modules = Modules(tight(tiny))
    for _ in range(3):
        assert torch.equal(modules.denoise(asked(9))[0], wanted)
    modules.close()


@pytest.mark.full_size  # whoever holds a tensor is looked for, which `tests/diffusers` does, too
@pytest.mark.parametrize("ends", ["closed", "another model", "a failure"])
def test_nothing_is_held_in_the_end(modules, ends: str, monkeypatch: pytest.MonkeyPatch) -> None:
    modules.denoise(asked(9))
    modules.close()  # what is made once is there
    gc.collect()
    before = held_bytes()
    modules.denoise(asked(9))
    gc.collect()
    assert held_bytes() > before + 10**6  # the blocks
    if ends == "closed":
        modules.close()
    elif ends == "another model":
        modules.decode([torch.zeros(16, 4, 4)])
    else:
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(Block, "forward", lambda *_, **__: interrupted())
            modules.denoise(asked(9))
    gc.collect()
    assert held_bytes() <= before + 10**5
    modules.denoise(asked(9))  # and it goes on


def interrupted() -> None:
    raise KeyboardInterrupt


@SLOW
def test_memory_that_runs_out_is_planned_again(diffusers_folder, exact, modules, monkeypatch) -> None:
    told: list[str] = []
    modules.pipeline.work.tell = told.append
    one, calls, original = asked(9), [0], Block.forward
    wanted = alone(diffusers_folder, one, 0)

    def forward(*args: Any, **kwargs: Any) -> Tensor:
        calls[0] += 1
        if calls[0] == 12:  # in the second evaluation
            raise MemoryError
        return original(*args, **kwargs)

    monkeypatch.setattr(Block, "forward", forward)
    for _ in range(3):
        assert relative_error(modules.denoise(one)[0], wanted) <= 1e-5
    assert len(told) == 1 and "memory ran out" in told[0]


@pytest.mark.slow
@SLOW
def test_adapters_come_and_go(diffusers_folder, modules, tmp_path: Path) -> None:
    config = modules.pipeline.model.transformer.config
    path = str(save_lora(tmp_path / "style.safetensors", config, rank=4))
    adapters = modules.pipeline.adapters.of((Lora(path),))
    plain, styled = asked(9), asked(9, adapters=adapters)
    first = modules.denoise(styled)[0]
    require_right(diffusers_folder, plain, modules.denoise(plain))
    assert relative_error(first, modules.denoise(plain)[0]) > 0.01
    assert torch.equal(modules.denoise(styled)[0], first)


def test_values_that_are_not_finite(modules) -> None:
    one = asked(9)
    one.latents[0][0, 0, 0] = torch.inf
    with pytest.raises(UserError, match="NaN or infinite"):
        modules.denoise(one)


def test_several_sizes_are_refused(modules) -> None:
    with pytest.raises(UserError, match="one size"):
        modules.denoise(Asked([torch.zeros(16, 8, 8), torch.zeros(16, 8, 16)], [TIME] * 2, [torch.zeros(3, 128)] * 2))


def test_encoder_and_vae_are_diffusers(diffusers_pipeline, modules) -> None:
    vae, config = diffusers_pipeline.vae, modules.pipeline.model.vae.config
    ids = tuple(modules.pipeline.model.tokenizer.encode(PROMPT))
    image, latent = torch.rand(3, 32, 48) * 2 - 1, torch.randn(16, 4, 6)
    with torch.no_grad():
        features = diffusers_pipeline._encode_prompt(PROMPT, device=torch.device("cpu"))[0]
        moments = vae.encode(image[None]).latent_dist.parameters[0]
        decoded = vae.decode((latent / config.scaling_factor + config.shift_factor)[None]).sample[0]
    assert relative_error(modules.encode([ids])[0], features) <= 1e-5
    assert relative_error(modules.moments([image])[0], moments) <= 1e-5
    assert relative_error(modules.decode([latent])[0], decoded) <= 1e-5

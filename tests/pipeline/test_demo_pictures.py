"""The demo draws over pictures as it is asked, judged by what can be seen."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from demo_judge import judge
from demo_scenes import Scene, Thing
from PIL import Image
from torch import Tensor

from zimage_lite import GenerateOptions, load
from zimage_lite.config import SAMPLERS
from zimage_lite.pipeline.denoise import Step
from zimage_lite.pipeline.drawing import Pipeline

RED, BLUE = "a red circle on a white background", "a blue circle on a white background"


@pytest.fixture(scope="module")
def demo() -> Pipeline:
    return load("demo", device="cpu")


@pytest.fixture(scope="module")
def red(demo: Pipeline) -> Tensor:
    (found,) = demo.generate([GenerateOptions(RED, seed=1)])
    assert is_a_circle(found, "red")
    return found


def is_a_circle(pixels: Tensor, colour: str, background: str = "white") -> bool:
    return judge(Image.fromarray(pixels.numpy()), Scene((background,), (Thing("circle", colour),))).all


def middle(pixels: Tensor) -> float:
    """How far to the right what is not white lies, in pixels."""
    columns = (pixels.amin(2) < 150).float().sum(0)
    return float((columns * torch.arange(len(columns))).sum() / columns.sum())


@pytest.mark.slow
def test_another_colour_in_the_same_place(demo: Pipeline, red: Tensor) -> None:
    """Moved to the left, where the demo would not draw it by itself."""
    moved = torch.roll(red, -5, dims=1)
    low, medium, high = demo.generate(
        [GenerateOptions(BLUE, seed=2, image=moved, strength=strength) for strength in (0.2, 0.5, 1.0)]
    )
    assert is_a_circle(medium, "blue") and is_a_circle(high, "blue")
    assert middle(moved) < middle(low) < middle(medium) < middle(high) - 1


@pytest.mark.parametrize(
    "sampler", [name if name in ("euler", "lcm") else pytest.param(name, marks=pytest.mark.slow) for name in SAMPLERS]
)
def test_outside_a_hard_mask_every_byte_is_the_pictures(demo: Pipeline, red: Tensor, sampler: str) -> None:
    mask = np.zeros((64, 64), np.uint8)
    mask[5:, 33:] = 255
    request = GenerateOptions(BLUE, seed=2, image=red, mask=mask, sampler=sampler)
    (found,) = demo.generate([request])
    kept = torch.from_numpy(mask == 0)
    assert torch.equal(found[kept], red[kept])
    was_red = ~kept & (red[..., 0].int() - red[..., 2].int() > 80)
    changed = found[was_red].int()
    assert was_red.sum() > 200 and (changed[:, 2] > changed[:, 0]).float().mean() > 0.8


@pytest.mark.slow
def test_any_size_comes_back_with_what_the_mask_left(demo: Pipeline, red: Tensor) -> None:
    large = torch.from_numpy(np.array(Image.fromarray(red.numpy()).resize((203, 149))))
    mask = np.zeros((149, 203), np.uint8)
    mask[40:100, 120:180] = 255
    for area in ("picture", "mask"):
        (found,) = demo.generate([GenerateOptions(BLUE, seed=2, image=large, mask=mask, inpaint_area=area)])
        assert found.shape == large.shape
        kept = torch.from_numpy(mask == 0)
        assert torch.equal(found[kept], large[kept]) and not torch.equal(found, large)


@pytest.mark.slow
def test_outpainting_goes_on_with_the_background(demo: Pipeline) -> None:
    (plain,) = demo.generate([GenerateOptions("a white circle on a green background", seed=3)])
    (found,) = demo.generate([GenerateOptions("a green background", seed=4, image=plain, outpaint=(0, 0, 0, 16))])
    assert tuple(found.shape) == (80, 64, 3)
    ground = plain[-3:].float().mean((0, 1))
    assert (found[66:].float() - ground).abs().mean() < 12  # of 255


@pytest.mark.slow
@pytest.mark.parametrize("steps", [12, pytest.param(200, marks=pytest.mark.full_size)])
def test_many_steps_of_any_sampler_end_alike(demo: Pipeline, steps: int) -> None:
    """Those that draw no noise in the same picture, the others in one of the same circle."""
    drawn = demo.generate([GenerateOptions(RED, seed=5, steps=steps, sampler=name) for name in SAMPLERS])
    found = dict(zip(SAMPLERS, drawn, strict=True))
    assert all(is_a_circle(pixels, "red") for pixels in drawn)
    for name in ("heun", "res_multistep", "dpmpp_2m"):
        assert (found[name].float() - found["euler"].float()).abs().mean() < 100 / steps  # of 255


@pytest.mark.slow
def test_a_larger_one_is_the_smaller_one_drawn_over(demo: Pipeline) -> None:
    (small,) = demo.generate([GenerateOptions(RED, seed=2)])
    (found,) = demo.generate([GenerateOptions(RED, seed=2, hires=1.25, hires_strength=0.4)])
    enlarged = Image.fromarray(small.numpy()).resize((80, 80), Image.Resampling.LANCZOS)
    (over,) = demo.generate([GenerateOptions(RED, seed=2, image=enlarged, strength=0.4, width=80, height=80)])
    assert tuple(found.shape) == (80, 80, 3) and torch.equal(found, over)


@pytest.mark.slow
def test_a_moved_prompt_draws_another_picture(demo: Pipeline) -> None:
    """Of the same: the demo's embeddings are some 80 wide."""
    plain, moved, again = demo.generate([GenerateOptions(RED, seed=1, variation=v) for v in (0.0, 300.0, 300.0)])
    assert torch.equal(moved, again) and not torch.equal(plain, moved)
    assert is_a_circle(moved, "red")


@pytest.mark.slow
def test_latents_can_be_kept_and_given(demo: Pipeline, red: Tensor) -> None:
    kept: dict[int, Tensor] = {}
    list(demo.images([GenerateOptions(RED, seed=1)], on_latents=kept.__setitem__))
    assert torch.equal(demo.decode([kept[0]])[0], red)
    (found,) = demo.generate([GenerateOptions(RED, seed=7, latents=kept[0], strength=0.05)])
    assert tuple(found.shape) == (64, 64, 3)
    assert (found.float() - red.float()).abs().mean() < 8


@pytest.mark.slow
def test_a_caller_sees_each_step_and_stops_it(demo: Pipeline) -> None:
    class Enough(Exception):
        pass

    seen: list[tuple[int, int, int, float]] = []

    def look(step: Step) -> None:
        seen.append((step.image, step.step, step.of, step.sigma))
        assert step.x0.shape == (16, 8, 8)
        if len(seen) == 12:
            raise Enough

    with pytest.raises(Enough):
        demo.generate([GenerateOptions(RED, seed=1), GenerateOptions(RED, seed=2, shift=2.0)], on_step=look)
    assert [own[:3] for own in seen] == [(0, i, 8) for i in range(1, 9)] + [(1, i, 8) for i in range(1, 5)]
    assert seen[0][3] == 1 and seen[7][3] == pytest.approx(0.3, abs=1e-6)

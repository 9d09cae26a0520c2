"""What the model is given of a picture, and what becomes of what it draws: to the byte where nothing is to change."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from diffusers.image_processor import VaeImageProcessor
from picture_files import noise
from PIL import Image

from zimage_lite.errors import UserError
from zimage_lite.pictures.canvas import Canvas, Layout, lay_out
from zimage_lite.pictures.reading import Picture

DEFAULT = (64, 64)


def picture(width: int, height: int, **options: Any) -> Picture:
    return Picture(noise(width, height), **options)


def spot(width: int, height: int, box: tuple[int, int, int, int], value: int = 255) -> Picture:
    """A mask with one rectangle."""
    rgb = np.zeros((height, width, 3), np.uint8)
    rgb[box[1] : box[3], box[0] : box[2]] = value
    return Picture(rgb, name="mask.png")


def laid(of: Picture, mask: Picture | None = None, alpha: bool = True, **options: Any) -> Canvas:
    return lay_out(of, mask, Layout(**options), DEFAULT, alpha)


def drawn(canvas: Canvas, seed: int = 9) -> np.ndarray:
    return noise(*canvas.size, seed=seed)


@pytest.mark.parametrize(
    "layout",
    [{}, {"width": 96, "height": 32}, {"width": 96, "height": 48, "fit": "pad"}, {"diffusers": True},
     {"area": "mask"}, {"width": 80, "height": 80, "area": "mask"}],
)  # fmt: skip
def test_a_picture_beside_itself_lies_where_it_does(layout: dict[str, Any]) -> None:
    """And one of another size as it does once it has that of the first."""
    of, mask = picture(150, 90), spot(150, 90, (20, 30, 60, 70))
    canvas = laid(of, mask, **layout)
    fit = Layout(**layout).used_fit
    assert np.array_equal(canvas.beside(of.rgb, fit), canvas.given())
    larger = np.asarray(Image.fromarray(of.rgb).resize((300, 180), Image.Resampling.NEAREST))
    other = canvas.beside(larger, fit).astype(int)
    assert other.shape == canvas.given().shape and np.abs(other - canvas.given()).mean() < 40


# --- Without a mask: the result is what was drawn


@pytest.mark.parametrize("size", [(64, 64), (48, 80), (33, 47), (16, 17), (63, 65), (31, 100)])
def test_its_own_size_to_the_pixel(size: tuple[int, int]) -> None:
    of = picture(*size)
    canvas, (width, height) = laid(of), size
    given, new = canvas.given(), drawn(canvas)
    assert canvas.size == tuple(-(-side // 16) * 16 for side in size) and canvas.result_size == size
    assert given.shape == new.shape and np.array_equal(given[:height, :width], of.rgb)
    assert (given[height:] == given[height - 1]).all() and (given[:, width:] == given[:, width - 1 : width]).all()
    assert canvas.given_mask() is None
    assert np.array_equal(canvas.finished(new), new[:height, :width])
    assert canvas.finished(new).flags.c_contiguous


@pytest.mark.parametrize("size", [(65, 64), (640, 480), (300, 70), (1000, 1000)])
def test_larger_ones_are_drawn_at_the_models_area(size: tuple[int, int]) -> None:
    canvas = laid(picture(*size))
    width, height = canvas.result_size
    assert canvas.scaled == (width, height) == canvas.finished(drawn(canvas)).shape[1::-1]
    assert abs(width * height / 4096 - 1) < 0.05 and abs(width / height * size[1] / size[0] - 1) < 0.1
    expected = np.asarray(Image.fromarray(noise(*size)).resize((width, height), Image.Resampling.LANCZOS))
    assert np.array_equal(canvas.given()[:height, :width], expected)


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        ({"width": 96, "height": 32}, (96, 32)),
        ({"width": 640, "height": 480}, (640, 480)),  # asked for, so drawn in full
        ({"width": 160}, (160, 80)),
        ({"height": 160}, (320, 160)),
        ({"width": 48}, (48, 24)),
    ],
)
@pytest.mark.parametrize("fit", ["crop", "pad", "stretch"])
def test_asked_sizes(asked: dict[str, int], expected: tuple[int, int], fit: str) -> None:
    canvas = laid(picture(100, 50), fit=fit, **asked)
    assert canvas.result_size == expected == canvas.finished(drawn(canvas)).shape[1::-1]


# --- With one: the result is the source, but where it is repainted


def sizes(count: int) -> list[tuple[int, dict[str, Any]]]:
    """Layouts of every kind, by lot: a number to draw a picture with, and its options."""
    rng = np.random.default_rng(4)
    found = []
    for seed in range(count):
        options: dict[str, Any] = {
            "area": ("picture", "mask")[seed % 2],
            "fit": ("crop", "pad", "stretch")[seed % 3],
            "feather": (0, 32)[seed // 2 % 2],
            "outpaint": tuple(rng.integers(0, 40, 4).tolist()) if seed // 4 % 2 else (0, 0, 0, 0),
        }
        if seed // 8 % 2:
            options |= {"width": int(rng.integers(1, 12)) * 16, "height": int(rng.integers(1, 12)) * 16}
        found.append((seed, options))
    return found


@pytest.mark.parametrize(("seed", "options"), sizes(48))
def test_what_is_not_masked_stays_to_the_byte(seed: int, options: dict[str, Any]) -> None:
    rng = np.random.default_rng(seed)
    width, height = (int(side) for side in rng.integers(20, 300, 2))
    of = picture(width, height)
    left, top = width // 3, height // 3  # in the middle, where no fit cuts it away
    canvas = laid(of, spot(width, height, (left, top, left + width // 3, top + height // 3), seed * 5 + 10), **options)
    result = canvas.finished(drawn(canvas))
    assert canvas.result_size == result.shape[1::-1] and result.shape == canvas.source.shape
    assert np.array_equal(result[canvas.mask == 0], canvas.source[canvas.mask == 0])
    assert not np.array_equal(result[canvas.mask > 0], canvas.source[canvas.mask > 0])
    more_left, more_top, more_right, more_bottom = options["outpaint"]
    wide, high = options.get("width", width), options.get("height", height)
    assert canvas.result_size == (more_left + wide + more_right, more_top + high + more_bottom)
    if "width" not in options and not options["feather"]:
        inside = np.s_[more_top : more_top + height, more_left : more_left + width]
        untouched = np.ones((height, width), bool)
        untouched[top : top + height // 3, left : left + width // 3] = False
        assert np.array_equal(result[inside][untouched], of.rgb[untouched])


def test_what_the_mask_covers_is_what_was_drawn() -> None:
    """Through every size that differs: the model draws one colour, which no filter changes."""
    for options in ({}, {"area": "mask"}, {"width": 128, "height": 96}, {"outpaint": (9, 0, 3, 20)}):
        canvas = laid(picture(200, 120), spot(200, 120, (90, 50, 110, 80)), **options)
        plain = np.full((*canvas.size[::-1], 3), (7, 99, 201), np.uint8)
        result = canvas.finished(plain)
        assert (result[canvas.mask == 255] == (7, 99, 201)).all() and (canvas.mask == 255).any()


def test_soft_masks_blend() -> None:
    of = picture(64, 48)
    ramp = np.repeat(np.repeat(np.arange(64, dtype=np.uint8)[None] * 4, 48, 0)[..., None], 3, 2)
    canvas = laid(of, Picture(ramp))
    new = drawn(canvas)
    parts = ramp / 255
    assert np.abs(canvas.finished(new) - (of.rgb * (1 - parts) + new * parts)).max() < 1
    assert np.array_equal(canvas.given_mask(), ramp[..., 0])


def test_drawn_smaller_and_enlarged_again() -> None:
    of = picture(256, 256)
    canvas = laid(of, spot(256, 256, (100, 100, 101, 200)))
    assert canvas.size == (64, 64) and canvas.result_size == (256, 256)
    new = drawn(canvas)
    enlarged = np.asarray(Image.fromarray(new).resize((256, 256), Image.Resampling.LANCZOS))
    result = canvas.finished(new)
    assert np.array_equal(result[100:200, 100], enlarged[100:200, 100])
    assert (result != of.rgb).any(2).sum() <= 100
    assert canvas.given_mask()[25:50, 25].min() == 255  # a quarter of a pixel wide, and still drawn anew


def test_the_area_of_the_mask() -> None:
    """A margin of a quarter of its longer side, or of 32 pixels; enlarged to what the model is made for, or reduced."""
    small = laid(picture(400, 300), spot(400, 300, (200, 150, 210, 160)), area="mask")
    assert small.box == (168, 118, 242, 192) and small.size == (64, 64)
    wide = laid(picture(400, 300), spot(400, 300, (100, 100, 300, 150)), area="mask")
    assert wide.box == (50, 50, 350, 200) and wide.scaled == (91, 45)
    corner = laid(picture(400, 300), spot(400, 300, (0, 290, 5, 300)), area="mask")
    assert corner.box == (0, 258, 37, 300)
    tiny = laid(picture(24, 20), spot(24, 20, (3, 3, 4, 4)), area="mask")
    assert tiny.box == (0, 0, 24, 20) and tiny.scaled == (70, 58)
    source = np.ascontiguousarray(small.source[118:192, 168:242])
    expected = np.asarray(Image.fromarray(source).resize((64, 64), Image.Resampling.LANCZOS))
    assert np.array_equal(small.given(), expected)


# --- Where the mask comes from


def see_through(box: tuple[int, int, int, int] = (10, 10, 20, 30)) -> Picture:
    alpha = np.full((48, 64), 255, np.uint8)
    alpha[box[1] : box[3], box[0] : box[2]] = 0
    alpha[0, 0] = 200
    return Picture(noise(64, 48), alpha)


def test_what_is_transparent_is_repainted() -> None:
    of = see_through()
    canvas = laid(of)
    assert np.array_equal(canvas.mask, 255 - of.alpha) and np.array_equal(canvas.given(), of.rgb)
    assert canvas.mask[0, 0] == 55


@pytest.mark.parametrize("mask", [None, spot(64, 48, (40, 10, 50, 20))])
def test_without_that_the_picture_lies_on_white(mask: Picture | None) -> None:
    canvas = laid(see_through(), mask, alpha=False)
    assert (canvas.given()[10:30, 10:20] == 255).all() and (canvas.mask is None) == (mask is None)


def test_a_mask_is_as_bright_as_it_looks_and_clear_is_black() -> None:
    colours = np.array([[[255, 255, 255], [128, 128, 128], [255, 0, 0], [255, 255, 255]]], np.uint8)
    alpha = np.array([[255, 255, 255, 0]], np.uint8)
    mask = Picture(colours.repeat(16, 1).repeat(32, 0), alpha.repeat(16, 1).repeat(32, 0))
    canvas = laid(picture(64, 32), mask)
    assert canvas.mask[0, ::16].tolist() == [255, 128, 76, 0]


def test_a_mask_of_another_size_is_resized() -> None:
    small, large = spot(32, 24, (8, 8, 16, 16)), spot(128, 96, (32, 32, 64, 64))
    for mask in (small, large):
        canvas = laid(picture(64, 48), mask)
        assert canvas.mask.shape == (48, 64) and canvas.mask[17:31, 17:31].min() == 255
        assert canvas.mask[:14].max() == canvas.mask[34:].max() == 0


def test_outpainting_joins_the_mask() -> None:
    canvas = laid(picture(64, 48), spot(64, 48, (30, 20, 40, 30)), outpaint=(10, 0, 0, 5), feather=0)
    assert canvas.mask.shape == (53, 74)
    assert canvas.mask[:, :10].min() == canvas.mask[48:].min() == canvas.mask[20:30, 40:50].min() == 255
    assert np.count_nonzero(canvas.mask) == 53 * 10 + 5 * 64 + 100


def test_masks_with_nothing_in_them() -> None:
    with pytest.raises(UserError, match=r"^mask\.png: nothing to repaint, all is black; paint white what is to change"):
        laid(picture(64, 48), spot(64, 48, (0, 0, 0, 0)))
    with pytest.raises(UserError, match="there is no mask; name one with --mask"):
        laid(picture(64, 48), area="mask")
    assert laid(picture(64, 48), spot(64, 48, (0, 0, 0, 0)), outpaint=(8, 0, 0, 0)).mask.max() == 255
    assert laid(see_through((0, 0, 0, 0)), width=16, height=48).mask is None  # what was transparent is cut away


# --- Diffusers' rule

PROCESSOR = VaeImageProcessor(vae_scale_factor=16)
MASK_PROCESSOR = VaeImageProcessor(vae_scale_factor=16, do_normalize=False, do_binarize=True, do_convert_grayscale=True)


@pytest.mark.parametrize("size", [(96, 64), (97, 79), (31, 100), (500, 333)])
@pytest.mark.parametrize("asked", [{}, {"width": 64, "height": 80}])
def test_diffusers_rule(size: tuple[int, int], asked: dict[str, int]) -> None:
    """As its pipelines prepare a picture and a mask."""
    image, gray = Image.fromarray(noise(*size)), Image.fromarray(noise(*size, seed=3)[..., 0])
    mask = Picture(np.asarray(gray.convert("RGB")))
    canvas = laid(Picture(np.asarray(image)), mask, diffusers=True, fit="crop", **asked)
    pixels = PROCESSOR.preprocess(image, **asked)
    width, height = pixels.shape[3], pixels.shape[2]
    assert canvas.size == canvas.result_size == (width, height)
    assert np.array_equal(canvas.given(), ((pixels[0].permute(1, 2, 0) + 1) * 127.5).round().byte().numpy())
    hard = MASK_PROCESSOR.preprocess(gray, height=height, width=width)
    assert np.array_equal(canvas.given_mask(), hard[0, 0].numpy() * 255)
    assert np.array_equal(canvas.finished(drawn(canvas)), drawn(canvas))  # nothing is pasted


def test_diffusers_rule_and_alpha() -> None:
    canvas = laid(see_through(), diffusers=True)
    assert np.count_nonzero(canvas.given_mask() == 255) == 200 and canvas.given_mask()[0, 0] == 0


# --- What cannot be drawn


@pytest.mark.parametrize(
    ("size", "options", "message"),
    [
        ((1, 1), {}, "got 1 x 1, expected at least 16 each way; crop it first, or name a --width and a --height"),
        ((30000, 1), {}, "expected at least 16 each way"),
        ((1, 30000), {}, "expected at least 16 each way"),
        ((15, 64), {}, "got 15 x 64, expected at least 16 each way"),
        ((30000, 40), {}, "got 8192 x 11, expected at least 16 each way"),
        ((30000, 1), {"width": 512}, "got 512 x 1, expected at least 16 each way"),
        ((1, 30000), {"width": 512}, "got 512 x 15360000, expected at most 8192 each way; ask for less"),
        ((64, 64), {"width": 8208}, "got 8208 x 8208, expected at most 8192 each way"),
        ((64, 64), {"width": 8192, "height": 64, "outpaint": (1, 0, 0, 0)}, "got 8193 x 64, expected at most 8192"),
        ((15, 64), {"diffusers": True}, "got 0 x 64, expected at least 16 each way"),
        ((9000, 16), {"diffusers": True}, "got 8992 x 16, expected at most 8192 each way"),
        ((400, 300), {"outpaint": (8000, 8000, 8000, 0)}, "too large: got 16400 x 8300 pixels with --outpaint"),
    ],
)  # fmt: skip
def test_sizes_that_cannot_be_drawn(size: tuple[int, int], options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as raised:
        laid(Picture(np.zeros((size[1], size[0], 3), np.uint8), name="a.png"), **options)
    assert str(raised.value).startswith("a.png: ")
    assert message in str(raised.value)


@pytest.mark.parametrize("size", [(1, 1), (30000, 1), (1, 30000), (15, 3)])
@pytest.mark.parametrize("fit", ["crop", "pad", "stretch"])
def test_asked_for_in_another_size_they_can(size: tuple[int, int], fit: str) -> None:
    canvas = laid(Picture(np.full((size[1], size[0], 3), 77, np.uint8)), width=64, height=48, fit=fit)
    assert (canvas.given() == 77).all() and canvas.result_size == (64, 48)


@pytest.mark.parametrize("size", [(4000, 30), (5000, 16), (9000, 20)])
def test_long_ones_are_drawn_no_smaller_than_the_model_can(size: tuple[int, int]) -> None:
    canvas = laid(Picture(np.zeros((size[1], size[0], 3), np.uint8)))
    assert canvas.scaled[1] == 16 and canvas.scaled[0] <= 8192


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fit": "cover"}, "--fit: got 'cover', expected one of crop, pad, stretch"),
        ({"area": "box"}, "--inpaint-area: got 'box', expected one of picture, mask"),
        ({"outpaint": (1, 2, 3)}, "--outpaint: got 1,2,3, expected LEFT,TOP,RIGHT,BOTTOM, each from 0 to 8192 pixels"),
        ({"outpaint": (0, -1, 0, 0)}, "--outpaint: got 0,-1,0,0, expected LEFT"),
        ({"outpaint": (0, 0.5, 0, 0)}, "--outpaint: got 0,0.5,0,0, expected LEFT"),
        ({"outpaint": (0, 0, 9000, 0)}, "--outpaint: got 0,0,9000,0, expected LEFT"),
        ({"feather": -1}, "feather of --outpaint: got -1, expected 0 or more pixels"),
        ({"diffusers": True, "outpaint": (0, 0, 0, 9)}, "diffusers' rule has neither outpainting nor an inpaint area"),
        ({"diffusers": True, "area": "mask"}, "diffusers' rule has neither outpainting nor an inpaint area"),
    ],
)
def test_layouts_that_make_no_sense(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as raised:
        Layout(**options)
    assert str(raised.value).startswith(message)

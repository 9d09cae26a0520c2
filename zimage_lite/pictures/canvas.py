"""A picture laid out for the model, and what the model drew put back where it belongs.

    source -> (fitted to an asked size) -> (enlarged by outpainting) -> box -> scaled -> padded to multiples of 16
    result <-      blended by the mask into that                     <- box <- scaled <- cut

The model sees `given()`, at `size`. The result has the size of the source if there is a mask, and then every pixel
where the mask is 0 is the source's; without a mask the result is what was drawn, at `scaled`.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import sqrt

import numpy as np

from ..config import SIZE_MULTIPLE
from ..errors import UserError
from ..units import round_up
from .fitting import FITS, fitted, fitted_mask
from .masks import Box, blend, box_of, grey, hardened, resized, resized_mask, widened
from .outpainting import FEATHER, Sides, extended, extension_mask
from .reading import MAX_PIXELS, Picture

AREAS = ("picture", "mask")
MAX_SIDE = 512 * SIZE_MULTIPLE  # pixels: the model knows 512 places for tokens each way
_MUCH_LARGER = 2  # times as many pixels as the model is made for: drawn smaller
_CONTEXT, _LEAST_CONTEXT = 1 / 4, 32  # around a mask: of the longer side of its box, and pixels

Size = tuple[int, int]  # width, height


@dataclass(frozen=True)
class Layout:
    """What is asked of a picture. width, height: what it is fitted to, or None: its own size; one alone keeps its
    shape. fit: one of FITS, for a size of another shape. outpaint: pixels to add to the left, top, right, bottom;
    feather: how far inside that repaints, 0 leaving every old pixel as it is. area: one of AREAS, of which the model
    draws the whole picture, or what the mask covers at the size that it is made for. diffusers: by the rule of its
    pipelines: stretched to multiples of 16, the mask hard, nothing pasted back."""

    width: int | None = None
    height: int | None = None
    fit: str = "crop"
    outpaint: Sides = (0, 0, 0, 0)
    feather: int = FEATHER
    area: str = "picture"
    diffusers: bool = False

    def __post_init__(self) -> None:
        if self.fit not in FITS:
            raise UserError("--fit", got=repr(self.fit), expected=f"one of {', '.join(FITS)}")
        if self.area not in AREAS:
            raise UserError("--inpaint-area", got=repr(self.area), expected=f"one of {', '.join(AREAS)}")
        if len(self.outpaint) != 4 or not all(side in range(MAX_SIDE + 1) for side in self.outpaint):
            expected = f"LEFT,TOP,RIGHT,BOTTOM, each from 0 to {MAX_SIDE} pixels"
            raise UserError("--outpaint", got=",".join(map(str, self.outpaint)), expected=expected)
        if self.feather < 0:
            raise UserError("feather of --outpaint", got=self.feather, expected="0 or more pixels")
        if self.diffusers and (any(self.outpaint) or self.area == "mask"):
            fix = "leave out --strength-mode diffusers"
            raise UserError("diffusers' rule has neither outpainting nor an inpaint area", fix=fix)

    @property
    def asks_size(self) -> bool:
        return self.width is not None or self.height is not None

    @property
    def used_fit(self) -> str:
        return "stretch" if self.diffusers else self.fit

    def size_for(self, own: Size) -> Size:
        """Of a picture of its own size, before outpainting."""
        width, height = own
        if self.diffusers:
            width, height = (side // SIZE_MULTIPLE * SIZE_MULTIPLE for side in own)
            return self.width or width, self.height or height
        if self.width and not self.height:
            return self.width, max(round(height * self.width / width), 1)
        if self.height and not self.width:
            return max(round(width * self.height / height), 1), self.height
        return self.width or width, self.height or height


@dataclass(frozen=True, eq=False)
class Canvas:
    """source: [H, W, 3] uint8, fitted and enlarged; mask: [H, W] uint8 or None; box: what of it the model draws;
    scaled: at which size; pastes: whether the result is the source with the box repainted, not what was drawn."""

    source: np.ndarray
    mask: np.ndarray | None
    box: Box
    scaled: Size
    pastes: bool

    @property
    def size(self) -> Size:
        """Width and height of what the model draws: multiples of 16."""
        width, height = self.scaled
        return round_up(width, SIZE_MULTIPLE), round_up(height, SIZE_MULTIPLE)

    @property
    def result_size(self) -> Size:
        """Width and height of what `finished` returns."""
        return (self.source.shape[1], self.source.shape[0]) if self.pastes else self.scaled

    def given(self) -> np.ndarray:
        """The picture that the model starts from: [h, w, 3] uint8 of `size`."""
        return self._padded(resized(self._boxed(self.source), self.scaled))

    def given_mask(self) -> np.ndarray | None:
        """What of it the model repaints: [h, w] uint8 of `size`."""
        return None if self.mask is None else self._padded(resized_mask(self._boxed(self.mask), self.scaled))

    def beside(self, rgb: np.ndarray, fit: str) -> np.ndarray:
        """[h, w, 3] uint8 of another picture, fitted to the source -> what of it lies where `given` does, of `size`."""
        whole = fitted(rgb, (self.source.shape[1], self.source.shape[0]), fit)
        return self._padded(resized(self._boxed(whole), self.scaled))

    def finished(self, drawn: np.ndarray) -> np.ndarray:
        """drawn: [h, w, 3] uint8 of `size` -> the result [H, W, 3] uint8 of `result_size`."""
        width, height = self.scaled
        cut = np.ascontiguousarray(drawn[:height, :width])
        if not self.pastes or self.mask is None:
            return cut
        left, top, right, bottom = self.box
        result = self.source.copy()
        drawn_box = resized(cut, (right - left, bottom - top))
        result[top:bottom, left:right] = blend(self._boxed(self.source), drawn_box, self._boxed(self.mask))
        return result

    def _boxed(self, pixels: np.ndarray) -> np.ndarray:
        left, top, right, bottom = self.box
        return pixels[top:bottom, left:right]

    def _padded(self, pixels: np.ndarray) -> np.ndarray:
        (width, height), (own_width, own_height) = self.size, self.scaled
        more = ((0, height - own_height), (0, width - own_width), (0, 0))
        return np.pad(pixels, more[: pixels.ndim], mode="edge")


def lay_out(picture: Picture, mask: Picture | None, layout: Layout, default: Size, alpha: bool = True) -> Canvas:
    """mask: white repaints; None: what is transparent in the picture, if `alpha` says so, or nothing. The picture lies
    on white where its alpha is not the mask. default: the size that the model is made for; more pixels than that are
    drawn only where a size is asked for. Raises UserError for what cannot be drawn."""
    size = layout.size_for(picture.size)
    if size != picture.size:
        _require_drawable(size, picture.name)
    hidden = mask is None and alpha  # what is transparent keeps its colours, which the model then sees
    source = fitted(picture.rgb if hidden else picture.on(255), size, layout.used_fit)
    repainted = _fitted_mask_of(picture, mask, size, layout, alpha)
    if any(layout.outpaint):
        _require_room(size, layout.outpaint, picture.name)
        source, repainted = _outpainted(source, repainted, layout)
    box = None if repainted is None else box_of(repainted)
    if mask is not None and not box:
        raise UserError(f"{mask.name}: nothing to repaint, all is black", fix="paint white what is to change")
    if layout.area == "mask" and not box:
        raise UserError("--inpaint-area mask: there is no mask", fix="name one with --mask")
    whole = (0, 0, source.shape[1], source.shape[0])
    drawn = _with_context(box, whole) if box and layout.area == "mask" else whole
    scaled = _scaled(drawn, layout, default)
    _require_drawable(scaled, picture.name)
    return Canvas(source, repainted if box else None, drawn, scaled, pastes=bool(box) and not layout.diffusers)


def _fitted_mask_of(
    picture: Picture, mask: Picture | None, size: Size, layout: Layout, alpha: bool
) -> np.ndarray | None:
    """[h, w] uint8 of the size that the picture is fitted to, if there is a mask."""
    if mask is not None and layout.diffusers:
        return hardened(grey(resized(mask.on(0), size)))
    if mask is not None:
        return fitted_mask(resized_mask(grey(mask.on(0)), picture.size), size, layout.used_fit)
    if picture.alpha is None or not alpha:
        return None
    found = fitted_mask(255 - picture.alpha, size, layout.used_fit)
    return hardened(found) if layout.diffusers else found


def _outpainted(source: np.ndarray, mask: np.ndarray | None, layout: Layout) -> tuple[np.ndarray, np.ndarray]:
    added = extension_mask((source.shape[1], source.shape[0]), layout.outpaint, layout.feather)
    both = added if mask is None else np.maximum(added, widened(mask, layout.outpaint))
    return extended(source, layout.outpaint), both


def _with_context(box: Box, whole: Box) -> Box:
    """The box with as much around it as the model needs to go on from, within the whole."""
    left, top, right, bottom = box
    more = max(round(max(right - left, bottom - top) * _CONTEXT), _LEAST_CONTEXT)
    return max(left - more, 0), max(top - more, 0), min(right + more, whole[2]), min(bottom + more, whole[3])


def _scaled(box: Box, layout: Layout, default: Size) -> Size:
    """At which size the model draws a box."""
    width, height = box[2] - box[0], box[3] - box[1]
    if layout.area == "picture" and (layout.asks_size or layout.diffusers):
        return width, height
    scale = sqrt(default[0] * default[1] / (width * height))
    if layout.area == "picture" and scale > sqrt(1 / _MUCH_LARGER):
        scale = 1
    scale = max(scale, SIZE_MULTIPLE / min(width, height))
    scale = min(scale, MAX_SIDE / max(width, height))
    if layout.area == "picture":
        scale = min(scale, 1)
    return max(round(width * scale), 1), max(round(height * scale), 1)


def _require_drawable(size: Size, name: str) -> None:
    if max(size) > MAX_SIDE:
        expected, fix = f"at most {MAX_SIDE} each way", "ask for less, or crop it first"
    elif min(size) < SIZE_MULTIPLE:
        expected, fix = f"at least {SIZE_MULTIPLE} each way", "crop it first, or name a --width and a --height"
    else:
        return
    raise UserError(f"{name}: pixels to draw", got=f"{size[0]} x {size[1]}", expected=expected, fix=fix)


def _require_room(size: Size, sides: Sides, name: str) -> None:
    width, height = size[0] + sides[0] + sides[2], size[1] + sides[1] + sides[3]
    if width * height > MAX_PIXELS:
        got = f"{width} x {height} pixels with --outpaint"
        raise UserError(f"{name}: too large", got=got, expected=f"at most {MAX_PIXELS // 10**6} million")

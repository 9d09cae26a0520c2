"""Judge a picture against a scene of the demo's grammar by plain image analysis (numpy and Pillow, no learned model).

Every pixel goes to the nearest of the colours that matter; what is left is areas, outlines and centres. The judge
looks only at what the caption says: where a shape lies counts if a place or a relation was asked for, how large it is
if a size was. It expects flat colours, at most mildly blurred or noisy, and works from 64x64 up.

    verdict = judge(picture, parse("a red circle on a blue background"))
    verdict.all, verdict.shapes
"""

import math
from dataclasses import asdict, dataclass

import numpy as np
from demo_scenes import (
    COLOURS,
    PLACES,
    SHAPES,
    SIZES,
    SUPERSAMPLE,
    WORD_TOP,
    WORDS,
    Scene,
    Thing,
    ground_pixels,
    ink,
    shape_mask,
    word_mask,
)
from numpy.typing import NDArray
from PIL import Image

COLOUR_REACH = 75.0  # RGB distance at which a pixel still has a colour; the palette's colours are 130 apart or more
LEAST_TRUE = 0.3  # of a shape's pixels must have its colour; the rest may be edges
LEAST_AREA = 0.004  # of the picture; the smallest shape of the grammar covers 0.008
STRAY_AREA = 0.012  # of the picture; more solid pixels of a colour nobody asked for is a mistake
LEAST_OVERLAP = 0.66  # with the outline's template, over the union; drawn truth has 0.9, tiny stars at 64x64 0.7
LEAST_CORRELATION = 0.5  # of a written word with its rendering
LEAST_SIDE = 128  # smaller pictures are enlarged: smoothed edges then give outlines finer than a pixel
TEMPLATE_SIDE = 32
EDGE = 2  # about one pixel of a 64x64 picture
HALF_WIDTHS = {"square": 0.9, "diamond": 0.9, "star": 0.9}  # as seen, of the shape's r; 1 for the others

Mask = NDArray[np.bool_]
Pixels = NDArray[np.float32]  # [height, width, 3], 0..255


@dataclass(frozen=True)
class Verdict:
    """Which parts of the caption the picture shows; a part that was not asked for is True."""

    background: bool
    colours: bool
    shapes: bool
    places: bool
    words: bool

    @property
    def all(self) -> bool:
        return all(asdict(self).values())


def judge(picture: Image.Image, scene: Scene, font: str | None = None) -> Verdict:
    """Compare a square picture with what the scene asks for; `font` is the file its word would be drawn with."""
    side = picture.width * math.ceil(LEAST_SIDE / picture.width)
    pixels = np.asarray(picture.convert("RGB").resize((side, side), Image.Resampling.BICUBIC), np.float32)
    ground = ground_pixels(scene, side).astype(np.float32)
    shapes_end = round(side * WORD_TOP) if scene.word else side
    upper, upper_ground = pixels[:shapes_end], ground[:shapes_end]
    masks = {thing.colour: thing_mask(upper, upper_ground, scene, thing.colour) for thing in scene.things}
    true = {colour: _distance(upper, COLOURS[colour])[mask] < COLOUR_REACH for colour, mask in masks.items()}
    solid = {colour: _largest_part(mask) for colour, mask in masks.items()}
    if scene.relation == "inside":  # what lies on top of the outer shape does not change its outline
        inner, outer = (thing.colour for thing in scene.things)
        solid[outer] = solid[outer] | (solid[inner] & _hull(solid[outer]))
    found = all(mask.sum() >= LEAST_AREA * side**2 for mask in masks.values())
    coloured = found and all(near.mean() > LEAST_TRUE for near in true.values())
    return Verdict(
        background=_shows_ground(pixels, ground),
        colours=coloured and not _has_stray_colour(upper, upper_ground, scene),
        shapes=found and all(_has_shape(solid[t.colour], masks[t.colour], t.shape) for t in scene.things),
        places=found and _in_place(scene, solid, side),
        words=not scene.word or _reads(pixels, ground, scene, font),
    )


def _distance(pixels: Pixels, colour: Pixels | tuple[int, int, int]) -> NDArray[np.float32]:
    return np.linalg.norm(pixels - np.asarray(colour, np.float32), axis=-1)


def _shows_ground(pixels: Pixels, ground: Pixels) -> bool:
    """True if the frame of the picture, which no shape reaches, has the background's colours."""
    frame = np.ones(pixels.shape[:2], bool)
    edge = max(1, len(pixels) // 48)
    frame[edge:-edge, edge:-edge] = False
    return bool(np.mean(_distance(pixels, ground)[frame] < COLOUR_REACH) > 0.85)


def thing_mask(pixels: Pixels, ground: Pixels, scene: Scene, colour: str) -> Mask:
    """Pixels nearer to the colour than to the background and to the scene's other colours."""
    others = [thing.colour for thing in scene.things if thing.colour != colour]
    distance = _distance(pixels, COLOURS[colour])
    rest = np.min([_distance(pixels, ground), *(_distance(pixels, COLOURS[other]) for other in others)], axis=0)
    return (distance < rest) & (distance < 2 * COLOUR_REACH)


def _has_stray_colour(pixels: Pixels, ground: Pixels, scene: Scene) -> bool:
    """True if solid areas show a colour that is neither the background's nor a thing's."""
    wanted = [_distance(pixels, ground)] + [_distance(pixels, COLOURS[thing.colour]) for thing in scene.things]
    stray = np.min(wanted, axis=0) > COLOUR_REACH
    return bool(_solid(stray).sum() > STRAY_AREA * pixels.shape[1] ** 2)


def _solid(mask: Mask) -> Mask:
    """Pixels with the mask on all sides at EDGE pixels' distance: thin edges, which are mixtures, drop out."""
    inner, back, on = slice(EDGE, -EDGE), slice(None, -2 * EDGE), slice(2 * EDGE, None)
    return mask[inner, inner] & mask[back, inner] & mask[on, inner] & mask[inner, back] & mask[inner, on]


def _largest_part(mask: Mask) -> Mask:
    """The largest 4-connected part of the mask: numbers sweep along rows and columns until none changes."""
    numbers = np.where(mask, np.arange(1, mask.size + 1).reshape(mask.shape), 0)
    while True:
        swept = _sweep(_sweep(numbers, mask).T, mask.T).T
        if np.array_equal(swept, numbers):
            break
        numbers = swept
    counts = np.bincount(numbers.ravel())
    counts[0] = 0
    return mask & (numbers == counts.argmax())


def _sweep(numbers: NDArray[np.int64], mask: Mask) -> NDArray[np.int64]:
    """Give every run of mask pixels within a row its largest number."""
    for _ in range(2):  # to the right, then, mirrored, to the left
        runs = np.cumsum(~mask, axis=1) * (mask.size + 1)  # grows at each gap, so that no number passes it
        numbers, mask = ((np.maximum.accumulate(numbers + runs, axis=1) - runs) * mask)[:, ::-1], mask[:, ::-1]
    return numbers


def _bounds(mask: Mask) -> tuple[int, int, int, int]:
    """left, top, right, bottom (exclusive) of a mask that is not empty."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return columns[0], rows[0], columns[-1] + 1, rows[-1] + 1


def _hull(mask: Mask) -> Mask:
    hull = np.zeros_like(mask)
    if mask.any():
        left, top, right, bottom = _bounds(mask)
        hull[top:bottom, left:right] = True
    return hull


def _outline(mask: Mask) -> NDArray[np.float32]:
    """The mask's bounding box scaled to TEMPLATE_SIDE squared, values 0..1: its form without place and size."""
    cut = Image.fromarray(mask.astype(np.uint8) * 255).crop(_bounds(mask))
    return np.asarray(cut.resize((TEMPLATE_SIDE, TEMPLATE_SIDE), Image.Resampling.BOX), np.float32) / 255


_TEMPLATES = {shape: _outline(np.asarray(shape_mask(Thing(shape, "red", r=0.48), 256)) > 0) for shape in SHAPES}


def _has_shape(part: Mask, mask: Mask, shape: str) -> bool:
    """True if the part's outline fits the shape best, and well, and no solid area of its colour lies elsewhere."""
    left, top, right, bottom = _bounds(part)
    outline, aspect = _outline(part), (right - left) / (bottom - top)
    overlaps = {
        name: np.minimum(outline, form).sum() / np.maximum(outline, form).sum() for name, form in _TEMPLATES.items()
    }
    elsewhere = _solid(mask & ~part).sum() / part.sum()
    fits = max(overlaps, key=overlaps.get) == shape and overlaps[shape] > LEAST_OVERLAP
    return bool(fits and 0.7 < aspect < 1.43 and elsewhere < 0.15)


def _in_place(scene: Scene, solid: dict[str, Mask], side: int) -> bool:
    boxes = [np.array(_bounds(solid[thing.colour])) / side for thing in scene.things]
    height = WORD_TOP if scene.word else 1.0  # shapes above a word are squeezed upwards
    placed = all(_at_place(thing, box, height) for thing, box in zip(scene.things, boxes, strict=True))
    return placed and (not scene.relation or _related(scene.relation, *boxes))


def _at_place(thing: Thing, box: NDArray[np.float64], height: float) -> bool:
    """True if the box (left, top, right, bottom as fractions) fits the asked place and size."""
    if thing.place:
        x, y = PLACES[thing.place]
        if abs((box[0] + box[2]) / 2 - x) > 0.15 or abs((box[1] + box[3]) / 2 - y * height) > 0.15:
            return False
    reach = (box[2] - box[0]) / 2 / height / HALF_WIDTHS.get(thing.shape, 1.0)
    between_small, between_large = (SIZES["small"] + SIZES[""]) / 2, (SIZES[""] + SIZES["large"]) / 2
    return {"small": reach < between_small, "": True, "large": reach > between_large}[thing.size]


def _related(relation: str, a: NDArray[np.float64], b: NDArray[np.float64]) -> bool:
    """True if box a is left of, right of, above, below or inside box b."""
    if relation == "inside":
        slack = 0.02
        return bool((a[:2] > b[:2] - slack).all() and (a[2:] < b[2:] + slack).all() and a[2] - a[0] < b[2] - b[0])
    dx, dy = (a[:2] + a[2:] - b[:2] - b[2:]) / 2
    along, across = {"left": (-dx, dy), "right": (dx, dy), "above": (-dy, dx), "below": (dy, dx)}[relation]
    return bool(along > 0.15 and along > abs(across))


def _reads(pixels: Pixels, ground: Pixels, scene: Scene, font: str | None) -> bool:
    """True if the strip at the bottom looks more like the asked word than like any other of the lexicon."""
    side = len(pixels)
    top = round(side * WORD_TOP)
    towards_ink = np.array(COLOURS[ink(scene)], np.float32) - ground[top:]
    written = ((pixels - ground)[top:] * towards_ink).sum(-1) / (towards_ink**2).sum(-1)
    words = [word for word in WORDS if font or word.isascii()]
    scores = {word: _correlation(written, _rendering(word, side, font)[top:]) for word in words}
    return max(scores, key=scores.get) == scene.word and scores[scene.word] > LEAST_CORRELATION


def _rendering(word: str, side: int, font: str | None) -> NDArray[np.float32]:
    return np.asarray(word_mask(word, SUPERSAMPLE * side, font).reduce(SUPERSAMPLE), np.float32) / 255


def _correlation(image: NDArray[np.float32], template: NDArray[np.float32]) -> float:
    """The best correlation within a shift of 5 % of the side; 0 where nothing is written."""
    reach = range(-6, 7, 2)
    flat, best = image.ravel() - image.mean(), 0.0
    for candidate in (np.roll(template, (dy, dx), (0, 1)).ravel() for dy in reach for dx in reach):
        centred = candidate - candidate.mean()
        best = max(best, float(flat @ centred / (np.linalg.norm(flat) * np.linalg.norm(centred) + 1e-6)))
    return best

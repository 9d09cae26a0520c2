"""The picture grammar the demo model is trained on: scenes, their drawings and their captions.

Everything is a pure function of a seeded numpy generator (no torch), so training, the judge and the evaluation read
one definition of what a caption means. A scene is one to three flat shapes on a plain or graded background, with at
most one relation and one word. Lengths are fractions of the picture's side, so a scene draws at any size.

About one in eleven (shape, colour, background) combinations is held out: training never draws it, and the evaluation
asks for nothing else. The rule is arithmetic (`is_held_out`), so every pair of the three is still seen in training.
"""

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import chain

import numpy as np
from PIL import Image, ImageDraw, ImageFont

# At least 130 apart in RGB, and no colour lies near the middle of two others that often touch.
COLOURS = {
    "red": (222, 32, 36),
    "yellow": (250, 222, 40),
    "green": (24, 150, 60),
    "cyan": (50, 205, 225),
    "blue": (30, 66, 222),
    "purple": (168, 48, 190),
    "black": (16, 16, 18),
    "white": (244, 244, 244),
}
SHAPES = ("circle", "square", "triangle", "star", "ring", "diamond", "cross")
HOLLOW_FREE = ("circle", "square", "diamond")  # wide enough in the middle to hold another shape
WORDS = ("OPEN", "SALE", "STOP", "HELLO", "NEW", "开", "关", "你好", "出口", "茶")
PLACES = {
    "top left": (0.25, 0.25),
    "top right": (0.75, 0.25),
    "bottom left": (0.25, 0.75),
    "bottom right": (0.75, 0.75),
    "left": (0.25, 0.5),
    "right": (0.75, 0.5),
    "top": (0.5, 0.25),
    "bottom": (0.5, 0.75),
}
CORNERS = tuple(PLACES)[:4]
SIZES = {"small": 0.11, "": 0.15, "large": 0.19}
WORD_TOP = 0.77  # a written word takes the strip below this height; shapes then shrink into the rest
SUPERSAMPLE = 4

_ZH_COLOURS = dict(zip(COLOURS, ("红色", "黄色", "绿色", "青色", "蓝色", "紫色", "黑色", "白色"), strict=True))
_ZH_SHAPES = dict(zip(SHAPES, ("圆形", "正方形", "三角形", "星形", "圆环", "菱形", "十字"), strict=True))
_ZH_PLACES = dict(zip(PLACES, ("左上角", "右上角", "左下角", "右下角", "左侧", "右侧", "顶部", "底部"), strict=True))
_ZH_SIZES = {"small": "小", "": "", "large": "大"}
_RELATIONS = {
    "en": {
        "left": ("to the left of", "left of"),
        "right": ("to the right of", "right of"),
        "above": ("above", "over"),
        "below": ("below", "under"),
        "inside": ("inside", "within"),
    },
    "zh": {
        "left": ("左边", "左面"),
        "right": ("右边", "右面"),
        "above": ("上方", "上面"),
        "below": ("下方", "下面"),
        "inside": ("里面", "内部"),
    },
}
RELATIONS = tuple(_RELATIONS["en"])
_TEMPLATES = {
    "en": ("{what} on {ground}", "{ground} with {what}", "{what}, {ground}", "a picture of {what} on {ground}"),
    "zh": ("{ground}上的{what}", "{ground}上有{what}", "{what}，{ground}", "一幅画：{ground}上的{what}"),
}
_WORD_SUFFIX = {"en": ', with the word "{word}"', "zh": "，写着“{word}”"}
LANGUAGES = tuple(_TEMPLATES)
LEVELS = {
    "one": "one flat shape on a plain background",
    "two": "two flat shapes with a relation (left, right, above, below, inside) on a plain background",
    "full": "one to three flat shapes with sizes and places, on a plain or graded background, some with a short word",
}
MOST_THINGS = 3
_THING_FIELDS = (SHAPES, tuple(COLOURS), ("small", "large"), tuple(PLACES))
FIELDS = (tuple(COLOURS), tuple(COLOURS), RELATIONS, WORDS, *(_THING_FIELDS * MOST_THINGS))  # see `numbered`


@dataclass(frozen=True)
class Thing:
    """One flat shape. `size` and `place` are what the caption says ("" = nothing); x, y, r are where it is drawn."""

    shape: str
    colour: str
    size: str = ""
    place: str = ""
    x: float = 0.5
    y: float = 0.5
    r: float = 0.3


@dataclass(frozen=True)
class Scene:
    """Background colours (one, or two graded from top to bottom), things, what the first is to the second, a word."""

    background: tuple[str, ...]
    things: tuple[Thing, ...]
    relation: str = ""
    word: str = ""


def is_held_out(shape: str, colour: str, background: str) -> bool:
    """True for the combinations that training never draws (35 of 392)."""
    colours = list(COLOURS)
    return (SHAPES.index(shape) + 3 * colours.index(colour) + 5 * colours.index(background)) % 11 == 4


def holds_out(scene: Scene) -> bool:
    """True if any thing of the scene is a held-out combination with any of its background colours."""
    return any(is_held_out(t.shape, t.colour, ground) for t in scene.things for ground in scene.background)


def random_scene(rng: np.random.Generator, level: str, held_out: bool = False) -> Scene:
    """A scene of the level: never with a held-out combination, or always with one if `held_out`."""
    builders = {"one": _one, "two": _two, "full": _full}
    if level not in builders:
        raise ValueError(f"unknown level {level!r}; choose one of {', '.join(LEVELS)}")
    while True:
        scene = builders[level](rng)
        if holds_out(scene) == held_out:
            return scene


def held_out_captions(level: str = "one", count: int = 200, seed: int = 7) -> list[tuple[str, Scene]]:
    """The fixed evaluation set: (caption, scene) pairs with unseen combinations, languages taking turns."""
    rng = np.random.default_rng(seed)
    scenes = [random_scene(rng, level, held_out=True) for _ in range(count)]
    return [(caption(scene, rng, LANGUAGES[i % 2]), scene) for i, scene in enumerate(scenes)]


def _pick(rng: np.random.Generator, names: tuple[str, ...], count: int = 1) -> list[str]:
    return [names[i] for i in rng.permutation(len(names))[:count]]


def _one(rng: np.random.Generator) -> Scene:
    colour, ground = _pick(rng, tuple(COLOURS), 2)
    x, y = rng.uniform(0.47, 0.53, 2)
    thing = Thing(_pick(rng, SHAPES)[0], colour, x=x, y=y, r=rng.uniform(0.28, 0.32))
    return Scene((ground,), (thing,))


def _two(rng: np.random.Generator) -> Scene:
    first, second, ground = _pick(rng, tuple(COLOURS), 3)
    relation = _pick(rng, RELATIONS)[0]
    a, b = (Thing(_pick(rng, SHAPES)[0], colour, r=rng.uniform(0.18, 0.2)) for colour in (first, second))
    near, far = rng.uniform(0.26, 0.28), rng.uniform(0.72, 0.74)
    level_a, level_b = rng.uniform(0.48, 0.52, 2)
    if relation == "inside":
        b = replace(b, shape=_pick(rng, HOLLOW_FREE)[0], x=level_a, y=level_b, r=rng.uniform(0.38, 0.41))
        a = replace(a, x=level_a, y=level_b, r=rng.uniform(0.15, 0.17))
    elif relation in ("left", "right"):
        left, right = (near, far) if relation == "left" else (far, near)
        a, b = replace(a, x=left, y=level_a), replace(b, x=right, y=level_b)
    else:
        top, bottom = (near, far) if relation == "above" else (far, near)
        a, b = replace(a, x=level_a, y=top), replace(b, x=level_b, y=bottom)
    return Scene((ground,), (a, b), relation)


def _full(rng: np.random.Generator) -> Scene:
    scene = _two(rng) if rng.random() < 0.4 else _placed(rng)
    used = {*scene.background, *(thing.colour for thing in scene.things)}
    if rng.random() < 0.25:
        free = tuple(colour for colour in COLOURS if colour not in used)
        scene = replace(scene, background=(*scene.background, _pick(rng, free)[0]))
    if rng.random() < 0.35 and ink(scene) not in {thing.colour for thing in scene.things}:
        shrunk = tuple(replace(t, y=t.y * WORD_TOP, r=t.r * WORD_TOP) for t in scene.things)
        scene = replace(scene, things=shrunk, word=_pick(rng, WORDS)[0])
    return scene


def _placed(rng: np.random.Generator) -> Scene:
    count = int(rng.integers(1, 4))
    ground, *colours = _pick(rng, tuple(COLOURS), count + 1)
    places = _pick(rng, tuple(PLACES) if count == 1 else CORNERS, count)
    things = []
    for colour, place in zip(colours, places, strict=True):
        size = _pick(rng, tuple(SIZES))[0]
        x, y = np.array(PLACES[place]) + rng.uniform(-0.03, 0.03, 2)
        things.append(Thing(_pick(rng, SHAPES)[0], colour, size, place, x, y, SIZES[size] * rng.uniform(0.95, 1.05)))
    return Scene((ground,), tuple(things))


def ink(scene: Scene) -> str:
    """The colour a word is written in: the one of black and white that is furthest from the bottom background."""
    return "white" if np.mean(COLOURS[scene.background[-1]]) < 128 else "black"


def draw(scene: Scene, size: int, font: str | None = None) -> Image.Image:
    """The scene as an RGB picture of size x size, edges smoothed by 4x4 supersampling; `font` is a path, for words."""
    side = size * SUPERSAMPLE
    image = Image.fromarray(ground_pixels(scene, side))
    for thing in reversed(scene.things):  # the first lies on top: it may be inside the second
        image.paste(COLOURS[thing.colour], mask=shape_mask(thing, side))
    if scene.word:
        image.paste(COLOURS[ink(scene)], mask=word_mask(scene.word, side, font))
    return image.reduce(SUPERSAMPLE)


def ground_pixels(scene: Scene, side: int) -> np.ndarray:
    """The background alone: [side, side, 3] uint8."""
    first, last = (np.array(COLOURS[scene.background[i]], np.float32) for i in (0, -1))
    rows = first + np.linspace(0, 1, side, dtype=np.float32)[:, None] * (last - first)
    return np.ascontiguousarray(np.broadcast_to(rows.round().astype(np.uint8)[:, None], (side, side, 3)))


def shape_mask(thing: Thing, side: int) -> Image.Image:
    """The thing's area as an 8-bit mask of side x side pixels (255 inside, no smoothing)."""
    mask = Image.new("L", (side, side))
    pen = ImageDraw.Draw(mask)
    x, y, r = thing.x * side, thing.y * side, thing.r * side
    if thing.shape in ("circle", "ring"):
        pen.ellipse((x - r, y - r, x + r, y + r), fill=255)
        if thing.shape == "ring":
            hole = 0.55 * r
            pen.ellipse((x - hole, y - hole, x + hole, y + hole), fill=0)
    elif thing.shape == "square":
        half = 0.9 * r
        pen.rectangle((x - half, y - half, x + half, y + half), fill=255)
    else:
        pen.polygon([(x + r * dx, y + r * dy) for dx, dy in _OUTLINES[thing.shape]], fill=255)
    return mask


def _star_outline() -> tuple[tuple[float, float], ...]:
    turns = [(math.pi * i / 5, 1.0 if i % 2 == 0 else 0.42) for i in range(10)]
    return tuple((radius * math.sin(angle), -radius * math.cos(angle)) for angle, radius in turns)


_ARM = 0.34  # half the width of the cross's arms
_OUTLINES = {
    "triangle": ((0, -1), (1, 0.8), (-1, 0.8)),
    "diamond": ((0, -1), (0.9, 0), (0, 1), (-0.9, 0)),
    "star": _star_outline(),
    "cross": (
        *((-_ARM, -1), (_ARM, -1), (_ARM, -_ARM), (1, -_ARM), (1, _ARM), (_ARM, _ARM)),
        *((_ARM, 1), (-_ARM, 1), (-_ARM, _ARM), (-1, _ARM), (-1, -_ARM), (-_ARM, -_ARM)),
    ),
}


def word_mask(word: str, side: int, font: str | None = None) -> Image.Image:
    """The word centred in the bottom strip as an 8-bit mask; without a font file only Latin words can be drawn."""
    if font is None and not word.isascii():
        raise ValueError(f"the word {word!r} needs a Chinese font (e.g. Noto Sans CJK SC); give its path")
    points = round(0.19 * side)
    face = ImageFont.truetype(font, points) if font else ImageFont.load_default(points)
    mask = Image.new("L", (side, side))
    middle = (side / 2, side * (WORD_TOP + 1) / 2)
    ImageDraw.Draw(mask).text(middle, word, fill=255, font=face, anchor="mm")
    return mask


def caption(scene: Scene, rng: np.random.Generator, language: str | None = None) -> str:
    """One of the phrasings of the scene, in the language ("en" or "zh") or in either."""
    language = language or _pick(rng, LANGUAGES)[0]
    template = _pick(rng, _TEMPLATES[language])[0]
    text = template.format(what=_what(scene, rng, language), ground=_ground_phrase(scene.background, language))
    if scene.word:
        text += _WORD_SUFFIX[language].format(word=scene.word)
    if language == "en" and rng.random() < 0.15:
        text = text[0].upper() + text[1:] + "."
    return text


def _ground_phrase(background: tuple[str, ...], language: str) -> str:
    if language == "en":
        graded = "a background fading from {} to {}"
        return f"a {background[0]} background" if len(background) == 1 else graded.format(*background)
    names = [_ZH_COLOURS[colour] for colour in background]
    return f"{names[0]}背景" if len(names) == 1 else f"从{names[0]}到{names[1]}的渐变背景"


def _thing_phrase(thing: Thing, language: str, counted: bool) -> str:
    if language == "en":
        place = f" at the {thing.place}" if thing.place else ""
        return " ".join(filter(None, ("a", thing.size, thing.colour, thing.shape))) + place
    place = f"{_ZH_PLACES[thing.place]}的" if thing.place else ""
    count = "一个" if counted else ""
    return f"{place}{count}{_ZH_SIZES[thing.size]}{_ZH_COLOURS[thing.colour]}{_ZH_SHAPES[thing.shape]}"


def _what(scene: Scene, rng: np.random.Generator, language: str) -> str:
    counted = bool(rng.random() < 0.3)
    phrases = [_thing_phrase(thing, language, counted) for thing in scene.things]
    if scene.relation:
        relation = _pick(rng, _RELATIONS[language][scene.relation])[0]
        a, b = phrases
        return f"{a} {relation} {b}" if language == "en" else f"{a}在{b}{relation}"
    return (" and " if language == "en" else "和").join(phrases)


def asked(scene: Scene) -> Scene:
    """The scene without its geometry: what a caption can say, and so what `parse` gives back."""
    plain = tuple(Thing(thing.shape, thing.colour, thing.size, thing.place) for thing in scene.things)
    return replace(scene, things=plain)


def numbered(scene: Scene) -> list[int]:
    """What the caption says as one number per field of FIELDS; the last number of a field stands for "nothing"."""
    things = [scene.things[i] if i < len(scene.things) else Thing("", "") for i in range(MOST_THINGS)]
    values = [scene.background[0], scene.background[-1], scene.relation, scene.word]
    values += [value for thing in things for value in (thing.shape, thing.colour, thing.size, thing.place)]
    return [names.index(value) if value in names else len(names) for names, value in zip(FIELDS, values, strict=True)]


def parse(text: str) -> Scene:
    """What a caption of the grammar asks for; ValueError for any other text."""
    word = next((word for word in WORDS if word in text), "")
    language = "en" if re.match("[A-Za-z]", text) else "zh"
    body = text.rstrip(".").removesuffix(_WORD_SUFFIX[language].format(word=word))
    body = body[0].lower() + body[1:] if body else body
    for template in _TEMPLATES[language]:
        pattern = template.format(what="(?P<what>.+)", ground=_GROUND[language])
        match = re.fullmatch(pattern, body)
        if match and (parsed := _parse_what(match["what"], language)):
            things, relation = parsed
            ground = tuple(_english(name) for name in match.group("plain", "first", "last") if name)
            return Scene(ground, things, relation, word)
    raise ValueError(f"not a caption of the demo's grammar: {text!r}; try 'a red circle on a blue background'")


def _parse_what(what: str, language: str) -> tuple[tuple[Thing, ...], str] | None:
    """Things and relation of e.g. "a red ring above a blue star"; None if it is not of the grammar."""
    skeleton = re.sub(_THING[language], "#", what)
    things = tuple(
        Thing(*(_english(match[part] or "") for part in ("shape", "colour", "size", "place")))
        for match in re.finditer(_THING[language], what)
    )
    relations = {
        (f"# {phrase} #" if language == "en" else f"#在#{phrase}"): relation
        for relation, phrases in _RELATIONS[language].items()
        for phrase in phrases
    }
    lists = [(" and " if language == "en" else "和").join("#" * count) for count in (1, 2, 3)]
    if skeleton not in relations and skeleton not in lists:
        return None
    return things, relations.get(skeleton, "")


_ENGLISH = {zh: en for names in (_ZH_COLOURS, _ZH_SHAPES, _ZH_PLACES, _ZH_SIZES) for en, zh in names.items()}


def _english(name: str) -> str:
    return _ENGLISH.get(name, name)


def _any(names: Iterable[str]) -> str:
    return "|".join(sorted(filter(None, names), key=len, reverse=True))


_EN_GROUND = "a (?:(?P<plain>{0}) background|background fading from (?P<first>{0}) to (?P<last>{0}))"
_ZH_GROUND = "(?:(?P<plain>{0})背景|从(?P<first>{0})到(?P<last>{0})的渐变背景)"
_GROUND = {"en": _EN_GROUND.format(_any(COLOURS)), "zh": _ZH_GROUND.format(_any(_ZH_COLOURS.values()))}
_THING = {
    "en": rf"\ba (?:(?P<size>{_any(SIZES)}) )?(?P<colour>{_any(COLOURS)}) (?P<shape>{_any(SHAPES)})"
    rf"(?: at the (?P<place>{_any(PLACES)}))?",
    "zh": rf"(?:(?P<place>{_any(_ZH_PLACES.values())})的)?(?:一个)?(?P<size>小|大)?"
    rf"(?P<colour>{_any(_ZH_COLOURS.values())})(?P<shape>{_any(_ZH_SHAPES.values())})",
}


def vocabulary() -> list[str]:
    """Every word of the captions, Chinese ones cut where the grammar joins them: what the tokenizer is trained on."""
    tables = [*COLOURS, *SHAPES, *SIZES, *PLACES, *WORDS, *_ENGLISH, *chain(*_RELATIONS["en"].values())]
    tables += [*chain(*_RELATIONS["zh"].values()), *chain(*_TEMPLATES.values()), *_WORD_SUFFIX.values()]
    joints = "A a fading from to at the and background 背景 的 的渐变背景 一个 从 到 和 在 上"
    text = re.sub(r"\{\w+\}", " ", " ".join([*tables, joints]))
    latin, other = re.findall("[A-Za-z]+", text), re.findall("[\u4e00-\u9fff]+|[，：“”]", text)
    return sorted({*latin, *(f" {word}" for word in latin), *other})

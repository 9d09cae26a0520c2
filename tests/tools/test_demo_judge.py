"""The judge must accept drawn truth and refuse captions with one wrong attribute, at the sizes the demo draws."""

from dataclasses import replace

import numpy as np
import pytest
from demo_judge import judge
from demo_scenes import (
    COLOURS,
    CORNERS,
    LEVELS,
    RELATIONS,
    SHAPES,
    WORDS,
    Scene,
    asked,
    caption,
    draw,
    held_out_captions,
    holds_out,
    is_held_out,
    parse,
    random_scene,
)
from marking import always
from PIL import Image, ImageFilter

COUNT = 60  # scenes per level and size
LATIN = tuple(word for word in WORDS if word.isascii())  # Pillow's own font has no others


def scenes(level: str, count: int = COUNT) -> list[Scene]:
    rng = np.random.default_rng(11)
    drawable = []
    for scene in (random_scene(rng, level) for _ in range(count)):
        readable = replace(scene, word=LATIN[rng.integers(len(LATIN))]) if scene.word else scene
        drawable.append(readable)
    return drawable


def other(rng: np.random.Generator, names: tuple[str, ...], taken: set[str]) -> str:
    return str(rng.choice([name for name in names if name not in taken]))


def wrong_scenes(scene: Scene, rng: np.random.Generator) -> list[Scene]:
    """The scene with one attribute changed, once per attribute it has."""
    thing, *rest = scene.things
    colours = {*scene.background, *(thing.colour for thing in scene.things)}

    def with_thing(**changes: str) -> Scene:
        return replace(scene, things=(replace(thing, **changes), *rest))

    wrong = [
        with_thing(shape=other(rng, SHAPES, {thing.shape})),
        with_thing(colour=other(rng, tuple(COLOURS), colours)),
        replace(scene, background=(other(rng, tuple(COLOURS), colours), *scene.background[1:])),
    ]
    if scene.relation:
        wrong.append(replace(scene, relation=other(rng, RELATIONS, {scene.relation})))
    if thing.place:
        wrong.append(with_thing(place=other(rng, CORNERS, {thing.place})))
    if thing.size:
        wrong.append(with_thing(size={"small": "large", "large": "small"}[thing.size]))
    if scene.word:
        wrong.append(replace(scene, word=other(rng, LATIN, {scene.word})))
    return wrong


def worn(picture: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Mild blur (0.6 pixels at 64x64) and noise (standard deviation 6 of 255)."""
    soft = np.asarray(picture.filter(ImageFilter.GaussianBlur(0.6 * picture.width / 64)), np.float32)
    noisy = soft + rng.normal(0, 6, soft.shape)
    return Image.fromarray(noisy.clip(0, 255).astype(np.uint8))


@pytest.mark.slow  # hundreds of drawings
@pytest.mark.parametrize("size", always(64, of=[64, 128]))
@pytest.mark.parametrize("level", LEVELS)
def test_truth_is_accepted_and_wrong_captions_are_refused(level: str, size: int) -> None:
    rng = np.random.default_rng(12)
    right, refused = [], []
    for scene in scenes(level):
        picture = draw(scene, size)
        right.append(judge(picture, asked(scene)).all)
        wrong = wrong_scenes(asked(scene), rng)
        refused.append(not judge(picture, wrong[rng.integers(len(wrong))]).all)
    assert np.mean(right) >= 0.99
    assert np.mean(refused) >= 0.95


@pytest.mark.slow
@pytest.mark.parametrize("level", ["one", "two"])
def test_mild_blur_and_noise_do_not_matter(level: str) -> None:
    rng = np.random.default_rng(13)
    accepted = [judge(worn(draw(scene, 64), rng), asked(scene)).all for scene in scenes(level)]
    assert np.mean(accepted) >= 0.95


def test_every_kind_of_mistake_is_named() -> None:
    scene = parse("a red circle to the left of a yellow star on a blue background")
    placed = replace(
        scene,
        things=(replace(scene.things[0], x=0.27, r=0.2), replace(scene.things[1], x=0.73, r=0.2)),
    )
    picture = draw(placed, 64)
    assert judge(picture, scene).all
    assert not judge(picture, replace(scene, background=("green",))).background
    assert not judge(picture, replace(scene, relation="right")).places
    circle, star = scene.things
    assert not judge(picture, replace(scene, things=(replace(circle, shape="cross"), star))).shapes
    assert not judge(picture, replace(scene, things=(replace(circle, colour="white"), star))).colours
    assert not judge(picture, replace(scene, word="SALE")).words


def test_an_empty_picture_shows_only_its_background() -> None:
    verdict = judge(Image.new("RGB", (64, 64), COLOURS["blue"]), parse("蓝色背景上的红色圆形"))
    assert verdict.background
    assert not (verdict.colours or verdict.shapes or verdict.places or verdict.all)


@pytest.mark.parametrize("level", LEVELS)
def test_a_caption_is_parsed_back_to_its_scene(level: str) -> None:
    rng = np.random.default_rng(14)
    for scene in (random_scene(rng, level) for _ in range(300)):
        assert parse(caption(scene, rng)) == asked(scene)


def test_text_outside_the_grammar_is_refused_with_an_example() -> None:
    with pytest.raises(ValueError, match="a red circle on a blue background"):
        parse("an astronaut riding a horse")


def test_held_out_combinations_never_occur_in_training_and_only_there() -> None:
    rng = np.random.default_rng(15)
    assert not any(holds_out(random_scene(rng, level)) for level in LEVELS for _ in range(200))
    captions = held_out_captions("one")
    assert len(captions) == 200
    assert all(holds_out(scene) for _, scene in captions)
    assert captions == held_out_captions("one")
    assert not is_held_out("circle", "red", "blue")  # the README's first picture


def test_a_font_is_asked_for_only_where_it_is_needed() -> None:
    scene = replace(parse("a red circle on a blue background"), word="你好")
    with pytest.raises(ValueError, match="font"):
        draw(scene, 64)

"""Pictures with ControlNets: in any memory, together and alone, beside LoRAs and guidance, in parts of the steps."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from budgeted import CAT, difference, free, tight
from control_files import save_control, tiny_config
from marking import always
from picture_files import smooth
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from trained_loras import save_lora

from zimage_lite import load, quantize
from zimage_lite.cli import run
from zimage_lite.config import GenerateOptions, Lora, TransformerConfig
from zimage_lite.errors import UserError
from zimage_lite.model.controlnet import ControlNet
from zimage_lite.model.samplers import SAMPLERS, asked_at, evaluations
from zimage_lite.pictures.controls import MAKING_BYTES
from zimage_lite.pictures.saving import recipe_of
from zimage_lite.pipeline import weights as loading
from zimage_lite.pipeline.controls import ControlLibrary, unusual
from zimage_lite.pipeline.sights import Sight
from zimage_lite.plan import tiles

VERSIONS = ("1.0", "2.0", "2.1")
SLOW = pytest.mark.slow  # whole pictures, again and again


@pytest.fixture(scope="module")
def nets(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("controls")
    found = {version: save_control(folder / f"{version}.safetensors", tiny_config(version)) for version in VERSIONS}
    found["other"] = save_control(folder / "other.safetensors", tiny_config(places=(0, 1)), seed=1)
    return found | {
        f"{version} zeroed": save_control(folder / f"{version}z.safetensors", tiny_config(version), zeroed=True)
        for version in ("1.0", "2.1")  # one of 2.0 would be told by its projections, which are not zero
    }


def hint(seed: int = 0, size: tuple[int, int] = (40, 30)) -> Image.Image:
    return smooth(size, seed)


HINT = hint()


def controlled(request: GenerateOptions, *nets: Path, scale: float = 0.8, **more: Any) -> GenerateOptions:
    image = more.pop("control_image", HINT)
    return replace(request, controls=tuple(f"{net}:{scale}" for net in nets), control_image=image, **more)


def drawn(model: Path, *requests: GenerateOptions, **options: str) -> list[Tensor]:
    """In a pipeline of their own."""
    return load(model, device="cpu", **options).generate(requests)


@pytest.mark.slow
@pytest.mark.parametrize("version", ["2.1", pytest.param("1.0", marks=SLOW)])
def test_one_that_gives_no_hints_changes_no_bit(tiny: Path, nets: dict[str, Path], version: str) -> None:
    request = replace(CAT, steps=1)
    plain, zeroed, at_zero, followed = drawn(
        tiny, request, controlled(request, nets[f"{version} zeroed"]), controlled(request, nets[version], scale=0.0),
        controlled(request, nets[version]),
    )  # fmt: skip
    assert torch.equal(zeroed, plain) and torch.equal(at_zero, plain)
    assert difference(followed, plain) > 2


@SLOW
@pytest.mark.parametrize("version", [*VERSIONS, "several"])
def test_blocks_that_come_and_go_bring_theirs(tiny: Path, exact: None, nets: dict[str, Path], version: str) -> None:
    """With a budget that holds two blocks. What is planned holds what is read: its places are cut from the plan."""
    chosen = [nets["2.1"], nets["other"]] if version == "several" else [nets[version]]
    request = controlled(CAT, *chosen)
    first, streaming = free(tiny), tight(tiny, request=request)
    (wanted,), (got,) = first.generate([request]), streaming.generate([request])
    assert torch.equal(wanted, got)
    blocks = {"1.0": 4, "2.0": 4, "2.1": 4, "several": 8}[version]
    assert len(first.plans["denoise"].homes) == 5 + blocks


@SLOW
@pytest.mark.parametrize("version", always("2.1", of=VERSIONS))
def test_images_drawn_together_are_those_drawn_alone(tiny: Path, exact: None, nets, version: str) -> None:
    """Of one ControlNet, with other hints, other prompts and guidance, in one group and in several."""
    requests = [
        controlled(CAT, nets[version]),
        controlled(replace(CAT, seed=1), nets[version], control_image=hint(1)),
        replace(CAT, seed=2),
        controlled(replace(CAT, prompt="a dog", guidance=3.0, negative="blurry"), nets[version]),
        controlled(CAT, nets[version], scale=0.4),
        controlled(replace(CAT, seed=3, width=48), nets[version]),
    ]
    alone, together = [drawn(tiny, request)[0] for request in requests], drawn(tiny, *requests)
    assert all(difference(*pair) <= 1 for pair in zip(together, alone, strict=True))  # prompts are encoded together
    assert difference(together[0], together[4]) > 1  # the scale counts


@SLOW
def test_several_images_at_once(tiny: Path, nets: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """In one pass over the blocks: they differ by rounding."""
    requests = [controlled(replace(CAT, seed=i), nets["2.1"], control_image=hint(i)) for i in range(2)]
    with monkeypatch.context() as patch:
        patch.setattr("zimage_lite.plan.prediction._BATCHES", (2,))
        pipeline = free(tiny)
        together = pipeline.generate(requests)
    assert pipeline.plans["denoise"].way == 2
    for one, request in zip(together, requests, strict=True):
        assert difference(one, drawn(tiny, request)[0]) <= 1


@SLOW
def test_the_order_of_several_does_not_matter_and_each_counts(tiny: Path, nets: dict[str, Path]) -> None:
    pictures = [HINT, hint(1)]
    a, b = nets["2.1"], nets["other"]
    both, swapped, first, second = drawn(
        tiny, controlled(CAT, a, b, control_image=pictures), controlled(CAT, b, a, control_image=pictures[::-1]),
        controlled(CAT, a), controlled(CAT, b, control_image=pictures[1:]),
    )  # fmt: skip
    assert difference(both, swapped) <= 1  # they are added in another order
    assert difference(both, first) > 2 and difference(both, second) > 2


@SLOW
@pytest.mark.parametrize("sampler", always("euler", of=["euler", "heun"]))
def test_parts_of_the_steps(tiny: Path, exact: None, nets, sampler: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a ControlNet is not asked none of its blocks is read, and the step is that without."""
    reads, read = Counter[str](), loading.Weights._jobs

    def counting(weights: loading.Weights, name: str, buffer: Tensor) -> Any:
        reads[name] += weights.plan.phase == "denoise"
        return read(weights, name, buffer)

    monkeypatch.setattr(loading.Weights, "_jobs", counting)
    request = replace(CAT, steps=4, sampler=sampler)
    half = controlled(request, nets["2.1"], control_end=0.5)
    streaming = tight(tiny, request=controlled(request, nets["2.1"]))
    reads.clear()
    guesses: dict[str, list[Tensor]] = {"plain": [], "late": []}
    (got,) = streaming.generate([half])
    total = evaluations(sampler, 4)
    asked = sum(step < 2 for step in asked_at(sampler, torch.tensor([1.0, 0.75, 0.5, 0.25, 0.0])))
    assert reads["layers.0"] == total and reads["controls.0.control_layers.1"] == asked < total
    (wanted,) = free(tiny).generate([half])
    assert torch.equal(got, wanted)
    assert difference(wanted, drawn(tiny, controlled(request, nets["2.1"]))[0]) > 0
    late = controlled(request, nets["2.1"], control_start=0.5)
    for name, own in (("plain", request), ("late", late)):
        load(tiny, device="cpu").generate([own], on_step=lambda step, name=name: guesses[name].append(step.x0.clone()))
    same = [torch.equal(a, b) for a, b in zip(guesses["plain"], guesses["late"], strict=True)]
    assert same[0] and not same[-1]


@pytest.mark.parametrize("name", SAMPLERS)
def test_where_samplers_ask_is_known_beforehand(name: str) -> None:
    sigmas = torch.tensor([0.999, 0.7, 0.4, 0.0])
    places = asked_at(name, sigmas)
    assert len(places) == evaluations(name, 3) and places[0] == 0 and places == sorted(places) and places[-1] == 2


@SLOW
def test_beside_a_lora(tiny: Path, exact: None, nets: dict[str, Path], tmp_path: Path) -> None:
    lora = save_lora(tmp_path / "style.safetensors", load(tiny, device="cpu").model.transformer.config, rank=4)
    with_lora = replace(CAT, loras=(Lora(str(lora)),))
    both = controlled(with_lora, nets["2.1"])
    wanted, alone, plain = drawn(tiny, both, with_lora, controlled(CAT, nets["2.1"]))
    assert difference(wanted, alone) > 2 and difference(wanted, plain) > 2
    (got,) = tight(tiny, request=both).generate([both])
    assert torch.equal(wanted, got)


@SLOW
@pytest.mark.parametrize("to", always("int8", of=["int8", "q8_0", "q4_k_m"]))
def test_in_other_formats(tiny: Path, nets: dict[str, Path], tmp_path: Path, to: str) -> None:
    """A quantized ControlNet moves the picture as the one it was made from does, whatever multiplies."""
    quantize(nets["2.1"], tmp_path / "net", to)
    quantize(tiny, tmp_path / "model", "int8")
    for compute in ("int8", "16bit"):
        plain, wanted, got = drawn(
            tmp_path / "model", CAT, controlled(CAT, nets["2.1"]), controlled(CAT, tmp_path / "net"), compute=compute
        )
        change, truth = ((one.float() - plain.float()).flatten() for one in (got, wanted))
        assert torch.nn.functional.cosine_similarity(change, truth, dim=0) > 0.8, compute


@SLOW
def test_tiles_see_their_part(tiny: Path, nets: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the hint, encoded at the size of the enlarged picture."""
    for name, value in (("TILED_PIXELS", 64 * 64), ("_TILE", 8), ("_OVERLAP", 4)):
        monkeypatch.setattr(tiles, name, value)
    wholes, seen = list[Tensor](), list[Tensor]()
    context, embedded = Sight.context, ControlNet.embedded

    def whole(self: Sight, latents: Any) -> Tensor:
        wholes.append(found := context(self, latents))
        return found

    def part(self: ControlNet, contexts: Any, pad_token: Tensor) -> Tensor:
        seen.extend(contexts)
        return embedded(self, contexts, pad_token)

    monkeypatch.setattr(Sight, "context", whole)
    monkeypatch.setattr(ControlNet, "embedded", part)
    drawn(tiny, controlled(replace(CAT, hires=2.0, steps=1), nets["2.1"]))
    small, large = wholes
    pieces = tiles.tiles_of(128, 96)
    assert len(pieces) > 4 and small.shape == (33, 6, 8) and large.shape == (33, 12, 16)
    cut = [large[:, t.top : t.top + t.height, t.left : t.left + t.width] for t in pieces]
    assert all(map(torch.equal, seen, [small, *cut]))
    assert not seen[0][16:].any() and seen[0][:16].std() > 0.1


@SLOW
def test_a_mask_keeps_what_it_leaves(tiny: Path, nets: dict[str, Path]) -> None:
    """Also with nothing to follow; and what the ControlNet sees of the picture changes what is drawn."""
    source, mask = hint(3, (64, 48)), Image.new("L", (64, 48))
    mask.paste(255, (20, 10, 50, 40))
    over = replace(CAT, width=None, height=None, image=source, mask=mask)
    plain, followed, filled = drawn(
        tiny, over, controlled(over, nets["2.1"]), controlled(over, nets["2.1"], control_image=None)
    )
    kept = np.asarray(mask) == 0
    for image in (plain, followed, filled):
        assert (image.numpy()[kept] == np.asarray(source)[kept]).all()
    assert min(difference(a, b) for a, b in ((plain, followed), (plain, filled), (followed, filled))) > 2


def test_what_there_is_to_see(tiny: Path, nets: dict[str, Path]) -> None:
    """What is transparent is a mask too; enlarged, a picture has none, and is drawn without the ControlNet."""
    hole = hint(3, (64, 48)).convert("RGBA")
    hole.paste((0, 0, 0, 0), (20, 10, 50, 40))
    plain = hole.convert("RGB")
    over = controlled(replace(CAT, steps=1, width=None, height=None, image=hole), nets["2.1"], control_image=None)
    pipeline = load(tiny, device="cpu")
    pipeline.require_fit([over, replace(over, image=plain, outpaint=(0, 0, 16, 0))])
    first, enlarged = pipeline._tasks([pipeline.complete(replace(over, hires=2.0))])
    assert first.sights and first.controls and not enlarged.controls
    old = controlled(over, nets["1.0"], control_image=None)
    with pytest.raises(UserError, match="takes no mask, so it has nothing to see"):
        pipeline.require_fit([old])
    for unmasked in (replace(over, mask="none"), replace(over, image=plain)):
        with pytest.raises(UserError, match="neither a picture to follow nor a mask, so it has nothing to see"):
            pipeline.require_fit([unmasked])


def test_wrong_files_are_refused(tiny: Path, nets: dict[str, Path], tmp_path: Path) -> None:
    pipeline = load(tiny, device="cpu")
    missing, wide = tmp_path / "none.safetensors", save_control(tmp_path / "x.safetensors", tiny_config(places=(0, 3)))
    model = next((tiny / "transformer").glob("*.safetensors"))
    for path, said in ((missing, "no such file"), (wide, "last place among the layers"), (model, "ControlNet")):
        with pytest.raises(UserError, match=said):
            pipeline.generate([controlled(CAT, path)])


def test_a_hint_is_open_before_the_image_is_decoded(tiny: Path, nets: dict[str, Path]) -> None:
    pipeline, large = load(tiny, device="cpu"), np.zeros((500, 1000, 3), np.uint8)
    request = controlled(CAT, nets["2.1"], control_image=large, control_from="canny")
    (planned,) = pipeline._planned(pipeline._tasks([pipeline.complete(request)])).groups
    assert planned.group.job.open_bytes >= large.nbytes + 64 * 48 * MAKING_BYTES
    assert planned.group.job.back_bytes == 0


def test_what_is_damaged_is_named(tiny: Path, tmp_path: Path) -> None:
    path = save_control(tmp_path / "x.safetensors", tiny_config())
    weights = load_file(path)
    weights["control_layers.1.attention.to_v.weight"][3, 5] = torch.nan
    with safe_open(path, "pt") as file:
        save_file(weights, path, file.metadata())
    with pytest.raises(UserError, match=r"x\.safetensors: tensor control_layers\.1\.attention\.to_v\.weight"):
        load(tiny, device="cpu").generate([controlled(replace(CAT, steps=1), path)])


def test_the_recipe_is_of_what_was_drawn_with(tiny: Path, tmp_path: Path) -> None:
    """Whatever happens to the file: it is gone, or another one. One that is made in memory has no hash."""
    path, pipeline = save_control(tmp_path / "x.safetensors", tiny_config()), load(tiny, device="cpu")
    request = pipeline.complete(controlled(CAT, path))
    pipeline.require_fit([request])
    path.unlink()
    said = [{"name": "x", "scale": 0.8}]
    assert pipeline.controls.told(request) == said
    save_control(path, tiny_config(), seed=1)
    assert pipeline.controls.told(request) == said
    pipeline.require_fit([request])
    assert pipeline.controls.told(request)[0]["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    synthetic = ControlLibrary(TransformerConfig(), lambda line: None)
    assert synthetic.told(replace(request, controls="synthetic:1.0/int8"))[0].keys() == {"name", "scale"}


def test_one_at_scale_0_is_opened_and_costs_nothing(tiny: Path, nets: dict[str, Path]) -> None:
    pipeline = load(tiny, device="cpu")
    (off,) = pipeline._tasks([pipeline.complete(controlled(CAT, nets["2.1"], scale=0.0))])
    assert not off.controls and not off.sights
    uses = (f"{nets['2.1']}:0", f"{nets['1.0']}:0.5")
    (task,) = pipeline._tasks([pipeline.complete(replace(CAT, controls=uses, control_image=HINT))])
    assert task.controls.scales == [0.5] and len(task.sights) == 1
    with pytest.raises(UserError, match=r"no\.safetensors"):
        pipeline._tasks([pipeline.complete(replace(CAT, controls="no.safetensors:0", control_image=HINT))])


def test_it_says_when_none_is_asked(tiny: Path, nets: dict[str, Path]) -> None:
    pipeline = load(tiny, device="cpu")
    late = pipeline.complete(controlled(replace(CAT, steps=2), nets["2.1"], control_start=0.6))
    (task,) = pipeline._tasks([late])
    (line, *_) = unusual(late, task.controls, task.steps, False)
    assert line == "none of 2 steps begins between --control-start 0.6 and --control-end 1, so no ControlNet is asked"
    assert not any("none of" in line for line in unusual(late, task.controls, 3, False))


def test_it_says_what_its_authors_do_otherwise(tiny: Path, nets: dict[str, Path]) -> None:
    lines = list[str]()
    request = controlled(replace(CAT, steps=1), nets["1.0"], scale=0.3)
    load(tiny, device="cpu", tell=lines.append).generate([request])
    said = "\n".join(lines)
    assert "version 1.0, 2 blocks" in said
    assert "at a scale of 0.65 to 0.80, not 0.3" in said and "made for 9 steps; 1 may be blurred" in said


@SLOW
def test_the_command_says_and_writes_it_down(tiny: Path, nets, tmp_path: Path, capsys) -> None:
    out, size = tmp_path / "out.png", ("--width", "64", "--height", "48", "--steps", "1", "--device", "cpu")
    hint = tmp_path / "hints" / "hint.png"  # beside the picture it would be found
    hint.parent.mkdir()
    HINT.save(hint)
    asked = ("--control", f"{nets['2.1']}:0.8", "--control-image", str(hint), "--control-from", "canny")
    own = ("generate", "a cat", "--model", str(tiny), "-o", str(out), "--json", "--control-end", "0.6")
    assert run([*own, *size, *asked]) == 0
    printed, sha256 = capsys.readouterr(), hashlib.sha256(nets["2.1"].read_bytes()).hexdigest()
    assert "note: 2.1: version 2.1 lite, 2 blocks; takes a picture to follow, a mask and" in printed.err
    recipe = recipe_of(out)
    assert recipe["controls"] == [{"name": "2.1", "scale": 0.8, "sha256": sha256}]
    assert [image["name"] for image in recipe["control_image"]] == ["hint.png"] and recipe["control_from"] == ["canny"]
    assert recipe["control_end"] == 0.6 and "control_start" not in recipe
    assert json.loads(printed.out)["controls"] == [recipe["controls"]]
    again = ("generate", "--like", str(out), "--model", str(tiny), "-o", str(tmp_path / "again.png"), "--device", "cpu")
    assert run(list(again)) == 2 and "drawn with the ControlNet 2.1; name it with --control" in capsys.readouterr().err
    assert run([*again, *asked[:2]]) == 2 and "hint.png; name it with --control-image" in capsys.readouterr().err
    assert run([*again, *asked[:4]]) == 0 and recipe_of(tmp_path / "again.png") == recipe


@pytest.mark.slow
def test_full_size_ones_without_a_file(capsys: pytest.CaptureFixture[str]) -> None:
    own = ("plan", "--gpu", "3060 laptop", "--json")
    blocks = {"1.0": 8, "2.0": 30, "2.1": 17, "2.1-lite": 5}
    for version, more in blocks.items():
        assert run([*own, "--control", f"synthetic:{version}/int8:0.7"]) == 0
        (phase,) = (p for p in json.loads(capsys.readouterr().out)["phases"] if p["phase"] == "denoise")
        assert len(phase["homes"]) == 32 + more
    assert run([*own, "--control", "synthetic:3.0/int8"]) == 2
    assert "of the versions 1.0, 2.0, 2.1, 2.1-lite" in capsys.readouterr().err


@pytest.mark.slow
def test_weights_are_released(tiny: Path, nets: dict[str, Path]) -> None:
    pipeline = load(tiny, device="cpu")
    pipeline.generate([controlled(replace(CAT, steps=1), nets["2.1"])])
    assert pipeline.denoising._beside is not None
    model = pipeline.denoising._beside[1].model
    assert all(parameter.is_meta for parameter in model.parameters())
    assert all(getattr(module, "packed", None) is None for module in model.modules())

"""Fields of requests: which are offered, and what becomes of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
from control_files import save_control, tiny_config
from served import base64_of, finished, png, serving

from zimage_lite.config import ControlUse, GenerateOptions, Lora
from zimage_lite.pictures.recipe import BESIDE, SOURCES
from zimage_lite.serve.catalog import Catalog, UnknownError
from zimage_lite.serve.fields import FIELDS, HELD_BACK, PICTURES, FieldError, asked_for
from zimage_lite.serve.options import Limits, ServeOptions

Options = Callable[..., ServeOptions]


def test_no_setting_takes_a_path_of_a_clients() -> None:
    """Whatever names files is a picture that is sent, or something of the catalog's, or is not offered."""
    named = {field.name for field in fields(GenerateOptions)}
    assert named - {"loras", "controls"} <= FIELDS.keys() | set(HELD_BACK)
    assert {*SOURCES, *BESIDE} == {*PICTURES, *HELD_BACK, "loras", "controls"}


def ask(options: ServeOptions, **values: Any) -> GenerateOptions:
    _, (request,) = asked_for({"prompt": "x", **values}, Catalog(options), Limits())
    return request


def test_files_of_the_server_by_their_names(serve_options: Options, tmp_path: Path) -> None:
    options = serve_options(controls={"union": "/models/union.safetensors"})
    (tmp_path / "loras" / "ink.safetensors").touch()
    hint = base64_of(png())
    nets = [{"name": "union", "scale": 0.6}, {"name": "union"}]
    request = ask(options, loras=[{"name": "ink"}], controls=nets, control_image=[hint, hint], control_from="canny")
    assert request.loras == (Lora(str(tmp_path / "loras" / "ink.safetensors")),)
    assert request.controls == (ControlUse("/models/union.safetensors", 0.6), ControlUse("/models/union.safetensors"))
    assert request.control_image == (png(), png()) and request.control_from == ("canny",)
    with pytest.raises(UnknownError, match=r"ControlNet: got '/models/union\.safetensors', expected one of union"):
        ask(options, controls=[{"name": "/models/union.safetensors"}], control_image=hint)


@pytest.mark.parametrize(
    ("values", "param"),
    [
        ({"controls": [{"name": "union", "path": "/x"}]}, "controls"),
        ({"controls": [{"name": "union"}] * 4}, "controls"),
        ({"controls": [{"name": "union", "scale": 99}]}, None),
        ({"controls": [{"name": "union"}], "control_image": ["/etc/passwd"]}, "control_image"),
        ({"controls": [{"name": "union"}], "control_image": []}, "control_image"),
        ({"control_from": "depth"}, "control_from"),
        ({"loras": [{"name": "ink", "strength": "a"}]}, None),
    ],
)
def test_what_is_refused(serve_options: Options, tmp_path: Path, values: dict[str, Any], param: str | None) -> None:
    (tmp_path / "loras").mkdir()
    (tmp_path / "loras" / "ink.safetensors").touch()
    with pytest.raises(FieldError) as raised:
        ask(serve_options(controls={"union": "union.safetensors"}), **values)
    assert raised.value.param == param


@pytest.mark.slow
def test_pictures_are_not_enlarged_without_end(serve_options: Options) -> None:
    """What has no size of its own has its picture's; of a large one, twice the model's megapixel."""
    for size, most in (((256, 256), 8.0), ((2000, 2000), 1.4)):
        image = base64_of(png(*size))
        assert ask(serve_options(), image=image, hires=most).hires == most
        if most < 8:
            with pytest.raises(FieldError, match=r"1448 x 1448, 1\.5 times as large, expected at most 4\.2 million"):
                ask(serve_options(), image=image, hires=most + 0.1)


def test_names_that_others_have(serve_options: Options) -> None:
    values = {"negative_prompt": "y", "num_inference_steps": 3, "guidance_scale": 2.0, "seed": None, "width": None}
    request = ask(serve_options(), **values)
    assert (request.negative, request.steps, request.guidance, request.width) == ("y", 3, 2.0, None)
    assert ask(serve_options(), seed=-1).seed != ask(serve_options(), seed=-1).seed


def test_clients_see_names_not_places(serve_options: Options, tiny: Path, tmp_path: Path) -> None:
    """In what is refused at once, and in what fails later; `tiny` is of another width."""
    net = save_control(tmp_path / "2.1.safetensors", replace(tiny_config("2.1"), dim=128, n_heads=1))
    options = serve_options(models={"mine": str(tiny)}, controls={"union": str(net)})
    asked = {"prompt": "x", "steps": 1, "width": 64, "height": 64, "control_image": base64_of(png())}
    with serving(options) as (client, _):
        wrong = client.post("/api/jobs", json={**asked, "controls": [{"name": "union", "scale": 99}]}).json()
        assert wrong["error"]["message"].startswith("union: scale: got 99")
        job = client.post("/api/jobs", json={**asked, "controls": [{"name": "union"}]}).json()["id"]
        assert finished(client, job)["error"]["message"].startswith("union: width of the ControlNet: got 128")


@pytest.mark.slow
def test_a_control_is_drawn_with(serve_options: Options, tiny: Path, tmp_path: Path) -> None:
    net = save_control(tmp_path / "2.1.safetensors", tiny_config("2.1"))
    options = serve_options(models={"tiny": str(tiny)}, controls={"union": str(net)})
    asked = {"prompt": "x", "steps": 1, "width": 64, "height": 64, "control_image": base64_of(png())}
    with serving(options) as (client, service):
        job = client.post("/api/jobs", json={**asked, "controls": [{"name": "union", "scale": 0.5}]}).json()["id"]
        facts = finished(client, job)
        assert facts["state"] == "done", facts
        settings = client.get("/api/jobs").json()["jobs"][0]["settings"]
        assert settings["controls"] == [{"name": "union", "scale": 0.5}]
        assert [one.keys() for one in settings["control_image"]] == [{"sha256"}]
        assert client.get("/api/status").json()["controls"] == ["union"] and service.catalog.models == ["tiny"]

"""A1111's API, asked as its clients ask (surfaces of Open WebUI, SillyTavern and LibreChat, field by field)."""

from __future__ import annotations

import json
from collections.abc import Callable
from io import BytesIO
from typing import Any

import numpy as np
import pytest
from PIL import Image
from served import base64_of, finished, picture, png, serving
from starlette.testclient import TestClient

from zimage_lite.serve.options import ServeOptions

Options = Callable[..., ServeOptions]
BASIC = {"authorization": "Basic OnNlY3JldA=="}  # :secret


def draw(client: TestClient, verb: str = "txt2img", **values: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """The answer, and its info."""
    answer = client.post(f"/sdapi/v1/{verb}", json=values)
    assert answer.status_code == 200, answer.text
    return answer.json(), json.loads(answer.json()["info"])


@pytest.mark.slow
def test_as_open_webui_asks(client: TestClient) -> None:
    """50 steps that nobody asked for become the model's own, and it is said."""
    options = client.get("/sdapi/v1/options").json()
    assert options["sd_model_checkpoint"] == client.get("/sdapi/v1/sd-models").json()[0]["title"] == "demo"
    assert client.post("/sdapi/v1/options", json=options).status_code == 200
    answer, info = draw(client, prompt="a red circle", batch_size=2, width=128, height=128, steps=50)
    assert [picture(text).size for text in answer["images"]] == [(128, 128)] * 2
    assert info["steps"] == 8 and info["cfg_scale"] == 1
    assert info["extra_generation_params"] == {"Steps asked": 50, "CFG scale asked": 7.0}
    assert info["all_seeds"] == [info["seed"], info["seed"] + 1] and len(info["infotexts"]) == 2


SILLY = {
    "url": "http://localhost:7860", "auth": "", "prompt": "x", "negative_prompt": "blurry", "sampler_name": "Euler a",
    "scheduler": "karras", "steps": 3, "cfg_scale": 7, "width": 70, "height": 64, "enable_hr": False,
    "hr_upscaler": "Latent", "hr_scale": 1.5, "hr_second_pass_steps": 0, "denoising_strength": 0.7, "seed": 7,
    "restore_faces": False, "override_settings": {"CLIP_stop_at_last_layers": 1}, "clip_skip": 1,
    "override_settings_restore_afterwards": True, "save_images": True, "send_images": True, "do_not_save_grid": False,
}  # fmt: skip


@pytest.mark.slow
def test_as_sillytavern_asks(serve_options: Options) -> None:
    """It always sends Basic, asks for every list, waits until nothing is drawn, and takes images[0] as PNG."""
    lists = (
        "samplers",
        "schedulers",
        "upscalers",
        "latent-upscale-modes",
        "sd-vae",
        "sd-modules",
        "sd-models",
        "loras",
    )
    with serving(serve_options()) as (client, _):
        client.headers.update({"authorization": "Basic Og=="})  # no user, no password
        for name in lists:
            assert isinstance(client.get(f"/sdapi/v1/{name}").json(), list), name
        assert client.get("/sdapi/v1/samplers").json()[0]["name"] == "Euler"
        assert client.post("/sdapi/v1/options", json={"sd_model_checkpoint": "demo"}).json() is None
        idle = client.get("/sdapi/v1/progress").json()
        assert idle["progress"] == 0 and idle["state"]["job_count"] == 0 and idle["current_image"] is None
        answer, info = draw(client, **SILLY)
        assert picture(answer["images"][0]).format == "PNG" and picture(answer["images"][0]).size == (64, 64)
        assert (info["sampler_name"], info["steps"], info["seed"]) == ("Euler a", 3, 7)
        assert info["extra_generation_params"] == {"CFG scale asked": 7.0, "Width asked": 70}
        assert "Schedule type: Karras" in info["infotexts"][0] and "Negative prompt: blurry" in info["infotexts"][0]
        assert client.post("/sdapi/v1/interrupt").json() == {}


@pytest.mark.slow
def test_as_librechat_asks(client: TestClient) -> None:
    values = {"prompt": "x", "negative_prompt": "y", "cfg_scale": 4.5, "steps": 22, "width": 1024, "height": 1024}
    _, info = draw(client, **{**values, "width": 64, "height": 64})
    assert {"width", "height", "seed"} <= info.keys() and info["infotexts"][0].startswith("x\nNegative prompt: y\n")


@pytest.mark.slow
def test_a_server_may_obey(serve_options: Options) -> None:
    with serving(serve_options(obey=True)) as (client, _):
        _, info = draw(client, prompt="x", steps=12, cfg_scale=2, width=64, height=64)
        assert info["steps"] == 12 and info["cfg_scale"] == 2 and info["extra_generation_params"] == {}


@pytest.mark.slow
def test_what_is_not_known_is_euler(client: TestClient) -> None:
    _, info = draw(client, prompt="x", sampler_name="UniPC", scheduler="Align Your Steps", steps=1, cfg_scale=1)
    assert info["sampler_name"] == "Euler" and (info["width"], info["height"]) == (64, 64)  # the model's own
    assert info["extra_generation_params"] == {"Not known here": "unipc, align your steps"}
    _, info = draw(client, prompt="x", sampler_name="DPM++ 2M Karras", steps=1, cfg_scale=1)
    assert info["sampler_name"] == "DPM++ 2M" and "Schedule type: Karras" in info["infotexts"][0]


@pytest.mark.slow
def test_img2img_keeps_what_the_mask_leaves(client: TestClient) -> None:
    mask = np.zeros((64, 64, 3), np.uint8)
    mask[16:48, 16:48] = 255
    file = BytesIO()
    Image.fromarray(mask).save(file, "PNG")
    given = np.asarray(picture(base64_of(png())))
    common = {"prompt": "x", "init_images": [base64_of(png())], "mask": base64_of(file.getvalue()), "steps": 2}
    for full, invert in ((False, 0), (True, 0), (False, 1)):
        more = {"inpaint_full_res": full, "inpainting_mask_invert": invert, "mask_blur": 0, "denoising_strength": 1}
        answer, info = draw(client, "img2img", **common, **more)
        changed = (np.asarray(picture(answer["images"][0])) != given).any(2)
        white = (mask[..., 0] > 0) != bool(invert)
        assert changed[white].any() and not changed[~white].any()
        assert info["denoising_strength"] == 1.0
    assert "init_images" not in answer["parameters"] and answer["parameters"]["steps"] == 2


def test_a_picture_that_is_missing_or_wrong(client: TestClient) -> None:
    answer = client.post("/sdapi/v1/img2img", json={"prompt": "x"})
    assert answer.status_code == 404 and answer.json()["detail"] == "Init image not found"
    for wrong in ("http://127.0.0.1/x.png", "not base64", base64_of(b"no picture"), 5, None):
        answer = client.post("/sdapi/v1/img2img", json={"prompt": "x", "init_images": [wrong]})
        assert answer.status_code == 400 and answer.json()["detail"]


@pytest.mark.slow
def test_progress_and_interrupt(serve_options: Options) -> None:
    with serving(serve_options()) as (client, service):
        page = client.post("/api/jobs", json={"prompt": "x", "steps": 100, "width": 256, "height": 256}).json()["id"]
        seen = client.get("/sdapi/v1/progress").json()
        while not seen["current_image"]:
            seen = client.get("/sdapi/v1/progress").json()
        assert 0 < seen["progress"] < 1 and seen["state"]["sampling_steps"] == 100 and seen["state"]["job_count"] == 1
        assert picture(seen["current_image"]).format == "JPEG"
        assert client.get("/sdapi/v1/progress?skip_current_image=true").json()["current_image"] is None
        client.post("/sdapi/v1/interrupt")
        assert client.get(f"/api/jobs/{page}").json()["state"] == "running"  # it is another client's
        service.board.get(page).client = "a1111"
        client.post("/sdapi/v1/interrupt")
        assert finished(client, page)["state"] == "cancelled"


@pytest.mark.slow
def test_png_info(client: TestClient) -> None:
    answer, _ = draw(client, prompt="a red circle", steps=1)
    said = client.post("/sdapi/v1/png-info", json={"image": answer["images"][0]}).json()
    assert said["info"].startswith("a red circle\nSteps: 1") and said["items"]["parameters"] == said["info"]
    assert client.post("/sdapi/v1/png-info", json={"image": base64_of(png())}).json()["info"] == ""


def test_loras_are_named_in_the_prompt(client: TestClient) -> None:
    answer = client.post("/sdapi/v1/txt2img", json={"prompt": "x <lora:none:0.8>"})
    assert answer.status_code == 400 and "<lora:none>" in answer.json()["detail"]
    assert "served" not in answer.json()["detail"] and "/" not in answer.json()["detail"]


@pytest.mark.parametrize(
    "wrong",
    [{"steps": "many"}, {"seed": 1.5}, {"prompt": 5}, {"width": 10**30}, {"batch_size": 100}, {"cfg_scale": [7]}],
)
def test_errors_are_as_a1111s(client: TestClient, wrong: dict[str, Any]) -> None:
    answer = client.post("/sdapi/v1/txt2img", json={"prompt": "x", **wrong})
    assert answer.status_code == 400 and {"error", "detail", "body", "errors"} <= answer.json().keys()


def test_only_listed_models_are_chosen(client: TestClient) -> None:
    answer = client.post("/sdapi/v1/options", json={"sd_model_checkpoint": "/etc/passwd"})
    assert answer.status_code == 400
    assert client.post("/sdapi/v1/options", json={"sd_model_checkpoint": "demo [0123456789]"}).status_code == 200
    assert client.get("/sdapi/v1/options").json()["sd_model_checkpoint"] == "demo"


def test_the_key_is_basics_password(serve_options: Options) -> None:
    with serving(serve_options(api_key="secret")) as (client, _):
        assert client.get("/sdapi/v1/options").status_code == 401
        assert client.get("/sdapi/v1/options", headers=BASIC).status_code == 200

"""OpenAI's images API, asked by the openai package itself over a socket, and as Open WebUI and LibreChat ask."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from io import BytesIO
from typing import Any

import numpy as np
import openai
import pytest
from PIL import Image
from served import base64_of, events, listening, picture, png, serving
from starlette.testclient import TestClient

from zimage_lite import GenerateOptions, load
from zimage_lite.pictures.saving import recipe_of
from zimage_lite.serve.options import ServeOptions
from zimage_lite.serve.service import Service

Options = Callable[..., ServeOptions]
SHORT = {"steps": 2, "seed": 5}


@pytest.fixture
def real(serve_options: Options) -> Iterator[tuple[openai.OpenAI, Service]]:
    with (
        listening(serve_options(api_key="secret")) as (address, service),
        openai.OpenAI(base_url=f"{address}/v1", api_key="secret") as client,
    ):
        yield client, service


@pytest.mark.slow
def test_the_openai_package_draws(real: tuple[openai.OpenAI, Service]) -> None:
    client, _ = real
    assert [model.id for model in client.models.list()] == ["demo"] == [client.models.retrieve("demo").id]
    answer = client.images.generate(model="gpt-image-1", prompt="a red circle", n=2, size="auto", extra_body=SHORT)
    assert answer.size == "64x64" and answer.usage.total_tokens == 0 and abs(answer.created - time.time()) < 600
    assert [one.model_extra["seed"] for one in answer.data] == [5, 6]
    wanted = load("demo", device="cpu").generate([GenerateOptions("a red circle", seed=5, steps=2)])
    assert np.array_equal(np.asarray(picture(answer.data[0].b64_json)), wanted[0].numpy())


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "format"), [("jpeg", "JPEG"), ("webp", "WEBP")])
def test_other_formats_keep_the_recipe(kind: Any, format: str, client: TestClient) -> None:
    values = {"prompt": "x", "output_format": kind, "output_compression": 80, **SHORT}
    answer = client.post("/v1/images/generations", json=values).json()
    shown = picture(answer["data"][0]["b64_json"])
    assert shown.format == format and answer["output_format"] == kind
    file = BytesIO()
    shown.save(file, format, exif=shown.getexif())
    assert recipe_of(file.getvalue())["seed"] == 5


@pytest.mark.slow
def test_the_openai_package_streams(real: tuple[openai.OpenAI, Service]) -> None:
    client, _ = real
    stream = client.images.generate(
        prompt="a red circle", stream=True, partial_images=2, output_format="jpeg", extra_body={"steps": 9, "seed": 5}
    )
    told = list(stream)
    assert told[-1].type == "image_generation.completed" and told[-1].size == "64x64"
    partial = [event.partial_image_index for event in told[:-1]]
    assert partial == list(range(len(partial))) and 1 <= len(partial) <= 2  # a slow reader may miss the first
    assert {event.type for event in told[:-1]} == {"image_generation.partial_image"}
    assert all(picture(event.b64_json).format == "JPEG" for event in told)


@pytest.mark.slow
def test_the_openai_package_edits(real: tuple[openai.OpenAI, Service]) -> None:
    """A mask's transparent part is drawn anew, and the rest stays as it was, to the byte."""
    client, _ = real
    alpha = np.full((64, 64), 255, np.uint8)
    alpha[16:48, 16:48] = 0
    given = np.asarray(Image.open(BytesIO(png())))
    answer = client.images.edit(image=png(), mask=png(alpha=alpha), prompt="a red circle", extra_body=SHORT)
    changed = (np.asarray(picture(answer.data[0].b64_json)) != given).any(2)
    assert changed[20:44, 20:44].any() and not changed[alpha == 255].any()
    several = client.images.edit(image=[png(), png(32, 32)], prompt="x", extra_body={**SHORT, "strength": 0.3})
    assert picture(several.data[0].b64_json).size == (64, 64)


@pytest.mark.slow
def test_edits_in_json(client: TestClient) -> None:
    images = [{"image_url": f"data:image/png;base64,{base64_of(png())}"}]
    answer = client.post("/v1/images/edits", json={"prompt": "x", "images": images, **SHORT})
    assert answer.status_code == 200 and picture(answer.json()["data"][0]["b64_json"]).size == (64, 64)
    for wrong in (None, [], ["x"], [{"image_url": "https://example.org/x.png"}], [{"file_id": "file-1"}]):
        answer = client.post("/v1/images/edits", json={"prompt": "x", "images": wrong})
        assert answer.status_code == 400 and answer.json()["error"]["type"] == "invalid_request_error"


@pytest.mark.slow
def test_who_gives_up_cancels_and_is_not_drawn_thrice(
    real: tuple[openai.OpenAI, Service], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The package asks three times; what nobody waits for any more is stopped."""
    client, service = real
    monkeypatch.setattr("zimage_lite.serve.waiting.LOOK_S", 0.02)
    with pytest.raises(openai.APITimeoutError):
        client.with_options(timeout=0.3, max_retries=1).images.generate(
            prompt="x", extra_body={"steps": 100, "seed": 1, "hires": 4, "hires_strength": 1}
        )
    end = time.monotonic() + 60
    while service.board.running or service.board.waiting():
        assert time.monotonic() < end
        time.sleep(0.01)
    assert {facts["state"] for facts in service.history.jobs(10)} == {"cancelled"}


@pytest.mark.slow
def test_a_stream_that_is_left_cancels(real: tuple[openai.OpenAI, Service]) -> None:
    client, service = real
    stream = client.images.generate(
        prompt="x", stream=True, partial_images=3, extra_body={"steps": 100, "hires": 4, "hires_strength": 1}
    )
    next(iter(stream))
    stream.close()
    end = time.monotonic() + 60
    while service.board.running:
        assert time.monotonic() < end
        time.sleep(0.01)
    assert service.history.jobs(1)[0]["state"] == "cancelled"


def test_errors_are_those_that_the_package_knows(real: tuple[openai.OpenAI, Service]) -> None:
    client, _ = real
    with pytest.raises(openai.BadRequestError) as raised:
        client.images.generate(prompt="x", size="1000x1000")
    assert raised.value.param == "size" and "multiples of 16" in raised.value.message
    with pytest.raises(openai.AuthenticationError) as refused:
        client.with_options(api_key="wrong").models.list()
    assert refused.value.code == "invalid_api_key"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt-5")
    for wrong in ({"output_format": "../x"}, {"output_compression": 101}, {"partial_images": 4}, {"prompt": None}):
        with pytest.raises(openai.BadRequestError):
            client.post("/images/generations", body={"prompt": "x", **wrong}, cast_to=object)


@pytest.mark.slow
def test_failures_are_not_asked_for_again(real: tuple[openai.OpenAI, Service], monkeypatch: pytest.MonkeyPatch) -> None:
    client, service = real

    def broken(*_: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr("zimage_lite.pipeline.drawing.Pipeline._planned", broken)
    with pytest.raises(openai.InternalServerError):
        client.images.generate(prompt="x")
    assert len(service.history.jobs(10)) == 1
    with pytest.raises(openai.APIError, match="ZeroDivisionError"):
        list(client.images.generate(prompt="x", stream=True))


@pytest.mark.slow
def test_as_open_webui_asks(client: TestClient) -> None:
    """b64_json, for it fetches URLs through a check that blocks this machine; edits by `image` and by `image[]`."""
    values = {"model": "demo", "prompt": "x", "n": 1, "size": "64x64", "response_format": "b64_json", **SHORT}
    (one,) = client.post("/v1/images/generations", json=values).json()["data"]
    assert one.keys() == {"b64_json", "seed"}
    unnamed = {"model": "dall-e-2", "prompt": "x", "n": 1, "response_format": "b64_json", **SHORT}
    assert client.post("/v1/images/generations?api-version=1", json=unnamed).status_code == 200
    form = {"model": "demo", "prompt": "x", "n": "1", "size": "64x64", "response_format": "b64_json", "steps": "2"}
    for name, count in (("image", 1), ("image[]", 1), ("image[]", 2)):
        files = [(name, (f"{number}.png", png(), "image/png")) for number in range(count)]
        answer = client.post("/v1/images/edits", data={**form, "background": "auto"}, files=files)
        assert answer.status_code == 200 and answer.json()["data"][0]["b64_json"], answer.text


@pytest.mark.slow
def test_as_librechat_asks(client: TestClient) -> None:
    values = {
        "model": "gpt-image-1", "prompt": "x", "quality": "auto", "size": "auto", "background": "auto", "n": 1,
        "output_format": "png",
    }  # fmt: skip
    assert "b64_json" in client.post("/v1/images/generations", json=values).json()["data"][0]
    (one,) = client.post("/v1/images/generations", json={**values, "response_format": "url"}).json()["data"]
    assert client.get(one["url"]).headers["content-type"] == "image/png"
    form = {"model": "gpt-image-1", "prompt": "x", "quality": "auto", "size": "auto"}
    answer = client.post("/v1/images/edits", data=form, files={"image[]": ("a.png", png(), "image/png")})
    assert answer.status_code == 200 and answer.json()["data"][0]["b64_json"], answer.text


def test_a_full_queue_says_when(serve_options: Options) -> None:
    with serving(serve_options(limits={"waiting": 1})) as (client, service):
        for _ in range(2):
            client.post("/api/jobs", json={"prompt": "x", "steps": 100, "width": 256, "height": 256})
            while service.board.running is None:
                pass
        answer = client.post("/v1/images/generations", json={"prompt": "x"})
        assert answer.status_code == 429 and answer.headers["retry-after"].isdecimal()
        assert answer.headers["x-should-retry"] == "true" and answer.json()["error"]["code"] == "queue_full"


def test_an_error_ends_a_stream_as_an_event(serve_options: Options) -> None:
    with serving(serve_options()) as (client, service):
        service.workers[0].drawer.opener = lambda *_: (_ for _ in ()).throw(MemoryError())
        answer = client.post("/v1/images/generations", json={"prompt": "x", "stream": True})
        (name, data) = events(answer.text)[-1]
        assert name == "error" and "memory ran out" in data["error"]["message"]


def test_forms_of_hostile_clients(client: TestClient) -> None:
    many = [("prompt", (None, "x"))] * 100
    assert client.post("/v1/images/edits", files=many).status_code == 400
    assert client.post("/v1/images/edits", data={"prompt": "x"}, files={"other": b"x"}).status_code == 400
    files = {"image": ("../../etc/passwd", b"not a picture", "image/png")}
    answer = client.post("/v1/images/edits", data={"prompt": "x"}, files=files)
    said = "image: not a picture of a kind that can be read; save it as PNG or JPEG"
    assert (answer.status_code, answer.json()["error"]["message"]) == (400, said)
    raw = {"content-type": "multipart/form-data; boundary=x"}
    assert client.post("/v1/images/edits", content=b"--x\r\nbroken", headers=raw).status_code == 400

"""/api/...: jobs ordered, watched, stopped, found again and deleted."""

from __future__ import annotations

from collections.abc import Callable
from io import BytesIO
from typing import Any

import pytest
from PIL import Image
from served import base64_of, events, finished, png, serving
from starlette.testclient import TestClient

from zimage_lite.pictures.saving import recipe_of
from zimage_lite.serve.options import ServeOptions

Options = Callable[..., ServeOptions]
RED = {"prompt": "a red circle", "steps": 2, "seed": 3}


def submit(client: TestClient, **values: Any) -> str:
    response = client.post("/api/jobs", json={**RED, **values})
    assert response.status_code == 202, response.text
    assert response.headers["location"] == f"/api/jobs/{response.json()['id']}"
    return response.json()["id"]


def test_a_job_from_order_to_deletion(client: TestClient) -> None:
    job = submit(client, count=2)
    facts = finished(client, job)
    assert facts["state"] == "done" and [one["seed"] for one in facts["pictures"]] == [3, 4]
    name = facts["pictures"][0]["name"]
    answer = client.get(f"/api/pictures/{name}")
    assert answer.headers["content-type"] == "image/png" and Image.open(BytesIO(answer.content)).size == (64, 64)
    assert recipe_of(answer.content)["prompt"] == "a red circle"
    (told,) = client.get("/api/jobs").json()["jobs"]
    assert told["id"] == job and told["settings"]["steps"] == 2 and told["settings"]["count"] == 2
    assert client.delete(f"/api/jobs/{job}").status_code == 204
    for gone in (f"/api/pictures/{name}", f"/api/jobs/{job}"):
        assert client.get(gone).status_code == 404
    assert client.delete(f"/api/jobs/{job}").status_code == 404
    assert client.get("/api/jobs").json() == {"jobs": []}


@pytest.mark.slow
def test_a_restart_finds_the_history(serve_options: Options) -> None:
    with serving(serve_options()) as (client, _):
        job = submit(client)
        facts = finished(client, job)
    with serving(serve_options()) as (client, _):
        again = client.get(f"/api/jobs/{job}").json()
        assert again["state"] == "done" and again["pictures"] == facts["pictures"]
        assert client.get(f"/api/pictures/{facts['pictures'][0]['name']}").status_code == 200
        redrawn = finished(client, client.post("/api/jobs", json=again["settings"]).json()["id"])
        assert redrawn["state"] == "done"


@pytest.mark.slow
def test_a_job_says_what_was_asked_for_and_what_it_took(client: TestClient) -> None:
    job = submit(client)
    facts = finished(client, job)
    memory = facts["memory"]
    assert facts["settings"]["steps"] == 2
    assert memory["place"] == "Memory" and 0 < memory["planned"] <= memory["limit"] and memory["used"] > 0


@pytest.mark.slow
def test_events_until_the_end(client: TestClient) -> None:
    job = submit(client, steps=4)
    told = [data for name, data in events(client.get(f"/api/jobs/{job}/events").text) if name == "job"]
    assert told[-1]["state"] == "done" and len(told[-1]["pictures"]) == 1
    versions = [facts["version"] for facts in told]
    assert versions == sorted(set(versions)) and {facts["id"] for facts in told} == {job}
    assert client.get(f"/api/jobs/{job}/preview").status_code == 204  # it has gone with the job


@pytest.mark.slow
def test_previews_while_it_draws(client: TestClient) -> None:
    job, seen = submit(client, steps=60), None
    while seen is None or seen.status_code != 200:
        assert client.get(f"/api/jobs/{job}").json()["state"] in ("queued", "running")
        seen = client.get(f"/api/jobs/{job}/preview")
    assert Image.open(BytesIO(seen.content)).format == "JPEG"
    assert client.post(f"/api/jobs/{job}/cancel").status_code == 200
    assert finished(client, job)["state"] == "cancelled"
    assert client.post(f"/api/jobs/{job}/cancel").json()["state"] == "cancelled"


@pytest.mark.slow
def test_a_full_queue(serve_options: Options) -> None:
    with serving(serve_options(limits={"waiting": 2})) as (client, service):
        first = submit(client, steps=100)
        while service.board.running is None:
            pass
        waiting = [submit(client) for _ in range(2)]
        answer = client.post("/api/jobs", json=RED)
        assert answer.status_code == 429 and 1 <= int(answer.headers["retry-after"]) <= 120
        assert answer.json()["error"]["code"] == "queue_full"
        assert [client.get(f"/api/jobs/{job}").json()["position"] for job in waiting] == [1, 2]
        for job in (*waiting, first):
            client.post(f"/api/jobs/{job}/cancel")
        assert [finished(client, job)["state"] for job in (first, *waiting)] == ["cancelled"] * 3
        assert len(client.get("/api/jobs").json()["jobs"]) == 3  # nothing of what was refused


@pytest.mark.slow
def test_pictures_in(client: TestClient) -> None:
    job = submit(client, image=base64_of(png()), mask=f"data:image/png;base64,{base64_of(png(mode='L'))}")
    facts = finished(client, job)
    assert facts["state"] == "done", facts
    settings = client.get("/api/jobs").json()["jobs"][0]["settings"]
    assert settings["image"].keys() == {"sha256"}  # not the picture itself


@pytest.mark.slow
def test_what_a_picture_says_of_itself(client: TestClient) -> None:
    facts = finished(client, submit(client))
    raw = client.get(f"/api/pictures/{facts['pictures'][0]['name']}").content
    said = client.post("/api/read", json={"image": base64_of(raw)}).json()
    assert said["settings"]["seed"] == 3 and said["text"].startswith("a red circle\nSteps: 2, ")
    assert client.post("/api/read", json={"image": base64_of(png())}).json() == {"settings": {}, "text": ""}


@pytest.mark.parametrize(
    ("values", "param", "says"),
    [
        ({"steps": 0}, "steps", "steps: got 0, expected a number from 1"),
        ({"steps": 101}, "steps", "expected at most 100"),
        ({"steps": "8"}, "steps", "steps: got '8', expected a whole number"),
        ({"steps": True}, "steps", "expected a whole number"),
        ({"width": 1000}, "width", "a multiple of 16"),
        ({"width": 4096, "height": 4096}, "width", "at most 4.2 million pixels"),
        ({"hires": 8, "width": 1024, "height": 1024}, "width", "at most 4.2 million pixels"),
        ({"width": 2**62}, "width", "expected"),
        ({"sigmas": [1] * 2000}, "sigmas", "a list of numbers"),
        ({"sampler": "ddim"}, "sampler", "expected one of euler"),
        ({"count": 11}, "count", "a number from 1 to 10"),
        ({"model": "other"}, None, "expected one of demo"),
        ({"prompt": "x" * 10_001}, "prompt", "expected at most 10000"),
        ({"prompt": 5}, "prompt", "expected a text"),
        ({"loras": [{"name": "../x"}]}, None, "LoRA: got '../x'"),
        ({"loras": [{"path": "/x"}]}, "loras", "expected a list such as"),
        ({"latents": "/etc/passwd"}, "latents", "there is no such field"),
        ({"image": "/etc/passwd"}, "image", "image: not base64"),
        ({"image": "file:///etc/passwd"}, "image", "URLs are not fetched"),
        ({"image": "http://169.254.169.254/"}, "image", "URLs are not fetched"),
        ({"cfg": 0}, "cfg", "cfg: got 0"),
        ({"cfg": 2, "guidance": 2}, "cfg", "one setting"),
    ],
)
def test_what_is_refused(client: TestClient, values: dict[str, Any], param: str | None, says: str) -> None:
    answer = client.post("/api/jobs", json={**RED, **values})
    assert answer.status_code in (400, 404), answer.text
    error = answer.json()["error"]
    assert says in error["message"] and error["param"] == param and "--" not in error["message"]
    assert client.get("/api/status").json()["waiting"] == 0


def test_what_is_there_to_use(client: TestClient) -> None:
    status = client.get("/api/status").json()
    assert status["defaults"]["demo"] == {"width": 64, "height": 64, "steps": 8, "guidance": 0.0, "shift": 3.0}
    assert status["models"] == ["demo"] and status["loras"] == [] and "euler" in status["samplers"]
    assert client.get("/health").json() == {"ok": True}
    document = client.get("/api/openapi.json").json()
    assert document["components"]["schemas"]["Request"]["properties"]["sampler"]["enum"][0] == "euler"


def test_the_document_names_every_route(client: TestClient) -> None:
    from zimage_lite.serve.own_routes import OwnRoutes

    named = {
        (path, verb.upper())
        for path, verbs in client.get("/api/openapi.json").json()["paths"].items()
        for verb in verbs
    }
    routes = {(route.path, verb) for route in OwnRoutes(None).routes() for verb in route.methods - {"HEAD"}}
    assert named | {("/api/openapi.json", "GET")} == routes

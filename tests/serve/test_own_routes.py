"""/api/...: jobs ordered, watched, stopped, found again and deleted."""

from __future__ import annotations

from collections.abc import Callable
from io import BytesIO
from typing import Any

import pytest
from PIL import Image
from served import base64_of, events, finished, png, serving
from starlette.testclient import TestClient

from zimage_lite.config import RuntimeOptions
from zimage_lite.pictures.saving import recipe_of
from zimage_lite.serve import own_routes
from zimage_lite.serve.options import ServeOptions
from zimage_lite.workers.orders import LostError, Order

Options = Callable[..., ServeOptions]
RED = {"prompt": "a red circle", "steps": 2, "seed": 3}


def submit(client: TestClient, **values: Any) -> str:
    response = client.post("/api/jobs", json={**RED, **values})
    assert response.status_code == 202, response.text
    assert response.headers["location"] == f"/api/jobs/{response.json()['id']}"
    return response.json()["id"]


@pytest.mark.slow
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


def plan(client: TestClient, **values: Any) -> dict[str, Any]:
    answer = client.post("/api/plan", json={**RED, **values})
    assert answer.status_code == 200, answer.text
    schemas = client.get("/api/openapi.json").json()["components"]["schemas"]
    found, wanted = answer.json(), schemas["Plan"]["properties"]
    assert found.keys() == wanted.keys()
    for name in ("memory", "phases"):
        for one in found[name]:
            assert one.keys() == wanted[name]["items"]["properties"].keys()
    return found


@pytest.mark.slow
def test_what_a_job_would_take_while_another_is_drawn(client: TestClient) -> None:
    before, large = plan(client), plan(client, width=512, height=512, count=2, image=base64_of(png()))
    assert before["fits"] and [one["phase"] for one in before["phases"]] == ["encode", "denoise", "decode"]
    assert [one["phase"] for one in large["phases"]] == ["encode", "picture", "denoise", "decode"]
    (memory,), (more,) = before["memory"], large["memory"]
    assert memory["place"] == "Memory" and 0 < memory["planned"] < more["planned"] <= more["limit"]
    assert before["seconds"] < large["seconds"] and client.get("/api/jobs").json() == {"jobs": []}
    job = submit(client, steps=100, count=10)
    while client.get(f"/api/jobs/{job}").json()["step"] is None:
        pass
    assert plan(client)["fits"] and client.get(f"/api/jobs/{job}").json()["state"] == "running"
    client.post(f"/api/jobs/{job}/cancel")
    assert finished(client, job)["state"] == "cancelled"


def test_what_does_not_fit_is_told_before_it_is_ordered(serve_options: Options) -> None:
    with serving(serve_options(runtime=RuntimeOptions("cpu", cache=False, ram_bytes=10**8))) as (client, _):
        found = plan(client)
        assert found["fits"] is False and "the smallest that works is" in found["message"]
        assert found["memory"] == [{"place": "Memory", "planned": 0, "limit": 10**8}] and found["phases"] == []


def test_what_cannot_be_planned(serve_options: Options, monkeypatch: pytest.MonkeyPatch) -> None:
    options = serve_options(models={"demo": "demo", "hub": "nobody/nothing", "none": "/nowhere"})
    with serving(options) as (client, service):
        found = plan(client, model="hub")  # which is not downloaded for a plan
        assert found["fits"] is None and "nobody/nothing is planned once it was opened" in found["message"]
        for values, says in (({"model": "none"}, "no such model"), ({"steps": 0}, "steps: got 0")):
            answer = client.post("/api/plan", json={**RED, **values})
            assert answer.status_code == 400 and says in answer.json()["error"]["message"]
        monkeypatch.setattr(own_routes, "_PLANS", 0)
        assert client.post("/api/plan", json=RED).status_code == 429
        monkeypatch.undo()
        monkeypatch.setattr(service.workers[0].drawer, "plan", lost)
        assert client.post("/api/plan", json=RED).status_code == 503


def lost(order: Order) -> None:
    raise LostError("gone")


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


def test_an_address_that_there_is_not(client: TestClient) -> None:
    """In the shape of its API, and with where to look."""
    own, openai, a1111 = (client.get(path) for path in ("/api/nosuch", "/v1/nosuch", "/sdapi/v1/nosuch"))
    assert [answer.status_code for answer in (own, openai, a1111)] == [404] * 3
    assert own.json()["error"]["message"] == "there is nothing at /api/nosuch; /api/openapi.json has what there is"
    assert openai.json()["error"]["message"] == "there is nothing at /v1/nosuch"
    assert a1111.json()["detail"] == "there is nothing at /sdapi/v1/nosuch"

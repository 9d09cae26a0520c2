"""Pictures that clients sent: kept while a job names them, so that it can be drawn again."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from served import base64_of, finished, png
from starlette.testclient import TestClient

from zimage_lite.config import GenerateOptions
from zimage_lite.pictures.saving import recipe_of
from zimage_lite.serve import kept
from zimage_lite.serve.history import History
from zimage_lite.serve.jobs import DONE, Job
from zimage_lite.serve.options import ServeOptions
from zimage_lite.serve.service import Service

IMAGE, MASK = png(), png(alpha=np.zeros((64, 64), np.uint8))
ORDER = {"prompt": "x", "steps": 1, "seed": 1, "image": base64_of(IMAGE), "mask": base64_of(png(mode="L"))}


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def sha256(raw: bytes) -> str:
    return hashlib.sha256(raw).hexdigest()


def job_of(*pictures: bytes, state: str = DONE) -> Job:
    return Job("demo", [GenerateOptions("x", image=one) for one in pictures], state=state)


def keep(history: History, job: Job) -> Job:
    job.requests = history.kept.of(job.id, job.requests)
    history.put(job, {})
    return job


@pytest.mark.slow
def test_what_was_drawn_over_a_picture_is_drawn_again(client: TestClient, tmp_path: Path) -> None:
    first = client.post("/api/jobs", json={**ORDER, "count": 2}).json()["id"]
    one = finished(client, first)
    again = client.post("/api/jobs", json=one["settings"]).json()["id"]
    other = finished(client, again)
    paths = [tmp_path / "served" / "pictures" / facts["pictures"][0]["name"] for facts in (one, other)]
    assert paths[0].read_bytes() == paths[1].read_bytes() and one["settings"] == other["settings"]
    assert recipe_of(paths[0])["image"] == one["settings"]["image"] == {"sha256": sha256(IMAGE)}
    folder = tmp_path / "served" / "given"
    assert len(names(folder)) == 2
    there = client.get(f"/api/given/{sha256(IMAGE)}")
    assert there.content == IMAGE and there.headers["content-type"] == "image/png"
    client.delete(f"/api/jobs/{first}")
    assert len(names(folder)) == 2
    client.delete(f"/api/jobs/{again}")
    assert names(folder) == set() and client.get(f"/api/given/{sha256(IMAGE)}").status_code == 404
    gone = client.post("/api/jobs", json=one["settings"])
    assert gone.status_code == 404 and "send it again" in gone.json()["error"]["message"]


def test_what_waits_holds_no_picture(serve_options: Callable[..., ServeOptions]) -> None:
    service = Service(serve_options(limits={"waiting": 1}))  # not started
    job = service.submit("demo", [GenerateOptions("x", image=IMAGE, seed=seed) for seed in (1, 2)])
    assert {request.image for request in job.requests} == {service.history.kept.path(sha256(IMAGE))}
    with pytest.raises(Exception, match="wait already"):
        service.submit("demo", [GenerateOptions("x", image=MASK)])
    assert names(service.history.kept.folder) == {sha256(IMAGE)}  # of what was refused nothing stays
    service.stop()


def test_a_picture_that_cannot_be_kept_is_no_request_at_fault(
    client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    assert client.post("/api/jobs", json=ORDER).status_code == 507


def test_a_broken_picture_is_told_without_its_place(client: TestClient) -> None:
    job = client.post("/api/jobs", json={**ORDER, "image": base64_of(IMAGE[: len(IMAGE) // 2])}).json()["id"]
    said = finished(client, job)["error"]["message"]
    assert said.startswith("the picture: the picture is broken or cut short")


@pytest.mark.parametrize("value", ["../history.sqlite", "0" * 63, "G" * 64, "", "x" * 10**5, "%2e%2e"])
def test_no_hash_leads_out_of_the_folder(value: str, client: TestClient) -> None:
    answer = client.post("/api/jobs", json={"prompt": "x", "image": {"sha256": value}})
    assert answer.status_code == 404 and "kept no longer" in answer.json()["error"]["message"]


def test_the_oldest_go_whose_jobs_are_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    history, pictures = History(tmp_path), [bytes([number]) * 100 for number in range(5)]
    monkeypatch.setattr(kept, "MOST_BYTES", 350)
    waiting = keep(history, job_of(pictures[0], state="queued"))
    for picture in pictures[1:]:
        keep(history, job_of(picture))
    assert names(history.kept.folder) == {sha256(pictures[number]) for number in (0, 3, 4)}
    assert waiting.requests[0].image.read_bytes() == pictures[0]


def test_a_restart_keeps_what_jobs_name_and_nothing_else(tmp_path: Path) -> None:
    history = History(tmp_path)
    keep(history, job_of(b"one"))
    lost = job_of(b"two")
    history.kept.of(lost.id, lost.requests)  # killed before the job was there
    assert len(names(history.kept.folder)) == 2
    assert names(History(tmp_path).kept.folder) == {sha256(b"one")}

"""The core on the demo: what is drawn, how it is told, and what it outlives."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from threading import Event
from typing import Any

import numpy as np
import pytest
from PIL import Image

from zimage_lite import GenerateOptions, load
from zimage_lite.pictures.saving import recipe_of
from zimage_lite.pipeline.drawing import Pipeline
from zimage_lite.serve.catalog import UnknownError
from zimage_lite.serve.jobs import CANCELLED, DONE, FAILED, LOST, Job
from zimage_lite.serve.options import ServeOptions
from zimage_lite.serve.service import Service

MINUTE_S = 60
Options = Callable[..., ServeOptions]


def requests(*seeds: int, steps: int = 2, **more: Any) -> list[GenerateOptions]:
    return [GenerateOptions("a red circle", steps=steps, seed=seed, **more) for seed in seeds]


def drawn(service: Service, *seeds: int, **more: Any) -> Job:
    job = service.submit("demo", requests(*seeds, **more))
    assert service.board.wait(job, MINUTE_S)
    return job


@pytest.mark.slow
def test_pictures_are_those_of_generate(service: Service) -> None:
    job = drawn(service, 5, 6)
    assert job.state == DONE and [picture.seed for picture in job.pictures] == [5, 6]
    wanted = load("demo", device="cpu").generate(requests(5, 6))
    for picture, pixels in zip(job.pictures, wanted, strict=True):
        path = service.history.picture(picture.name)
        assert path and np.array_equal(np.asarray(Image.open(path)), pixels.numpy())
        assert (picture.width, picture.height) == Image.open(path).size
        said = recipe_of(path)
        assert (said["prompt"], said["seed"], said["model"]["name"]) == ("a red circle", picture.seed, "demo")
    assert service.history.job(job.id)["settings"]["steps"] == 2


@pytest.mark.slow
def test_progress_and_previews_are_told(service: Service) -> None:
    seen = list[dict[str, Any]]()
    previews = set[bytes | None]()

    def look() -> None:
        if job := service.board.running:
            seen.append(job.facts())
            previews.add(job.preview)

    with service.board.listening(look), service.board.watching():
        job = drawn(service, 1, steps=4)
    steps = [facts["step"] for facts in seen if facts["phase"] == "denoise"]
    assert sorted(set(steps)) == [1, 2, 3, 4] and steps == sorted(steps)
    left = [facts["seconds_left"] for facts in seen if facts["step"] == 3]
    assert left and all(seconds is not None and seconds >= 0 for seconds in left[1:])
    assert job.previews == 4 and job.preview is None  # it takes no memory once it is over
    shown = [Image.open(BytesIO(picture)) for picture in previews if picture]
    assert len(shown) == 4 and {picture.format for picture in shown} == {"JPEG"}
    assert [facts["version"] for facts in seen] == sorted(facts["version"] for facts in seen)


@pytest.mark.slow
def test_previews_are_made_for_those_who_look(service: Service) -> None:
    """On a GPU each costs a wait for it, in every step."""
    assert drawn(service, 1).previews == 0
    with service.board.watching(Job("demo", requests(1))):  # another one
        assert drawn(service, 1).previews == 0
    with service.board.watching():
        assert drawn(service, 1).previews == 2
    job = Job("demo", requests(1))
    with service.board.watching(job):
        service.board.submit(job, lambda one: service.history.put(one, {}))
        assert service.board.wait(job, MINUTE_S) and job.previews == 2
    job = Job("demo", requests(1))
    service.board.glance(job)
    service.board.submit(job, lambda one: service.history.put(one, {}))
    assert service.board.wait(job, MINUTE_S) and job.previews == 2


@pytest.mark.slow
def test_a_cancelled_job_stops_within_a_step(service: Service) -> None:
    steps = list[int]()

    def cancel() -> None:
        job = service.board.running
        if job and job.phase == "denoise":
            steps.append(job.done)
            job.cancelled.set()

    with service.board.listening(cancel):
        job = drawn(service, 1, steps=50)
    assert job.state == CANCELLED and set(steps) == {1} and job.pictures == []
    assert service.history.job(job.id)["state"] == CANCELLED
    assert drawn(service, 2).state == DONE


class Breaking:
    """A pipeline that breaks once."""

    def __init__(self, error: BaseException) -> None:
        self.error: BaseException | None = error

    def __call__(self, *_: object) -> None:
        error, self.error = self.error, None
        if error:
            raise error


@pytest.mark.slow
@pytest.mark.parametrize(
    ("error", "code", "says"),
    [
        (MemoryError(), "out_of_memory", "memory ran out"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "too_large", "memory ran out"),
        (ZeroDivisionError("x"), "internal", "ZeroDivisionError: the server's log has more"),
    ],
)
def test_the_worker_outlives_what_breaks(
    error: BaseException, code: str, says: str, service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Out of memory in a phase, it is planned with less, if that can be; outside of one there is no other way."""
    place = "zimage_lite.pipeline.drawing.Pipeline._planned"
    if code == "too_large":
        monkeypatch.setattr("zimage_lite.pipeline.decode.Decode.run", lambda *_: (_ for _ in ()).throw(error))
    else:
        broken, whole = Breaking(error), Pipeline._planned
        monkeypatch.setattr(place, lambda self, tasks: broken() or whole(self, tasks))
    job = drawn(service, 1)
    assert job.state == FAILED and job.failure and job.failure.code == code and says in job.failure.message
    monkeypatch.undo()
    assert drawn(service, 2).state == DONE


@pytest.mark.slow
def test_what_does_not_fit_is_told_as_that(serve_options: Options) -> None:
    from dataclasses import replace

    options = serve_options()
    tight = replace(options, runtime=replace(options.runtime, ram_bytes=100 * 10**6))
    service = Service(tight)
    service.start()
    job = drawn(service, 1)
    assert job.state == FAILED and job.failure and job.failure.code == "too_large" and "--ram" in job.failure.message
    service.stop()


@pytest.mark.slow
def test_a_full_disk_fails_the_job_alone(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    job = drawn(service, 1)
    assert job.state == FAILED and job.failure and job.failure.code == "storage" and "disk is full" in str(job.failure)
    assert list(service.history.folder.iterdir()) == [] and job.pictures == []
    monkeypatch.undo()
    assert drawn(service, 2).state == DONE


@pytest.mark.slow
def test_the_pipeline_is_opened_once_and_given_back(serve_options: Options, monkeypatch: pytest.MonkeyPatch) -> None:
    service = Service(serve_options())
    worker, back, opened = service.workers[0], Event(), list[weakref.ref[Pipeline]]()
    own, given = worker.drawer.opener, worker.drawer.give_back

    def opening(*asked: Any) -> Pipeline:
        pipeline = own(*asked)
        opened.append(weakref.ref(pipeline))
        return pipeline

    def giving_back() -> None:
        given()
        back.set()

    monkeypatch.setattr(worker.drawer, "opener", opening)
    service.start()
    drawn(service, 1)
    drawn(service, 2)
    assert len(opened) == 1 and opened[0]() is not None
    monkeypatch.setattr(worker.drawer, "give_back", giving_back)
    monkeypatch.setattr(worker, "idle_s", 0.01)
    back.clear()
    drawn(service, 3)  # the worker waits for the next one by the new time
    assert back.wait(MINUTE_S)
    gc.collect()
    assert opened[0]() is None
    assert drawn(service, 4).state == DONE and len(opened) == 2
    service.stop()


def test_a_server_that_stops_says_what_it_did_not_draw(serve_options: Options) -> None:
    service = Service(serve_options())
    jobs = [service.submit("demo", requests(seed, steps=50)) for seed in (1, 2)]
    started = Event()
    with service.board.listening(lambda: started.set() if service.board.running else None):
        service.start()
        assert started.wait(MINUTE_S)
    service.stop()
    assert [job.state for job in jobs] == [CANCELLED, LOST]
    again = Service(serve_options())
    assert again.lost == [] and again.facts(jobs[1].id)["state"] == LOST
    again.stop()


def test_deleting_a_job_stops_it(service: Service) -> None:
    job = service.submit("demo", requests(1, steps=500))
    assert service.delete(job.id)
    assert job.over and service.history.job(job.id) is None and not service.delete(job.id)


def test_other_models_are_not_opened(service: Service, tmp_path: Path) -> None:
    for name in ("/etc", "../demo", "owner/name", str(tmp_path), ""):
        with pytest.raises(UnknownError, match=r"model: got .*, expected one of demo"):
            service.submit(name, requests(1))


def test_other_adapters_are_not_opened(service: Service, tmp_path: Path) -> None:
    (tmp_path / "loras" / "ink.safetensors").touch()
    (tmp_path / "secret.safetensors").touch()
    assert service.catalog.lora("ink") == tmp_path / "loras" / "ink.safetensors"
    for name in ("../secret", str(tmp_path / "secret.safetensors"), "owner/name", "", None, 5):
        with pytest.raises(UnknownError, match=r"LoRA: got .*, expected one of ink"):
            service.catalog.lora(name)


def test_what_is_said_of_files_names_no_place(serve_options: Options) -> None:
    """However the place was spelled when the server was started; on Windows with slashes of either kind."""
    catalog = Service(serve_options(models={"own": "./some//place/model", "demo": "demo"})).catalog
    assert catalog.shown("some/place/model/vae: no weights in ./some//place/model") == "own/vae: no weights in own"

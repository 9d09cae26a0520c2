"""zimage-lite serve: what it says, what it refuses, and what a kill leaves."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx2 as httpx
import pytest

from zimage_lite.cli import serve
from zimage_lite.errors import UserError

Refused = Callable[..., str]
LONG = {"prompt": "x", "steps": 100, "width": 512, "height": 512}


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (("--host", "0.0.0.0"), "could use the server; set --api-key (or ZIMAGE_LITE_API_KEY)"),
        (("--port", 99999), "--port: got 99999, expected a number from 0"),
        (("--lora-dir", "missing"), "--lora-dir missing: no such folder"),
        (("--model", "a/x", "--model", "b/x"), "name each differently, as NAME=PLACE"),
        (("--queue", 0), "limit of waiting: got 0, expected 1 or more"),
        (("--idle-minutes", 0), "--idle-minutes: got 0.0, expected more than 0"),
        (("--host", "no.such.host.invalid", "--no-auth", "--folder", "FOLDER"), "no address of this machine"),
    ],
)  # fmt: skip
def test_what_is_refused(options: tuple, line: str, tmp_path: Path, refused: Refused) -> None:
    options = tuple(tmp_path if option == "FOLDER" else option for option in options)
    assert line in refused("serve", *options)


def test_names_of_models() -> None:
    given = ("demo", "turbo=models/Z-Image-Turbo-q8_0", "owner/Model-2.1", "synthetic:q4_0", "a/b.c.safetensors")
    wanted = {"demo": "demo", "turbo": "models/Z-Image-Turbo-q8_0", "Model-2.1": "owner/Model-2.1"}
    assert serve._named(given) == {**wanted, "synthetic:q4_0": "synthetic:q4_0", "b.c": "a/b.c.safetensors"}


def test_without_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serve, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="serve needs starlette, uvicorn, python_multipart; pip install"):
        serve._require_extra()


def serving_in(folder: Path) -> list[str]:
    options = ["--no-browser", "--port", "0", "--device", "cpu", "--folder", str(folder)]
    return [sys.executable, "-m", "zimage_lite", "serve", *options]


@contextmanager
def running(folder: Path) -> Iterator[tuple[subprocess.Popen[str], httpx.Client, str]]:
    """A server as a process of its own, a client of it, and what it said before its address."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(serving_in(folder), stderr=subprocess.PIPE, text=True, env=environment)
    assert process.stderr
    said, address = "", None
    for line in process.stderr:
        if address := re.match(r"http://127\.0\.0\.1:\d+", line):
            break
        said += line
    assert address, said
    try:
        with httpx.Client(base_url=address[0], timeout=60) as client:
            yield process, client, said
    finally:
        process.kill()
        process.wait(60)
        process.stderr.close()


def told_off(folder: Path) -> str:
    """What another server says of its folder."""
    done = subprocess.run(serving_in(folder), capture_output=True, text=True)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
    return done.stderr


def until(holds: Callable[[], bool]) -> None:
    end = time.monotonic() + 120
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.02)


@pytest.mark.slow
def test_killed_in_the_middle_and_started_again(tmp_path: Path) -> None:
    with running(tmp_path) as (process, client, said):
        assert said == ""
        done = client.post("/api/jobs", json={"prompt": "x", "steps": 1}).json()["id"]
        until(lambda: client.get(f"/api/jobs/{done}").json()["state"] == "done")
        lost = [client.post("/api/jobs", json=LONG).json()["id"] for _ in range(2)]
        until(lambda: (client.get(f"/api/jobs/{lost[0]}").json()["step"] or 0) > 0)
        assert "another server draws into it; end that, or name another --folder" in told_off(tmp_path)
        assert client.get(f"/api/jobs/{lost[0]}").json()["state"] == "running"
        process.kill()
        process.wait(60)
    with running(tmp_path) as (process, client, said):
        assert "note: 2 jobs of the last time had not been drawn" in said
        assert [client.get(f"/api/jobs/{job}").json()["state"] for job in lost] == ["lost", "lost"]
        assert sorted(client.get("/api/status").json()["lost"]) == sorted(lost)
        (picture,) = client.get(f"/api/jobs/{done}").json()["pictures"]
        assert client.get(f"/api/pictures/{picture['name']}").status_code == 200
        assert [path.name for path in (tmp_path / "pictures").iterdir()] == [picture["name"]]
        again = client.post("/api/jobs", json={"prompt": "x", "steps": 1}).json()["id"]
        until(lambda: client.get(f"/api/jobs/{again}").json()["state"] == "done")


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="no such signal to a process alone")
def test_an_interrupt_ends_it_within_a_step(tmp_path: Path) -> None:
    with running(tmp_path) as (process, client, _):
        job = client.post("/api/jobs", json=LONG).json()["id"]
        until(lambda: (client.get(f"/api/jobs/{job}").json()["step"] or 0) > 0)
        process.send_signal(signal.SIGINT)
        assert process.wait(60) in (0, 130)
    with running(tmp_path) as (_, client, said):
        assert said == "" and client.get(f"/api/jobs/{job}").json()["state"] == "cancelled"

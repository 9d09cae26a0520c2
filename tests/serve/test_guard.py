"""What each rule of the server prevents, by its name."""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from served import BASE, base64_of, finished, png, serving
from starlette.testclient import TestClient

from zimage_lite.errors import UserError
from zimage_lite.serve.options import ServeOptions

Options = Callable[..., ServeOptions]
DRAW = {"prompt": "x", "steps": 1}


OTHERS = "evil.example localhost.evil.example evil.example:7860 127.0.0.1.nip.io localhost:x [::1 a@localhost"


@pytest.mark.parametrize("host", ["", *OTHERS.split(" ")])
def test_dns_rebinding(client: TestClient, host: str) -> None:
    """A page's own name, made to lead here: there Host and Origin are equal."""
    answer = client.get("/api/status", headers={"host": host, "origin": f"http://{host}"})
    assert answer.status_code == 403 and answer.json()["error"]["code"] == "host"


@pytest.mark.parametrize("host", ["localhost:7860", "LOCALHOST", "127.0.0.1:7860", "[::1]:7860", "192.168.1.5:7860"])
def test_the_servers_own_names_are_taken(client: TestClient, host: str) -> None:
    assert client.get("/api/status", headers={"host": host}).status_code == 200


def test_further_names_are_told(serve_options: Options) -> None:
    with serving(serve_options(hosts=("drawing.lan",))) as (client, _):
        assert client.get("/api/status", headers={"host": "drawing.lan:7860"}).status_code == 200
        assert client.get("/api/status", headers={"host": "other.lan"}).status_code == 403


@pytest.mark.parametrize(
    "headers",
    [
        {"origin": "http://evil.example"},
        {"origin": "null"},
        {"origin": "http://localhost.evil.example:7860"},
        {"origin": "http://localhost:3000"},
        {"sec-fetch-site": "cross-site"},
        {"sec-fetch-site": "same-site"},
        {"origin": BASE, "sec-fetch-site": "cross-site"},
    ],
)
@pytest.mark.parametrize("path", ["/api/jobs", "/v1/images/generations", "/sdapi/v1/txt2img", "/sdapi/v1/interrupt"])
def test_csrf(client: TestClient, headers: dict[str, str], path: str) -> None:
    """Any page may send to this machine; that it may not read the answer does not stop what it ordered."""
    answer = client.post(path, json=DRAW, headers=headers)
    assert answer.status_code == 403 and client.get("/api/jobs").json() == {"jobs": []}


def test_the_servers_own_page_may(client: TestClient) -> None:
    headers = {"origin": BASE, "sec-fetch-site": "same-origin"}
    assert client.post("/api/jobs", json=DRAW, headers=headers).status_code == 202


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "", "application/json-seq"])
def test_csrf_by_a_form_that_needs_no_leave(client: TestClient, kind: str) -> None:
    """These kinds a page may send without being asked first; JSON it may not."""
    answer = client.post("/api/jobs", content=json.dumps(DRAW), headers={"content-type": kind})
    assert answer.status_code == 415


def test_other_origins_read_nothing(client: TestClient) -> None:
    for headers in ({"origin": "http://evil.example"}, {"origin": BASE}):
        answer = client.get("/api/status", headers=headers)
        assert not [name for name in answer.headers if name.startswith("access-control-")]
        assert answer.headers["cross-origin-resource-policy"] == "same-origin"
    assert client.options("/api/jobs", headers={"origin": "http://evil.example"}).status_code == 405


@pytest.mark.slow
def test_stored_xss(client: TestClient) -> None:
    """Nothing of a client's is served as a page, and no browser guesses what it is."""
    job = client.post("/api/jobs", json={**DRAW, "prompt": "<script>alert(1)</script>"}).json()["id"]
    name = finished(client, job)["pictures"][0]["name"]
    for path, kind in ((f"/api/pictures/{name}", "image/png"), (f"/api/jobs/{job}", "application/json")):
        answer = client.get(path)
        assert answer.headers["content-type"] == kind and answer.headers["x-content-type-options"] == "nosniff"
        assert "default-src 'self'" in answer.headers["content-security-policy"]
        assert "unsafe" not in answer.headers["content-security-policy"]


@pytest.fixture
def locked(serve_options: Options) -> Iterator[TestClient]:
    with serving(serve_options(api_key="secret")) as (client, _):
        yield client


ROUTES = ["/", "/api/status", "/api/jobs", "/api/events", "/api/pictures/x", "/v1/models", "/sdapi/v1/options", "/x"]


@pytest.mark.parametrize("path", ROUTES)
@pytest.mark.parametrize(
    "given", [None, "Bearer", "Bearer wrong", "Bearer secret2", "Basic !!", "Basic c2VjcmV0", "secret"]
)
def test_a_missing_or_wrong_key(locked: TestClient, path: str, given: str | None) -> None:
    answer = locked.get(path, headers={"authorization": given} if given else {})
    assert answer.status_code == 401 and answer.headers["www-authenticate"].startswith("Basic")


@pytest.mark.parametrize("given", ["Bearer secret", "bearer secret", "Basic " + base64_of(b"any:secret")])
def test_the_right_key(locked: TestClient, given: str) -> None:
    assert locked.get("/api/status", headers={"authorization": given}).status_code == 200


def test_a_key_with_letters_of_any_kind_is_no_crash(locked: TestClient) -> None:
    assert locked.get("/api/status", headers={"authorization": "Bearer schlüssel".encode()}).status_code == 401


@pytest.mark.parametrize("host", ["0.0.0.0", "192.168.1.5", "::", "example.org"])
def test_an_open_server_by_accident(serve_options: Options, host: str) -> None:
    """175,000 of another program stood open to the internet."""
    with pytest.raises(UserError, match="whoever reaches this machine could use the server; set --api-key"):
        serve_options(host=host)
    assert serve_options(host=host, api_key="x") and serve_options(host=host, no_auth=True)


TRAVERSAL = [
    "../history.sqlite", "..%2fhistory.sqlite", "%2e%2e/history.sqlite", "..\\history.sqlite", "..%5chistory.sqlite",
    "%2fetc%2fpasswd", "C:%5cWindows", "a%00.png", "....//history.sqlite",
]  # fmt: skip


@pytest.mark.parametrize("name", TRAVERSAL)
def test_path_traversal(client: TestClient, name: str) -> None:
    for path in ("/api/pictures/", "/api/given/", "/api/jobs/", "/v1/models/", "/"):
        answer = client.get(path + name)
        assert answer.status_code == 404 and "SQLite" not in answer.text


def test_files_of_the_server_as_models_or_adapters(client: TestClient, tmp_path: Path) -> None:
    for values in ({"model": "/etc"}, {"model": "../demo"}, {"loras": [{"name": "../../secret"}]}, {"latents": "/x"}):
        answer = client.post("/api/jobs", json={**DRAW, **values})
        assert answer.status_code in (400, 404) and str(tmp_path) not in answer.text
    assert client.post("/api/jobs", json={**DRAW, "mask": "none", "image": "image.png"}).status_code == 400


@pytest.mark.parametrize(
    "url", ["http://127.0.0.1:1/", "https://x/", "file:///etc/passwd", "ftp://x", "HTTP://x", "//x/y"]
)
def test_requests_forged_by_the_server(client: TestClient, url: str) -> None:
    """It fetches nothing, wherever a picture may stand."""
    asks: list[tuple[str, dict[str, Any]]] = [
        ("/api/jobs", {"image": url}),
        ("/api/read", {"image": url}),
        ("/v1/images/generations", {"image": url}),
        ("/v1/images/edits", {"images": [{"image_url": url}]}),
        ("/sdapi/v1/img2img", {"init_images": [url]}),
        ("/sdapi/v1/png-info", {"image": url}),
    ]
    for path, values in asks:
        assert client.post(path, json={**DRAW, **values} if path != "/api/read" else values).status_code == 400, path


def bomb(width: int, height: int) -> bytes:
    """A PNG of a few hundred bytes that says it is large."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = zlib.compress(bytes(10_000))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


@pytest.mark.parametrize("size", [(5000, 5000), (30_000, 30_000), (2**31 - 1, 2**31 - 1)])
def test_decompression_bombs(client: TestClient, size: tuple[int, int]) -> None:
    for path, values in (
        ("/api/jobs", {**DRAW, "image": base64_of(bomb(*size))}),
        ("/api/read", {"image": base64_of(bomb(*size))}),
    ):
        answer = client.post(path, json=values)
        assert answer.status_code == 400 and "too large" in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    "raw", [b"", b"%!PS-Adobe-3.0 EPSF-3.0\n", b"<svg xmlns='http://www.w3.org/2000/svg'/>", b"\x89PNG\r\n\x1a\n"]
)
def test_files_that_are_no_pictures(client: TestClient, raw: bytes) -> None:
    """Those that Pillow would have other programs run, above all."""
    assert client.post("/api/jobs", json={**DRAW, "image": base64_of(raw)}).status_code == 400


def test_bodies_without_end(serve_options: Options) -> None:
    with serving(serve_options(limits={"body_bytes": 10_000})) as (client, _):
        big = {"prompt": "x" * 20_000}
        assert client.post("/api/jobs", json=big).status_code == 413  # by its header

        def pieces() -> Iterator[bytes]:
            for _ in range(100):
                yield b" " * 1000

        answer = client.post("/api/jobs", content=pieces(), headers={"content-type": "application/json"})
        assert answer.status_code == 413  # without one
        answer = client.post("/v1/images/edits", data={"prompt": "x"}, files={"image": png(128, 128)})
        assert answer.status_code == 413
        lying = {"content-type": "application/json", "content-length": "-1"}
        assert client.post("/api/jobs", content=b"{}", headers=lying).status_code in (400, 413)


@pytest.mark.parametrize(
    "raw", [b"", b"[]", b"1", b"{", b"\xff\xfe", b"[" * 100_000, b'{"prompt": NaN}', b'{"steps": 1e999}']
)
def test_bodies_that_are_no_requests(client: TestClient, raw: bytes) -> None:
    for path in ("/api/jobs", "/v1/images/generations", "/v1/images/edits", "/sdapi/v1/img2img", "/api/read"):
        answer = client.post(path, content=raw, headers={"content-type": "application/json"})
        assert 400 <= answer.status_code < 500, (path, answer.text)


def test_methods_that_are_not_used(client: TestClient) -> None:
    for method in ("PUT", "PATCH", "OPTIONS", "TRACE", "PROPFIND"):
        assert client.request(method, "/api/jobs").status_code == 405
    assert client.post("/api/status").status_code == 405


def test_errors_tell_nothing_of_the_server(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise ZeroDivisionError("/secret/path")

    monkeypatch.setattr("zimage_lite.serve.own_routes.asked_for", broken)
    answer = client.post("/api/jobs", json=DRAW)
    assert answer.status_code == 500 and "secret" not in answer.text and "Traceback" not in answer.text


@pytest.mark.slow
def test_streams_without_number(serve_options: Options) -> None:
    with serving(serve_options(limits={"streams": 1})) as (client, _):
        job = client.post("/api/jobs", json=DRAW).json()["id"]
        for _ in range(3):  # one that has ended leaves its place
            assert client.get(f"/api/jobs/{job}/events").status_code == 200

"""A small Hub on this machine: enough of its HTTP interface for huggingface_hub, and a few ways to misbehave."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"
PIECE_BYTES = 2**16


@dataclass(frozen=True)
class Served:
    """One answer with a body."""

    name: str
    start: int
    n_bytes: int


@dataclass
class HubServer:
    """Serves one model folder as `repo_id`. Weights come by a redirect, as from the Hub's storage."""

    folder: Path
    repo_id: str = "someone/tiny"
    url: str = ""
    token: str | None = None  # without it, files are refused as gated
    honours_ranges: bool = True
    refusal_code: str | None = None  # with which it denies that there are other repositories
    refusal_message: str = "Invalid username or password."
    cuts: dict[str, int] = field(default_factory=dict)  # name -> how often its bodies are cut in the middle
    listed: dict[str, int] = field(default_factory=dict)  # name -> false size in the listing
    headed: dict[str, int] = field(default_factory=dict)  # name -> false size in answers to HEAD and range requests
    served: list[Served] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)
    on_piece: Callable[[str], None] = lambda name: None  # called before each piece of a body

    def names(self) -> list[str]:
        return sorted(path.relative_to(self.folder).as_posix() for path in self.folder.rglob("*") if path.is_file())

    def shards(self, folder: str = "") -> list[str]:
        return [name for name in self.names() if name.endswith(".safetensors") and name.startswith(folder)]

    def size(self, name: str) -> int:
        return (self.folder / name).stat().st_size

    def served_bytes(self, *names: str) -> int:
        return sum(answer.n_bytes for answer in self.served if answer.name in names)

    def listing(self) -> dict[str, Any]:
        files = [
            {"rfilename": name, "size": self.listed[name] if name in self.listed else self.size(name), "blobId": COMMIT}
            for name in dict.fromkeys([*self.names(), *self.listed])
        ]
        return {"id": self.repo_id, "sha": COMMIT, "private": False, "tags": [], "siblings": files}

    def tree(self) -> list[dict[str, Any]]:
        files = self.listing()["siblings"]
        return [{"type": "file", "path": file["rfilename"], "size": file["size"], "oid": COMMIT} for file in files]


@contextmanager
def serving(folder: Path) -> Iterator[HubServer]:
    hub = HubServer(folder)
    server = _Server(("127.0.0.1", 0), type("_BoundHandler", (_Handler,), {"hub": hub}))
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, *_: Any) -> None:
        """Who hangs up is no trouble of ours; a traceback would stand among what the command says."""


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # else each answer waits 40 ms for an acknowledgement of its head

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def log_message(self, *args: Any) -> None:
        pass

    def _answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append(f"{self.command} {path}")
        api, file = f"/api/models/{self.hub.repo_id}", f"/{self.hub.repo_id}/resolve/"
        if path.startswith("/storage/"):
            self._file(path.removeprefix("/storage/"))
        elif path.startswith(file):
            revision, _, name = path.removeprefix(file).partition("/")
            self._resolve(revision, name)
        elif path in (api, f"{api}/revision/main", f"{api}/revision/{COMMIT}"):
            self._json(self.hub.listing())
        elif path.startswith(f"{api}/tree/"):
            self._json(self.hub.tree())
        elif path.startswith(f"{api}/revision/"):
            self._refuse(404, "RevisionNotFound")
        else:
            self._refuse(404 if self.hub.refusal_code else 401, self.hub.refusal_code)  # 401 is for strangers

    def _resolve(self, revision: str, name: str) -> None:
        if self.hub.token and self.headers.get("Authorization") != f"Bearer {self.hub.token}":
            self._refuse(401, "GatedRepo")
        elif revision not in ("main", COMMIT):
            self._refuse(404, "RevisionNotFound")
        elif name not in self.hub.names():
            self._refuse(404, "EntryNotFound")
        elif name.endswith(".safetensors"):
            self.send_response(302)
            self.send_header("Location", f"{self.hub.url.replace('127.0.0.1', 'localhost')}/storage/{name}")
            self.send_header("X-Repo-Commit", COMMIT)
            self.send_header("X-Linked-Etag", f'"{self._etag(name)}"')
            self.send_header("X-Linked-Size", str(self.hub.headed.get(name, self.hub.size(name))))
            self.send_header("Content-Length", "0")
            self.end_headers()
        else:
            self._file(name)

    def _file(self, name: str) -> None:
        content = (self.hub.folder / name).read_bytes()
        start, stop, size = 0, len(content), self.hub.headed.get(name, len(content))
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if wanted and self.hub.honours_ranges:
            start, stop = int(wanted[1]), min(int(wanted[2] or stop) + 1, stop)
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{stop - 1}/{size}")
        else:
            self.send_response(200)
        self.send_header("Content-Length", str(stop - start))
        self.send_header("ETag", f'"{self._etag(name)}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("Accept-Ranges", "bytes")
        self.end_headers()
        if self.command == "HEAD":
            return
        whole = stop
        if stop - start > PIECE_BYTES and self.hub.cuts.get(name, 0) > 0:
            self.hub.cuts[name] -= 1
            stop = start + (stop - start) // 2
        sent = start
        try:
            while sent < stop:
                self.hub.on_piece(name)
                sent += self.wfile.write(content[sent : min(sent + PIECE_BYTES, stop)])
        except ConnectionError:
            self.close_connection = True
        self.hub.served.append(Served(name, start, sent - start))
        self.close_connection |= stop < whole

    def _etag(self, name: str) -> str:
        """Any string that differs between files would do."""
        return hashlib.sha256(f"{name} {self.hub.size(name)}".encode()).hexdigest()

    def _json(self, value: object) -> None:
        body = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _refuse(self, status: int, code: str | None = None) -> None:
        self.send_response(status)
        if code:
            self.send_header("X-Error-Code", code)
        else:
            self.send_header("X-Error-Message", self.hub.refusal_message)
        self.send_header("Content-Length", "0")
        self.end_headers()

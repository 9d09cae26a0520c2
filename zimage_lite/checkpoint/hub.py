"""Models by their Hugging Face Hub id: a snapshot to run, or a source that is converted one shard at a time.

A conversion fixes the layout of its output before it reads a weight, so it needs all headers first. They come by HTTP
range requests into stubs, files of nothing but a header, which open like the file itself once its size is given along.
`fetch` puts the file in the stub's place and `release` takes it away again: with `discard` one shard is on the disk at
a time, otherwise files come from, and stay in, the Hub's own cache. huggingface_hub is imported where it is used, for
it takes half a second; it downloads, and so reads HF_ENDPOINT, HF_HOME and HF_TOKEN.
"""

from __future__ import annotations

import inspect
import os
import re
import struct
import threading
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory
from typing import Any

from ..errors import FileFormatError, UserError
from .detect import COMPONENTS, VISION
from .hub_client import OnBytes, endpoint, failures, quiet, reporting_bar, telling
from .model_card import CARD
from .output import patiently, require_space
from .weight_files import ADAPTER_CONFIG

FIRST_BYTES = 100_000  # hold almost any header; one request more where they do not
TIMEOUT_S = 10  # without an answer, as huggingface_hub has it
_STUBBED = (".safetensors", ".sft")
_WEIGHTS = (*_STUBBED, ".gguf")  # a GGUF header does not say how long it is, so such a file comes whole
_SUFFIXES = (".json", ".txt", ".jinja", *_WEIGHTS)
_FOLDERS = (*COMPONENTS, VISION, "siglip_processor", "tokenizer", "scheduler")
_ROOT_FILES = ("model_index.json", CARD)


def is_hub_id(text: str) -> bool:
    """Whether `text` reads OWNER/NAME, and is neither a path that exists nor the name of a file."""
    like = re.fullmatch(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9_][\w.-]{0,95}", text, re.ASCII)
    return bool(like) and not text.lower().endswith((*_SUFFIXES, ".git", ".bin", ".pt")) and not os.path.exists(text)


def snapshot(repo_id: str, revision: str | None = None) -> Path:
    """The folder of a model in the Hub's cache, downloaded as far as it is not there. Raises UserError."""
    from huggingface_hub import snapshot_download

    patterns = [*_ROOT_FILES, *(f"{folder}/*{suffix}" for folder in _FOLDERS for suffix in _SUFFIXES)]
    with quiet(), telling(repo_id, revision):
        return Path(snapshot_download(repo_id, revision=revision, endpoint=endpoint(), allow_patterns=patterns))


def named_file(path: str) -> Path | None:
    """What OWNER/NAME or OWNER/NAME/FILE means, as `single_file`; None for what reads otherwise, is there as a path, or
    lies in a folder that is. Raises UserError."""
    owner, _, rest = path.partition("/")
    name, _, file = rest.partition("/")
    if os.path.exists(owner) or not is_hub_id(f"{owner}/{name}") or (file and not file.lower().endswith(_WEIGHTS)):
        return None
    return single_file(f"{owner}/{name}", file or None)


def single_file(repo_id: str, name: str | None = None) -> Path:
    """A LoRA's or ControlNet's file in the Hub's cache, downloaded if it is not there: the one that is named, else the
    only one, or its folder. PEFT's config, which says how strong it is, comes along. Raises UserError."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    with quiet(), telling(repo_id, None):
        there = _listed(repo_id) if name is None else []
        file = PurePosixPath(name or _only_weights(there, repo_id))
        config = str(file.with_name(ADAPTER_CONFIG))
        if config in there or file.name == "adapter_model.safetensors":
            try:
                hf_hub_download(repo_id, config, endpoint=endpoint())
            except EntryNotFoundError as error:
                if isinstance(error, FileNotFoundError):  # not reached, which is no answer
                    raise
        found = Path(hf_hub_download(repo_id, str(file), endpoint=endpoint()))
        return found.parent if config in there else found


def _listed(repo_id: str) -> list[str]:
    """What the repository holds; of one that cannot be reached, what the cache does."""
    from huggingface_hub import HfApi, errors, snapshot_download

    try:
        return list(HfApi(endpoint=endpoint()).list_repo_files(repo_id))
    except errors.HfHubHTTPError:
        raise
    except failures():
        with suppress(*failures()):
            folder = Path(snapshot_download(repo_id, endpoint=endpoint(), local_files_only=True))
            return [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
        raise


def _only_weights(names: Iterable[str], repo_id: str) -> str:
    weights = [name for name in names if name.endswith(".safetensors")]
    if len(weights) != 1:
        got = ", ".join(weights[:5]) or "no .safetensors file"
        raise UserError(
            f"{repo_id}: no single file of weights", got=got, fix=f"name one, as {repo_id}/FILE" if weights else None
        )
    return weights[0]


class LocalFiles:
    """A source on this disk: everything is there and stays there."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.file_bytes: Mapping[Path, int] = {}  # where the size of what lies there is not the true one

    def expect(self, paths: Iterable[Path], folder: Path, out_bytes: int) -> None:
        """Name the files to be fetched, in order. Raises UserError if they and the output in `folder` do not fit."""
        require_space(folder, out_bytes)

    def fetch(self, path: Path) -> None:
        """Have the whole file at `path`. Raises UserError."""

    def release(self, path: Path) -> None:
        """The file at `path` is not needed any more."""


@contextmanager
def hub_files(
    repo_id: str, revision: str | None = None, *, beside: Path, discard: bool = False,
    components: Collection[str] = tuple(COMPONENTS), on_bytes: OnBytes = lambda n: None,
) -> Iterator[HubFiles]:  # fmt: skip
    """A Hub model as a folder of small files and stubs, for the time of the `with` block. Raises UserError.

    beside: with `discard`, the folder to hold a temporary one with a shard. components: whose weights are wanted.
    """
    from huggingface_hub import constants

    place = beside if discard else Path(constants.HF_HUB_CACHE)  # on the disk of the cache, where it can be linked to
    if discard:
        os.environ.setdefault("HF_XET_CHUNK_CACHE_SIZE_BYTES", "0")  # 10 GB in some builds of hf_xet
    else:
        place.mkdir(parents=True, exist_ok=True)
    with quiet(), TemporaryDirectory(prefix=".hub-", dir=place, ignore_cleanup_errors=True) as temporary:
        files = HubFiles(repo_id, revision, Path(temporary).resolve(), discard, on_bytes)
        try:
            files.open(components)
            yield files
        except UserError as error:
            error.args = (str(error).replace(str(files.path), repo_id),)  # nobody knows the temporary folder
            raise
        finally:
            files.closed = True


class HubFiles(LocalFiles):
    """`path`: the model's folder, as it seems. Made by `hub_files`."""

    def __init__(self, repo_id: str, revision: str | None, temporary: Path, discard: bool, on_bytes: OnBytes) -> None:
        self.path = temporary / repo_id.partition("/")[2]
        self.repo_id, self.revision, self.commit, self.discard = repo_id, revision, "", discard
        self.file_bytes: dict[Path, int] = {}
        self.closed = False
        self._on_bytes, self._lock = on_bytes, threading.Lock()
        self._stubs: dict[Path, bytes] = {}  # the headers of the files to fetch
        self._fetched: set[Path] = set()
        self._order: list[Path] = []
        self._ahead = threading.Thread()

    def open(self, components: Collection[str]) -> None:
        """Bring the small files and the headers."""
        from huggingface_hub import HfApi

        with telling(self.repo_id, self.revision):
            api = HfApi(endpoint=endpoint())
            info = api.model_info(self.repo_id, revision=self.revision, files_metadata=True, timeout=TIMEOUT_S)
        self.commit = info.sha or ""
        files = [file for file in info.siblings or [] if _is_wanted(file.rfilename, components)]
        sizes = {file.rfilename: file.size or 0 for file in files}
        if not any(name.endswith(_WEIGHTS) for name in sizes):
            expected = ", ".join(f"{part}/" for part in components) + " as diffusers lays them out"
            raise UserError(f"{self.repo_id} holds no such model", expected=expected)
        self.file_bytes = {self.path / name: size for name, size in sizes.items()}
        for path in self.file_bytes:
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.suffix not in _STUBBED or self._cached(path):
                self._bring(path)
            else:
                self._stubs[path] = self._header(path)
                path.write_bytes(self._stubs[path])

    def expect(self, paths: Iterable[Path], folder: Path, out_bytes: int) -> None:
        self._order = [path for path in dict.fromkeys(paths) if path in self._stubs]
        sizes = [self.file_bytes[path] for path in self._order]
        needed = max(sizes, default=0) if self.discard else sum(sizes)
        if os.stat(folder).st_dev != os.stat(self.path).st_dev:
            require_space(self.path.parent.parent, needed)
            needed = 0
        require_space(folder, out_bytes + needed)

    def fetch(self, path: Path) -> None:
        if path not in self._stubs or path in self._fetched:
            return
        while self._ahead.is_alive():
            self._ahead.join(0.5)  # without a limit, Windows could not interrupt it
        patiently(os.unlink, path)  # huggingface_hub would take the stub for the file
        self._bring(path)
        self._fetched.add(path)
        following = next((later for later in self._order if later not in self._fetched), None)
        if following and not self.discard:
            self._ahead = threading.Thread(target=self._download_ahead, args=(following,), daemon=True)
            self._ahead.start()

    def release(self, path: Path) -> None:
        if self.discard and path in self._fetched:
            patiently(os.unlink, path)
            path.write_bytes(self._stubs[path])
            self._fetched.remove(path)

    def _name(self, path: Path) -> str:
        return path.relative_to(self.path).as_posix()

    def _cached(self, path: Path) -> Path | None:
        from huggingface_hub import try_to_load_from_cache

        found = try_to_load_from_cache(self.repo_id, self._name(path), revision=self.commit)
        return Path(found) if isinstance(found, str) else None

    def _bring(self, path: Path) -> None:
        """Have `path` be, or lead to, the file. Raises UserError unless it is what was announced."""
        file = self._cached(path) or self._download(path)
        header, size = self._stubs.get(path, b""), file.stat().st_size
        with open(file, "rb") as opened:
            same = opened.read(len(header)) == header
        if size != self.file_bytes[path] or not same:
            raise self._changed(path, f"{size} bytes" if same else "another header")
        if file.parent == path.parent:
            return
        try:
            path.symlink_to(file.resolve())
        except OSError:  # Windows asks for a privilege
            self._link(path, file)

    def _link(self, path: Path, file: Path) -> None:
        try:
            os.link(file.resolve(), path)
        except OSError as error:  # exFAT knows neither kind
            what = f"{self.repo_id}: no link can be made on the disk of the Hub's cache ({error.strerror})"
            raise UserError(what, fix="add --discard-source, or set HF_HOME to a folder on another disk") from error

    def _download(self, path: Path) -> Path:
        from huggingface_hub import hf_hub_download

        bar = reporting_bar(self._report)
        options: dict[str, Any] = {"local_dir": self.path} if self.discard else {}
        if "tqdm_class" in inspect.signature(hf_hub_download).parameters:  # since huggingface_hub 1.0
            options["tqdm_class"] = bar
        with telling(self.repo_id, self.revision, name := self._name(path)):
            file = hf_hub_download(self.repo_id, name, revision=self.commit, endpoint=endpoint(), **options)
            self._report(self.file_bytes[path] - bar.done_bytes)
        return Path(file)

    def _download_ahead(self, path: Path) -> None:
        with suppress(UserError):  # `fetch` will find it out
            self._download(path)

    def _report(self, n_bytes: int) -> None:
        with self._lock:
            if self.closed:
                raise OSError("the download is not wanted any more")
            self._on_bytes(n_bytes)

    def _header(self, path: Path) -> bytes:
        """The length, in 8 bytes, and the JSON of a safetensors file."""
        from .safetensors import MAX_HEADER_BYTES

        size = self.file_bytes[path]
        raw = self._start(path, min(size, FIRST_BYTES))
        end = 8 + (struct.unpack("<Q", raw[:8])[0] if size > 8 else 0)
        if not 10 <= end <= min(8 + MAX_HEADER_BYTES, size):
            raise FileFormatError(f"{path}: not a safetensors file", got=f"a header of {end - 8} bytes of {size}")
        return raw[:end] if len(raw) >= end else self._start(path, end)

    def _start(self, path: Path, stop: int) -> bytes:
        """Bytes [0, stop) of a file, and no more even from a server that would send them all."""
        from huggingface_hub import hf_hub_url
        from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

        url = hf_hub_url(self.repo_id, name := self._name(path), revision=self.commit, endpoint=endpoint())
        headers = {**build_hf_headers(), "Range": f"bytes=0-{stop - 1}", "Accept-Encoding": "identity"}
        session: Any = get_session()
        how = {"headers": headers, "timeout": TIMEOUT_S}
        is_httpx = callable(session.stream)  # since huggingface_hub 1.0
        raw = b""
        with (
            telling(self.repo_id, self.revision, name),
            session.stream("GET", url, **how) if is_httpx else session.get(url, stream=True, **how) as response,
        ):
            hf_raise_for_status(response)
            announced = response.headers.get("Content-Range", "").rpartition("/")[2]
            if announced.isdigit() and int(announced) != self.file_bytes[path]:
                raise self._changed(path, f"{announced} bytes")
            for piece in (response.iter_bytes if is_httpx else response.iter_content)(2**16):
                raw += piece
                if len(raw) >= stop:
                    return raw[:stop]
        raise self._changed(path, f"only {len(raw)} bytes")

    def _changed(self, path: Path, got: str) -> UserError:
        fix = "start again, or download the model another way"
        return UserError(f"{path}: not the file announced", got=got, expected=f"{self.file_bytes[path]} bytes", fix=fix)


def _is_wanted(name: str, components: Collection[str]) -> bool:
    """Whether a conversion needs the file. Any other name is not to be trusted: it may lead out of the folder."""
    folder, _, leaf = name.rpartition("/")
    wanted = {*components, VISION} if "transformer" in components else components  # an Omni is not told by names
    is_one = folder in (wanted if name.endswith(_WEIGHTS) else _FOLDERS) and leaf.endswith(_SUFFIXES)
    return name in _ROOT_FILES or (is_one and bool(re.fullmatch(r"\w[\w.-]*", leaf)))

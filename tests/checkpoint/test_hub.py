"""Models from the Hub: headers first, then shard by shard; and whatever a network can do ends in one line."""

from __future__ import annotations

import inspect
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from hub_cache import REPO, SLACK_BYTES, cut_for_good, nothing_left, size_of
from hub_server import COMMIT, PIECE_BYTES, HubServer
from huggingface_hub import file_download, try_to_load_from_cache
from safetensors.torch import load_file

from zimage_lite.checkpoint import hub
from zimage_lite.checkpoint.hub import hub_files, is_hub_id, snapshot
from zimage_lite.checkpoint.hub_client import quiet, reporting_bar
from zimage_lite.errors import UserError


def shard_paths(files: hub.HubFiles, folder: str = "") -> list[Path]:
    return [path for path in files.file_bytes if path.suffix == ".safetensors" and folder in ("", path.parent.name)]


@pytest.mark.parametrize("text", ["Tongyi-MAI/Z-Image-Turbo", "someone/tiny.model", "a/b", "o_o/v1.0"])
def test_owner_and_name_are_a_hub_id(text: str) -> None:
    assert is_hub_id(text)


@pytest.mark.parametrize(
    "text",
    ["demo", "./a", "../a", "/a/b", "a/b/c", "a/", "~/model", "a\\b", "https://huggingface.co/a", "a/..", "",
     "models/turbo.safetensors", "models/turbo.gguf", "a b/c", "模型/图"],
)  # fmt: skip
def test_anything_else_is_a_path(text: str) -> None:
    assert not is_hub_id(text)


def test_a_path_wins_over_a_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert is_hub_id("models/turbo")
    (tmp_path / "models" / "turbo").mkdir(parents=True)
    assert not is_hub_id("models/turbo")


def test_importing_costs_nothing() -> None:
    heavy = "('huggingface_hub', 'torch')"
    code = f"import sys, zimage_lite.checkpoint.hub; sys.exit(any(name in sys.modules for name in {heavy}))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("honours_ranges", [True, False])
def test_headers_come_before_any_weight(server: HubServer, tmp_path: Path, honours_ranges: bool) -> None:
    server.honours_ranges = honours_ranges
    with hub_files(REPO, beside=tmp_path / "work", discard=True) as files:
        stubs = shard_paths(files)
        assert [path.relative_to(files.path).as_posix() for path in stubs] == server.shards()[1:]  # not onnx/
        for path in stubs:
            original = server.folder / path.relative_to(files.path)
            header = original.read_bytes()[: path.stat().st_size]
            assert path.read_bytes() == header
            assert header.endswith((b"}", b" ")) and len(header) == 8 + int.from_bytes(header[:8], "little")
            assert files.file_bytes[path] == original.stat().st_size
        if honours_ranges:
            most = sum(4096 + path.stat().st_size for path in stubs)
            assert server.served_bytes(*server.shards()) <= most < SLACK_BYTES
        for name in server.names():
            if not name.endswith((".safetensors", ".md")):
                assert (files.path / name).read_bytes() == (server.folder / name).read_bytes()
        assert files.path.name == "tiny"  # what outputs are called after
    assert server.served_bytes("README.md", "onnx/model.safetensors") == 0
    assert nothing_left(tmp_path)


def test_only_the_wanted_components(server: HubServer, tmp_path: Path) -> None:
    with hub_files(REPO, beside=tmp_path / "work", discard=True, components=["text_encoder"]) as files:
        assert {path.parent.name for path in shard_paths(files)} == {"text_encoder"}
        assert (files.path / "tokenizer" / "tokenizer.json").exists()


@pytest.mark.slow
def test_one_shard_at_a_time_with_discard(server: HubServer, tmp_path: Path) -> None:
    """Looked at whenever the server is about to send something, and whenever a shard is there."""
    sizes: list[int] = []

    def look(name: str = "") -> None:
        sizes.append(sum(size_of(path) for path in (tmp_path / "work").rglob("*")))

    server.on_piece = look
    done: list[int] = []
    with hub_files(REPO, beside=tmp_path / "work", discard=True, on_bytes=done.append) as files:
        small = sum(size for path, size in files.file_bytes.items() if path.suffix != ".safetensors")
        assert sum(done) == small
        paths = shard_paths(files)
        files.expect(paths, tmp_path / "work", 0)
        for path in paths:
            stub = path.read_bytes()
            files.fetch(path)
            look()
            assert path.read_bytes() == (server.folder / path.relative_to(files.path)).read_bytes()
            load_file(path)
            files.release(path)
            assert path.read_bytes() == stub
        total = sum(files.file_bytes[path] for path in paths)
        largest = max(files.file_bytes[path] for path in paths)
        assert largest < max(sizes) < largest + SLACK_BYTES
        assert total > 6 * largest
        assert sum(done) == small + total
        files.fetch(paths[0])  # a second time
        assert path.stat().st_size < files.file_bytes[paths[0]] == paths[0].stat().st_size
    assert nothing_left(tmp_path)
    assert not (tmp_path / "cache").exists()


def test_a_second_conversion_downloads_nothing(server: HubServer, tmp_path: Path) -> None:
    for _ in range(2):
        before = len(server.served)
        done: list[int] = []
        with hub_files(REPO, beside=tmp_path / "work", on_bytes=done.append) as files:
            paths = shard_paths(files)
            files.expect(paths, tmp_path / "work", 0)
            for path in paths:
                files.fetch(path)
                assert path.read_bytes() == (server.folder / path.relative_to(files.path)).read_bytes()
                files.release(path)
                assert path.stat().st_size == files.file_bytes[path]  # nothing is gained by taking it away
            expected = sum(files.file_bytes.values())
        assert sum(done) == (0 if before else expected)
        assert nothing_left(tmp_path)
    assert len(server.served) == before  # by the second round
    # What lies in the cache is not downloaded again, nor touched, with --discard-source either.
    with hub_files(REPO, beside=tmp_path / "work", discard=True) as files:
        for path in shard_paths(files):
            files.fetch(path)
            files.release(path)
    assert len(server.served) == before
    assert snapshot(REPO).joinpath("model_index.json").exists()
    assert len(server.served) == before


def test_the_next_shard_comes_meanwhile(server: HubServer, tmp_path: Path) -> None:
    with hub_files(REPO, beside=tmp_path / "work") as files:
        paths = shard_paths(files, "transformer")
        files.expect(paths, tmp_path / "work", 0)
        files.fetch(paths[0])
        files._ahead.join(30)
        names = [path.relative_to(files.path).as_posix() for path in paths]
        assert server.served_bytes(names[1]) >= server.size(names[1])
        assert server.served_bytes(names[2]) < server.size(names[2])
        requests = len(server.requests)
        files.fetch(paths[1])
        files._ahead.join(30)
        assert not any(names[1] in request for request in server.requests[requests:])


def test_leaving_ends_the_download_ahead(server: HubServer, tmp_path: Path) -> None:
    names = server.shards("transformer")
    left = threading.Event()

    def hold(name: str) -> None:
        if name == names[1] and server.served_bytes(name):  # after its header
            left.wait(30)

    server.on_piece = hold
    with hub_files(REPO, beside=tmp_path / "work") as files:
        paths = shard_paths(files, "transformer")
        files.expect(paths, tmp_path / "work", 0)
        files.fetch(paths[0])
    left.set()
    files._ahead.join(30)
    assert not files._ahead.is_alive()
    if "tqdm_class" in inspect.signature(file_download.hf_hub_download).parameters:  # before 1.0, it goes on to the end
        assert not isinstance(try_to_load_from_cache(REPO, names[1], revision=COMMIT), str)


def test_whatever_is_done_with_a_progress_bar_works() -> None:
    """As hf_xet's reporter does it, which no test of ours can reach."""
    done: list[int] = []
    made = reporting_bar(done.append)
    assert callable(made.update_transfer)  # by which huggingface_hub tells how to report
    with made(total=100, unit="B", unit_scale=True, initial=0, desc="x", position=1, leave=True) as bar:
        bar.total = max(bar.total or 0, 200)
        for n_bytes in (10, 20.0, -5):
            bar.update(n_bytes)
            bar.update_transfer(n_bytes)
            bar.set_postfix_str("1 MB/s", refresh=False)
            bar.set_transfer_postfix_str("1 MB/s", refresh=False)
        bar.refresh()
    assert done == [10, 20, -5]
    assert made.done_bytes == 25


def test_hard_links_where_symbolic_ones_are_forbidden(
    server: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def forbidden(*args: object, **kwargs: object) -> None:
        raise OSError(1314, "A required privilege is not held by the client")

    with hub_files(REPO, beside=tmp_path / "work") as files:
        monkeypatch.setattr(Path, "symlink_to", forbidden)
        path = shard_paths(files)[0]
        files.fetch(path)
        assert not path.is_symlink()
        assert path.stat().st_size == files.file_bytes[path]
        monkeypatch.setattr(hub.os, "link", forbidden)  # as on exFAT
        with pytest.raises(UserError, match=r"no link can be made .*; add --discard-source, or set HF_HOME to"):
            files.fetch(shard_paths(files)[1])


def test_a_lack_of_links_is_not_lectured_about(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    """As on Windows, where few have the privilege."""

    def forbidden(*args: object, **kwargs: object) -> None:
        raise OSError(1314, "A required privilege is not held by the client")

    monkeypatch.setattr(file_download.os, "symlink", forbidden)
    with quiet():
        assert not file_download.are_symlinks_supported(tmp_path / "quiet")
    assert not recwarn.list
    assert not file_download.are_symlinks_supported(tmp_path / "loud")
    assert recwarn.list


def test_snapshot_is_what_a_model_needs(server: HubServer, capfd: pytest.CaptureFixture[str]) -> None:
    folder = snapshot(REPO)
    found = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    assert found == [name for name in server.names() if not name.startswith(("onnx", "README"))]
    before = len(server.served)
    assert snapshot(REPO, COMMIT) == snapshot(REPO, "main") == folder
    assert len(server.served) == before
    assert capfd.readouterr().err == ""  # no bars without a terminal


def test_a_snapshot_outlives_the_connection(server: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = snapshot(REPO)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    assert snapshot(REPO) == folder


def refusal(tmp_path: Path, repo: str = REPO, revision: str | None = None, **options: Any) -> str:
    """The one line that opening, or else fetching everything, ends with. Nothing stays behind."""
    with pytest.raises(UserError) as caught, hub_files(repo, revision, beside=tmp_path / "work", **options) as files:
        for path in shard_paths(files):
            files.fetch(path)
            files.release(path)
    assert nothing_left(tmp_path)
    assert str(tmp_path) not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("discard", [True, False])
@pytest.mark.parametrize("token", [None, "hf_wrong"])
def test_gated(server: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, discard: bool, token: str) -> None:
    server.token = "hf_right"
    if token:
        monkeypatch.setenv("HF_TOKEN", token)
    line = refusal(tmp_path, discard=discard)
    assert line.startswith("someone/tiny: granted on request only")
    assert f"accept its terms at {server.url}/someone/tiny" in line and "HF_TOKEN" in line
    with pytest.raises(UserError, match="granted on request only"):
        snapshot(REPO)


def test_gated_with_a_token(server: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server.token = "hf_right"
    monkeypatch.setenv("HF_TOKEN", "hf_right")
    with hub_files(REPO, beside=tmp_path / "work", discard=True) as files:
        path = shard_paths(files)[0]
        files.fetch(path)
        assert path.stat().st_size == files.file_bytes[path]


@pytest.mark.parametrize("refusal_code", [None, "RepoNotFound"])
def test_no_such_model(server: HubServer, tmp_path: Path, refusal_code: str | None) -> None:
    server.refusal_code = refusal_code
    assert refusal(tmp_path, "someone/else") == (
        f"someone/else: no such path, nor model at {server.url}; check the name; if it is a private one, set HF_TOKEN "
        "or run `hf auth login`"
    )
    with pytest.raises(UserError, match="someone/else: no such path, nor model"):
        snapshot("someone/else")


def test_a_token_that_is_no_longer_valid(server: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_old")
    server.refusal_message = "Invalid credentials in Authorization header"
    line = refusal(tmp_path, "someone/else")
    assert line.startswith(f"someone/else: refused by {server.url}: got HTTP status 401; check the token")


def test_no_such_revision(server: HubServer, tmp_path: Path) -> None:
    assert refusal(tmp_path, revision="v2") == "someone/tiny: no revision v2; name a branch, a tag or a commit"
    with pytest.raises(UserError, match="no revision v2"):
        snapshot(REPO, "v2")


def test_a_repository_without_a_model(server: HubServer, tmp_path: Path) -> None:
    server.folder = server.folder / "tokenizer"
    assert refusal(tmp_path).startswith("someone/tiny holds no such model: expected transformer/, text_encoder/, vae/")


def test_names_that_lead_out_of_the_folder(server: HubServer, tmp_path: Path) -> None:
    strange = ["vae/../../x.json", "../x.json", "/x.json", "vae/..\\x.json", "vae/C:x.json", "vae/.json", "vae/..json"]
    server.listed = dict.fromkeys(strange, 10)
    with hub_files(REPO, beside=tmp_path / "work", discard=True) as files:
        assert all(path.relative_to(files.path).as_posix() in server.names() for path in files.file_bytes)


@pytest.mark.parametrize("endpoint", ["http://127.0.0.1:9", "nonsense", "http://nowhere.invalid"])
def test_no_connection(server: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, endpoint: str) -> None:
    monkeypatch.setenv("HF_ENDPOINT", endpoint)
    line = refusal(tmp_path)
    assert line.startswith(f"someone/tiny: no connection to {endpoint} (")
    assert line.endswith("check the network and HF_ENDPOINT, then start again")
    with pytest.raises(UserError, match="someone/tiny: no connection to"):
        snapshot(REPO)


@pytest.mark.parametrize("discard", [True, False])
def test_a_server_that_dies_midway(server: HubServer, tmp_path: Path, discard: bool) -> None:
    name = server.shards("transformer")[2]
    cut_for_good(server, name)
    line = refusal(tmp_path, discard=discard)
    assert line.startswith(f"someone/tiny/{name}: the download failed (")
    assert line.endswith("start again")


def test_a_cut_connection_is_taken_up_again(server: HubServer, tmp_path: Path) -> None:
    name = server.shards("text_encoder")[0]
    server.cuts = {name: 2}
    with hub_files(REPO, beside=tmp_path / "work", discard=True) as files:
        path = files.path / name
        try:
            files.fetch(path)
        except UserError as error:  # huggingface_hub before 1.0 gives up
            assert "the download failed" in str(error)
        else:
            assert path.read_bytes() == (server.folder / name).read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("discard", [True, False])
@pytest.mark.parametrize("where", ["listed", "headed", "both"])
@pytest.mark.parametrize("by", [-4, 4])
def test_a_size_that_is_not_true(server: HubServer, tmp_path: Path, discard: bool, where: str, by: int) -> None:
    name = server.shards("transformer")[3]
    size = server.size(name)
    if where != "headed":
        server.listed = {name: size + by}
    if where != "listed":
        server.headed = {name: size + by}
    line = refusal(tmp_path, discard=discard)
    assert line.startswith(f"someone/tiny/{name}: ")
    assert str(size) in line and str(size + by) in line


def test_a_file_that_changes_after_its_header(server: HubServer, tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught, hub_files(REPO, beside=tmp_path / "work", discard=True) as files:
        path = shard_paths(files)[0]
        files._stubs[path] = files._stubs[path].replace(b"F32", b"F16", 1)
        files.fetch(path)
    assert "not the file announced: got another header" in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"12345678", bytes(8) + b"{}", b"\xff" * 100, b"PK\x03\x04" + bytes(100)])
def test_no_safetensors_file(server: HubServer, tmp_path: Path, content: bytes) -> None:
    model = tmp_path / "model"
    (model / "transformer").mkdir(parents=True)
    (model / "transformer" / "model.safetensors").write_bytes(content)
    server.folder = model
    line = refusal(tmp_path)
    assert line.startswith("someone/tiny/transformer/model.safetensors: ")


def test_disk_space_is_asked_for_beforehand(server: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    monkeypatch.setattr(hub, "require_space", lambda folder, n_bytes: asked.append(n_bytes))
    for discard in (True, False):
        with hub_files(REPO, beside=tmp_path / "work", discard=discard) as files:
            files.expect(shard_paths(files), tmp_path / "work", 1000)
            sizes = [files.file_bytes[path] for path in shard_paths(files)]
    assert asked == [1000 + max(sizes), 1000 + sum(sizes)]


def test_pieces_are_smaller_than_shards(server: HubServer) -> None:
    """What the tests above rely on."""
    assert all(server.size(name) > 4 * PIECE_BYTES for name in server.shards()[1:])
    assert len(server.shards("transformer")) > 3

"""Whole commands on a Hub id: the same as on a folder, and trouble is one line."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from hub_cache import REPO, SLACK_BYTES, cut_for_good, nothing_left, size_of
from hub_server import COMMIT, HubServer
from oracles import PROMPT
from safetensors.torch import load_file, save_file

from zimage_lite.cli import run

pytestmark = pytest.mark.slow  # a server for each test


@pytest.mark.parametrize(
    ("to", "runs"),
    [
        ("q8_0", ([], ["--discard-source", "--revision", COMMIT])),
        pytest.param("int8", (["--discard-source"],), marks=pytest.mark.full_size),
    ],
)
def test_quantize_from_the_hub_is_quantize(
    server: HubServer, tmp_path: Path, to: str, runs: tuple[list[str], ...]
) -> None:
    work = tmp_path / "work"
    assert run(["quantize", str(server.folder), "--to", to, "-o", str(tmp_path / "local")]) == 0
    for options in runs:
        assert run(["quantize", REPO, "--to", to, "--overwrite", *options]) == 0
        assert os.listdir(work) == [f"tiny-{to}"]
        expected = sorted(path.relative_to(tmp_path / "local") for path in (tmp_path / "local").rglob("*"))
        assert sorted(path.relative_to(work / f"tiny-{to}") for path in (work / f"tiny-{to}").rglob("*")) == expected
        for name in expected:
            if (tmp_path / "local" / name).is_file():
                assert (work / f"tiny-{to}" / name).read_bytes() == (tmp_path / "local" / name).read_bytes(), name


@pytest.mark.parametrize("to", ["q8_0", "bf16"])  # bf16 keeps the text encoder as it is
def test_quantize_with_discard_needs_one_shard_beside_the_output(server: HubServer, tmp_path: Path, to: str) -> None:
    work, held = tmp_path / "work", []

    def look(name: str) -> None:
        held.append(sum(size_of(path) for path in work.rglob("*.safetensors") if ".hub-" in str(path)))

    server.on_piece = look
    assert run(["quantize", REPO, "--to", to, "--discard-source"]) == 0
    assert max(held) < SLACK_BYTES  # nothing but stubs is there when a shard begins, or goes on, to come
    shards = server.shards()[1:]
    fetched = [answer.name for answer in server.served if answer.n_bytes == server.size(answer.name)]
    assert sorted(name for name in fetched if name in shards) == shards  # each of them once
    assert os.listdir(work) == [f"tiny-{to}"]
    assert not (tmp_path / "cache").exists()


def test_one_component_from_the_hub(server: HubServer, tmp_path: Path) -> None:
    assert run(["quantize", REPO, "--to", "q8_0", "--component", "transformer", "--discard-source"]) == 0
    assert os.listdir(tmp_path / "work") == ["tiny-transformer-q8_0.gguf"]
    assert server.served_bytes(*server.shards("text_encoder"), *server.shards("vae")) == 0


@pytest.mark.parametrize("trouble", ["gated", "missing", "dead", "cut", "lie", "nan"])
@pytest.mark.parametrize("discard", [True, False])
def test_trouble_is_one_line_and_leaves_nothing(
    server: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused: Callable[..., str], trouble: str,
    discard: bool,
) -> None:  # fmt: skip
    repo = "someone/else" if trouble == "missing" else REPO
    last = server.shards("transformer")[-1]
    if trouble == "gated":
        server.token = "hf_right"
    elif trouble == "dead":
        monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    elif trouble == "lie":
        server.listed = {last: server.size(last) + 1}
    elif trouble == "cut":
        cut_for_good(server, last)
    elif trouble == "nan":
        server.folder = shutil.copytree(server.folder, tmp_path / "damaged")
        weights = load_file(server.folder / last)
        next(iter(weights.values())).view(-1)[0] = float("nan")
        save_file(weights, server.folder / last)
    line = refused("quantize", repo, "--to", "q8_0", *(["--discard-source"] if discard else []))
    assert line.startswith(f"error: {repo}{'' if trouble in ('gated', 'missing', 'dead') else '/' + last}: ")
    assert nothing_left(tmp_path)


def test_arguments_are_looked_at_before_the_network(server: HubServer, refused: Callable[..., str]) -> None:
    assert "--to" in refused("quantize", REPO, "--to", "q9_9")
    assert "--discard-source" in refused("quantize", "demo", "--to", "q8_0", "--discard-source")
    assert server.requests == []


def test_generate_from_the_hub(server: HubServer, tmp_path: Path) -> None:
    """In a process of its own: huggingface_hub reads its environment once."""
    work, size = tmp_path / "work", ("--width", "32", "--height", "32", "--steps", "1")
    environment = {**os.environ, "HF_ENDPOINT": server.url, "HF_HOME": str(tmp_path / "home")}
    command = [sys.executable, "-m", "zimage_lite", "generate", PROMPT, "--model", REPO, *size]
    done = subprocess.run(command, cwd=work, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (work / "image.png").exists() and (tmp_path / "home" / "hub").exists()
    assert "Fetching" not in done.stderr

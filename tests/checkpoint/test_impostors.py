"""What is no model is told for what it is, with what to do, on every way that it can be named."""

from __future__ import annotations

import gzip
import json
import os
import pickle
import shutil
import struct
import zipfile
from collections.abc import Callable
from io import BytesIO
from pathlib import Path, PureWindowsPath

import pytest
import torch
from safetensors.torch import save_file

from zimage_lite.checkpoint.checkpoint import open_checkpoint
from zimage_lite.checkpoint.impostors import no_such
from zimage_lite.checkpoint.opening import open_tensor_file
from zimage_lite.cli import run


def saved_by_torch() -> bytes:
    raw = BytesIO()
    torch.save({"a": torch.zeros(3)}, raw)
    return raw.getvalue()


def zipped() -> bytes:
    raw = BytesIO()
    with zipfile.ZipFile(raw, "w") as archive:
        archive.writestr("model.safetensors", b"x" * 100)
    return raw.getvalue()


FILES: dict[str, tuple[str, bytes, str]] = {
    "nothing": ("a.gguf", b"", "the file is empty; download it again"),
    "a page": ("a.gguf", b"<!DOCTYPE html><html><title>Sign in</title></html>", "a web page"),
    "a page after a mark": ("a.safetensors", "\ufeff\n <HTML lang=en>".encode(), "a web page"),
    "an error of a store": ("a.safetensors", b'<?xml version="1.0"?><Error><Code>AccessDenied</Code>', "a web page"),
    "an error of an API": ("a.safetensors", b'{"error":"Invalid username or password."}', "a JSON text"),
    "an index": ("model.safetensors.index.json", b'{\n  "metadata": {}, "weight_map": {}}', "name the folder"),
    "a pointer": (
        "a.safetensors", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 4980000000\n", "git lfs pull",
    ),
    "zeros": ("a.safetensors", bytes(4096), "its download was never finished"),
    "a file of torch": ("a.pt", saved_by_torch(), "can run any code when it is opened"),
    "the same under another name": ("a.safetensors", saved_by_torch(), "can run any code when it is opened"),
    "a pickle": ("a.ckpt", pickle.dumps({"a": 1}), "can run any code when it is opened"),
    "a zip": ("a.zip", zipped(), "a zip archive; unpack it"),
    "a gzip": ("a.gz", gzip.compress(b"x"), "a gzip archive; unpack it"),
    "something else": ("a.safetensors", b"\x89PNG\r\n\x1a\n" + b"x" * 99, "not a safetensors or GGUF file"),
}  # fmt: skip


@pytest.mark.parametrize("case", FILES)
def test_files(tmp_path: Path, tiny: Path, refused: Callable[..., str], case: str) -> None:
    name, content, message = FILES[case]
    file = tmp_path / name
    file.write_bytes(content)
    for command in (
        ("quantize", file, "--to", "q8_0", "-o", tmp_path / "out.gguf"),
        ("generate", "x", "--model", tiny, "--transformer", file, "-o", tmp_path / "x.png"),
        ("generate", "x", "--model", file, "-o", tmp_path / "x.png"),
    ):
        line = refused(*command)
        assert line.startswith(f"error: {file}: ") and message in line


@pytest.mark.parametrize("first", [0x5B, 0x7B, 0x20, 0x3C])
def test_a_header_length_may_look_like_text(tmp_path: Path, first: int) -> None:
    """The first byte of a safetensors file is a [, a {, a space or a <, if its header is so long."""
    path = tmp_path / "a.safetensors"
    save_file({"a": torch.zeros(1, dtype=torch.uint8)}, path)
    header = path.read_bytes()[8:-1].rstrip()
    length = 256 + first
    path.write_bytes(struct.pack("<Q", length) + header.ljust(length) + b"\0")
    assert path.read_bytes()[0] == first and set(open_tensor_file(path).entries) == {"a"}


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("https://huggingface.co/Tongyi-MAI/Z-Image-Turbo", "name the model as Tongyi-MAI/Z-Image-Turbo"),
        ("http://hf.co/Tongyi-MAI/Z-Image-Turbo/", "name the model as Tongyi-MAI/Z-Image-Turbo"),
        ("huggingface.co/Tongyi-MAI/Z-Image-Turbo", "name the model as Tongyi-MAI/Z-Image-Turbo"),
        ("https://huggingface.co/A/B/tree/main?x=1", "name the model as A/B"),
        ("https://huggingface.co/A/B/resolve/main/x.gguf", "the address of a file; download it"),
        ("https://huggingface.co/A/B/blob/main/x.gguf", "the address of a file; download it"),
        ("https://example.com/x.safetensors", "this is an address; download the file"),
    ],
)
def test_addresses(tmp_path: Path, tiny: Path, refused: Callable[..., str], address: str, message: str) -> None:
    for command in (
        ("generate", "x", "--model", address, "-o", tmp_path / "x.png"),
        ("generate", "x", "--model", tiny, "--transformer", address, "-o", tmp_path / "x.png"),
        ("quantize", address, "--to", "q8_0", "-o", tmp_path / "out"),
        ("plan", "--model", address),
    ):
        assert message in refused(*command)


def test_a_cache_of_the_hub(tmp_path: Path, tiny: Path, refused: Callable[..., str]) -> None:
    root = tmp_path / "models--Some-One--A.Model"
    snapshot = root / "snapshots" / "0123abc"
    shutil.copytree(tiny, snapshot)
    for command in (
        ("generate", "x", "--model", root, "-o", tmp_path / "x.png"),
        ("generate", "x", "--model", tiny, "--transformer", root, "-o", tmp_path / "x.png"),
        ("quantize", root, "--to", "q8_0", "-o", tmp_path / "out"),
        ("inspect", root),
    ):
        line = refused(*command)
        assert line.endswith(f"a model's folder in the Hub's cache; name Some-One/A.Model, or {snapshot}")
    line = refused("generate", "x", "--model", tmp_path, "-o", tmp_path / "x.png")
    assert line.endswith("this is the Hub's cache, not a model; name a model in it, such as Some-One/A.Model")
    (tmp_path / "diffusion_models").mkdir()  # any folder of models may have some of the cache's in it
    assert "has no transformer" in refused("generate", "x", "--model", tmp_path, "-o", tmp_path / "x.png")
    assert open_checkpoint(snapshot / "vae").component == "vae"


def test_inspect_says_the_same(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.gguf").write_bytes(FILES["a page"][1])
    assert run(["inspect", str(tmp_path / "a.gguf"), "--json"]) == 2
    assert "a web page" in json.loads(capsys.readouterr().out)["parts"][0]["refusal"]


def test_an_address_as_windows_has_its_path() -> None:
    for address in ("https://huggingface.co/A/B", "huggingface.co/A/B"):
        assert "name the model as A/B" in str(no_such(PureWindowsPath(address)))


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no named pipes")
def test_a_pipe_is_not_waited_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    os.mkfifo(tmp_path / "pipe.safetensors")
    assert run(["inspect", str(tmp_path / "pipe.safetensors"), "--json"]) == 2
    assert "pipe.safetensors: not a file" in json.loads(capsys.readouterr().out)["parts"][0]["refusal"]

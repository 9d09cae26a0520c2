"""Tensor file headers: what other programs wrote reads back the same, and what is broken is refused in one line."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import torch
from tensor_files import (
    SAFETENSORS_HEADER,
    content,
    refusal,
    safetensors_bytes,
)

from zimage_lite.checkpoint.opening import open_tensor_file
from zimage_lite.errors import FileFormatError, UserError


def test_missing_file_and_folder(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file"):
        open_tensor_file(tmp_path / "absent.safetensors")
    with pytest.raises(UserError, match="cannot be read"):
        open_tensor_file(tmp_path)


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("value", [{}, {"weight": [1.5] * 100}, list(range(10**5))], ids=["empty", "small", "large"])
def test_pickle(path: Path, protocol: int, value: object) -> None:
    path.write_bytes(pickle.dumps(value, protocol))
    assert "pickle file can run any code" in (refusal(path) or "accepted")


@pytest.mark.parametrize("zipped", [True, False])
def test_torch_save(path: Path, zipped: bool) -> None:
    torch.save({"weight": torch.ones(3)}, path, _use_new_zipfile_serialization=zipped)
    message = refusal(path) or "accepted"
    assert "pickle file can run any code" in message
    assert "get the safetensors or GGUF version" in message


def test_file_cut_after_it_was_opened(path: Path) -> None:
    path.write_bytes(safetensors_bytes(SAFETENSORS_HEADER))
    file = open_tensor_file(path)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(FileFormatError, match=r"layers.1.weight ends early"):
        content(file, "layers.1.weight")
    path.unlink()
    with pytest.raises(UserError, match="cannot be read"):
        content(file, "layers.0.weight")

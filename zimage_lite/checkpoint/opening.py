"""Opens a file of tensors, told by its first bytes what it is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from ..errors import UserError
from . import gguf, safetensors
from .container import TensorFile, file_stamp
from .impostors import START_BYTES, no_such, refuse_impostor


def open_tensor_file(path: Path, file_bytes: Mapping[Path, int] | None = None) -> TensorFile:
    """Read the header of a safetensors or GGUF file, told apart by their first bytes, not by the name.

    file_bytes: sizes of safetensors files of which only the header is there so far.
    """
    if path.exists() and not (path.is_file() or path.is_dir()):  # a pipe would be waited for
        raise UserError(f"{path}: not a file")
    try:
        with open(path, "rb") as file:
            start = file.read(START_BYTES)
    except FileNotFoundError as error:
        raise no_such(path, "no such file") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    stamp = file_stamp(path)
    if start.startswith(b"GGUF"):
        return replace(gguf.read_header(path), stamp=stamp)
    refuse_impostor(path, start)
    return replace(safetensors.read_header(path, (file_bytes or {}).get(path)), stamp=stamp)

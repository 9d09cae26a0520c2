"""Opens a file of tensors, told by its first bytes what it is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from ..errors import FileFormatError, UserError
from . import gguf, safetensors
from .container import TensorFile, file_stamp

PICKLE_MAGIC = (b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")  # a zip of pickles, or one


def open_tensor_file(path: Path, file_bytes: Mapping[Path, int] | None = None) -> TensorFile:
    """Read the header of a safetensors or GGUF file, told apart by their first bytes, not by the name.

    file_bytes: sizes of safetensors files of which only the header is there so far.
    """
    try:
        with open(path, "rb") as file:
            magic = file.read(9)
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    if not magic:
        raise FileFormatError(f"{path}: the file is empty")
    stamp = file_stamp(path)
    if magic.startswith(b"GGUF"):
        return replace(gguf.read_header(path), stamp=stamp)
    # A safetensors header of 640 bytes begins like a pickle, with 80 02, but its JSON begins at the ninth byte.
    if magic[8:] != b"{" and magic.startswith(PICKLE_MAGIC):
        raise FileFormatError(
            f"{path}: a pickle file can run any code when it is opened, so it is refused",
            fix="get the safetensors or GGUF version",
        )
    return replace(safetensors.read_header(path, (file_bytes or {}).get(path)), stamp=stamp)

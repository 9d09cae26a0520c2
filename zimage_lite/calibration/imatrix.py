"""llama.cpp's importance matrix: the mean square of each channel, for each weight of a GGUF file by its name there.

The current form is GGUF: `NAME.in_sum2`, sums of squares, and `NAME.counts`, the rows they are of. The old one, .dat,
is little-endian int32 and float32: a number of entries; of each its name (with its length), a number of calls, and
(with their number) the mean squares times that; the number of chunks, and the name of the text they were made with.
"""

from __future__ import annotations

import struct
from io import BufferedReader
from pathlib import Path

import torch
from torch import Tensor

from ..checkpoint import gguf
from ..checkpoint.container import Entry, TensorFile
from ..checkpoint.names import NATIVE_TRANSFORMER, PREFIXES
from ..checkpoint.output import replacing
from ..checkpoint.writer import open_writer
from ..errors import FileFormatError, UserError
from ..units import round_up
from .known import Calibration
from .statistics import Moments, Statistics, input_of

SUFFIXES = (".gguf", ".dat")
_SUMS, _COUNTS = ".in_sum2", ".counts"
_MOST_ENTRIES, _MOST_NAME_BYTES, _MOST_VALUES = 2**16, 2**12, 2**24


def write(path: Path, statistics: Statistics) -> None:
    """By the name's end. Raises UserError."""
    found = _by_name(statistics)
    if path.suffix == ".dat":
        with replacing(path) as partial:
            partial.write_bytes(_old(found, len(statistics.prompts)))
        return
    tensors: dict[str, Tensor] = {}
    for name, own in sorted(found.items()):
        tensors[f"{name}{_SUMS}"] = own.squares.sum(0, keepdim=True).float()
        tensors[f"{name}{_COUNTS}"] = own.counts.sum().float().view(1, 1)
    info = {
        "general.type": "imatrix",
        "imatrix.datasets": [f"{len(statistics.prompts)} prompts"],
        "imatrix.chunk_count": len(statistics.prompts),
        "imatrix.chunk_size": max(int(own.counts.sum()) for own in found.values()) // max(len(statistics.prompts), 1),
    }
    arrays = [(name, "f32", tuple(tensor.shape)) for name, tensor in tensors.items()]
    header, offsets = gguf.encode_header(arrays, info)
    ends = [offset + tensor.nbytes for offset, tensor in zip(offsets, tensors.values(), strict=True)]
    with open_writer(path, header, round_up(max(ends), gguf.DEFAULT_ALIGNMENT)) as writer:
        for offset, tensor in zip(offsets, tensors.values(), strict=True):
            writer.write(offset, tensor)


def read(file: TensorFile) -> Calibration:
    """Raises UserError."""
    if file.metadata.get("general.type") != "imatrix":
        raise FileFormatError(f"{file.path}: a GGUF file of weights", expected="statistics, as calibrate writes them")
    means = {}
    for name, entry in file.entries.items():
        counts = file.entries.get(name.removesuffix(_SUMS) + _COUNTS)
        if name.endswith(_SUMS) and counts is not None:
            means[name.removesuffix(_SUMS)] = _floats(entry) / _floats(counts).sum().clamp(min=1)
    return _calibration(file.path, means)


def is_old(path: Path) -> bool:
    """Whether its name says so; what is in it has no mark of its own."""
    return path.suffix == ".dat"


def read_old(path: Path) -> Calibration:
    """Raises UserError."""
    means = {}
    try:
        with open(path, "rb") as file:
            for _ in range(_count(file, _MOST_ENTRIES)):
                name = file.read(_count(file, _MOST_NAME_BYTES)).decode()
                calls, values = _count(file, 2**31 - 1), _count(file, _MOST_VALUES)
                raw = file.read(4 * values)
                means[name] = torch.tensor(struct.unpack(f"<{values}f", raw)) / max(calls, 1)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    except (ValueError, struct.error) as error:
        raise FileFormatError(f"{path}: not an imatrix of llama.cpp's, or a damaged one") from error
    return _calibration(path, means)


def _by_name(statistics: Statistics) -> dict[str, Moments]:
    """By the names of all weights in a GGUF file, which share inputs."""
    firsts = {name: own for name, own in statistics.inputs.items() if float(own.counts.sum())}
    names = [name.replace(".w1.", f".{part}.") for name in firsts for part in ("w1", "w3")]
    names = [name.replace(".to_q.", f".{part}.") for name in dict.fromkeys(names) for part in ("to_q", "to_k", "to_v")]
    foreign = NATIVE_TRANSFORMER.to_foreign(dict.fromkeys(names))
    return {name: firsts[input_of(members[0])] for name, members in foreign.items()}


def _old(found: dict[str, Moments], calls: int) -> bytes:
    out = [struct.pack("<i", len(found))]
    for name, own in sorted(found.items()):
        raw, values = name.encode(), (own.mean_squares * calls).tolist()
        out.append(struct.pack("<i", len(raw)) + raw + struct.pack("<ii", calls, len(values)))
        out.append(struct.pack(f"<{len(values)}f", *values))
    text = f"{calls} prompts".encode()
    return b"".join([*out, struct.pack("<ii", calls, len(text)), text])


def _calibration(path: Path, means: dict[str, Tensor]) -> Calibration:
    """Raises UserError for what is no mean of squares."""
    squares = {}
    for name, mean in means.items():
        if not bool(torch.isfinite(mean).all()) or bool((mean < 0).any()):
            raise FileFormatError(f"{path}: {name[:200]} has values that are no sums of squares")
        prefix = next(prefix for prefix in PREFIXES["transformer"] if name.startswith(prefix))
        squares[input_of(NATIVE_TRANSFORMER.to_canonical(name.removeprefix(prefix))[0])] = mean
    return Calibration(path, None, squares)


def _floats(entry: Entry) -> Tensor:
    if entry.kind != "f32":
        raise FileFormatError(f"{entry.path}: {entry.name[:200]}", got=entry.kind, expected="f32")
    return entry.read().view(torch.float32)


def _count(file: BufferedReader, most: int) -> int:
    (number,) = struct.unpack("<i", file.read(4))
    if not 0 <= number <= most:
        raise ValueError(number)
    return int(number)

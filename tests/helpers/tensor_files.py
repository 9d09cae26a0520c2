"""Small files of tensors, whole and damaged, and how they are refused: what the tests of both kinds of file share."""

from __future__ import annotations

import json
import random
import struct
import tracemalloc
from itertools import pairwise
from pathlib import Path

import gguf as gguf_py
from hypothesis import settings
from hypothesis import strategies as st

from zimage_lite.checkpoint.container import TensorFile
from zimage_lite.checkpoint.opening import open_tensor_file
from zimage_lite.errors import UserError

SEEDS = range(80)  # per kind of damage
MAX_PEAK_BYTES = 2**20  # what a hostile header of a few hundred bytes may make us allocate
repeatable = settings(derandomize=True, deadline=None, database=None, max_examples=60)


def our_name(kind: gguf_py.GGMLQuantizationType) -> str:
    """ComfyUI's nvfp4 is another format than ggml's."""
    return {"NVFP4": "nvfp4_ggml"}.get(kind.name, kind.name.lower())


def content(file: TensorFile, name: str) -> bytes:
    return file.entries[name].read().numpy().tobytes()


def refusal(path: Path) -> str | None:
    """Why the file is refused, or None. Says it in one line, and cheaply, whatever the file claims."""
    tracemalloc.start()
    try:
        open_tensor_file(path)
        return None
    except UserError as error:
        message = str(error)
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < MAX_PEAK_BYTES + 20 * min(path.stat().st_size, 2**20)
    assert message.startswith(f"{path}: ")
    assert len(message) < len(str(path)) + 1000
    assert len(message.splitlines()) == 1
    return message


names = st.text(min_size=1, max_size=30).filter(lambda name: name != "__metadata__")
shapes = st.lists(st.integers(0, 5), max_size=4).map(tuple)


def stamp(path: Path) -> tuple[int, int, int]:
    """By which a file that changes while it is read is noticed."""
    found = path.stat()
    return found.st_size, found.st_mtime_ns, found.st_ino


def assert_disjoint(file: TensorFile) -> None:
    ranges = sorted((entry.offset, entry.offset + entry.nbytes) for entry in file.entries.values() if entry.nbytes)
    assert all(before[1] <= after[0] for before, after in pairwise(ranges))


# --- Random damage

SAFETENSORS_BODY = bytes(range(120))
SAFETENSORS_HEADER = json.dumps(
    {
        "__metadata__": {"format": "pt"},
        "layers.0.weight": {"dtype": "F32", "shape": [3, 5], "data_offsets": [0, 60]},
        "layers.0.bias": {"dtype": "BF16", "shape": [20], "data_offsets": [60, 100]},
        "layers.1.weight": {"dtype": "I8", "shape": [4, 5], "data_offsets": [100, 120]},
        "empty": {"dtype": "F16", "shape": [0, 7], "data_offsets": [100, 100]},
    }
).encode()


def safetensors_bytes(header: bytes | object, body: bytes = SAFETENSORS_BODY) -> bytes:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw)) + raw + body


def flip(rng: random.Random, header: bytearray) -> None:
    header[rng.randrange(len(header))] ^= 1 << rng.randrange(8)


def overwrite(rng: random.Random, header: bytearray) -> None:
    header[rng.randrange(len(header))] = rng.choice(b"0123456789")


def insert(rng: random.Random, header: bytearray) -> None:
    at = rng.randrange(len(header) + 1)
    header[at:at] = rng.choice([rng.randbytes(rng.randint(1, 9)), b"\0", b"0", b"1", b" ", b"9" * 30])


def delete(rng: random.Random, header: bytearray) -> None:
    at = rng.randrange(len(header))
    del header[at : at + rng.randint(1, 9)]


def move(rng: random.Random, header: bytearray) -> None:
    at, to, n = rng.randrange(len(header)), rng.randrange(len(header)), rng.randint(1, 40)
    header[to : to + n] = header[at : at + n]


DAMAGE = [flip, overwrite, insert, delete, move]

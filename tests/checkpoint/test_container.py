"""Tensor file headers: what other programs wrote reads back the same, and what is broken is refused in one line."""

from __future__ import annotations

import json
import math
import pickle
import random
import struct
import tracemalloc
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import gguf as gguf_py
import numpy as np
import pytest
import safetensors as safetensors_library
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from zimage_lite.checkpoint import gguf, safetensors
from zimage_lite.checkpoint.container import TensorFile
from zimage_lite.checkpoint.opening import open_tensor_file
from zimage_lite.errors import FileFormatError, UserError

SEEDS = range(80)  # per kind of damage
MAX_PEAK_BYTES = 2**20  # what a hostile header of a few hundred bytes may make us allocate
BITS = {"F64": 64, "F32": 32, "F16": 16, "BF16": 16, "I64": 64, "I32": 32, "I16": 16, "I8": 8} | {
    "U64": 64, "U32": 32, "U16": 16, "U8": 8, "BOOL": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8
}  # fmt: skip
GGML_TYPES = {  # those that a checkpoint may hold; gguf-py also lists integers and the types of intermediate results
    kind: gguf_py.GGML_QUANT_SIZES[kind]
    for kind in gguf_py.GGMLQuantizationType
    if kind.name not in ("Q8_1", "Q8_K", "I8", "I16", "I32", "I64", "Q1_0")
}

repeatable = settings(derandomize=True, deadline=None, database=None, max_examples=60)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "weights"


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One file for all the examples that hypothesis draws."""
    return tmp_path_factory.mktemp("headers") / "weights"


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


# --- Files of other programs


def test_safetensors_of_the_library(path: Path) -> None:
    floats = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2)
    integers = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.uint16, torch.uint32, torch.bool)
    tensors = {f"{dtype}": torch.randn(3, 5).mul(50).to(dtype) for dtype in floats + integers}
    tensors |= {"scalar": torch.tensor(2.5), "empty": torch.empty(0, 3), "卷积.weight": torch.randn(2, 3, 1, 1)}
    metadata = {"format": "pt", "title": '红色圆形 \\ " \n é'}
    save_file(tensors, path, metadata)

    file = open_tensor_file(path)
    assert (file.container, file.metadata, set(file.entries)) == ("safetensors", metadata, set(tensors))
    with safetensors_library.safe_open(path, "pt") as truth:
        for name, tensor in tensors.items():
            assert file.entries[name].kind == truth.get_slice(name).get_dtype()
            assert file.entries[name].shape == tuple(tensor.shape)
            assert content(file, name) == bytes(tensor.contiguous().flatten().view(torch.uint8).tolist())


def test_safetensors_without_metadata_or_tensors(path: Path) -> None:
    save_file({}, path)
    assert open_tensor_file(path) == TensorFile(path, "safetensors", {}, {}, stamp(path))


@pytest.mark.parametrize("header_bytes", [640, 896, 1152, 1408, 0x10280])
def test_header_length_may_look_like_the_start_of_a_pickle(path: Path, header_bytes: int) -> None:
    empty = '{"__metadata__":{"pad":""},"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}'
    save_file({"a": torch.zeros(1, dtype=torch.uint8)}, path, {"pad": "x" * (header_bytes - len(empty))})
    assert path.read_bytes()[:2] in (b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")
    assert set(open_tensor_file(path).entries) == {"a"}


def write_gguf(path: Path, alignment: int | None = None) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """A file by gguf-py with every type of value and of tensor -> the values, and the bytes of each tensor."""
    writer = gguf_py.GGUFWriter(path, "lumina2")
    if alignment:
        writer.add_custom_alignment(alignment)
    kinds = gguf_py.GGUFValueType
    values = {
        kinds.UINT8: 200, kinds.INT8: -100, kinds.UINT16: 60000, kinds.INT16: -30000, kinds.UINT32: 4_000_000_000,
        kinds.INT32: -2_000_000_000, kinds.UINT64: 2**63 + 1, kinds.INT64: -(2**62), kinds.FLOAT32: -0.25,
        kinds.FLOAT64: 1e-300, kinds.BOOL: True, kinds.STRING: "红色 \n é",
    }  # fmt: skip
    for kind, value in values.items():
        writer.add_key_value(kind.name, value, kind)
    lists = {"texts": ["", "a b", "圆"], "numbers": [1, -2, 3], "floats": [0.5, -1.0], "flags": [True, False]}
    lists["nested"] = [[1, 2], [3]]
    for key, items in lists.items():
        writer.add_array(key, items)
    writer.add_array("comfy.gguf.orig_shape.flattened", [4, 3, 8, 8])
    rng = np.random.default_rng(3)
    tensors = {"flattened": rng.standard_normal((3, 256), dtype=np.float32), "one": np.ones(1, np.float32)}
    for name, array in tensors.items():
        writer.add_tensor(name, array)
    for kind, (_, block_bytes) in GGML_TYPES.items():
        name = f"blk.0.{kind.name.lower()}"
        tensors[name] = rng.integers(0, 256, (3, 2 * block_bytes), dtype=np.uint8)
        writer.add_tensor(name, tensors[name], raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return {kind.name: value for kind, value in values.items()} | lists, tensors


@pytest.mark.parametrize("alignment", [None, 8, 256])
@pytest.mark.parametrize("version", [2, 3])
def test_gguf_of_gguf_py(path: Path, version: int, alignment: int | None) -> None:
    values, tensors = write_gguf(path, alignment)
    with open(path, "r+b") as raw:
        raw.seek(4)
        raw.write(struct.pack("<I", version))  # from version 1 on, only version 2 differs, and not in these files

    file = open_tensor_file(path)
    assert file.container == "gguf"
    assert set(file.entries) == set(tensors)
    assert {key: file.metadata[key] for key in values} == values
    assert file.metadata["general.architecture"] == "lumina2"
    for name, array in tensors.items():
        assert content(file, name) == array.tobytes()
    assert (file.entries["flattened"].kind, file.entries["flattened"].shape) == ("f32", (4, 3, 8, 8))
    assert (file.entries["one"].kind, file.entries["one"].shape) == ("f32", (1,))
    for kind, (block, _) in GGML_TYPES.items():
        entry = file.entries[f"blk.0.{kind.name.lower()}"]
        assert (entry.kind, entry.shape) == (our_name(kind), (3, 2 * block))


def test_gguf_without_metadata(path: Path) -> None:
    """As stable-diffusion.cpp writes them."""
    path.write_bytes(gguf_bytes([], [("a", [2], 0, 0)], b"\1" * 8))
    file = open_tensor_file(path)
    assert (file.metadata, list(file.entries), content(file, "a")) == ({}, ["a"], b"\1" * 8)


# --- Our headers in the hands of other programs

names = st.text(min_size=1, max_size=30).filter(lambda name: name != "__metadata__")
shapes = st.lists(st.integers(0, 5), max_size=4).map(tuple)


@repeatable
@given(arrays=st.dictionaries(names, st.tuples(st.sampled_from(sorted(BITS)), shapes), max_size=8), data=st.data())
def test_library_reads_our_safetensors(
    scratch: Path, arrays: dict[str, tuple[str, tuple[int, ...]]], data: st.DataObject
) -> None:
    metadata = data.draw(st.dictionaries(names, st.text(max_size=20), max_size=3))
    wide_first = sorted(arrays, key=lambda name: -BITS[arrays[name][0]])  # torch wants its arrays aligned
    header, offsets = safetensors.encode_header([(name, *arrays[name]) for name in wide_first], metadata)
    sizes = [math.prod(arrays[name][1]) * BITS[arrays[name][0]] // 8 for name in wide_first]
    body = random.Random(sum(sizes)).randbytes(sum(sizes))
    scratch.write_bytes(header + body)

    assert len(header) % 4096 == 0
    with safetensors_library.safe_open(scratch, "pt") as truth:
        assert (truth.metadata() or {}) == metadata
        assert set(truth.keys()) == set(arrays)
        for name, offset, size in zip(wide_first, offsets, sizes, strict=True):
            stored = truth.get_slice(name)
            assert (stored.get_dtype(), tuple(stored.get_shape())) == arrays[name]
            values = truth.get_tensor(name).flatten().view(torch.uint8)
            assert values.numpy().tobytes() == body[offset - len(header) :][:size]
    assert safetensors_as_told(scratch) == open_tensor_file(scratch)


values = st.one_of(
    st.integers(0, 2**32 - 1), st.booleans(), st.floats(width=32, allow_nan=False), st.text(max_size=20),
    st.lists(st.integers(-(2**31), 2**31 - 1), min_size=1, max_size=5), st.lists(st.text(max_size=8), min_size=1),
)  # fmt: skip


@repeatable
@given(
    arrays=st.dictionaries(names, st.tuples(st.sampled_from(list(GGML_TYPES)), shapes), max_size=8),
    metadata=st.dictionaries(names, values, max_size=6),
)
def test_gguf_py_reads_our_gguf(
    scratch: Path,
    arrays: dict[str, tuple[gguf_py.GGMLQuantizationType, tuple[int, ...]]],
    metadata: dict[str, Any],
) -> None:
    tensors = [(name, our_name(kind), (*shape, 2 * GGML_TYPES[kind][0])) for name, (kind, shape) in arrays.items()]
    header, offsets = gguf.encode_header(tensors, metadata)
    scratch.write_bytes(header + random.Random(7).randbytes(sum(offsets) + 2**18))

    truth = gguf_py.GGUFReader(scratch)
    assert {key: field.contents() for key, field in truth.fields.items() if not key.startswith("GGUF.")} == metadata
    types = {"bool": "BOOL", "int": "UINT32", "float": "FLOAT32", "str": "STRING", "list": "ARRAY"}
    for key, value in metadata.items():
        assert truth.fields[key].types[0].name == types[type(value).__name__]
    assert [tensor.name for tensor in truth.tensors] == list(arrays)
    for tensor, (_, kind, shape), offset in zip(truth.tensors, tensors, offsets, strict=True):
        assert (our_name(tensor.tensor_type), tuple(reversed(tensor.shape.tolist()))) == (kind, shape)
        assert tensor.data_offset == offset
    assert gguf_as_told(scratch) == open_tensor_file(scratch)


# --- An independent reading, for headers that were changed but are still accepted


def safetensors_as_told(path: Path) -> TensorFile:
    """What the header says, word for word."""
    raw = path.read_bytes()
    (header_bytes,) = struct.unpack_from("<Q", raw)
    pairs = json.loads(raw[8 : 8 + header_bytes], object_pairs_hook=list)
    assert len({name for name, _ in pairs}) == len(pairs)
    entries, metadata = {}, {}
    for name, info in pairs:
        if name == "__metadata__":
            metadata = dict(info)
            continue
        told = dict(info)
        begin, end = told["data_offsets"]
        assert all(type(n) is int and n >= 0 for n in (*told["shape"], begin, end))
        assert math.prod(told["shape"]) * BITS[told["dtype"]] == 8 * (end - begin)
        assert 8 + header_bytes + end <= len(raw)
        at = 8 + header_bytes + begin
        entries[name] = safetensors.Entry(path, name, told["dtype"], tuple(told["shape"]), at, end - begin)
    return TensorFile(path, "safetensors", entries, metadata, stamp(path))


def gguf_as_told(path: Path) -> TensorFile:
    """What gguf-py reads."""
    truth = gguf_py.GGUFReader(path)
    metadata = {key: field.contents() for key, field in truth.fields.items() if not key.startswith("GGUF.")}
    entries = {}
    for tensor in truth.tensors:
        kind, name = our_name(tensor.tensor_type), tensor.name
        shape = metadata.get(f"comfy.gguf.orig_shape.{name}") or list(reversed(tensor.shape.tolist()))
        assert tensor.data_offset + tensor.n_bytes <= path.stat().st_size
        entries[name] = gguf.Entry(path, name, kind, tuple(shape), tensor.data_offset, int(tensor.n_bytes))
    return TensorFile(path, "gguf", entries, metadata, stamp(path))


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


def text(value: str | bytes) -> bytes:
    raw = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(raw)) + raw


Info = tuple[str | bytes, list[int], int, int]  # name, sizes as stored, type, offset


def gguf_bytes(pairs: list[bytes], infos: list[Info], body: bytes = b"", alignment: int = 32) -> bytes:
    """pairs: key, type and value as bytes."""
    raw = b"GGUF" + struct.pack("<IQQ", 3, len(infos), len(pairs)) + b"".join(pairs)
    for name, sizes, kind, offset in infos:
        raw += text(name) + struct.pack(f"<I{len(sizes)}QIQ", len(sizes), *sizes, kind, offset)
    return raw + b"\0" * (-len(raw) % alignment) + body


GGUF_PAIRS = [
    text("general.architecture") + struct.pack("<I", 8) + text("qwen3"),
    text("general.file_type") + struct.pack("<II", 4, 7),
    text("qwen3.rope.freq_base") + struct.pack("<If", 6, 1e6),
    text("tokenizer.ggml.tokens") + struct.pack("<IIQ", 9, 8, 3) + text("a") + text("") + text("好"),
    text("tokenizer.ggml.token_type") + struct.pack("<IIQ3i", 9, 5, 3, 1, 1, 3),
    text("comfy.gguf.orig_shape.conv") + struct.pack("<IIQ3i", 9, 5, 3, 2, 2, 4),
]
GGUF_INFOS: list[Info] = [
    ("token_embd.weight", [32, 3], 8, 0),
    ("output_norm.weight", [5], 0, 128),
    ("conv", [4, 4], 1, 160),
]
GGUF_BODY = bytes(range(192))


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


def damaged_safetensors(damage: Callable[[random.Random, bytearray], None] | str) -> Iterator[bytes]:
    for seed in SEEDS:
        rng = random.Random(seed)
        header = bytearray(SAFETENSORS_HEADER)
        if damage == "truncate":
            whole = safetensors_bytes(SAFETENSORS_HEADER)
            yield whole[: rng.randrange(len(whole))]
        elif damage == "length":
            length = rng.choice([len(header) + rng.randint(-9, 9), rng.getrandbits(rng.randint(1, 64))])
            yield struct.pack("<Q", length) + header + SAFETENSORS_BODY
        else:
            assert callable(damage)
            for _ in range(rng.choice([1, 1, 1, 3])):
                damage(rng, header)
            length = rng.choice([len(header), len(header), len(SAFETENSORS_HEADER)])
            yield struct.pack("<Q", length) + header + SAFETENSORS_BODY


@pytest.mark.parametrize("damage", [*DAMAGE, "truncate", "length"])
def test_damaged_safetensors(path: Path, damage: Callable[[random.Random, bytearray], None] | str) -> None:
    for raw in damaged_safetensors(damage):
        path.write_bytes(raw)
        message = refusal(path)
        if message is None:
            assert open_tensor_file(path) == safetensors_as_told(path)
            assert_disjoint(open_tensor_file(path))
            continue
        with pytest.raises(safetensors_library.SafetensorError):  # the library must not find fewer faults than we do
            safetensors_library.deserialize(raw)


def damaged_gguf(damage: Callable[[random.Random, bytearray], None] | str) -> Iterator[bytes]:
    whole = gguf_bytes(GGUF_PAIRS, GGUF_INFOS, GGUF_BODY)
    header_bytes = len(whole) - len(GGUF_BODY)
    for seed in SEEDS:
        rng = random.Random(seed)
        header = bytearray(whole[:header_bytes])
        if damage == "truncate":
            yield whole[: rng.randrange(len(whole))]
        elif damage == "length":
            at = rng.choice([8, 16, 24, header.index(b"conv", 100) - 8, header.index(b"token_type") - 23])
            header[at : at + 8] = struct.pack("<Q", rng.choice([rng.randrange(9), rng.getrandbits(rng.randint(1, 64))]))
            yield bytes(header) + GGUF_BODY
        else:
            assert callable(damage)
            damage(rng, header)
            yield bytes(header) + bytes(rng.choice([0, 0, 31])) + GGUF_BODY


@pytest.mark.parametrize("damage", [*DAMAGE, "truncate", "length"])
def test_damaged_gguf(path: Path, damage: Callable[[random.Random, bytearray], None] | str) -> None:
    for raw in damaged_gguf(damage):
        path.write_bytes(raw)
        if refusal(path) is None:
            file = open_tensor_file(path)
            assert repr(file) == repr(gguf_as_told(path))  # as text, because NaN equals nothing
            assert_disjoint(file)


# --- Headers that lie, and odd ones that do not

HUGE = 10**400
LIES: dict[str, list[object]] = {
    "dtype": ["F33", "f32", "", "F4", "U8" * 10**5, None, 3, True, {}, ["F32"], "F64", "BF16", "BOOL"],
    "shape": [
        [-3, -5], [3.0, 5], [True, 15], ["3", "5"], "35", None, {}, 15, [[3, 5]], [3, None], [2**40, 2**40], [2**63, 2],
        [2**64 + 15], [HUGE], [0], [0, 2**40], [], [3, 4], [15] + [1] * 10**5, [float("nan"), 5], [float("inf")],
    ],
    "data_offsets": [
        [0], [0, 60, 60], [], None, {}, "0,60", 60, [60, 0], [-60, 0], [0.0, 60.0], [False, 60], ["0", "60"],
        [2**70, 2**70 + 60], [2**63, 2**63 + 60], [HUGE, HUGE], [1, 61], [100, 160], [120, 180], [4, 64], [0, 59],
        [0, 61], [0, 2**40], [60, 60], [[0], [60]],
    ],
}  # fmt: skip
BAD_ENTRIES = [None, [], 3, "F32", True, {}, {"dtype": "F32"}, {"dtype": "F32", "shape": [2]}]
BAD_METADATA = [[], "pt", 3, {"format": 1}, {"format": None}, {"format": {}}, {"format": ["pt"]}]
TRUTHS: list[dict[str, Any]] = [
    {"dtype": "I32"},
    {"dtype": "U8", "shape": [60]},
    {"dtype": "F64", "shape": [], "data_offsets": [0, 8]},
    {"shape": [5, 3]},
    {"shape": [1, 15, 1, 1, 1, 1, 1, 1]},
    {"shape": [0, 2**40], "data_offsets": [0, 0]},
    {"data_offsets": [0, 20], "shape": [5]},
    {"note": [{"a": 1}]},
]


def header_with(**changes: object) -> dict[str, Any]:
    """The sound header, changed in its first tensor."""
    header = json.loads(SAFETENSORS_HEADER)
    header["layers.0.weight"] |= changes
    return header


def lies() -> Iterator[object]:
    for field, values in LIES.items():
        yield from (header_with(**{field: value}) for value in values)
        header = header_with()
        del header["layers.0.weight"][field]
        yield header
    yield from (header_with() | {"extra": entry} for entry in BAD_ENTRIES)
    yield from (header_with() | {"__metadata__": metadata} for metadata in BAD_METADATA)
    for name in ("x" * 10**5, "\0\x1b[31m\n\u2028", "../../etc/passwd", "__metadata"):
        yield header_with() | {name: {"dtype": "U8", "shape": [9], "data_offsets": [0, 9]}}
    yield from ([], [header_with()], None, "header", 3, True)


def test_safetensors_header_that_lies(path: Path) -> None:
    for header in lies():
        path.write_bytes(safetensors_bytes(header))
        assert refusal(path), str(header)[:1000]


@pytest.mark.parametrize("changes", TRUTHS)
def test_odd_but_true_safetensors_header(path: Path, changes: dict[str, Any]) -> None:
    path.write_bytes(safetensors_bytes(header_with(**changes)))
    assert open_tensor_file(path) == safetensors_as_told(path)


@pytest.mark.parametrize("name", ["", "x" * 10**5, "\0\x1b[31m\n", "../../etc/passwd", "__metadata", "😀"])
def test_any_text_may_be_a_name(path: Path, name: str) -> None:
    path.write_bytes(safetensors_bytes({name: {"dtype": "I8", "shape": [2], "data_offsets": [0, 2]}}))
    assert content(open_tensor_file(path), name) == SAFETENSORS_BODY[:2]


def pair(key: str | bytes, kind: int, payload: bytes) -> bytes:
    return text(key) + struct.pack("<I", kind) + payload


def listed(item_kind: int, count: int, payload: bytes = b"") -> bytes:
    return struct.pack("<IQ", item_kind, count) + payload


def counts(tensors: int, pairs: int, version: int = 3) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, tensors, pairs)


def with_pair(key: str | bytes, kind: int, payload: bytes) -> bytes:
    return gguf_bytes([*GGUF_PAIRS, pair(key, kind, payload)], GGUF_INFOS, GGUF_BODY)


def with_info(name: str | bytes, sizes: list[int], kind: int, offset: int) -> bytes:
    return gguf_bytes(GGUF_PAIRS, [*GGUF_INFOS, (name, sizes, kind, offset)], GGUF_BODY)


MANY = [2**31, 2**60, 2**61, 2**63, 2**64 - 1]
GGUF_LIES: list[tuple[bytes, str]] = [
    *((counts(n, 0) + bytes(64), "items, more than") for n in MANY),
    *((counts(0, n) + bytes(64), "items, more than") for n in MANY),
    *((counts(0, 1) + struct.pack("<Q", n) + bytes(64), "items, more than") for n in MANY),
    *((with_pair("a", 8, struct.pack("<Q", n)), "items, more than") for n in MANY),
    *((with_pair("a", 9, listed(kind, n)), "items, more than") for n in MANY for kind in (0, 4, 7, 8, 9, 10, 12)),
    *((counts(0, 0, version) + bytes(64), "GGUF version") for version in (0, 1, 4, 3 << 24, 2**32 - 1)),
    *((with_pair("a", kind, bytes(64)), "unknown GGUF value type") for kind in (13, 255, 2**31, 2**32 - 1)),
    (with_pair("a", 9, listed(13, 1, bytes(64))), "unknown GGUF value type"),
    (with_pair("a", 9, listed(9, 1) * 10 + listed(0, 0)), "unknown GGUF value type"),
    (with_pair(b"\xff\xfe", 7, b"\1"), "not UTF-8"),
    (with_pair("a", 8, text(b"\xff\xfe")), "not UTF-8"),
    (with_pair("a", 8, text(b"\xed\xa0\x80")), "not UTF-8"),
    (with_pair("general.file_type", 4, bytes(4)), "metadata general.file_type twice"),
    *((with_pair("general.alignment", 4, struct.pack("<I", n)), "a power of two") for n in (0, 3, 33, 2**32 - 1)),
    (with_pair("general.alignment", 5, struct.pack("<i", -32)), "a power of two"),
    (with_pair("general.alignment", 6, struct.pack("<f", 32)), "a power of two"),
    (with_pair("general.alignment", 7, b"\1"), "a power of two"),
    (with_pair("general.alignment", 8, text("32" * 10**5)), "a power of two"),
    (with_pair("general.alignment", 9, listed(0, 10**5, bytes(10**5))), "a power of two"),
    (with_pair("general.alignment", 10, struct.pack("<Q", 2**63)), "a power of two"),
    (with_pair("general.alignment", 4, struct.pack("<I", 2**31)), "not a multiple of the alignment"),
    *((with_pair("comfy.gguf.orig_shape.output_norm.weight", 9, listed(*shape)), "its orig_shape is") for shape in (
        (5, 1, struct.pack("<i", 6)), (5, 2, struct.pack("<2i", -1, -5)), (6, 1, struct.pack("<f", 5.0)),
        (8, 1, text("5")), (8, 2, text("a") + text("b")), (9, 2, listed(0, 0) * 2), (7, 10**5, b"\1" * 10**5),
        (0, 10**5, b"\5" + b"\1" * (10**5 - 1)), (5, 0, b""), (12, 1, struct.pack("<d", math.nan)),
    )),
    (with_pair("comfy.gguf.orig_shape.output_norm.weight", 4, struct.pack("<I", 5)), "its orig_shape is"),
    (with_info(b"\xff", [2], 0, 192), "not UTF-8"),
    (with_info("output_norm.weight", [2], 0, 192), "names a tensor twice"),
    (with_info("a", [2], 0, 32), "tensor a overlaps token_embd.weight"),
    (with_info("x" * 10**5, [2], 0, 0), "overlaps"),
    (with_info("a", [8], 0, 128 + 4), "offset 132 is not a multiple of the alignment 32"),
    (with_info("a", [2**40, 2**40], 0, 192), "ends at byte"),
    (with_info("a", [2], 0, 2**63), "ends at byte"),
    (with_info("a", [0], 0, 2**63), "ends at byte"),
    *((with_info("a", [32, n], 8, 192), "cannot be q8_0") for n in (2**63, 2**64 - 1)),
    *((with_info("a", [n], 8, 192), "blocks have 32 elements") for n in (1, 31, 33, 100)),
    (with_info("a", [], 8, 192), "blocks have 32 elements"),
    *((with_info("a", [2], kind, 192), f"ggml type {kind} is not known") for kind in (4, 5, 26, 99, 2**32 - 1)),
    (with_info("a", [1] * 9, 0, 192), "has 9 dimensions"),
    (counts(1, 0) + text("a") + struct.pack("<I", 2**32 - 1) + bytes(64), "has 4294967295 dimensions"),
    (counts(1, 0) + text("a") + struct.pack("<I", 8) + bytes(8), "runs past the end of the file"),
    (gguf_bytes(GGUF_PAIRS, GGUF_INFOS, GGUF_BODY)[:-1], "truncated or damaged, so download or copy it again"),
    (gguf_bytes(GGUF_PAIRS, GGUF_INFOS), "truncated or damaged, so download or copy it again"),
    (b"GGUF", "runs past the end of the file"),
]  # fmt: skip


@pytest.mark.parametrize(("raw", "message"), GGUF_LIES, ids=range(len(GGUF_LIES)))
def test_gguf_header_that_lies(path: Path, raw: bytes, message: str) -> None:
    path.write_bytes(raw)
    assert message in (refusal(path) or "accepted")


def test_odd_but_true_gguf_header(path: Path) -> None:
    pairs = [*GGUF_PAIRS, pair("", 9, listed(9, 1, listed(9, 1, listed(8, 1, text("deep")))))]
    pairs.append(pair("general.alignment", 4, struct.pack("<I", 1)))
    infos = [("", [2, 1], 0, 0), ("\0\x1b[31m\n", [0, 7], 8, 8), ("x" * 10**5, [32, 0], 8, 8), ("1", [], 30, 9)]
    path.write_bytes(gguf_bytes(pairs, infos, GGUF_BODY, alignment=1))
    file = open_tensor_file(path)
    assert file.metadata[""] == [[["deep"]]]
    shapes = {"": (1, 2), "\0\x1b[31m\n": (7, 0), "x" * 10**5: (0, 32), "1": ()}
    assert {name: entry.shape for name, entry in file.entries.items()} == shapes
    assert [content(file, name) for name in shapes] == [GGUF_BODY[:8], b"", b"", GGUF_BODY[9:11]]


def test_flattened_rows_that_share_blocks_stay_flat(path: Path) -> None:
    """Convolutions of an SDXL U-Net: 36 columns, cut into blocks of 32 as if they were 48."""
    shape = pair("comfy.gguf.orig_shape.a", 9, listed(5, 4, struct.pack("<4i", 8, 4, 3, 3)))
    path.write_bytes(gguf_bytes([shape], [("a", [32, 9], 8, 0)], bytes(9 * 34)))
    assert open_tensor_file(path).entries["a"].shape == (9, 32)


@pytest.mark.parametrize("kind", [b"GGUF", b"JSON"])
def test_no_more_is_read_than_a_header_can_have(path: Path, kind: bytes) -> None:
    """One flipped bit in a length must not bring gigabytes of weights into memory."""
    with open(path, "wb") as file:
        n = 400_000_000
        gguf_head = counts(0, 1) + struct.pack("<Q", n)
        file.write(gguf_head if kind == b"GGUF" else struct.pack("<Q", n) + SAFETENSORS_HEADER)
        file.truncate(2 * n)  # a hole, which takes no room on the disk
    assert refusal(path)


# --- What is no tensor file, or only a part of one

SAFETENSORS_FAULTS = {
    "empty": (b"", "the file is empty"),
    "two bytes": (b"\x10\0", "not a safetensors or GGUF file"),
    "text": (b"hello, this is a text and nothing else", "not a safetensors or GGUF file"),
    "length past the end": (struct.pack("<Q", 10**6) + SAFETENSORS_HEADER, "a header of 1000000 bytes in a file of"),
    "length of 2^63": (struct.pack("<Q", 2**63) + SAFETENSORS_HEADER, "a header of 9223372036854775808 bytes"),
    "length of 1": (struct.pack("<Q", 1) + SAFETENSORS_HEADER, "a header of 1 bytes"),
    "broken JSON": (safetensors_bytes(b'{"a":'), "not JSON"),
    "two JSONs": (safetensors_bytes(b"{}{}"), "not JSON"),
    "Latin-1": (safetensors_bytes(SAFETENSORS_HEADER.replace(b"bias", b"bi\xe4s")), "not JSON in UTF-8"),
    "half a pair in a name": (safetensors_bytes(SAFETENSORS_HEADER.replace(b"bias", rb"\ud800")), "not JSON in UTF-8"),
    "half a pair in a text": (safetensors_bytes(SAFETENSORS_HEADER.replace(b"pt", rb"\udfff")), "not JSON in UTF-8"),
    "endless number": (safetensors_bytes(SAFETENSORS_HEADER.replace(b"60", b"9" * 10**5)), "not JSON"),
    "deep list": (safetensors_bytes(b'{"a":' + b"[" * 10**5 + b"]" * 10**5 + b"}"), "not JSON"),
    "deep object": (safetensors_bytes(b'{"a":' * 10**5 + b"1" + b"}" * 10**5), "not JSON"),
    "a list": (safetensors_bytes(b"[]"), "not a JSON object"),
    "same name": (safetensors_bytes(SAFETENSORS_HEADER.replace(b"s.1.", b"s.0.")), "names a tensor twice"),
    "same key": (safetensors_bytes(SAFETENSORS_HEADER.replace(b'"dtype": "F32"', b'"shape": [15]')), "tensor twice"),
    "overlap": (
        safetensors_bytes(SAFETENSORS_HEADER.replace(b"[60, 100]", b"[56, 96]")),
        "layers.0.bias overlaps layers.0.weight",
    ),
    "body cut": (safetensors_bytes(SAFETENSORS_HEADER, SAFETENSORS_BODY[:-1]), "layers.1.weight ends at byte"),
    "no body": (safetensors_bytes(SAFETENSORS_HEADER, b""), "truncated or damaged, so download or copy it again"),
}


@pytest.mark.parametrize(("raw", "message"), SAFETENSORS_FAULTS.values(), ids=list(SAFETENSORS_FAULTS))
def test_refused_with_the_reason(path: Path, raw: bytes, message: str) -> None:
    path.write_bytes(raw)
    assert message in (refusal(path) or "accepted")


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

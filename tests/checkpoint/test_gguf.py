"""GGUF: what gguf-py wrote reads back the same, and it reads ours; damaged and lying headers are refused without being
believed."""

from __future__ import annotations

import math
import random
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gguf as gguf_py
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tensor_files import (
    DAMAGE,
    SAFETENSORS_HEADER,
    SEEDS,
    assert_disjoint,
    content,
    names,
    our_name,
    refusal,
    repeatable,
    shapes,
    stamp,
)

from zimage_lite.checkpoint import gguf
from zimage_lite.checkpoint.container import TensorFile
from zimage_lite.checkpoint.opening import open_tensor_file

GGML_TYPES = {  # those that a checkpoint may hold; gguf-py also lists integers and the types of intermediate results
    kind: gguf_py.GGML_QUANT_SIZES[kind]
    for kind in gguf_py.GGMLQuantizationType
    if kind.name not in ("Q8_1", "Q8_K", "I8", "I16", "I32", "I64", "Q1_0")
}


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


values = st.one_of(
    st.integers(0, 2**32 - 1), st.booleans(), st.floats(width=32, allow_nan=False), st.text(max_size=20),
    st.lists(st.integers(-(2**31), 2**31 - 1), min_size=1, max_size=5), st.lists(st.text(max_size=8), min_size=1),
)  # fmt: skip


@pytest.mark.slow
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

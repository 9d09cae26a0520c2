"""safetensors: what the library wrote reads back the same, and it reads ours; damaged and lying headers are refused
without being believed."""

from __future__ import annotations

import json
import math
import random
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors as safetensors_library
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from tensor_files import (
    DAMAGE,
    SAFETENSORS_BODY,
    SAFETENSORS_HEADER,
    SEEDS,
    assert_disjoint,
    content,
    names,
    refusal,
    repeatable,
    safetensors_bytes,
    shapes,
    stamp,
)

from zimage_lite.checkpoint import safetensors
from zimage_lite.checkpoint.container import TensorFile
from zimage_lite.checkpoint.opening import open_tensor_file

BITS = {"F64": 64, "F32": 32, "F16": 16, "BF16": 16, "I64": 64, "I32": 32, "I16": 16, "I8": 8} | {
    "U64": 64, "U32": 32, "U16": 16, "U8": 8, "BOOL": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8
}  # fmt: skip


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


@pytest.mark.slow
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

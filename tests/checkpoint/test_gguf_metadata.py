"""GGUF metadata as gguf-py writes it: passed on with its own types, and the parts of a split file refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf as gguf_py
import numpy as np
import pytest
from safetensors.torch import load_file

from zimage_lite.checkpoint import gguf
from zimage_lite.checkpoint.names import LLAMA_CPP_QWEN3
from zimage_lite.convert.quantize import quantize

KINDS = gguf_py.GGUFValueType
VALUES: dict[str, tuple[KINDS, Any]] = {
    "uint8": (KINDS.UINT8, 200), "int8": (KINDS.INT8, -100), "uint16": (KINDS.UINT16, 60000),
    "int16": (KINDS.INT16, -30000), "uint32": (KINDS.UINT32, 4_000_000_000), "int32": (KINDS.INT32, -1),
    "uint64": (KINDS.UINT64, 2**63 + 1), "int64": (KINDS.INT64, -(2**62)), "float32": (KINDS.FLOAT32, -0.25),
    "float64": (KINDS.FLOAT64, 1e-300), "bool": (KINDS.BOOL, True), "string": (KINDS.STRING, "红色 \n é"),
}  # fmt: skip
LISTS: dict[str, Any] = {
    "texts": ["", "a b", "圆"], "numbers": [1, -2, 3], "floats": [0.5, -1.0], "flags": [True, False],
    "bytes": b"\0\1\xff", "nested": [[1, 2], [3]], "mixed": [[1], [0.5]],
}  # fmt: skip
TOKENS = {
    "tokenizer.ggml.tokens": [f"<{n}>" for n in range(320)],
    "tokenizer.ggml.scores": [-n / 2 for n in range(320)],  # as Ollama's converter writes
}


def gguf_file(path: Path, tensors: dict[str, np.ndarray], lists: dict[str, Any], values: dict[str, Any], **how: Any):
    """Written by gguf-py; how: of its writer, such as where it splits."""
    writer = gguf_py.GGUFWriter(path, "qwen3", **how)
    for key, (kind, value) in values.items():
        writer.add_key_value(key, value, kind)
    for key, items in lists.items():
        writer.add_array(key, items)
    for name, array in tensors.items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def told(path: Path, prefix: str = "") -> dict[str, tuple[list[KINDS], list[bytes]]]:
    """Key -> its types and its bytes, as gguf-py reads them."""
    fields = gguf_py.GGUFReader(path).fields.items()
    return {
        key: (field.types, [part.tobytes() for part in field.parts])
        for key, field in fields
        if key.startswith(prefix) and not key.startswith("GGUF.")
    }


@pytest.fixture(scope="module")
def encoder(tiny: Path) -> dict[str, np.ndarray]:
    """Under llama.cpp's names."""
    (file,) = (tiny / "text_encoder").glob("*.safetensors")
    tensors = {name.removeprefix("model."): tensor for name, tensor in load_file(file).items()}
    names = LLAMA_CPP_QWEN3.to_foreign(tensors)
    return {new: tensors[old].float().numpy() for new, (old,) in names.items()}


def test_every_type_is_passed_on(tmp_path: Path) -> None:
    source, copy = tmp_path / "a.gguf", tmp_path / "b.gguf"
    gguf_file(source, {}, LISTS, VALUES)
    copy.write_bytes(gguf.encode_header([], gguf.encoded_values(source, ""))[0])
    assert told(copy) == told(source)
    assert set(told(copy)) == {*VALUES, *LISTS, "general.architecture"}
    assert set(gguf.encoded_values(source, "int")) == {"int8", "int16", "int32", "int64"}


@pytest.mark.slow
def test_quantizing_again_passes_on_the_tokenizer(encoder: dict[str, np.ndarray], tmp_path: Path) -> None:
    source, out = tmp_path / "a.gguf", tmp_path / "b.gguf"
    extra = {f"tokenizer.ggml.{key}": value for key, value in VALUES.items()}
    gguf_file(source, encoder, TOKENS, extra)
    quantize(source, out, "q8_0")
    assert told(out, "tokenizer.") == told(source, "tokenizer.")
    assert set(told(out, "tokenizer.")) == {*TOKENS, *extra}


@pytest.mark.parametrize("tensors_first", [True, False])
def test_parts_of_a_split_file_are_named(
    encoder: dict[str, np.ndarray], tmp_path: Path, refused: Callable[..., str], tensors_first: bool
) -> None:
    gguf_file(
        tmp_path / "te.gguf", encoder, TOKENS, VALUES,
        split_max_tensors=30, small_first_shard=not tensors_first,
    )  # fmt: skip
    parts = sorted(tmp_path.iterdir())
    assert [part.name for part in parts] == [f"te-{n:05d}-of-{len(parts):05d}.gguf" for n in range(1, len(parts) + 1)]
    joined = tmp_path / "joined.gguf"
    joined.write_bytes(b"".join(part.read_bytes() for part in parts))
    for n, part in enumerate(parts, start=1):
        line = refused("quantize", part, "--to", "q8_0", "-o", tmp_path / "out.gguf")
        assert f"{part.name}: part {n} of {len(parts)} of a split GGUF file; join" in line and "--merge" in line
    line = refused("quantize", joined, "--to", "q8_0", "-o", tmp_path / "out.gguf")
    assert f"the {len(parts)} parts of a split GGUF file, which `cat` does not join" in line and "--merge" in line
    assert not (tmp_path / "out.gguf").exists()

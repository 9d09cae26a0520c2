"""What `quantize` writes draws by itself: a tokenizer goes with it, whatever the source had."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from bare_files import FILES, all_in_one, comfy_files

from zimage_lite import load
from zimage_lite.checkpoint import gguf
from zimage_lite.checkpoint.qwen3 import Qwen3Tokenizer
from zimage_lite.checkpoint.tokenizer import tokenizer_from, tokenizer_from_gguf
from zimage_lite.config import GenerateOptions
from zimage_lite.convert.quantize import quantize

PROMPT = "a red circle, 你好 👍🏽 <think>"


def drawn(model: Path, **parts: Any) -> bytes:
    request = GenerateOptions(PROMPT, width=64, height=64, steps=1)
    return load(model, device="cpu", **parts).generate([request])[0].numpy().tobytes()


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return comfy_files(tmp_path_factory.mktemp("bare") / "true")


@pytest.mark.slow  # whole models
def test_files_without_a_tokenizer_draw_before_and_after(tmp_path: Path, bare: Path) -> None:
    """The output has one that transformers reads as it reads Qwen's, and that gives the same picture."""
    from transformers import AutoTokenizer

    quantize(bare, tmp_path / "out", "bf16", text_encoder_to="keep")
    theirs = AutoTokenizer.from_pretrained(tmp_path / "out" / "tokenizer")
    assert theirs(PROMPT)["input_ids"] == Qwen3Tokenizer().tokenizer.encode(PROMPT).ids
    assert drawn(tmp_path / "out") == drawn(bare) == drawn(bare, tokenizer=tmp_path / "out" / "tokenizer")


@pytest.mark.slow  # whole models
def test_all_in_one_file_gets_one(tmp_path: Path, bare: Path) -> None:
    quantize(all_in_one(tmp_path / "all.safetensors", bare), tmp_path / "out", "int8", text_encoder_to="keep")
    assert tokenizer_from(tmp_path / "out" / "tokenizer").encode(PROMPT) == Qwen3Tokenizer().encode(PROMPT)


@pytest.mark.slow  # whole models
def test_encoder_in_gguf_carries_it(tmp_path: Path, bare: Path) -> None:
    quantize(bare / FILES["text_encoder"], tmp_path / "encoder.gguf", "q8_0")
    inside = tokenizer_from_gguf(gguf.read_header(tmp_path / "encoder.gguf").metadata, "encoder.gguf")
    assert inside.encode(PROMPT) == Qwen3Tokenizer().encode(PROMPT)


@pytest.mark.slow
def test_tokenizer_of_a_gguf_outlives_its_container(tmp_path: Path, tiny: Path) -> None:
    """Safetensors have no room for it."""
    model = comfy_files(tmp_path / "model", 320)
    (model / FILES["text_encoder"]).unlink()
    quantize(tiny, model / "text_encoders" / "encoder.gguf", "q8_0", component="text_encoder")
    quantize(model, tmp_path / "out", "int8", text_encoder_to="int8")
    assert drawn(tmp_path / "out") == drawn(tmp_path / "out", tokenizer=tiny / "tokenizer")


def test_missing_tokenizer_is_told(tmp_path: Path) -> None:
    notes: list[str] = []
    quantize(comfy_files(tmp_path / "model", 320), tmp_path / "out", "q8_0", note=notes.append)
    assert [note for note in notes if "whose 320 tokens are not Qwen3's" in note and "--tokenizer" in note]
    assert not (tmp_path / "out" / "tokenizer").exists()


def test_the_sources_own_is_copied(tmp_path: Path, tiny: Path) -> None:
    shutil.copytree(tiny, tmp_path / "model")
    (tmp_path / "model" / "tokenizer" / "chat_template.jinja").write_text("kept")
    quantize(tmp_path / "model", tmp_path / "out", "q8_0")
    names = {path.name for path in (tmp_path / "model" / "tokenizer").iterdir()}
    assert {path.name for path in (tmp_path / "out" / "tokenizer").iterdir()} == names

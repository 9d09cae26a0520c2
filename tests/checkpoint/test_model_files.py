"""Which files make up a model: parts named one by one, and a tokenizer that need not be among them."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from bare_files import FILES, all_in_one, comfy_files

from zimage_lite.checkpoint.checkpoint import open_checkpoint
from zimage_lite.checkpoint.model_files import find_tokenizer, open_model
from zimage_lite.checkpoint.qwen3 import Qwen3Tokenizer, is_vocabulary_of_qwen3
from zimage_lite.checkpoint.tokenizer import tokenizer_from
from zimage_lite.convert.quantize import quantize
from zimage_lite.errors import UserError


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return comfy_files(tmp_path_factory.mktemp("bare") / "true")


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its vocabulary is not Qwen3's."""
    return comfy_files(tmp_path_factory.mktemp("bare") / "small", 320)


# --- The tokenizer


def test_built_in_tokenizer_serves_files_that_bring_none(bare: Path) -> None:
    model = open_model(bare)
    assert isinstance(model.tokenizer, Qwen3Tokenizer)
    assert "tokenizer" not in vars(model.tokenizer)  # not built before there is a prompt


@pytest.mark.parametrize(
    ("rows", "fits"), [(151668, False), (151669, True), (151936, True), (151937, False), (248320, False), (320, False)]
)
def test_vocabularies_of_qwen3(rows: int, fits: bool) -> None:
    assert is_vocabulary_of_qwen3(rows) is fits


def test_other_vocabulary_needs_a_tokenizer(small: Path) -> None:
    with pytest.raises(
        UserError, match=r"no tokenizer came .* got 320 tokens, expected Qwen3's 151936; .*Qwen/Qwen3-4B"
    ):
        open_model(small)


@pytest.mark.parametrize("wanted", ["chosen folder", "chosen file", "model", "GGUF", "encoder's folder"])
def test_order_of_tokenizers(tmp_path: Path, tiny: Path, wanted: str) -> None:
    """Each, where what comes before it is not there; all that come after it are."""
    kinds = ["chosen folder", "chosen file", "model", "GGUF", "encoder's folder"]
    there = kinds[kinds.index(wanted) :]
    model = comfy_files(tmp_path / "model", 320)
    encoder = tmp_path / "encoder"
    shutil.copytree(tiny / "text_encoder", encoder)
    shutil.copytree(tiny / "tokenizer", encoder, dirs_exist_ok=True)
    if "GGUF" in there:
        (encoder / "model.safetensors").unlink()
        (encoder / "config.json").unlink()
        quantize(tiny, encoder / "model.gguf", "q8_0", component="text_encoder")
    if "model" in there:
        shutil.copytree(tiny / "tokenizer", model / "tokenizer")
    chosen = {"chosen folder": tiny / "tokenizer", "chosen file": tiny / "tokenizer" / "tokenizer.json"}
    sources = {**chosen, "model": model / "tokenizer", "GGUF": encoder, "encoder's folder": encoder}
    found = open_model(model, {"text_encoder": encoder, "tokenizer": chosen.get(wanted)}).tokenizer
    assert found.source == str(sources[wanted])
    assert found.encode("x") == tokenizer_from(tiny / "tokenizer").encode("x")


def test_tokenizer_without_merges_inside_a_gguf_is_none(bare: Path) -> None:
    encoder = replace(open_checkpoint(bare / FILES["text_encoder"]), metadata={"tokenizer.ggml.tokens": ["a", "b"]})
    assert isinstance(find_tokenizer(None, encoder), Qwen3Tokenizer)


# --- The parts


def test_all_in_one_file_lacks_nothing(tmp_path: Path, bare: Path) -> None:
    path = all_in_one(tmp_path / "all.safetensors", bare)
    assert open_model(path).name == "all.safetensors"


NAMES = {"transformer": "Z-Image transformer", "text_encoder": "Qwen3 text encoder", "vae": "Flux VAE"}


@pytest.mark.parametrize("missing", [("vae",), ("text_encoder",), ("transformer",), ("text_encoder", "vae")])
def test_what_one_file_lacks_is_named_and_can_be_given(tmp_path: Path, bare: Path, missing: tuple[str, ...]) -> None:
    path = all_in_one(tmp_path / "some.safetensors", bare, [part for part in NAMES if part not in missing])
    with pytest.raises(UserError) as refused:
        open_model(path)
    lacks = " and no ".join(NAMES[part] for part in missing)
    has = " and ".join(f"a {name}" for part, name in NAMES.items() if part not in missing)
    flags = " and ".join(f"--{part.replace('_', '-')} FILE" for part in missing)
    assert str(refused.value) == f"{path} has no {lacks}: got {has}; name what is missing with {flags}"
    model = open_model(path, {part: bare / FILES[part] for part in missing})
    for part in NAMES:
        assert getattr(model, part).source == (bare / FILES[part] if part in missing else path)


def test_what_a_folder_lacks_is_named(tmp_path: Path, bare: Path) -> None:
    shutil.copytree(bare, tmp_path / "model")
    shutil.rmtree(tmp_path / "model" / "vae")
    with pytest.raises(UserError, match=r"model has no vae/; name what is missing with --vae FILE"):
        open_model(tmp_path / "model")

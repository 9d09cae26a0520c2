"""<lora:NAME:STRENGTH> in prompts."""

from __future__ import annotations

from pathlib import Path

import pytest

from zimage_lite.adapters.tags import with_tags
from zimage_lite.config import GenerateOptions
from zimage_lite.errors import UserError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in (
        "style.safetensors",
        "people/anna.sft",
        "people/style.v2.safetensors",
        "LOUD.SAFETENSORS",
        "a/twin.safetensors",
        "b/twin.safetensors",
        "twice.safetensors",
        "twice.sft",
        "peft.v1/adapter_config.json",
        "peft.v1/adapter_model.safetensors",
        "notes.txt",
        ".hidden.safetensors",
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    return tmp_path


@pytest.mark.parametrize(
    ("prompt", "rest", "found"),
    [
        ("a cat <lora:style:0.8>", "a cat", [("style.safetensors", 0.8)]),
        ("<lora:style> a cat", "a cat", [("style.safetensors", 1.0)]),
        ("a <lora:people/anna:-1>cat", "acat", [("people/anna.sft", -1.0)]),
        ("a cat <LORA:anna:0.5:0.7>", "a cat", [("people/anna.sft", 0.7)]),  # text encoder, transformer
        ("cat <lora:anna:te=0.5:unet=0.2>", "cat", [("people/anna.sft", 0.2)]),
        ("cat <lora:anna:te=0.5>", "cat", [("people/anna.sft", 0.5)]),  # of both, as of one number
        ("cat <lora:anna:0.7:te=0.5>", "cat", [("people/anna.sft", 0.5)]),
        ("cat <lora:anna:0.7:0.6:unet=0.2>", "cat", [("people/anna.sft", 0.2)]),
        ("cat <lora:anna::>", "cat", [("people/anna.sft", 1.0)]),
        ("cat <lyco:anna: 0.5 >", "cat", [("people/anna.sft", 0.5)]),
        (r"cat <lora:People\Anna.SFT:0.5>", "cat", [("people/anna.sft", 0.5)]),
        (
            "cat <lora:style.v2:1><lora:style:0>",
            "cat",
            [("people/style.v2.safetensors", 1.0), ("style.safetensors", 0.0)],
        ),
        ("cat <lora:loud:0.5>", "cat", [("LOUD.SAFETENSORS", 0.5)]),
        ("cat <lora:peft.v1:0.5>", "cat", [("peft.v1", 0.5)]),
        ("cat <lora:b/twin>", "cat", [("b/twin.safetensors", 1.0)]),
        ("cat <lora:twice.sft>", "cat", [("twice.sft", 1.0)]),
        ("cat <lora:twice.safetensors>", "cat", [("twice.safetensors", 1.0)]),
        ("<b>no tag</b> <lora>", "<b>no tag</b> <lora>", []),
    ],
)
def test_found(folder: Path, prompt: str, rest: str, found: list[tuple[str, float]]) -> None:
    request = with_tags(GenerateOptions(prompt), folder)
    assert request.prompt == rest
    assert [(lora.path, lora.strength) for lora in request.loras] == [(str(folder / name), m) for name, m in found]


def test_they_join_those_that_are_named(folder: Path) -> None:
    request = with_tags(GenerateOptions("cat <lora:anna>", loras=("x.safetensors:0.5",)), folder)
    assert [lora.path for lora in request.loras] == ["x.safetensors", str(folder / "people" / "anna.sft")]


def test_without_a_folder_it_is_text(folder: Path) -> None:
    request = GenerateOptions("a cat <lora:style:0.8>")
    assert with_tags(request, None) is request


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        ("<lora:stile:1>", "did you mean style?"),
        ("<lora:notes:1>", "expected one of its 9 adapters"),
        ("<lora:twin>", "got a/twin.safetensors and b/twin.safetensors"),
        ("<lora:Twice>", "got twice.safetensors and twice.sft, expected one of them"),
        ("<lora:style:strong>", "got 'strong', expected a number"),
        ("<lora:style:1e9>", "strength"),
    ],
)
def test_trouble(folder: Path, prompt: str, words: str) -> None:
    with pytest.raises(UserError, match="lora") as error:
        with_tags(GenerateOptions(prompt), folder)
    assert words in str(error.value)


@pytest.mark.parametrize("prompt", ["<lora:style>", "a cat"])
@pytest.mark.parametrize("name", ["absent", "notes.txt"])
def test_no_such_folder(folder: Path, name: str, prompt: str) -> None:
    with pytest.raises(UserError, match="no such folder"):
        with_tags(GenerateOptions(prompt), folder / name)


def test_as_it_is_spelled_comes_first(folder: Path) -> None:
    if (folder / "STYLE.safetensors").exists():
        pytest.skip("a file system that takes them for one")
    (folder / "STYLE.safetensors").touch()
    names = {
        tag: Path(with_tags(GenerateOptions(f"<lora:{tag}>"), folder).loras[0].path).stem for tag in ("style", "STYLE")
    }
    assert names == {"style": "style", "STYLE": "STYLE"}

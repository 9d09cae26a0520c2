"""A LoRA or a ControlNet from the Hub: the one file that is named, or the only one, and PEFT's config with it."""

from __future__ import annotations

from pathlib import Path

import pytest
from hub_cache import REPO
from hub_server import HubServer

from zimage_lite.checkpoint.hub import named_file, single_file
from zimage_lite.checkpoint.model_card import DEMO, control_name, control_place
from zimage_lite.errors import UserError
from zimage_lite.pipeline.controls import open_control

PEFT = ("adapter_model.safetensors", "adapter_config.json")


@pytest.fixture
def offers(server: HubServer, tmp_path: Path):
    """Says which files there are."""

    def offer(*names: str) -> HubServer:
        server.folder = tmp_path / "hub"
        for name in names:
            (server.folder / name).parent.mkdir(parents=True, exist_ok=True)
            (server.folder / name).write_bytes(name.encode())
        return server

    return offer


def test_the_only_file(offers) -> None:
    server = offers("README.md", "pencil.safetensors", "example.png")
    found = single_file(REPO)
    assert found.name == "pencil.safetensors" and found.read_bytes() == b"pencil.safetensors"
    assert {answer.name for answer in server.served} == {"pencil.safetensors"}


@pytest.mark.parametrize("name", [None, "adapter_model.safetensors"])
def test_a_config_comes_along(offers, name: str | None) -> None:
    offers(*PEFT)
    found = single_file(REPO, name)
    folder = found if name is None else found.parent
    assert sorted(path.name for path in folder.iterdir()) == sorted(PEFT)


def test_a_named_one_in_a_folder(offers) -> None:
    offers("v1/adapter_model.safetensors", "v1/adapter_config.json", "v2.safetensors")
    found = single_file(REPO, "v1/adapter_model.safetensors")
    assert found.with_name("adapter_config.json").read_bytes() == b"v1/adapter_config.json"
    assert single_file(REPO, "v2.safetensors").read_bytes() == b"v2.safetensors"


def test_peft_file_without_a_config(offers) -> None:
    offers("adapter_model.safetensors")
    assert single_file(REPO, "adapter_model.safetensors").read_bytes() == b"adapter_model.safetensors"


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("a.safetensors", "b.safetensors"), "got a.safetensors, b.safetensors; name one, as someone/tiny/FILE"),
        (("a.bin",), "got no .safetensors file"),
    ],
)
def test_which_one_is_asked(offers, names: tuple[str, ...], message: str) -> None:
    offers(*names)
    with pytest.raises(UserError, match=f"{REPO}: no single file of weights: {message}"):
        single_file(REPO)


def test_one_that_is_not_there(offers) -> None:
    offers("a.safetensors")
    with pytest.raises(UserError, match=REPO):
        single_file(REPO, "b.safetensors")


@pytest.mark.parametrize("names", [("pencil.safetensors", "README.md"), PEFT])
def test_what_is_in_the_cache_needs_no_hub(offers, names: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    offers(*names)
    found = single_file(REPO)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # nobody is there
    assert single_file(REPO) == found
    with pytest.raises(UserError, match=r"someone/other: no connection to http://127\.0\.0\.1:9"):
        single_file("someone/other")


def test_as_people_name_it(offers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    offers("v1/pencil.safetensors")
    assert named_file(REPO) == named_file(f"{REPO}/v1/pencil.safetensors") == single_file(REPO)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "loras").mkdir()
    for path in ("pencil.safetensors", "loras/pencil", "loras/zimage/pencil.safetensors", f"{REPO}/v1/README.md"):
        assert named_file(path) is None  # a misspelled path is not looked for on the Hub


def test_a_controlnet(offers) -> None:
    server, demo = offers(), control_place(DEMO)
    server.folder.mkdir()
    (server.folder / demo.name).write_bytes(demo.read_bytes())
    for path in (REPO, f"{REPO}/{demo.name}"):
        assert open_control(path).config == open_control(DEMO).config
    assert control_name(f"{REPO}/{demo.name}") == control_name(DEMO) == demo.stem

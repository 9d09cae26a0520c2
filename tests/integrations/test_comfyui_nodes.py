"""What our nodes for ComfyUI ask of our own package, with a stand-in for ComfyUI; and the workflows beside them."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator, Mapping
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import pytest
import torch
from comfy_stand_in import NODES, Bar, Interrupted, our_nodes

from zimage_lite import GenerateOptions, load
from zimage_lite.errors import UserError

WORKFLOWS = sorted((NODES / "example_workflows").rglob("*.json"))


@pytest.fixture
def nodes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Mapping[str, Any]]:
    monkeypatch.setattr(Bar, "stops_at", -1)
    with our_nodes(tmp_path / "models") as found:
        yield found


def defaults(node: Any) -> dict[str, Any]:
    """What a page would send of a node that nobody touched."""
    found = {}
    for one in node.define_schema().said["inputs"]:
        choices = one.args[0] if one.args else []
        if not one.said.get("optional"):
            found[one.id] = one.said.get("default", choices[0] if choices else "")
    return found


@pytest.mark.slow
def test_generate_draws_what_the_pipeline_draws(nodes: Mapping[str, Any]) -> None:
    node = nodes["ZImageLiteGenerate"]
    images, report = node.execute(**{**defaults(node), "prompt": "a red circle", "seed": 3, "count": 2, "steps": 2})
    wanted = load("demo", cache=False).generate([GenerateOptions("a red circle", seed=s, steps=2) for s in (3, 4)])
    assert torch.equal((images * 255).round().byte(), torch.stack(wanted))
    assert report.startswith("seed 3, 4\n") and "denoise: " in report


@pytest.mark.slow
def test_each_picture_of_a_batch_is_drawn_over(nodes: Mapping[str, Any]) -> None:
    node, pictures = nodes["ZImageLiteGenerate"], torch.rand(2, 64, 64, 3)
    mask = torch.zeros(1, 64, 64)
    mask[:, :32] = 1
    images, _ = node.execute(**{**defaults(node), "prompt": "a cat", "steps": 1, "image": pictures, "mask": mask})
    assert torch.equal((images[:, 32:] * 255).round(), (pictures[:, 32:] * 255).round())
    assert not torch.equal(images[0], images[1])


@pytest.mark.slow
def test_stopping_goes_through_everything(nodes: Mapping[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    node = nodes["ZImageLiteGenerate"]
    monkeypatch.setattr(Bar, "stops_at", 2)
    with pytest.raises(Interrupted):
        node.execute(**{**defaults(node), "prompt": "a cat"})


@pytest.mark.slow
def test_parts_alone_have_to_be_all(nodes: Mapping[str, Any]) -> None:
    node = nodes["ZImageLiteGenerate"]
    with pytest.raises(UserError, match="the model has no Z-Image transformer"):
        node.execute(**{**defaults(node), "model": "(the parts below)", "prompt": "a cat"})


def test_quantize_writes_a_model_that_is_listed(nodes: Mapping[str, Any], tmp_path: Path) -> None:
    node = nodes["ZImageLiteQuantize"]
    path, report = node.execute(**{**defaults(node), "source": "demo", "to": "q8_0"})
    assert path == str(tmp_path / "models" / "zimage_lite" / "demo-q8_0") and "transformer to q8_0" in report
    listed = {one.id: one for one in nodes["ZImageLiteGenerate"].define_schema().said["inputs"]}["model"]
    assert "demo-q8_0" in listed.args[0]


@pytest.mark.parametrize("file", WORKFLOWS, ids=lambda file: f"{file.parent.name}/{file.stem}")
def test_workflows_name_what_there_is(nodes: Mapping[str, Any], file: Path) -> None:
    """In the API's format {id: {class_type, inputs}}; in the page's, values lie in the order of the widgets."""
    workflow = json.loads(file.read_text(encoding="utf-8"))
    if "nodes" not in workflow:
        workflow = {"nodes": [{"type": one["class_type"], **one} for one in workflow.values()]}
    ours = [one for one in workflow["nodes"] if one["type"].startswith("ZImageLite")]
    assert ours
    for one in ours:
        inputs = nodes[one["type"]].define_schema().said["inputs"]
        known, required = {own.id for own in inputs}, {own.id for own in inputs if not own.said.get("optional")}
        given = set(one["inputs"]) if isinstance(one["inputs"], dict) else {own["name"] for own in one["inputs"]}
        assert given <= known and required <= given


def test_all_is_said_in_chinese(nodes: Mapping[str, Any]) -> None:
    texts = json.loads((NODES / "locales" / "zh" / "nodeDefs.json").read_text(encoding="utf-8"))
    assert set(texts) == set(nodes)
    for name, node in nodes.items():
        assert set(texts[name]["inputs"]) == {own.id for own in node.define_schema().said["inputs"]}


@pytest.mark.parametrize(
    ("python", "command"),
    [
        (
            r"C:\ComfyUI\python_embeded\python.exe",
            r"run: C:\ComfyUI\python_embeded\python.exe -m pip install zimage-lite",
        ),
        (r"C:\My AI\python.exe", r'run: "C:\My AI\python.exe" -m pip install zimage-lite'),
    ],
)
def test_the_line_that_installs_us(python: str, command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """PowerShell takes what begins with a quote for a text, and runs nothing."""
    spec = spec_from_file_location("installed", NODES / "nodes" / "installed.py")
    installed = module_from_spec(spec)
    spec.loader.exec_module(installed)
    monkeypatch.setattr(installed, "find_spec", lambda name: None)
    monkeypatch.setattr(sys, "executable", python)
    with pytest.raises(ImportError, match=re.escape(command)):
        installed.require_zimage_lite()

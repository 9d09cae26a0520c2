"""The self-test of the kernels remembers what it found, and survives what a kernel does to its process."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from zimage_lite.doctor import toolchain
from zimage_lite.doctor.nvidia import Driver
from zimage_lite.doctor.selftest import verdicts
from zimage_lite.doctor.selftest.checks import CHECKS
from zimage_lite.doctor.selftest.process import Verdict

pytest.importorskip("triton")
DEVICE = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
OK = dict.fromkeys(CHECKS, Verdict("ok"))


@pytest.fixture
def tested(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[dict[str, Verdict]]:
    """A cache of its own, and a test that takes no time. Returns what it found, once for each run."""
    monkeypatch.setenv("ZIMAGE_LITE_CACHE", str(tmp_path))
    monkeypatch.setattr(verdicts, "interpreted", lambda: True)
    runs: list[dict[str, Verdict]] = []

    def test(device: torch.device) -> dict[str, Verdict]:
        runs.append({**OK, "add_norm": Verdict("wrong", f"run {len(runs)}")})
        return runs[-1]

    monkeypatch.setattr(verdicts, "_test", test)
    new_process()
    return runs


def new_process() -> None:
    verdicts._known.clear()


def test_what_was_tested_is_not_tested_again(tested: list[Any], tmp_path: Path) -> None:
    first = verdicts.verdicts(DEVICE)
    assert first == tested[0] and first["add_norm"] == Verdict("wrong", "run 0")
    assert verdicts.verdicts(DEVICE) == first
    new_process()
    assert verdicts.verdicts(DEVICE) == first
    assert len(tested) == 1
    (file,) = (tmp_path / "kernels").iterdir()  # and nothing half-written beside it
    assert json.loads(file.read_text())["situation"]["torch"] == torch.__version__


def test_testing_afresh_replaces_what_was_kept(tested: list[Any]) -> None:
    verdicts.verdicts(DEVICE)
    assert verdicts.verdicts(DEVICE, refresh=True)["add_norm"].reason == "run 1"
    new_process()
    assert verdicts.verdicts(DEVICE)["add_norm"].reason == "run 1"


def test_verdicts_cannot_be_changed_from_outside(tested: list[Any]) -> None:
    verdicts.verdicts(DEVICE).clear()
    assert verdicts.verdicts(DEVICE) == tested[0]


@pytest.mark.parametrize("changed", ["capability", "driver", "triton", "torch", "kernels", "compiler"])
def test_another_situation_is_tested(changed: str, tested: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    verdicts.verdicts(DEVICE)
    before = verdicts.situation(DEVICE)
    assert changed in before
    monkeypatch.setattr(verdicts, "situation", lambda device: before | {changed: "another"})
    verdicts.verdicts(DEVICE)
    assert len(tested) == 2


def test_the_situation_follows_the_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    before = verdicts.situation(DEVICE)
    monkeypatch.setattr(verdicts, "triton_version", lambda: "0.1")
    monkeypatch.setenv("CC", "/opt/cc")
    (tmp_path / "norm.py").write_text("another kernel")
    monkeypatch.setattr(verdicts, "files", lambda package: tmp_path)
    after = verdicts.situation(DEVICE)
    assert {name for name in before if before[name] != after[name]} == {"triton", "compiler", "kernels"}
    (tmp_path / "norm.py").write_text("yet another")
    assert verdicts.situation(DEVICE)["kernels"] != after["kernels"]


def test_a_gpu_is_known_by_its_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "RTX 3060")
    monkeypatch.setattr(verdicts, "capability", lambda device: 86)
    found = []
    for version in ("560.94", "581.57"):
        monkeypatch.setattr(verdicts.nvidia, "driver", lambda version=version: Driver(version, (13, 0), ()))
        found.append(verdicts.situation(torch.device("cuda")))
    assert {name for name in found[0] if found[0][name] != found[1][name]} == {"driver"}
    assert (found[0]["gpu"], found[0]["capability"], found[0]["driver"]) == ("RTX 3060", 86, "560.94")


def test_compilations_that_are_lost(tested: list[Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """If somebody emptied Triton's cache, the first picture shall not compile everything without a word; but where
    nothing could be compiled, nothing is missed."""
    monkeypatch.setattr(verdicts, "interpreted", lambda: False)
    monkeypatch.setattr(verdicts, "_obstacle", lambda device: None)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "triton"))
    said: list[str] = []

    def runs() -> int:
        new_process()
        verdicts.verdicts(DEVICE, tell=said.append)
        assert len(said) == len(tested)
        return len(tested)

    compiled = tmp_path / "triton" / "a kernel"
    assert runs() == 1
    compiled.mkdir(parents=True)
    assert runs() == 1
    compiled.rmdir()
    assert runs() == 2
    compiled.parent.rmdir()
    assert runs() == 3
    failed = dict.fromkeys(CHECKS, Verdict("cannot compile", "no C compiler"))
    monkeypatch.setattr(verdicts, "_test", lambda device: tested.append(failed) or failed)
    assert runs() == runs() == 4
    assert f"up to {verdicts.COMPILATIONS} Triton kernels" in said[0] and str(tmp_path / "triton") in said[0]


def test_the_folder_is_tritons(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import triton

    for name in ("TRITON_CACHE_DIR", "TRITON_HOME"):
        assert str(toolchain.compiled_folder()) == triton.knobs.cache.dir
        monkeypatch.setenv(name, str(tmp_path / name))
        assert toolchain.compiled_folder() == Path(triton.knobs.cache.dir)
        monkeypatch.delenv(name)


def test_the_version_of_triton_is_that_of_its_package() -> None:
    import triton

    assert toolchain.triton_version() == triton.__version__.partition("+")[0]


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[: len(text) // 2],
        lambda text: "",
        lambda text: "[]",
        lambda text: text.replace('"ok"', '"fine"', 1),
        lambda text: text.replace('"linear_int8"', '"linear_int9"'),
        lambda text: text.replace(torch.__version__, "1.0"),
        lambda text: "\x00\xff" * 20,
    ],
    ids=["half", "empty", "list", "state", "op", "situation", "noise"],
)
def test_damaged_verdicts_are_tested_again(damage: Callable[[str], str], tested: list[Any], tmp_path: Path) -> None:
    verdicts.verdicts(DEVICE)
    (file,) = (tmp_path / "kernels").iterdir()
    good = file.read_text(encoding="utf-8")
    file.write_text(damage(good), encoding="utf-8")
    new_process()
    assert verdicts.verdicts(DEVICE)["add_norm"].reason == "run 1"
    assert file.read_text(encoding="utf-8") == good.replace("run 0", "run 1")


def test_without_a_folder_once_in_each_process(tested: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ZIMAGE_LITE_CACHE", "off")
    assert verdicts.verdicts(DEVICE) == verdicts.verdicts(DEVICE) == tested[0]
    assert len(tested) == 1


def test_what_cannot_be_tested_now_is_not_kept(
    tested: list[Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(verdicts, "_test", lambda device: {**OK, "add_norm": Verdict("not tested", "memory")})
    assert verdicts.verdicts(DEVICE)["add_norm"].state == "not tested"
    assert not (tmp_path / "kernels").exists()


def test_a_folder_that_cannot_be_written(tested: list[Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("ZIMAGE_LITE_CACHE", str(tmp_path / "file"))
    assert verdicts.verdicts(DEVICE) == tested[0]


def test_nothing_to_test_without_a_gpu(tested: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verdicts, "interpreted", lambda: False)
    found = verdicts.verdicts(torch.device("cpu"))
    assert set(found) == set(CHECKS)
    assert set(found.values()) == {Verdict("not supported", "kernels need CUDA, the device is cpu")}
    monkeypatch.setattr(verdicts._triton, "load", lambda: None)
    assert verdicts.verdicts(DEVICE)["add_norm"] == Verdict("not supported", "Triton cannot be imported")
    assert not tested

"""What is wrong with machines that are not here, and the command that mends it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from laptops import ALL_OK, CPU_TORCH, LAPTOP, WINDOWS, driver

from zimage_lite.doctor import remedies
from zimage_lite.doctor.installation import Installation, Torch
from zimage_lite.doctor.selftest.checks import CHECKS
from zimage_lite.doctor.selftest.process import Verdict


def only_problem(found: Installation) -> str:
    (problem,) = remedies.problems(found)
    return str(problem)


def test_nothing_is_wrong() -> None:
    for found in (LAPTOP, WINDOWS, replace(LAPTOP, driver=None, torch=CPU_TORCH, verdicts={})):
        assert remedies.problems(found) == []
        assert remedies.can_run(found)
    assert remedies.backend(LAPTOP) == f"triton, on cuda: all {len(CHECKS)} kernels passed their tests"


# --- torch


def pip(python: str, wanted: str, build: str) -> str:
    return f"{python} -m pip install {wanted} --index-url https://download.pytorch.org/whl/{build}"


@pytest.mark.parametrize(
    ("cuda", "capability", "version", "wanted", "build"),
    [
        ((13, 0), (8, 6), "2.13.0+cpu", "torch==2.13.0+cu130", "cu130"),
        ((13, 1), (12, 0), "2.15.1", "torch==2.15.1+cu130", "cu130"),  # PyPI's name for the CPU build on Windows
        ((12, 6), (8, 6), "2.13.0+cpu", "torch==2.13.0+cu126", "cu126"),
        ((12, 2), (7, 5), "2.11.0+cpu", "torch==2.11.0+cu128", "cu128"),
        ((12, 8), (12, 0), "2.11.0+cpu", "torch==2.11.0+cu128", "cu128"),
        ((13, 0), (6, 1), "2.13.0+cpu", "torch==2.13.0+cu126", "cu126"),  # CUDA 13 has no Pascal
    ],
)
def test_a_gpu_and_a_torch_for_cpus(
    cuda: tuple[int, int], capability: tuple[int, int], version: str, wanted: str, build: str
) -> None:
    found = replace(WINDOWS, torch=Torch(version, None, "cpu"), driver=driver(cuda, capability), verdicts={})
    problem = only_problem(found)
    assert problem.endswith(f"is a build for CPUs: {pip(WINDOWS.executable, wanted, build)}")
    assert not remedies.uses_kernels(found)
    assert remedies.backend(found).startswith("reference, on cpu")


@pytest.mark.parametrize(
    ("cuda", "capability", "version"),
    [((11, 8), (8, 6), "2.13.0+cpu"), ((12, 8), (12, 0), "2.13.0+cpu"), ((12, 8), (8, 6), "2.15.0+cpu")],
    ids=["CUDA 11", "Blackwell on CUDA 12", "torch without CUDA 12"],
)
def test_a_driver_too_old_for_any_build(cuda: tuple[int, int], capability: tuple[int, int], version: str) -> None:
    old = driver(cuda, capability, "546.33")
    problem = only_problem(replace(WINDOWS, torch=Torch(version, None, "cpu"), driver=old, verdicts={}))
    assert f"update the driver (546.33 runs CUDA {cuda[0]}.{cuda[1]}), https://www.nvidia.com/drivers" in problem


def test_a_driver_too_old_for_this_build() -> None:
    torch = Torch("2.13.0+cu130", "13.0", "cpu")
    problem = only_problem(replace(LAPTOP, torch=torch, driver=driver((12, 6), version="560.94"), verdicts={}))
    assert "built for CUDA 13.0 and driver 560.94 runs CUDA 12.6" in problem
    assert problem.endswith(pip(LAPTOP.executable, "torch==2.13.0+cu126", "cu126"))


def test_a_gpu_that_is_hidden() -> None:
    torch = Torch("2.13.0+cu130", "13.0", "cpu")
    hidden = replace(LAPTOP, torch=torch, verdicts={}, visible_devices="")
    assert only_problem(hidden).endswith("does not see it: unset CUDA_VISIBLE_DEVICES")
    assert "restart" in only_problem(replace(hidden, visible_devices=None))
    told = only_problem(replace(hidden, system="win32"))
    assert told.endswith("set CUDA_VISIBLE_DEVICES= (in PowerShell Remove-Item Env:CUDA_VISIBLE_DEVICES)")


@pytest.mark.parametrize(
    ("architectures", "capability", "has_code"),
    [
        (("sm_75", "sm_80", "sm_86", "sm_90"), (8, 9), True),  # by 8.6
        (("sm_75", "sm_80", "sm_86", "sm_90"), (12, 0), False),
        (("sm_75", "sm_86", "compute_90"), (12, 0), True),
        (("sm_86", "sm_90a", "sm_120"), (7, 5), False),
        (("sm_90a", "sm_120"), (9, 0), True),
    ],
)
def test_a_build_without_code_for_the_card(
    architectures: tuple[str, ...], capability: tuple[int, int], has_code: bool
) -> None:
    torch = Torch("2.13.0+cu126", "12.6", "cuda", architectures)
    found = replace(LAPTOP, torch=torch, driver=driver(capability=capability))
    assert remedies.uses_kernels(found) == has_code
    if not has_code:
        assert "torch 2.13.0+cu126 has no code for the NVIDIA GeForce RTX 3060 Laptop GPU" in only_problem(found)


def test_no_torch() -> None:
    bare = replace(LAPTOP, torch=None, verdicts={})
    assert not remedies.can_run(bare) and not remedies.uses_kernels(bare)
    assert only_problem(bare).endswith(pip(LAPTOP.executable, "torch", "cu130"))
    assert only_problem(replace(bare, driver=None)).endswith(pip(LAPTOP.executable, "torch", "cpu"))
    assert only_problem(replace(bare, driver=None, system="darwin")).endswith("-m pip install torch")
    assert remedies.backend(bare) == "none: torch cannot be imported"


def test_a_broken_torch() -> None:
    dll = replace(WINDOWS, torch=Torch(error="[WinError 126] The specified module could not be found"), verdicts={})
    assert "winget install --id Microsoft.VCRedist.2015+.x64" in only_problem(dll)
    broken = replace(LAPTOP, torch=Torch(error="undefined symbol: x"), verdicts={})
    assert only_problem(broken).endswith(pip(LAPTOP.executable, "--force-reinstall torch", "cu130"))
    assert not remedies.can_run(broken)


# --- Triton and the kernels


def test_no_triton() -> None:
    bare = replace(LAPTOP, triton=None, verdicts={})
    assert only_problem(bare).endswith('/home/me/venv/bin/python -m pip install "triton>=3.6"')
    windows = replace(WINDOWS, triton=None, executable=r"C:\My Python\python.exe", verdicts={})
    assert only_problem(windows).endswith('python -m pip install "triton-windows>=3.6"')
    assert remedies.backend(bare) == "reference, on cuda: Triton is not installed"
    assert not remedies.uses_kernels(bare)


@pytest.mark.parametrize(
    ("lacks", "command"),
    [
        ({"compiler": None}, "sudo apt-get install -y gcc"),
        ({"headers": False}, "sudo apt-get install -y python3.12-dev"),
        ({"compiler": None, "headers": False, "package_manager": "dnf"}, "sudo dnf install -y gcc python3-devel"),
        ({"compiler": None, "package_manager": None}, "install gcc and the development files of Python"),
    ],
)
def test_what_a_compilation_needs_is_missing(lacks: dict[str, Any], command: str) -> None:
    failed = dict.fromkeys(CHECKS, Verdict("cannot compile", "RuntimeError: Failed to find C compiler"))
    found = replace(LAPTOP, verdicts=failed, **lacks)
    assert only_problem(found).endswith(f"{len(CHECKS)} kernels cannot be compiled: {command}")
    assert remedies.backend(found) == "reference, on cuda: no kernel passed its test"


def test_a_missing_compiler_that_nobody_misses() -> None:
    """Triton keeps what it compiled; and other reasons are not blamed on tools that are there."""
    assert remedies.problems(replace(LAPTOP, compiler=None, headers=False)) == []
    failed = {**ALL_OK, "add_norm": Verdict("cannot compile", "PTXASError: no")}
    assert "add_norm: cannot compile (PTXASError: no)" in only_problem(replace(LAPTOP, verdicts=failed))


def test_a_card_of_7_5() -> None:
    """No product runs there in Triton, which is no fault of the installation."""
    absent = Verdict("not supported", "needs compute capability 8.0, this GPU has 7.5")
    verdicts = {op: Verdict("ok") if least == 75 else absent for op, (_, least) in CHECKS.items()}
    found = replace(LAPTOP, driver=driver(capability=(7, 5)), verdicts=verdicts)
    assert remedies.problems(found) == []
    line = "triton+torch, on cuda: all 7 kernels for this GPU passed; torch multiplies and attends"
    assert remedies.backend(found) == line
    failed = replace(found, verdicts=verdicts | {"add_norm": Verdict("wrong", "off")})
    assert remedies.backend(failed) == "reference, on cuda: add_norm did not pass"


def test_a_numba_that_compiles_nothing() -> None:
    (told,) = remedies.problems(replace(LAPTOP, loops_obstacle="numba cannot be imported (needs another numpy)"))
    assert "nothing can be quantized" in told.what and "needs another numpy" in told.what
    assert told.fix == f"{LAPTOP.executable} -m pip install --force-reinstall numba"
    assert remedies.problems(replace(LAPTOP, loops_obstacle="NUMBA_DISABLE_JIT is set"))[0].fix == "unset it"


def test_kernels_that_fail_are_named() -> None:
    full = Verdict("not tested", "CUDA out of memory")
    wrong = Verdict("wrong", "9 rows: off by 40 times what rounding explains")
    found = replace(LAPTOP, verdicts={**ALL_OK, "add_norm": full, "norm_rope": full, "linear_int8": wrong})
    lines = [str(problem) for problem in remedies.problems(found)]
    assert len(lines) == 2
    assert lines[0].startswith("add_norm, norm_rope: not tested (CUDA out of memory)")
    assert lines[1].startswith("linear_int8: wrong (9 rows: off by 40 times what rounding explains)")
    assert "\n" not in "".join(lines)
    assert remedies.backend(found) == "reference, on cuda: add_norm, norm_rope, linear_int8 did not pass"

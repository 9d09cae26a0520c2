"""What is wrong with an installation, and the exact command that mends it.

Pure: from what was found to a list of lines, so that any laptop's trouble can be tried on any machine.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from .installation import Installation, Torch
from .nvidia import Driver

_WHEELS = "https://download.pytorch.org/whl"
_DRIVERS = "https://www.nvidia.com/drivers"
# Builds of torch for Linux and Windows, as PyTorch's RELEASE.md lists them from 2.11 on: name; the driver's CUDA that
# runs it (within a major version any minor does, by NVIDIA's rule of minor version compatibility); the architectures
# in it, oldest to newest (a card runs code for its own major version and an older or equal minor one); the last torch
# that has it. The first that fits is taken; cu126 is the last, for it has no Blackwell, and torch 2.15 has no cu126.
_BUILDS = (
    ("cu130", 13, (7, 5), (99, 0), (99, 0)),
    ("cu128", 12, (7, 5), (12, 1), (2, 11)),
    ("cu126", 12, (5, 0), (9, 0), (2, 14)),
)
_TRITON_NEEDS = (7, 5)
# Packages of a C compiler and of Python's headers, by the program that installs packages.
_PACKAGES = {
    "apt-get": ("sudo apt-get install -y", "gcc", "python{0}-dev"),
    "dnf": ("sudo dnf install -y", "gcc", "python3-devel"),
    "zypper": ("sudo zypper install -y", "gcc", "python3-devel"),
    "pacman": ("sudo pacman -S --noconfirm", "gcc", "python"),
}


@dataclass(frozen=True)
class Problem:
    """Two halves of a line. fix: a command, or else a step in words."""

    what: str
    fix: str

    def __str__(self) -> str:
        return f"{self.what}: {self.fix}"


def problems(found: Installation) -> list[Problem]:
    """The worst first. An empty list says that the machine does what it can."""
    return [*_torch_problems(found), *_loops_problems(found), *_kernel_problems(found)]


def backend(found: Installation) -> str:
    """What --backend auto comes to on this machine, and why."""
    if found.torch is None or found.torch.error:
        return "none: torch cannot be imported"
    if found.torch.device != "cuda":
        return f"reference, on {found.torch.device}: kernels need an NVIDIA GPU that torch sees"
    if not found.triton:
        return "reference, on cuda: Triton is not installed"
    good = [op for op, verdict in found.verdicts.items() if verdict.trusted]
    absent = [op for op, verdict in found.verdicts.items() if verdict.state == "not supported"]
    if not good:
        return "reference, on cuda: no kernel passed its test"
    if len(good) + len(absent) < len(found.verdicts):
        failed = [op for op in found.verdicts if op not in good and op not in absent]
        return f"reference, on cuda: {', '.join(failed)} did not pass"
    if absent:
        return f"triton+torch, on cuda: all {len(good)} kernels for this GPU passed; torch multiplies and attends"
    return f"triton, on cuda: all {len(good)} kernels passed their tests"


def can_run(found: Installation) -> bool:
    """Even if slowly."""
    return found.torch is not None and not found.torch.error


def uses_kernels(found: Installation) -> bool:
    """Whether there is Triton, and a GPU that it could run them on."""
    return _on_nvidia(found) and found.triton is not None and not any(_torch_problems(found))


def _on_nvidia(found: Installation) -> bool:
    return found.torch is not None and found.torch.device == "cuda" and found.torch.cuda is not None


def _torch_problems(found: Installation) -> Iterator[Problem]:
    torch, driver = found.torch, found.driver
    if torch is None:
        yield Problem("torch is not installed, nothing can run", _install_torch(found))
    elif torch.error and found.system == "win32" and ("WinError 126" in torch.error or "WinError 1114" in torch.error):
        redistributable = "winget install --id Microsoft.VCRedist.2015+.x64"
        yield Problem(f"torch lacks a library of Microsoft's Visual C++ ({torch.error})", redistributable)
    elif torch.error:
        yield Problem(f"torch cannot be imported ({torch.error})", _install_torch(found))
    elif driver is not None and driver.cards and torch.device != "cuda":
        yield Problem(_why_unseen(torch, driver), _remedy_unseen(found, torch, driver))
    elif torch.device == "cuda" and driver is not None and driver.cards and not _has_code(torch, driver):
        card = f"{driver.cards[0].name} ({_dotted(driver.cards[0].capability)})"
        yield Problem(f"torch {torch.version} has no code for the {card}", _install_torch(found))


def _why_unseen(torch: Torch, driver: Driver) -> str:
    card = driver.cards[0].name
    if torch.cuda is None:
        return f"{card} is not used, torch {torch.version} is a build for CPUs"
    if _major(torch.cuda) > driver.cuda[0]:
        runs = f"driver {driver.version} runs CUDA {_dotted(driver.cuda)}"
        return f"{card} is not used, torch {torch.version} is built for CUDA {torch.cuda} and {runs}"
    return f"{card} is not used, torch {torch.version} does not see it"


def _remedy_unseen(found: Installation, torch: Torch, driver: Driver) -> str:
    if torch.cuda is None or _major(torch.cuda) > driver.cuda[0]:
        return _install_torch(found)
    if found.visible_devices is not None:
        in_cmd, in_powershell = "set CUDA_VISIBLE_DEVICES=", "Remove-Item Env:CUDA_VISIBLE_DEVICES"
        return f"{in_cmd} (in PowerShell {in_powershell})" if found.system == "win32" else "unset CUDA_VISIBLE_DEVICES"
    return f"restart the machine, and if that does not help install the driver again, {_DRIVERS}"


def _install_torch(found: Installation) -> str:
    """The pip command for the build of torch that runs here. The version stays as it is: others may need it."""
    pip, driver = _pip(found), found.driver
    if found.torch and found.torch.error:
        pip += " --force-reinstall"
    version = found.torch.version.partition("+")[0] if found.torch else ""
    if found.system == "darwin":
        return f"{pip} torch"
    if driver is None or not driver.cards:
        return f"{pip} torch --index-url {_WHEELS}/cpu"
    build = _build(driver, _numbers(version) if version else (2, 14))
    if build is None:
        return f"update the driver ({driver.version} runs CUDA {_dotted(driver.cuda)}), {_DRIVERS}, and run this again"
    # "+cu130" because pip takes an installed 2.13.0+cpu for 2.13.0, and would leave it there.
    wanted = f"torch=={version}+{build}" if version else "torch"
    return f"{pip} {wanted} --index-url {_WHEELS}/{build}"


def _build(driver: Driver, torch: tuple[int, ...]) -> str | None:
    """Of _BUILDS, the first that driver and card run and that this version of torch has."""
    capability = driver.cards[0].capability
    for name, cuda, oldest, newest, last in _BUILDS:
        if driver.cuda[0] >= cuda and oldest <= capability <= newest and torch <= last:
            return name
    return None


def _has_code(torch: Torch, driver: Driver) -> bool:
    """The architectures of a build: sm_ is machine code, compute_ is compiled by the driver for anything newer."""
    major, minor = driver.cards[0].capability
    for architecture in torch.architectures:
        kind, _, digits = architecture.partition("_")
        number = int("".join(char for char in digits if char.isdecimal()) or 0)
        if kind == "compute" and number <= 10 * major + minor:
            return True
        if kind == "sm" and number // 10 == major and number % 10 <= minor:
            return True
    return not torch.architectures  # ROCm, or a build that does not say


def _loops_problems(found: Installation) -> Iterator[Problem]:
    if found.loops_obstacle:
        what = f"nothing can be quantized, and CPUs draw more slowly: {found.loops_obstacle}"
        imported = "import" not in found.loops_obstacle
        yield Problem(what, "unset it" if imported else f"{_pip(found)} --force-reinstall numba")


def _kernel_problems(found: Installation) -> Iterator[Problem]:
    if not _on_nvidia(found):
        return
    if found.driver and found.driver.cards and found.driver.cards[0].capability < _TRITON_NEEDS:
        return  # there is nothing to gain
    if found.triton is None:
        package = "triton-windows" if found.system == "win32" else "triton"
        yield Problem("Triton is not installed, kernels cannot run", f'{_pip(found)} "{package}>=3.6"')
        return
    failed = {op: verdict for op, verdict in found.verdicts.items() if verdict.state in _FAILED}
    uncompiled = [op for op, verdict in failed.items() if verdict.state == "cannot compile"]
    lacks = [] if found.system == "win32" else [not found.compiler, not found.headers]
    if uncompiled and any(lacks):
        named = zip(("a C compiler", "Python's headers"), lacks, strict=True)
        things = " and ".join(name for name, lack in named if lack)
        yield Problem(f"Triton lacks {things}, {len(uncompiled)} kernels cannot be compiled", _install_tools(found))
        failed = {op: verdict for op, verdict in failed.items() if op not in uncompiled}
    for verdict in dict.fromkeys(failed.values()):
        ops = ", ".join(op for op, other in failed.items() if other == verdict)
        yield Problem(f"{ops}: {verdict.state} ({verdict.reason})", _FAILED[verdict.state])


_FAILED = {
    "wrong": "torch computes instead; please report this line",
    "crashed": "torch computes instead; please report this line",
    "cannot compile": "torch computes instead; please report this line",
    "not tested": "close what else uses the GPU, and run this again",
}


def _install_tools(found: Installation) -> str:
    if found.package_manager not in _PACKAGES:
        return "install gcc and the development files of Python"
    install, compiler, headers = _PACKAGES[found.package_manager]
    minor = ".".join(found.python.split(".")[:2])
    wanted = [*([] if found.compiler else [compiler]), *([] if found.headers else [headers.format(minor)])]
    return f"{install} {' '.join(wanted)}"


def _pip(found: Installation) -> str:
    """Of the Python that runs this. A path with spaces needs different quotes in each shell."""
    return f"{'python' if ' ' in found.executable else found.executable} -m pip install"


def _numbers(version: str) -> tuple[int, ...]:
    """(2, 13) of 2.13.0."""
    return tuple(int("".join(filter(str.isdecimal, part)) or 0) for part in version.split(".")[:2])


def _major(version: str) -> int:
    return _numbers(version)[0]


def _dotted(numbers: tuple[int, int]) -> str:
    return f"{numbers[0]}.{numbers[1]}"

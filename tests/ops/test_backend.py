"""auto falls back, an explicit choice works or says why not, and nothing needs Triton to be imported."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from zimage_kernels import _triton

KERNELS = Path(__file__).parents[2] / "kernels"
CODE = """
import sys
sys.modules.update({hidden})
import torch, zimage_kernels as kernels

x, scale = torch.ones(2, 64, dtype=torch.int8), torch.ones(2)
for backend in ("auto", "reference"):
    assert (kernels.linear_int8(x, scale, x, scale, backend=backend) == 64).all()
try:
    kernels.linear_int8(x, scale, x, scale, backend="triton")
except ValueError as error:
    print(error)
if "triton" in sys.modules:
    print(kernels.triton_obstacle(torch.device("cuda")))
"""


@pytest.mark.slow  # a process for each
@pytest.mark.parametrize("hidden", [{"triton": None, "triton.language": None}, {}], ids=["absent", "no GPU"])
def test_a_kernel_that_cannot_run(hidden: dict[str, None]) -> None:
    """Only for a GPU does it matter whether Triton is there."""
    if not hidden:
        pytest.importorskip("triton")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", CODE.format(hidden=hidden)],
        capture_output=True,
        text=True,
        env=environment | {"PYTHONPATH": str(KERNELS)},
    )
    expected = ["backend triton: got tensors on cpu, expected cuda", *(["Triton is not installed"] if hidden else [])]
    assert done.stdout.splitlines() == expected, done.stderr


def test_a_device_is_asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Python's share of a launch is what small models wait for."""
    asked: list[torch.device] = []

    def ask(device: torch.device) -> tuple[int, int]:
        asked.append(device)
        return (8, 6 + (device.index or 0))

    monkeypatch.setattr(_triton, "interpreted", lambda: False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", ask)
    devices = [torch.device("cuda", index) for index in (0, 1, 0, 1)]
    assert [_triton.capability(device) for device in devices] == [86, 87, 86, 87]
    assert asked == devices[:2]


def test_an_interrupt_waits_until_triton_is_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    """Raised while Triton's C++ calls Python, it aborted the process."""
    imported: list[str] = []

    def importing(name: str) -> ModuleType:
        signal.raise_signal(signal.SIGINT)
        imported.append(name)
        return ModuleType(name)

    monkeypatch.setattr(_triton.importlib, "import_module", importing)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a test run in the background may ignore it
    try:
        with pytest.raises(KeyboardInterrupt):
            _triton.load.__wrapped__()
        assert imported == ["triton"]
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)

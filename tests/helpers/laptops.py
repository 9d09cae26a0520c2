"""Machines that are not here, as `zimage-lite doctor` would find them."""

from __future__ import annotations

from dataclasses import replace

from zimage_lite.doctor.installation import Installation, Torch
from zimage_lite.doctor.nvidia import Card, Driver
from zimage_lite.doctor.selftest.checks import CHECKS
from zimage_lite.doctor.selftest.process import Verdict

ALL_OK = dict.fromkeys(CHECKS, Verdict("ok"))


def driver(cuda: tuple[int, int] = (13, 0), capability: tuple[int, int] = (8, 6), version: str = "581.57") -> Driver:
    return Driver(version, cuda, (Card("NVIDIA GeForce RTX 3060 Laptop GPU", capability, 6 * 2**30, 5 * 2**30),))


LAPTOP = Installation(
    system="linux",
    python="3.12.4",
    executable="/home/me/venv/bin/python",
    torch=Torch("2.13.0+cu130", "13.0", "cuda", ("sm_75", "sm_80", "sm_86", "sm_120")),
    driver=driver(),
    visible_devices=None,
    triton="3.7.1",
    compiler="/usr/bin/gcc",
    headers=True,
    package_manager="apt-get",
    ram_bytes=16_000_000_000,
    ram_free_bytes=12_000_000_000,
    cache="/home/me/.cache/zimage-lite",
    cache_bytes=1_000_000,
    verdicts=ALL_OK,
)
CPU_TORCH = Torch("2.13.0+cpu", None, "cpu")
WINDOWS = replace(LAPTOP, system="win32", executable=r"C:\venv\Scripts\python.exe", compiler=None, package_manager=None)

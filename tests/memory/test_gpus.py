"""The table of GPUs: found by what people call them."""

from __future__ import annotations

import pytest
from plans import GB

from zimage_lite.errors import UserError
from zimage_lite.memory.gpus import GPUS, find_gpu, gpu_with


@pytest.mark.parametrize(
    ("text", "name"),
    [("RTX 3060 Laptop", "RTX 3060 Laptop 6GB"), ("3060 laptop 6gb", "RTX 3060 Laptop 6GB"),
     ("NVIDIA GeForce RTX 3060 Laptop GPU", "RTX 3060 Laptop 6GB"), ("rtx3060", "RTX 3060 12GB"),
     ("GeForce RTX 4070Ti (12 GB)", "RTX 4070 Ti 12GB"), ("3050 mobile 4 GB", "RTX 3050 Laptop 4GB"),
     ("NVIDIA H200 141GB", "H200 141GB"), ("NVIDIA H100 80GB HBM3", "H100 80GB"), ("4090", "RTX 4090 24GB"),
     ("NVIDIA GeForce RTX 2060 with Max-Q Design", "RTX 2060 Laptop 6GB")],
)  # fmt: skip
def test_gpus_are_found(text: str, name: str) -> None:
    assert find_gpu(text).name == name


@pytest.mark.parametrize(
    ("text", "near"),
    [("3050 laptop", "RTX 3050 Laptop 4GB, RTX 3050 Laptop 6GB"), ("RTX 4070", "RTX 4070 Laptop 8GB, RTX 4070 Ti 12GB"),
     ("Voodoo 2", "RTX 2060 Laptop 6GB"), ("", "H200 141GB"), ("RTX 4061", "RTX 4060 Laptop 8GB")],
)  # fmt: skip
def test_unknown_gpus_list_near_ones(text: str, near: str) -> None:
    with pytest.raises(UserError, match=near):
        find_gpu(text)


def test_gpu_with() -> None:
    assert gpu_with(6 * GB).name == "GTX 1660 Ti Laptop 6GB"
    assert gpu_with(7 * GB).vram_gib == 8 and gpu_with(10**15) is GPUS[-1]

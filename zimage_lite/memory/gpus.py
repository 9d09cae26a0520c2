"""The GPUs that can be planned for, whether or not one of them is here: rates, memory and link of each.

Sources and assumptions, so that a surprising prediction can be traced:

- Rates are dense peaks: SMs x clock x operations per clock (int8 2048, 16 bits with 32-bit sums 512 on GeForce from
  RTX 20 on), at the lowest and at the highest power limit that the maker allows. A desktop card has one. Measured
  16-bit products reached 84-116 % of these values on real laptops.
- GTX 16 has no matrix units: its int8 rate is that of dp4a at full speed, its 16-bit rate that of plain float32.
- Links: PCIe 3.0 x16 and 4.0 x8 carry 12.5 GB/s from pinned memory, 4.0 x16 and 5.0 x8 25 GB/s (measured on others'
  machines), 5.0 x16 50 GB/s (assumed). Many laptops wire fewer lanes than the chip has, and then every copy takes twice
  as long.
- Clocks of GTX 1660 Ti, RTX 3070 and the power range of RTX 4070 and 5070 (all laptops), RTX 4060 Ti, RTX 4070 Ti,
  H100 and H200 are from specifications that were not looked up again; some lists give the RTX 5050 Laptop 224 GB/s
  instead of 384.
"""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass

from ..errors import UserError

_LINK_GBPS = {"3.0 x16": 12.5, "4.0 x8": 12.5, "4.0 x16": 25.0, "5.0 x8": 25.0, "5.0 x16": 50.0}


@dataclass(frozen=True)
class Gpu:
    """Two numbers: at the lowest and at the highest power limit. fp16_sums: how much faster 16-bit products are when
    their sums are 16-bit, too."""

    name: str
    vram_gib: int
    capability: tuple[int, int]
    tflops16: tuple[float, float]
    tops8: tuple[float, float]
    memory_gbps: float
    watts: tuple[int, int]
    pcie: str
    fp16_sums: float = 2.0  # where attention takes them: config.FLOAT16_SUMS

    @property
    def vram_bytes(self) -> int:
        return self.vram_gib * 2**30

    @property
    def link_gbps(self) -> float:
        """From pinned memory, as far as it can be expected."""
        return _LINK_GBPS[self.pcie]


GPUS = (
    Gpu("RTX 2060 Laptop 6GB", 6, (7, 5), (15.4, 24.0), (61.7, 95.8), 336, (65, 115), "3.0 x16"),
    Gpu("GTX 1660 Ti Laptop 6GB", 6, (7, 5), (4.5, 4.9), (17.9, 19.5), 288, (60, 80), "3.0 x16"),
    Gpu("RTX 3050 Laptop 4GB", 4, (8, 6), (8.7, 14.3), (34.6, 57.0), 192, (35, 80), "4.0 x8"),
    Gpu("RTX 3050 Laptop 6GB", 6, (8, 6), (10.1, 15.3), (40.6, 61.1), 144, (35, 80), "4.0 x8"),
    Gpu("RTX 3060 Laptop 6GB", 6, (8, 6), (20.8, 26.1), (83.4, 104.6), 336, (60, 115), "4.0 x16"),
    Gpu("RTX 3070 Laptop 8GB", 8, (8, 6), (26.4, 33.2), (105.7, 132.7), 448, (80, 125), "4.0 x16"),
    Gpu("RTX 4050 Laptop 6GB", 6, (8, 9), (16.4, 24.3), (65.5, 97.1), 192, (35, 115), "4.0 x8"),
    Gpu("RTX 4060 Laptop 8GB", 8, (8, 9), (18.7, 29.1), (74.7, 116.5), 256, (35, 115), "4.0 x8"),
    Gpu("RTX 4070 Laptop 8GB", 8, (8, 9), (22.7, 40.1), (90.7, 160.4), 256, (35, 115), "4.0 x8"),
    Gpu("RTX 5050 Laptop 8GB", 8, (12, 0), (15.4, 27.3), (61.4, 109.0), 384, (35, 100), "5.0 x8"),
    Gpu("RTX 5060 Laptop 8GB", 8, (12, 0), (25.2, 33.2), (100.6, 133.0), 384, (45, 100), "5.0 x8"),
    Gpu("RTX 5070 Laptop 8GB", 8, (12, 0), (26.3, 43.3), (105.1, 173.0), 384, (50, 100), "5.0 x8"),
    Gpu("RTX 3060 12GB", 12, (8, 6), (25.5, 25.5), (101.9, 101.9), 360, (170, 170), "4.0 x16"),
    Gpu("RTX 3090 24GB", 24, (8, 6), (71.2, 71.2), (284.7, 284.7), 936, (350, 350), "4.0 x16"),
    Gpu("RTX 4070 Ti 12GB", 12, (8, 9), (80.2, 80.2), (320.7, 320.7), 504, (285, 285), "4.0 x16"),
    Gpu("RTX 4060 Ti 16GB", 16, (8, 9), (44.1, 44.1), (176.5, 176.5), 288, (165, 165), "4.0 x8"),
    Gpu("RTX 4090 24GB", 24, (8, 9), (165.2, 165.2), (660.6, 660.6), 1008, (450, 450), "4.0 x16"),
    Gpu("H100 80GB", 80, (9, 0), (989.0, 989.0), (1979.0, 1979.0), 3350, (700, 700), "5.0 x16", 1.0),
    Gpu("H200 141GB", 141, (9, 0), (989.0, 989.0), (1979.0, 1979.0), 4800, (700, 700), "5.0 x16", 1.0),
)

_NO_MATRIX_UNITS = r"GTX 16|MX[45]50|\bT\d{3,4}\b"  # of compute capability 7.5: TU116 and TU117
_NOISE = {
    *("nvidia", "geforce", "gpu", "rtx", "gtx", "the", "with", "graphics", "card", "design"),
    *("sxm", "gddr6", "gddr7", "hbm3", "hbm3e"),
}
_SPELLINGS = {"mobile": "laptop", "notebook": "laptop", "l": "laptop", "lap": "laptop", "max-q": "laptop"}


def find_gpu(name: str) -> Gpu:
    """The GPU that is meant by "RTX 3060 Laptop", "3060 laptop 6gb" or what the driver calls it. Raises UserError.

    The memory may be left out where there is only one kind; "Ti" and "Laptop" may not: they are other chips.
    """
    wanted = _words(name)
    fits = [gpu for gpu in GPUS if wanted and wanted <= _words(gpu.name) <= wanted | {f"{gpu.vram_gib}gb"}]
    if len(fits) == 1:
        return fits[0]
    near = [gpu.name for gpu in fits or _near(name)]
    raise UserError(
        f"--gpu {name}: " + ("which one?" if fits else "not in the table"),
        expected="one of " + ", ".join(near or [gpu.name for gpu in GPUS]),
        fix="or give --vram alone",
    )


def gpu_of(name: str, vram_gib: int, capability: tuple[int, int], units: int, clock_ghz: float, gbps: float) -> Gpu:
    """One that is not in the table, from what its driver says. units: streaming multiprocessors."""
    ops8, share16 = _ops_per_clock(name, capability)
    tops = units * clock_ghz * ops8 / 1000
    tflops, sums = tops / share16, share16 / 2
    return Gpu(name, vram_gib, capability, (tflops, tflops), (tops, tops), gbps, (0, 0), "4.0 x8", sums)


def _ops_per_clock(name: str, capability: tuple[int, int]) -> tuple[int, int]:
    """-> int8 operations per clock of a multiprocessor, and how many times the rate of 16-bit products with 32-bit sums
    that is: 4 on GeForce, 2 on the cards of data centers."""
    if capability[0] in (9, 10, 11):
        return 8192, 2
    if capability == (8, 0):
        return 4096, 2
    if capability == (7, 5) and re.search(_NO_MATRIX_UNITS, name):
        return 512, 4  # dp4a, and plain float32
    return 2048, 4


def gpu_with(vram_bytes: int) -> Gpu:
    """The slowest GPU of the smallest memory that offers so much; the last one if none does."""
    enough = [gpu for gpu in GPUS if gpu.vram_bytes >= vram_bytes] or [GPUS[-1]]
    return min(enough, key=lambda gpu: (gpu.vram_gib, gpu.tops8[0]))


def _words(name: str) -> set[str]:
    """ "GeForce RTX 3060Ti (6 GB)" -> {"3060", "ti", "6gb"}"""
    text = re.sub(r"(\d+)\s*(?:gib|gb|g)\b", r" \1gb ", name.lower().replace("max-q", "laptop"))
    text = re.sub(r"(\d{4})(ti|super|m|l)\b", r"\1 \2", re.sub(r"([rg]tx)(\d)", r"\1 \2", text))
    return {_SPELLINGS.get(word, word) for word in re.findall(r"[a-z0-9]+", text)} - _NOISE


def _near(name: str) -> list[Gpu]:
    """Those of the same number, else those of similar names."""
    numbers = {word for word in _words(name) if word[:4].isdecimal() and len(word) >= 4}
    same = [gpu for gpu in GPUS if numbers & _words(gpu.name)]
    names = {" ".join(sorted(_words(gpu.name))): gpu for gpu in GPUS}
    close = difflib.get_close_matches(" ".join(sorted(_words(name))), list(names), n=3, cutoff=0.4)
    return same or [names[text] for text in close]

"""Makes tests/golden/ggml_quants.npz: what ggml's own quantizers give for a set of awkward rows, and
ggml_quants_imatrix.npz: the same with an importance matrix.

    python tools/golden_ggml.py PATH_TO_LIBGGML_BASE.so

The inputs are not stored: `inputs` makes them anew from raw PCG64 words, by operations that round the same everywhere.
"""

from __future__ import annotations

import ctypes
import sys
import zlib
from pathlib import Path

import numpy as np

GOLDEN = Path(__file__).parent.parent / "tests" / "golden" / "ggml_quants.npz"
WEIGHTED = GOLDEN.with_name("ggml_quants_imatrix.npz")
COLUMNS = 768
# ggml's number, elements and bytes per block
TYPES = {
    "q5_0": (6, 32, 22), "q5_1": (7, 32, 24),
    "q2_k": (10, 256, 84), "q3_k": (11, 256, 110), "q4_k": (12, 256, 144), "q5_k": (13, 256, 176),
    "q6_k": (14, 256, 210), "iq4_nl": (20, 32, 18), "iq4_xs": (23, 256, 136),
}  # fmt: skip


# With an importance matrix q4_0, q4_1 and q8_0 are of interest, too, which else gguf-py can write.
WEIGHTED_TYPES = {**TYPES, "q4_0": (2, 32, 18), "q4_1": (3, 32, 20), "q8_0": (8, 32, 34)}


def importance() -> np.ndarray:
    """[COLUMNS] float32: of sizes from 2^-6 to 2^6."""
    bits = np.random.PCG64(16).random_raw(2 * COLUMNS)
    sizes, parts = (bits[:COLUMNS] % np.uint64(13)).astype(np.int32) - 6, (bits[COLUMNS:] >> np.uint64(11)) * 2.0**-53
    return (2.0**sizes * (0.5 + parts)).astype(np.float32)


def inputs() -> dict[str, np.ndarray]:
    """Case -> [COLUMNS] float32."""
    bits = np.random.PCG64(15)

    def uniform(*shape: int) -> np.ndarray:
        return ((bits.random_raw(int(np.prod(shape, dtype=int))) >> np.uint64(11)) * 2.0**-53).reshape(shape)

    def normal() -> np.ndarray:
        return uniform(12, COLUMNS).sum(0) - 6

    signs = np.where(uniform(COLUMNS) < 0.5, -1.0, 1.0)
    position = np.arange(COLUMNS)
    cases = {
        "normal": 0.02 * normal(),
        "heavy tails": 0.02 * normal() / np.sqrt(uniform(COLUMNS)),
        "heavier tails": 0.02 * normal() / uniform(COLUMNS),
        "uniform": uniform(COLUMNS) - 0.5,
        "positive": abs(normal()),
        "negative": -abs(normal()),
        "far from zero": 3 + 0.01 * normal(),
        "far below zero": -3 + 0.01 * normal(),
        "constant": np.full(COLUMNS, 0.37),
        "negative constant": np.full(COLUMNS, -0.37),
        "constant in sixteens": np.repeat(normal()[: COLUMNS // 16], 16),
        "sub-blocks of many sizes": normal() * 10.0 ** (position // 16 % 7 - 3),
        "super-blocks of many sizes": normal() * 10.0 ** (position // 256 * 3 - 3),
        "an outlier each": np.where(position % 256 == 77, 5.0, 0.01 * normal()),
        "sparse": np.where(uniform(COLUMNS) < 0.1, normal(), 0.0),
        "one of all": np.where(position % 256 == 200, -3.0, 0.0),
        "+m or -m": 0.3 * signs,
        "small integers": np.floor(uniform(COLUMNS) * 16) - 8,
        "halves": (np.floor(uniform(COLUMNS) * 63) - 31) / 2,
        "some sub-blocks zero": np.where(position // 16 % 3 == 0, 0.0, normal()),
        "scales below float16's normal": 1e-6 * normal(),
        "scales round to zero": 1e-8 * normal(),
        "about 1e-15": 1e-15 * normal(),
        "tiny": 1e-30 * normal(),
        "large": 3e4 * normal(),
        "zeros": np.zeros(COLUMNS),
        "minus zeros": -np.zeros(COLUMNS),
    }
    return {name: row.astype(np.float32) for name, row in cases.items()}


def checksum(rows: dict[str, np.ndarray]) -> int:
    return zlib.crc32(b"".join(row.tobytes() for row in rows.values()))


def main(library: str) -> None:
    ggml = ctypes.CDLL(library, mode=ctypes.RTLD_GLOBAL)
    ggml.ggml_quantize_chunk.restype = ctypes.c_size_t
    ggml.ggml_quantize_chunk.argtypes = (
        [ctypes.c_int] + [ctypes.c_void_p] * 2 + [ctypes.c_int64] * 3 + [ctypes.c_void_p]
    )
    for path, types, weights in ((GOLDEN, TYPES, None), (WEIGHTED, WEIGHTED_TYPES, importance())):
        golden = quantized(ggml, types, weights)
        np.savez_compressed(path, **golden)
        print(f"{path}: {path.stat().st_size / 1000:.0f} kB")


def quantized(
    ggml: ctypes.CDLL, types: dict[str, tuple[int, int, int]], weights: np.ndarray | None
) -> dict[str, np.ndarray]:
    rows = inputs()
    x, golden = np.stack(list(rows.values())), {"checksum": np.uint32(checksum(rows))}
    told = None if weights is None else weights.ctypes.data
    for name, (number, block, block_bytes) in types.items():
        out = np.zeros((len(x), COLUMNS // block * block_bytes), np.uint8)
        written = ggml.ggml_quantize_chunk(number, x.ctypes.data, out.ctypes.data, 0, *x.shape, told)
        assert written == out.nbytes, f"{name}: ggml wrote {written} bytes, expected {out.nbytes}"
        golden[name] = out
    return golden


if __name__ == "__main__":
    main(sys.argv[1])

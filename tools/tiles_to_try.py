"""The short list of tools/tune_kernels.py: what is worth its time, for long inputs.

Chosen by what compiles without spills (Triton 3.9.0), by how many blocks share a multiprocessor, and by how often a
tile reads x and W again. On 9.0 `wgmma` wants long K and one product in the loop, everywhere else two
(kernels/README.md says why).
"""

from __future__ import annotations

# op -> the module that holds its variants
OPS = {
    "linear_int8": "linear_int8",
    "swiglu_int8": "swiglu_int8",
    "attention_int8": "attention",
    "attention": "attention",
}

_LINEAR = ("BLOCK_M", "BLOCK_N", "BLOCK_K", "DOTS", "num_warps", "num_stages")
_SWIGLU = ("BLOCK_M", "BLOCK_N", "BLOCK_K", "num_warps", "num_stages")
_ATTENTION = ("BLOCK_M", "BLOCK_N", "num_warps", "num_stages")

_PRODUCTS = {
    "linear_int8": (
        (128, 128, 32, 2, 8, 4), (128, 128, 32, 2, 8, 3), (128, 128, 64, 2, 8, 3), (128, 256, 32, 2, 8, 3),
        (256, 128, 32, 2, 8, 3), (64, 256, 32, 2, 8, 4), (64, 128, 64, 2, 4, 3), (128, 64, 64, 2, 4, 3),
        (128, 128, 32, 2, 4, 4),
    ),
    "swiglu_int8": (
        (128, 64, 32, 8, 5), (128, 64, 32, 8, 3), (128, 64, 64, 8, 3), (64, 128, 64, 8, 3), (256, 64, 32, 8, 4),
        (128, 128, 32, 8, 3), (64, 64, 64, 4, 3), (64, 64, 64, 4, 4), (128, 32, 64, 4, 4),
    ),
}  # fmt: skip
_HOPPERS = {
    "linear_int8": (
        (128, 128, 128, 1, 8, 3), (128, 128, 64, 1, 8, 4), (128, 128, 64, 1, 8, 5), (128, 256, 128, 1, 8, 3),
        (128, 256, 64, 1, 8, 4), (256, 128, 64, 1, 8, 4), (128, 128, 128, 1, 4, 3), (64, 256, 128, 1, 4, 3),
        (64, 128, 128, 1, 4, 4),
    ),
    "swiglu_int8": (
        (128, 64, 128, 8, 3), (128, 64, 64, 8, 4), (128, 64, 64, 8, 5), (128, 128, 128, 8, 3), (128, 128, 64, 8, 4),
        (256, 64, 64, 8, 4), (128, 64, 128, 4, 3), (64, 128, 128, 4, 3), (64, 64, 128, 4, 4),
    ),
}  # fmt: skip
_ATTENTIONS = (
    (128, 64, 8, 3), (128, 64, 8, 2), (128, 64, 8, 4), (128, 32, 8, 3), (128, 32, 8, 4), (64, 32, 4, 3),
)  # fmt: skip


def short_list(op: str, arch: int) -> list[dict[str, int]]:
    """Tiles for the last bucket of the op, most of them able to run there."""
    if op.startswith("attention"):
        return [dict(zip(_ATTENTION, values, strict=True)) for values in _ATTENTIONS]
    names = _LINEAR if op == "linear_int8" else _SWIGLU
    tiles = (_HOPPERS if arch == 90 else _PRODUCTS)[op]
    return [dict(zip(names, values, strict=True)) | {"GROUP_M": 8} for values in tiles]

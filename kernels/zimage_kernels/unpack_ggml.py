"""ggml's blocks, decoded in registers: one function for each type, in the layouts of ggml-quants.c.

Every function takes the address of a row's blocks, [blocks, 1, 1], and returns their elements as float32,
[blocks, sub-blocks, elements]. `s` and `i` count sub-blocks and their elements. Types with 32 elements have no
sub-blocks. Bytes hold codes of several elements and are read once for each; the second time from the cache.
"""

from __future__ import annotations

from ._triton import jit, tl

# type -> (elements of a block, bytes of a block)
GGML_BLOCKS = {
    "q8_0": (32, 34), "q4_0": (32, 18), "q4_1": (32, 20), "q5_0": (32, 22), "q5_1": (32, 24), "iq4_nl": (32, 18),
    "q2_k": (256, 84), "q3_k": (256, 110), "q4_k": (256, 144), "q5_k": (256, 176), "q6_k": (256, 210),
    "iq4_xs": (256, 136),
}  # fmt: skip

# What the codes of iq4_nl and iq4_xs mean.
IQ4_LEVELS = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)


@jit
def unpack_ggml(base: tl.tensor, levels_ptr: tl.tensor, KIND: tl.constexpr) -> tl.tensor:
    if KIND == "q8_0":
        return _q8_0(base)
    elif KIND == "q4_0":
        return (_nibble(base + 2) - 8) * _half(base)
    elif KIND == "q4_1":
        return _nibble(base + 4) * _half(base) + _half(base + 2)
    elif KIND == "q5_0":
        return (_nibble(base + 6) + 16 * _fifth(base + 2) - 16) * _half(base)
    elif KIND == "q5_1":
        return (_nibble(base + 8) + 16 * _fifth(base + 4)) * _half(base) + _half(base + 2)
    elif KIND == "iq4_nl":
        return tl.load(levels_ptr + _nibble(base + 2)) * _half(base)
    elif KIND == "q2_k":
        return _q2_k(base)
    elif KIND == "q3_k":
        return _q3_k(base)
    elif KIND == "q4_k":
        return _q4_k(base)
    elif KIND == "q5_k":
        return _q5_k(base)
    elif KIND == "q6_k":
        return _q6_k(base)
    else:
        return _iq4_xs(base, levels_ptr)


@jit
def _indices(SUBBLOCKS: tl.constexpr, ELEMENTS: tl.constexpr) -> tuple[tl.tensor, tl.tensor]:
    return tl.arange(0, SUBBLOCKS)[None, :, None], tl.arange(0, ELEMENTS)[None, None, :]


@jit
def _byte(address: tl.tensor) -> tl.tensor:
    return tl.load(address).to(tl.int32)


@jit
def _half(address: tl.tensor) -> tl.tensor:
    return tl.load(address.to(tl.pointer_type(tl.float16))).to(tl.float32)


@jit
def _q8_0(base: tl.tensor) -> tl.tensor:
    _, i = _indices(1, 32)
    return tl.load((base + 2 + i).to(tl.pointer_type(tl.int8))).to(tl.float32) * _half(base)


@jit
def _nibble(base: tl.tensor) -> tl.tensor:
    """32 codes in 16 bytes: the low nibbles first, then the high ones."""
    _, i = _indices(1, 32)
    return (_byte(base + i % 16) >> (4 * (i // 16))) & 15


@jit
def _fifth(base: tl.tensor) -> tl.tensor:
    """Bit i of 32."""
    _, i = _indices(1, 32)
    return (_byte(base + i // 8) >> (i % 8)) & 1


@jit
def _q2_k(base: tl.tensor) -> tl.tensor:
    s, i = _indices(16, 16)
    code = _two_bits(base + 16, s, i)
    scale = _byte(base + s)
    return _half(base + 80) * (scale & 15) * code - _half(base + 82) * (scale >> 4)


@jit
def _two_bits(base: tl.tensor, s: tl.tensor, i: tl.tensor) -> tl.tensor:
    """256 codes in 64 bytes. 32 bytes hold 128: bits 0-1 the first 32 of them, bits 2-3 the next, and so on."""
    return (_byte(base + s // 8 * 32 + s % 2 * 16 + i) >> (s % 8 // 2 * 2)) & 3


@jit
def _q3_k(base: tl.tensor) -> tl.tensor:
    """A third bit for each code, one plane of 32 bytes: bit g belongs to elements 32 g to 32 g + 31."""
    s, i = _indices(16, 16)
    high = (_byte(base + s % 2 * 16 + i) >> (s // 2)) & 1
    code = _two_bits(base + 32, s, i) + 4 * high - 4
    low = (_byte(base + 96 + s % 8) >> (4 * (s // 8))) & 15
    scale = (low | ((_byte(base + 104 + s % 4) >> (2 * (s // 4))) & 3) << 4) - 32
    return _half(base + 108) * scale * code


@jit
def _q4_k(base: tl.tensor) -> tl.tensor:
    s, i = _indices(8, 32)
    code = (_byte(base + 16 + s // 2 * 32 + i) >> (4 * (s % 2))) & 15
    scale, minimum = _six_bits(base + 4, s)
    return _half(base) * scale * code - _half(base + 2) * minimum


@jit
def _q5_k(base: tl.tensor) -> tl.tensor:
    s, i = _indices(8, 32)
    code = (_byte(base + 48 + s // 2 * 32 + i) >> (4 * (s % 2))) & 15
    code += ((_byte(base + 16 + i) >> s) & 1) << 4
    scale, minimum = _six_bits(base + 4, s)
    return _half(base) * scale * code - _half(base + 2) * minimum


@jit
def _six_bits(base: tl.tensor, s: tl.tensor) -> tuple[tl.tensor, tl.tensor]:
    """Eight scales and eight minima in 12 bytes. The last four of each are the nibbles of the last four bytes, and the
    upper two bits of the first eight."""
    first, second, third = _byte(base + s % 4), _byte(base + 4 + s % 4), _byte(base + 8 + s % 4)
    scale = tl.where(s < 4, first & 63, (third & 15) | (first >> 6 << 4))
    minimum = tl.where(s < 4, second & 63, (third >> 4) | (second >> 6 << 4))
    return scale, minimum


@jit
def _q6_k(base: tl.tensor) -> tl.tensor:
    """Of each 128 codes: low nibbles of the first 64, high ones of the others; the upper two bits as in q2_k."""
    s, i = _indices(16, 16)
    low = (_byte(base + s // 8 * 64 + s % 4 * 16 + i) >> (s % 8 // 4 * 4)) & 15
    code = (low | (_two_bits(base + 128, s, i) << 4)) - 32
    scale = tl.load((base + 192 + s).to(tl.pointer_type(tl.int8)))
    return _half(base + 208) * scale * code


@jit
def _iq4_xs(base: tl.tensor, levels_ptr: tl.tensor) -> tl.tensor:
    s, i = _indices(8, 32)
    code = (_byte(base + 8 + s * 16 + i % 16) >> (4 * (i // 16))) & 15
    low = (_byte(base + 4 + s // 2) >> (4 * (s % 2))) & 15
    scale = (low | ((_byte(base + 2 + s // 4) >> (2 * (s % 4))) & 3) << 4) - 32
    return _half(base) * scale * tl.load(levels_ptr + code)

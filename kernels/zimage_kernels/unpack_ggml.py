"""ggml's blocks, decoded in registers, in the layouts of ggml-quants.c: codes, times a scale, plus an offset in some.

A thread holds 16 neighbours, or twice that, which have one scale in every type. So codes are read for each element of a
row, in order, and scales for each 16: nothing has to change its thread afterwards, neither for the rotation nor to be
stored. Bytes hold codes of several elements and are read once for each; the second time from the cache.
`at` is the address of an element's block and `i` its place in the row: in `i % 32` Triton sees which bytes are
neighbours, and loads them at once, but not in `i % 256 % 32`. `first` is the block of each 16, `s` which 16 of it.
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
def unpack_ggml(
    row_ptr: tl.tensor, levels_ptr: tl.tensor, columns: tl.tensor,
    KIND: tl.constexpr, ELEMENTS: tl.constexpr, BYTES: tl.constexpr, SIZE: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """A row, [SIZE] float32, zero beyond its columns."""
    i, part = tl.arange(0, SIZE), tl.arange(0, SIZE // 16)
    at, inside = row_ptr + i // ELEMENTS * BYTES, i < columns
    first, s, there = row_ptr + part // (ELEMENTS // 16) * BYTES, part % (ELEMENTS // 16), part * 16 < columns
    code = _codes(at, i, inside, KIND)
    if KIND == "q5_0":
        code += 16 * _fifth(first + 2, i, s, there) - 16
    elif KIND == "q5_1":
        code += 16 * _fifth(first + 4, i, s, there)
    elif KIND == "iq4_nl" or KIND == "iq4_xs":
        code = tl.load(levels_ptr + code)
    x = code * _spread(_scale(first, s, there, KIND))
    if KIND == "q4_1" or KIND == "q5_1" or KIND == "q2_k" or KIND == "q4_k" or KIND == "q5_k":
        x += _spread(_offset(first, s, there, KIND))
    return x


@jit
def _codes(at: tl.tensor, i: tl.tensor, inside: tl.tensor, KIND: tl.constexpr) -> tl.tensor:
    """Integers; of iq4 the numbers of levels."""
    if KIND == "q8_0":
        return _signed(at + 2 + i % 32, inside)
    elif KIND == "q4_0":
        return _nibble(at + 2, i, inside) - 8
    elif KIND == "q4_1":
        return _nibble(at + 4, i, inside)
    elif KIND == "q5_0":
        return _nibble(at + 6, i, inside)
    elif KIND == "q5_1":
        return _nibble(at + 8, i, inside)
    elif KIND == "iq4_nl":
        return _nibble(at + 2, i, inside)
    elif KIND == "q2_k":
        return _two_bits(at + 16, i, inside)
    elif KIND == "q3_k":  # a third bit for each, one plane of 32 bytes: bit g belongs to elements 32 g to 32 g + 31
        return _two_bits(at + 32, i, inside) + 4 * ((_byte(at + i % 32, inside) >> (i // 32 % 8)) & 1) - 4
    elif KIND == "q4_k":
        return (_byte(at + 16 + i // 64 % 4 * 32 + i % 32, inside) >> (i // 32 % 2 * 4)) & 15
    elif KIND == "q5_k":
        fourth = (_byte(at + 48 + i // 64 % 4 * 32 + i % 32, inside) >> (i // 32 % 2 * 4)) & 15
        return fourth + (((_byte(at + 16 + i % 32, inside) >> (i // 32 % 8)) & 1) << 4)
    elif KIND == "q6_k":  # of each 128: low nibbles of the first 64, high ones of the others; the upper bits as in q2_k
        low = (_byte(at + i // 128 % 2 * 64 + i % 64, inside) >> (i // 64 % 2 * 4)) & 15
        return (low | (_two_bits(at + 128, i, inside) << 4)) - 32
    else:
        return _nibble(at + 8 + i // 32 % 8 * 16, i, inside)


@jit
def _scale(first: tl.tensor, s: tl.tensor, there: tl.tensor, KIND: tl.constexpr) -> tl.tensor:
    if KIND == "q2_k":
        return _half(first + 80, there) * (_byte(first + s, there) & 15)
    elif KIND == "q3_k":
        low = (_byte(first + 96 + s % 8, there) >> (4 * (s // 8))) & 15
        high = (_byte(first + 104 + s % 4, there) >> (2 * (s // 4))) & 3
        return _half(first + 108, there) * ((low | high << 4) - 32)
    elif KIND == "q4_k" or KIND == "q5_k":
        return _half(first, there) * _six_bits(first + 4, s // 2, there, False)
    elif KIND == "q6_k":
        return _half(first + 208, there) * _signed(first + 192 + s, there)
    elif KIND == "iq4_xs":
        low = (_byte(first + 4 + s // 4, there) >> (4 * (s // 2 % 2))) & 15
        high = (_byte(first + 2 + s // 8, there) >> (2 * (s // 2 % 4))) & 3
        return _half(first, there) * ((low | high << 4) - 32)
    else:
        return _half(first, there)


@jit
def _offset(first: tl.tensor, s: tl.tensor, there: tl.tensor, KIND: tl.constexpr) -> tl.tensor:
    if KIND == "q2_k":
        return -_half(first + 82, there) * (_byte(first + s, there) >> 4)
    elif KIND == "q4_k" or KIND == "q5_k":
        return -_half(first + 2, there) * _six_bits(first + 4, s // 2, there, True)
    else:
        return _half(first + 2, there)


@jit
def _byte(address: tl.tensor, inside: tl.tensor) -> tl.tensor:
    return tl.load(address, mask=inside, other=0).to(tl.int32)


@jit
def _signed(address: tl.tensor, inside: tl.tensor) -> tl.tensor:
    return _byte(address.to(tl.pointer_type(tl.int8)), inside)


@jit
def _half(address: tl.tensor, inside: tl.tensor) -> tl.tensor:
    return tl.load(address.to(tl.pointer_type(tl.float16)), mask=inside, other=0).to(tl.float32)


@jit
def _nibble(at: tl.tensor, i: tl.tensor, inside: tl.tensor) -> tl.tensor:
    """32 codes in 16 bytes: the low nibbles first, then the high ones."""
    return (_byte(at + i % 16, inside) >> (i // 16 % 2 * 4)) & 15


@jit
def _two_bits(at: tl.tensor, i: tl.tensor, inside: tl.tensor) -> tl.tensor:
    """256 codes in 64 bytes. 32 bytes hold 128: bits 0-1 the first 32 of them, bits 2-3 the next, and so on."""
    return (_byte(at + i // 128 % 2 * 32 + i % 32, inside) >> (i // 32 % 4 * 2)) & 3


@jit
def _fifth(first: tl.tensor, i: tl.tensor, s: tl.tensor, there: tl.tensor) -> tl.tensor:
    """One bit of 32."""
    bits = _byte((first + 2 * s).to(tl.pointer_type(tl.uint16)), there)
    return (_spread(bits) >> (i % 16)) & 1


@jit
def _six_bits(first: tl.tensor, run: tl.tensor, there: tl.tensor, MINIMUM: tl.constexpr) -> tl.tensor:
    """Eight scales and eight minima in 12 bytes. The last four of each are the nibbles of the last four bytes, and the
    upper two bits of the first eight."""
    early = _byte(first + 4 * MINIMUM + run % 4, there)
    late = _byte(first + 8 + run % 4, there)
    nibble = late >> 4 if MINIMUM else late & 15
    return tl.where(run < 4, early & 63, nibble | (early >> 6 << 4))


@jit
def _spread(parts: tl.tensor) -> tl.tensor:
    """Each for its 16 elements."""
    SIZE: tl.constexpr = parts.shape[0]
    return tl.reshape(tl.broadcast_to(parts[:, None], (SIZE, 16)), (SIZE * 16,))

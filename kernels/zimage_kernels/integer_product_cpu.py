# mypy: allow-untyped-defs
"""x w^T of 8-bit codes, compiled for CPUs without 8-bit units: 1.6 to 1.7 times as fast as float32 with AVX2 (a Zen 3).

Codes are widened to 16 bits, of which one instruction multiplies 16 and adds up neighbours to eight sums of 32 bits:
twice as many products as a float32 instruction has, and exact for all codes. The loops are those of every fast product:
a micro-kernel holds 6 x 16 sums in registers; its operands are packed in the order in which it reads them, 16 outputs
x DEPTH columns for the first cache, ROWS x DEPTH for the second. Threads take tiles of ROWS x OUTPUTS sums.

The two inner loops are written in LLVM's own language, for numba vectorises neither. It holds no instruction of one
processor: LLVM finds `vpmaddwd` in "widen, multiply, add even and odd". Elsewhere the result is the same, but slow.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
import torch.nn.functional as F
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.errors import NumbaError
from numba.extending import intrinsic
from torch import Tensor

from ._numba import compiled, in_threads

_STEP = 16  # columns: codes that are packed at once
_MICRO_ROWS, _MICRO_OUTPUTS = 6, 16
_DEPTH, _ROWS, _OUTPUTS = 768, 192, 256  # 24 KB and 288 KB of packed operands

_I8, _I16, _I32, _I64 = (ir.IntType(bits) for bits in (8, 16, 32, 64))
_CODES, _PAIRS, _SUMS = ir.VectorType(_I8, 16), ir.VectorType(_I16, 16), ir.VectorType(_I32, 8)
_PRODUCTS = ir.VectorType(_I32, 16)


def _place(builder, array, at, kind):
    """Pointer to element `at` of a flat array, as one to `kind`."""
    return builder.bitcast(builder.gep(array.data, [at]), kind.as_pointer())


def _load(builder, pointer, align=4):
    value = builder.load(pointer)
    value.align = align
    return value


def _spread(builder, pair):
    """The same two codes eight times."""
    one = builder.insert_element(ir.Constant(_SUMS, ir.Undefined), pair, _I32(0))
    return builder.bitcast(builder.shuffle_vector(one, one, ir.Constant(_SUMS, [0] * 8)), _PAIRS)


def _sums_of_pairs(builder, a, b):
    """What LLVM turns into `vpmaddwd`."""
    products = builder.mul(builder.sext(a, _PRODUCTS), builder.sext(b, _PRODUCTS))
    halves = [ir.Constant(_SUMS, list(range(first, 16, 2))) for first in (0, 1)]
    return builder.add(*(builder.shuffle_vector(products, products, half) for half in halves))


@intrinsic
def _transpose(typingctx, codes, starts, out, at, stride):
    """16 codes each of 8 rows -> out[at + pair * stride + row]: two neighbours, 16 bits each. codes: flat int8; starts:
    8 indices; out: flat int32."""

    def generate(context, builder, signature, args):
        source, target = (context.make_array(signature.args[i])(context, builder, args[i]) for i in (0, 2))
        rows = []
        for row in range(8):
            place = _place(builder, source, builder.extract_value(args[1], row), _CODES)
            rows.append(builder.bitcast(builder.sext(_load(builder, place, 1), _PAIRS), _SUMS))
        merges = [ir.Constant(_SUMS, [half + i // 2 + 8 * (i % 2) for i in range(8)]) for half in (0, 4)]
        for _ in range(3):  # merging the first half of the rows with the second, three times, transposes
            rows = [builder.shuffle_vector(rows[i], rows[i + 4], merge) for i in range(4) for merge in merges]
        for pair, row in enumerate(rows):
            index = builder.add(args[3], builder.mul(args[4], _I64(pair)))
            builder.store(row, _place(builder, target, index, _SUMS)).align = 4
        return context.get_dummy_value()

    return types.void(codes, starts, out, at, stride), generate


@intrinsic
def _multiply(typingctx, x, x_at, w, pairs, sums, at, stride, more):
    """6 x 16 sums over so many pairs of columns -> sums[at + row * stride + output]; more: added to what is there.
    x, w: packed by `_transpose`, x from x_at on; all flat int32."""

    def generate(context, builder, signature, args):
        x_array, w_array, out = (context.make_array(signature.args[i])(context, builder, args[i]) for i in (0, 2, 4))
        _, x_start, _, n_pairs, _, start, row_stride, more_than_zero = args
        tile = [(row, vector) for row in range(_MICRO_ROWS) for vector in range(_MICRO_OUTPUTS // 8)]
        places, totals = [], []
        for row, vector in tile:
            index = builder.add(builder.add(start, _I64(8 * vector)), builder.mul(row_stride, _I64(row)))
            places.append(_place(builder, out, index, _SUMS))
            totals.append(cgutils.alloca_once_value(builder, ir.Constant(_SUMS, None)))  # LLVM keeps it in a register
        with builder.if_then(more_than_zero):
            for place, total in zip(places, totals, strict=True):
                builder.store(_load(builder, place), total)
        with cgutils.for_range(builder, n_pairs) as loop:
            w_at = builder.mul(loop.index, _I64(_MICRO_OUTPUTS))
            outputs = [
                _load(builder, _place(builder, w_array, builder.add(w_at, _I64(first)), _PAIRS))
                for first in range(0, _MICRO_OUTPUTS, 8)
            ]
            pair_at = builder.add(x_start, builder.mul(loop.index, _I64(_MICRO_ROWS)))
            for (row, vector), total in zip(tile, totals, strict=True):
                pair = _load(builder, _place(builder, x_array, builder.add(pair_at, _I64(row)), _I32))
                product = _sums_of_pairs(builder, _spread(builder, pair), outputs[vector])
                builder.store(builder.add(builder.load(total), product), total)
        for place, total in zip(places, totals, strict=True):
            builder.store(builder.load(total), place).align = 4
        return context.get_dummy_value()

    return types.void(x, x_at, w, pairs, sums, at, stride, more), generate


@compiled
def _pack(codes, columns, first, last, start, stop, out, at, stride):
    """8 rows from `first` on, columns [start, stop), as `_transpose` says. Rows after the last are that one again."""
    rows = (
        min(first, last) * columns, min(first + 1, last) * columns, min(first + 2, last) * columns,
        min(first + 3, last) * columns, min(first + 4, last) * columns, min(first + 5, last) * columns,
        min(first + 6, last) * columns, min(first + 7, last) * columns,
    )  # fmt: skip
    for k in range(start, stop, _STEP):
        starts = (
            rows[0] + k, rows[1] + k, rows[2] + k, rows[3] + k, rows[4] + k, rows[5] + k, rows[6] + k, rows[7] + k,
        )  # fmt: skip
        _transpose(codes, starts, out, at, stride)
        at += _STEP // 2 * stride


@compiled
def _tile(x, w, columns, m_start, m_stop, n_start, n_stop, sums):
    """Rows [m_start, m_stop) and outputs [n_start, n_stop) of the product. x, w: flat; sums: [M, N] int32."""
    depth, panels = min(_DEPTH, columns), (m_stop - m_start + _MICRO_ROWS - 1) // _MICRO_ROWS
    x_pairs = np.empty(panels * _MICRO_ROWS * depth // 2 + 2, np.int32)  # 8 rows are written where 6 are kept
    w_pairs = np.empty(_MICRO_OUTPUTS * depth // 2, np.int32)
    edge = np.empty(_MICRO_ROWS * _MICRO_OUTPUTS, np.int32)
    flat, outputs = sums.reshape(-1), sums.shape[1]
    for k in range(0, columns, depth):
        k_stop = min(k + depth, columns)
        pairs = (k_stop - k) // 2
        for panel in range(panels):
            at = panel * _MICRO_ROWS
            _pack(x, columns, m_start + at, m_stop - 1, k, k_stop, x_pairs, at * pairs, _MICRO_ROWS)
        for n in range(n_start, n_stop, _MICRO_OUTPUTS):
            for half in (0, 8):
                _pack(w, columns, n + half, n_stop - 1, k, k_stop, w_pairs, half, _MICRO_OUTPUTS)
            for m in range(m_start, m_stop, _MICRO_ROWS):
                x_at = (m - m_start) * pairs
                if m + _MICRO_ROWS <= m_stop and n + _MICRO_OUTPUTS <= n_stop:
                    _multiply(x_pairs, x_at, w_pairs, pairs, flat, m * outputs + n, outputs, k > 0)
                    continue
                _multiply(x_pairs, x_at, w_pairs, pairs, edge, 0, _MICRO_OUTPUTS, False)
                for row in range(min(_MICRO_ROWS, m_stop - m)):
                    for output in range(min(_MICRO_OUTPUTS, n_stop - n)):
                        before = sums[m + row, n + output] if k > 0 else np.int32(0)
                        sums[m + row, n + output] = before + edge[row * _MICRO_OUTPUTS + output]


@compiled
def _scaled_tile(x, w, columns, m_start, m_stop, n_start, n_stop, sums, x_scale, w_scale, out):
    """The same, times the scales of its rows and outputs. out: [M, N] float32, in the memory of the sums."""
    _tile(x, w, columns, m_start, m_stop, n_start, n_stop, sums)
    row = np.empty(n_stop - n_start, np.int32)  # apart, or the vectoriser fears for what shares memory
    for m in range(m_start, m_stop):
        row[:] = sums[m, n_start:n_stop]
        scale = x_scale[m]
        for i in range(row.size):
            out[m, n_start + i] = np.float32(row[i]) * scale * w_scale[n_start + i]


def product(x: Tensor, w: Tensor) -> Tensor:
    """x: [M, K] int8, w: [N, K] int8 -> [M, N] int32."""
    sums = torch.empty(len(x), len(w), dtype=torch.int32)
    _in_tiles(x, w, lambda *tile: _tile(*tile, sums.numpy()))
    return sums


def scaled_product(x: Tensor, x_scale: Tensor, w: Tensor, w_scale: Tensor) -> Tensor:
    """The same, times x_scale: [M] and w_scale: [N], both float32 -> [M, N] float32."""
    y = torch.empty(len(x), len(w))
    sums, scales, out = y.view(torch.int32).numpy(), (x_scale.numpy(), w_scale.numpy()), y.numpy()
    _in_tiles(x, w, lambda *tile: _scaled_tile(*tile, sums, *scales, out))
    return y


def is_exact() -> bool:
    """Whether it can be compiled here, and holds the largest sums. A sum for each place of a micro-tile, and edges."""
    codes = torch.arange(-128, 128, dtype=torch.int8).repeat(40, 4)
    codes[0], codes[39] = -128, 127
    try:
        sums = product(codes[:8], codes)
    except NumbaError:
        return False
    return torch.equal(sums.double(), codes[:8].double() @ codes.double().T)


def _in_tiles(x, w, multiply):
    missing = -x.shape[1] % _STEP
    x, w = (F.pad(codes, (0, missing)) if missing else codes.contiguous() for codes in (x, w))
    operands = (x.view(-1).numpy(), w.view(-1).numpy(), x.shape[1])
    in_threads(multiply, [(*operands, *tile) for tile in _tiles(len(x), len(w))])


def _tiles(rows: int, outputs: int) -> Iterator[tuple[int, int, int, int]]:
    """All about as high, and each a whole number of micro-tiles but the last."""
    count = -(-rows // _ROWS)
    height = -(-rows // max(count, 1) // _MICRO_ROWS) * _MICRO_ROWS
    for n in range(0, outputs, _OUTPUTS):
        for m in range(0, rows, max(height, 1)):
            yield m, min(m + height, rows), n, min(n + _OUTPUTS, outputs)

"""What the CPU alone costs: memory that its heap keeps, and the time that unpacking takes there.

Measured at full size on 2 threads of a Zen 4 (benchmarks/budgets.py).
"""

from __future__ import annotations

from collections.abc import Iterable

from ..convert.catalog import Part
from ..memory.heap import HIGHEST_BYTES
from .footprint import is_reencoded

# Beside what is alive: of activations, of what unpacking a piece takes, and of a decoder's maps, of which those above
# 32 MB are mapped on their own. Peaks of the same run vary by 150 MB; meant never to be too low.
_ACTIVATION_HOLES, _UNPACKING_HOLES, _MAP_HOLES, _MOST_MAP_HOLES = 1.0, 2, 0.4, 100_000_000
# Measured by a training of the true width (2 threads of a Sapphire Rapids): 0.6 and 0.75 times the graph at 256x256 and
# 384x384; nothing at 512x512, where the widest pieces are mapped on their own.
_GRAPH_HOLES = 0.85
# Unpacking a weight takes as long as so many operations of a float32 product: 0.8 ns in q8_0, 1.6 to 2.5 ns in q4_k_m.
# Below 8 bits codes are picked out of bytes, and scales out of scales.
_UNPACKING_FLOPS = {"16 bits": 40, "8 bits": 150, "fewer": 400}
# Making int8 of it after that: 2.3 ns on one thread of a Zen 3.
_REENCODING_FLOPS = 170
# Nothing is fused: of a block's element-wise work each token takes 115 to 160 us where the width is 3840, as long as so
# many operations for each of its elements.
ELEMENTWISE_FLOPS = 5600


def holes(activations: int, unpacking: int) -> dict[str, int]:
    """Bytes, as a term of a plan."""
    return {"holes in the heap": round(_ACTIVATION_HOLES * activations + _UNPACKING_HOLES * unpacking)}


def holes_of_graph(n_bytes: int, widest: int) -> int:
    """Bytes that a graph for gradients leaves beside those. Most likely because glibc looks for aligned memory as if it
    were larger, so that a hole does not take the piece again that it is of. n_bytes: of the graph; widest: of its
    largest piece."""
    return round(_GRAPH_HOLES * n_bytes) if widest < HIGHEST_BYTES else 0


def holes_of_maps(n_bytes: int) -> dict[str, int]:
    """The same while the VAE decodes. n_bytes: of its maps."""
    return {"holes in the heap": round(min(_MAP_HOLES * n_bytes, _MOST_MAP_HOLES))}


def cpu_unpacking_flops(parts: Iterable[Part], int8: bool = False) -> int:
    """Of all matrices, once. int8: those in int8 are multiplied as they are."""
    wanted = (part for part in parts if part.rows > 1 and not (int8 and part.format.name == "int8"))
    return sum(_unpacking_flops(part) * part.rows * part.columns for part in wanted)


def reencoding_flops(parts: Iterable[Part]) -> int:
    """Of making int8 of all matrices of other integers."""
    wanted = (part for part in parts if part.rows > 1 and is_reencoded(part.format))
    return sum((_unpacking_flops(part) + _REENCODING_FLOPS) * part.rows * part.columns for part in wanted)


def _unpacking_flops(part: Part) -> int:
    """Of each weight."""
    if not part.format.lossy:
        return 0 if part.format.dtype == "F32" else _UNPACKING_FLOPS["16 bits"]
    return _UNPACKING_FLOPS["8 bits" if part.n_bytes >= part.rows * part.columns else "fewer"]

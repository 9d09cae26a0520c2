"""What the CPU alone costs: memory that its heap keeps, and the time that unpacking takes there.

Measured at full size on 2 threads of a Zen 4 (benchmarks/budgets.py).
"""

from __future__ import annotations

from collections.abc import Iterable

from .catalog import Part

# Beside what is alive: of activations, of what unpacking a piece takes, and of a decoder's maps, of which those above
# 32 MB are mapped on their own. Peaks of the same run vary by 150 MB; meant never to be too low.
_ACTIVATION_HOLES, _UNPACKING_HOLES, _MAP_HOLES, _MOST_MAP_HOLES = 0.6, 5, 0.3, 80_000_000
# Unpacking a weight takes as long as so many operations of a float32 product: 0.8 ns in q8_0, 1.6 to 2.5 ns in q4_k_m.
# Below 8 bits codes are picked out of bytes, and scales out of scales.
_UNPACKING_FLOPS, _UNPACKING_FLOPS_OF_FEW_BITS = 150, 400


def holes(activations: int, unpacking: int) -> dict[str, int]:
    """Bytes, as a term of a plan."""
    return {"holes in the heap": round(_ACTIVATION_HOLES * activations + _UNPACKING_HOLES * unpacking)}


def holes_of_maps(n_bytes: int) -> dict[str, int]:
    """The same while the VAE decodes. n_bytes: of its maps."""
    return {"holes in the heap": round(min(_MAP_HOLES * n_bytes, _MOST_MAP_HOLES))}


def cpu_unpacking_flops(parts: Iterable[Part]) -> int:
    """Of all matrices, once."""

    def per_weight(part: Part) -> int:
        if not part.format.lossy:
            return 0
        return _UNPACKING_FLOPS if part.n_bytes >= part.rows * part.columns else _UNPACKING_FLOPS_OF_FEW_BITS

    return sum(per_weight(part) * part.rows * part.columns for part in parts if part.rows > 1)

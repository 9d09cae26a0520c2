"""Tiles: chosen once per architecture, written in `tuning/sm_<arch>.json`, looked up at launch.

Nothing is tuned at run time: one compilation per op and bucket, the same on every machine. A file maps each op to a
list of buckets, ascending in `up_to` (rows of the problem; the last has none). The rest of a bucket goes to the kernel
as it is: its constexprs by name, and num_warps and num_stages.
`tools/compile_kernels.py` compiles every tile and refuses those that spill or exceed the shared memory;
`tools/tune_kernels.py` times what is left on a GPU and writes the file.
"""

from __future__ import annotations

import json
from functools import cache
from importlib.resources import files
from typing import Any

import torch

from ._triton import capability

ARCHITECTURES = (75, 80, 86, 89, 90, 120)
Tile = dict[str, int]


@cache
def load(arch: int) -> dict[str, list[dict[str, Any]]]:
    """The file of that compute capability: {op: [{"up_to": rows or None, ...}, ...]}."""
    text = (files("zimage_kernels") / "tuning" / f"sm_{arch}.json").read_text(encoding="utf-8")
    return json.loads(text)


@cache
def nearest(arch: int) -> int:
    """The architecture whose file serves this one: itself, or the next older."""
    known = [known for known in ARCHITECTURES if known <= arch]
    if not known:
        raise ValueError(f"compute capability: got {arch}, expected at least {ARCHITECTURES[0]}")
    return known[-1]


def tiles(op: str, arch: int) -> list[Tile]:
    """Every tile of the op on that architecture, without repeats; none where the op does not run."""
    found: list[Tile] = []
    for bucket in load(arch).get(op, []):
        tile = {name: value for name, value in bucket.items() if name != "up_to"}
        if tile not in found:
            found.append(tile)
    return found


@cache
def choose(op: str, rows: int, arch: int) -> Tile:
    """The tile for a problem of that many rows."""
    for bucket in load(nearest(arch))[op]:
        if bucket["up_to"] is None or rows <= bucket["up_to"]:
            return {name: value for name, value in bucket.items() if name != "up_to"}
    raise AssertionError(f"{op}: the last bucket of sm_{arch}.json has a bound")


def tile(op: str, rows: int, device: torch.device) -> Tile:
    """`choose` for the device that runs it."""
    return choose(op, rows, capability(device))

"""A file beside a quantized transformer that takes back part of what quantizing makes wrong: of each linear the update
of low rank that repairs most of what comes out, as a LoRA.

The transformer is as good without it, and as large. That is why it is of what is left over by the quantizer: were it
taken off the weights before, as SVDQuant does (arXiv 2411.05007), it would repair more, and nobody could do without it.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from ..calibration.known import Calibration
from ..checkpoint.output import replacing, require_absent
from ..checkpoint.safetensors import encode_header
from ..checkpoint.stored import StoredTensor
from ..checkpoint.writer import TensorWriter, open_new
from ..config import REPAIR_RANK
from ..errors import UserError
from ..quant.low_rank import low_rank
from .output_file import OutTensor

_FACTORS = ("lora_A", "lora_B")  # down and up
_DTYPE = "BF16"


@dataclass
class Repair:
    """The file to write, where it is until all is done, and its rank. errors: of each linear, of the mean square of
    what comes out, that which is wrong without it and with it; filled as it is written."""

    out: Path
    partial: Path
    rank: int
    errors: list[tuple[float, float]] = field(default_factory=list)

    def told(self) -> str:
        shares = [1 - after / before for before, after in self.errors if before]
        repaired = f"{100 * sum(shares) / max(len(shares), 1):.0f} %"
        return f"{self.out}: repairs {repaired} of what is wrong in what {len(self.errors)} linears give"


@contextmanager
def repairing(out: Path | None, rank: int | None, calibrated: bool, overwrite: bool) -> Iterator[Repair | None]:
    """What takes its name in the end, whole, or leaves nothing; None if it is not asked for. Raises UserError.

    rank: None for `REPAIR_RANK`."""
    if out is None:
        if rank is not None:
            raise UserError("--repair-rank is that of the LoRA of --repair", fix="add --repair FILE")
        yield None
        return
    if not calibrated:
        raise UserError("--repair weighs errors by what weights are multiplied by", fix="add --calibration STATS")
    if out.suffix != ".safetensors":
        raise UserError("--repair", got=str(out), expected="a name that ends in .safetensors")
    if out.is_dir():
        raise UserError(f"{out} is a folder", fix="name the file to write with --repair")
    require_absent(out, overwrite, "--repair")
    with replacing(out, "--repair") as partial:
        yield Repair(out, partial, REPAIR_RANK if rank is None else rank)


class RepairWriter:
    """Takes what tensors are off by as they are quantized, and writes what repairs them as each is complete."""

    def __init__(self, writer: TensorWriter, places: dict[str, int], calibration: Calibration, repair: Repair) -> None:
        self.writer, self.places, self.calibration, self.repair = writer, places, calibration, repair
        self._gaps: dict[str, Tensor] = {}  # bfloat16
        self._left: dict[str, int] = {}  # rows that are still to come
        self._lock = threading.Lock()

    def wants(self, tensor: OutTensor) -> bool:
        return any(_name(member, _FACTORS[0]) in self.places for member in tensor.members)

    def add(self, tensor: OutTensor, first_row: int, gap: Tensor) -> None:
        """gap: some rows of it, float32. Several threads call this at once."""
        with self._lock:
            if tensor.name not in self._gaps:
                self._gaps[tensor.name] = torch.empty(tensor.rows, tensor.columns, dtype=torch.bfloat16)
                self._left[tensor.name] = tensor.rows
            whole = self._gaps[tensor.name]
        whole[first_row : first_row + len(gap)] = gap
        with self._lock:
            self._left[tensor.name] -= len(gap)

    def finish(self, tensor: OutTensor) -> None:
        """Write what repairs it, if all of its rows are there. For whoever has added some and kept none."""
        with self._lock:
            if self._left.get(tensor.name) != 0:
                return
            del self._left[tensor.name]
            whole = self._gaps.pop(tensor.name)
        first = 0
        for member in tensor.members:
            self._write(member, whole[first : first + member.rows])
            first += member.rows

    def _write(self, member: StoredTensor, gap: Tensor) -> None:
        inputs = self.calibration.inputs(member.name)
        assert inputs is not None, "it was planned"
        found = low_rank(gap, inputs, self.repair.rank)
        for factor, part in zip(_FACTORS, (found.down, found.up), strict=True):
            self.writer.write(self.places[_name(member, factor)], part.to(torch.bfloat16))
        self.repair.errors.append((found.before, found.after))


@contextmanager
def open_repair(
    repair: Repair | None, tensors: Iterable[OutTensor], calibration: Calibration | None
) -> Iterator[RepairWriter | None]:
    """tensors: that are quantized. Raises UserError if nothing is known of any."""
    if repair is None or calibration is None:
        yield None
        return
    members = [member for tensor in tensors for member in tensor.members if calibration.inputs_known(member.name)]
    if not members:
        raise UserError(f"{repair.out}: there is nothing to repair", got="no tensor that is quantized")
    arrays = []
    for member in members:
        rank = min(repair.rank, member.rows, member.columns)
        for factor, shape in zip(_FACTORS, ((rank, member.columns), (member.rows, rank)), strict=True):
            arrays.append((_name(member, factor), _DTYPE, shape))
    header, offsets = encode_header(arrays, {"format": "pt", "ss_base_model_version": "zimage"})
    places = {name: offset for (name, _, _), offset in zip(arrays, offsets, strict=True)}
    total = offsets[-1] + 2 * arrays[-1][2][0] * arrays[-1][2][1]
    with open_new(repair.partial, header, total) as writer:
        yield RepairWriter(writer, places, calibration, repair)


def _name(member: StoredTensor, factor: str) -> str:
    """As diffusers names it."""
    return f"transformer.{member.name.removesuffix('.weight')}.{factor}.weight"

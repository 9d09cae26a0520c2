"""Which kernels run, and in how many bits: what was asked for, and what is there."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass

import torch
from zimage_kernels import Backend, cpu_int8_is_faster, has_matrix_units, loops_obstacle, triton_obstacle

from ..checkpoint.model_files import ModelFiles
from ..config import RuntimeOptions
from ..errors import UserError
from ..model.compute import HEAD_DIM, Compute
from ..model.transformer import is_time_weight
from ..plan.footprint import by_block, is_reencoded
from ..plan.model_sizes import Model
from ..quant.formats import Format


@dataclass(frozen=True)
class Choice:
    """note: for people, what they might not expect. torch_multiplies: and attends, beside kernels without products.
    unpacks, projects: whether the kernels that unpack weights, and multiply codes by a LoRA's narrow half, can be
    trusted."""

    compute: Compute
    note: str | None = None
    torch_multiplies: bool = False
    unpacks: bool = True
    projects: bool = True

    @property
    def bits(self) -> str:
        """As --compute names them."""
        return "int8" if self.compute.int8 else "16bit"

    @property
    def backend(self) -> str:
        """What runs: as --backend names it, or both."""
        return "triton+torch" if self.torch_multiplies else self.compute.backend

    @property
    def projecting(self) -> Backend | None:
        """What multiplies by the narrow half of a LoRA; None: as all else."""
        return None if self.projects else "reference"

    @property
    def unpacking(self) -> Backend:
        """What unpacks the text encoder, which the CPU may compute beside a GPU with kernels."""
        return "auto" if self.compute.backend == "triton" and self.unpacks else "reference"


def choose_for(
    model: ModelFiles, sizes: Model, options: RuntimeOptions, device: torch.device, tell: Callable[[str], None]
) -> Choice:
    """For this model's transformer, as `choose`."""
    of_blocks, _ = by_block(part for part in sizes.transformer if part.rows > 1 and not is_time_weight(part.name))
    formats = {part.format for block in of_blocks.values() for part in block}
    return choose(options, device, model.transformer.config.head_dim, formats, tell)


def choose(
    options: RuntimeOptions,
    device: torch.device,
    head_dim: int,
    formats: Iterable[Format],
    tell: Callable[[str], None] = lambda line: None,
) -> Choice:
    """device: to compute on; formats: of the matrices in the transformer's blocks; tell: before a check that takes
    long. Raises UserError for what was asked for and cannot be.

    auto takes the kernels on a CUDA device that can run them and on which those that it needs have passed their
    self-test, and 8 bits where they run and a weight is quantized to integers; if only kernels for 8 bits failed, 16.
    On compute capability 7.5 those are the kernels without products: torch multiplies, in as many bits, and attends in
    16. auto never leaves the references on the CPU, where kernels could only be interpreted; 8 bits it takes there if
    they are faster than float32. Weights of other integers are then re-encoded while they are read: once where they
    stay, else in each step, which costs more than it saves only where most of them stream at 256x256 or less.
    """
    found, auto = set(formats), options.backend == "auto" and device.type == "cuda"
    obstacle = triton_obstacle(device)
    if obstacle is None and head_dim != HEAD_DIM:
        obstacle = f"got heads of {head_dim}, expected {HEAD_DIM}"
    if options.backend == "triton" and obstacle:
        raise UserError(f"--backend triton: {obstacle}", fix="use auto or reference")
    kernels = options.backend == "triton" or (auto and obstacle is None)
    int8, failed, note = _in_int8(options, kernels, device, found), dict[str, str](), None
    if kernels and auto:
        failed = _failed(device, tell)
        obstacle = _missed(needed(int8, found), failed)
        if obstacle and int8 and options.compute == "auto" and not _missed(needed(False, found), failed):
            int8, note, obstacle = False, f"no Triton kernels for 8 bits: {obstacle}; computing in 16 bits", None
        kernels = obstacle is None
    if not kernels:
        fell_back = f"the Triton kernels cannot run: {obstacle}; torch computes" if auto else None
        return Choice(Compute("reference", _in_int8(options, False, device, found)), fell_back)
    turing = not has_matrix_units(device)
    if turing and note is None:
        note = "Triton has no matrix units on this GPU: torch multiplies and attends, kernels do the rest"
    return Choice(Compute("triton", int8), note, turing, "dequantize" not in failed, "project_rows" not in failed)


def needed(int8: bool, formats: Collection[Format]) -> set[str]:
    """The ops of the self-test that blocks with weights of these formats take."""
    others = [format for format in formats if not (int8 and (format.name == "int8" or is_reencoded(format)))]
    ops = {"add_norm", "norm_rope"}
    if int8:
        ops |= {"quantize_rows", "linear_int8", "swiglu_int8", "attention_int8"}
        ops |= {"requantize"} if any(map(is_reencoded, formats)) else set()
    if others:
        ops.add("flash_attention")
        ops |= {"dequantize"} if any(format.lossy for format in formats) else set()
    return ops


def _failed(device: torch.device, tell: Callable[[str], None]) -> dict[str, str]:
    """op -> what the self-test says of it. One that does not run on such a GPU is not missed."""
    from ..doctor.selftest.verdicts import verdicts  # only where there is a GPU

    found = verdicts(device, tell=tell)
    bad = {op: verdict for op, verdict in found.items() if not verdict.trusted and verdict.state != "not supported"}
    return {op: f"{verdict.state} ({verdict.reason}); zimage-lite doctor tells more" for op, verdict in bad.items()}


def _missed(ops: set[str], failed: dict[str, str]) -> str | None:
    """The first of these that failed."""
    return next((f"{op}: {why}" for op, why in failed.items() if op in ops), None)


def _in_int8(options: RuntimeOptions, kernels: bool, device: torch.device, formats: set[Format]) -> bool:
    there = any(format.name == "int8" or is_reencoded(format) for format in formats)
    if options.compute == "16bit":
        return False
    obstacle = loops_obstacle() if not kernels and device.type == "cpu" and any(map(is_reencoded, formats)) else None
    if options.compute == "auto":
        return there and not obstacle and (kernels or (device.type == "cpu" and cpu_int8_is_faster()))
    if obstacle:
        raise UserError("--compute int8: compiled loops re-encode", got=obstacle, fix="mend it, or use --compute 16bit")
    if not kernels and device.type != "cpu":
        raise UserError(f"--compute int8 needs the Triton kernels on {device.type}", fix="use --compute 16bit")
    if not there:
        names = ", ".join(sorted(format.name for format in formats))
        raise UserError(
            "--compute int8", got=names, expected="weights quantized to integers", fix="use --compute 16bit"
        )
    return True

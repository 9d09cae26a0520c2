"""Which arrays of a file make up one tensor, and in which format: told by markers and keys, never by the file name."""

from __future__ import annotations

from collections.abc import Iterator

from ..errors import WrongModelError
from ..quant.formats import FORMATS, PLAIN_BY_DTYPE
from . import packed_comfy, packed_diffusers
from .container import TensorFile
from .stored import StoredTensor, single

_NUNCHAKU = (".qweight", ".proj_down", ".smooth_factor")


def stored_tensors(file: TensorFile) -> list[StoredTensor]:
    """All tensors of a file under their raw names, packed parts grouped."""
    if file.container == "gguf":
        return [single(entry, FORMATS[entry.kind]) for entry in file.entries.values()]
    if any(name.endswith(_NUNCHAKU) for name in file.entries):
        raise WrongModelError(
            f"{file.path}: a nunchaku (SVDQuant) file, packed for nunchaku's own kernels",
            fix="use it with nunchaku, or quantize the 16-bit model with --to int4, which runs here",
        )
    packed = list(_packed(file))
    taken = {entry.name for tensor in packed for entry in tensor.parts.values()}
    return [*packed, *_plain(file, taken)]


def _packed(file: TensorFile) -> Iterator[StoredTensor]:
    for recognise in (packed_comfy.tensors, packed_diffusers.tensors):
        yield from recognise(file)


def _plain(file: TensorFile, taken: set[str]) -> Iterator[StoredTensor]:
    for name, entry in file.entries.items():
        if name in taken or packed_comfy.is_companion(name) or packed_diffusers.is_companion(name):
            continue
        if ".weight_scale" in name:  # ignored, the weight would come out as if its scale were one
            raise WrongModelError(
                f"{file.path}: {name} scales a weight, and no .comfy_quant marker says in which format"
            )
        if entry.kind in PLAIN_BY_DTYPE:
            yield single(entry, PLAIN_BY_DTYPE[entry.kind])
        elif name.endswith(".weight"):
            raise WrongModelError(f"{file.path}: {name} is {entry.kind}, and nothing in the file says how to read it")
        # Other integer arrays are counters and flags, not weights.

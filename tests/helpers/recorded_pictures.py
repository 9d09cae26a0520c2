"""A script for test_compile.py: what whole pictures would compile on a GPU, recorded without one.

Arguments: compute capability, format. On the meta device the text encoder reads a prompt and the transformer takes one
step, at full size, for a picture and then for one of another size; before that the self-test runs as it would there.
Then a third picture, with a LoRA on every linear of the blocks. Prints as JSON: how many kernels the self-test
compiles, how many of them the first picture uses, what it compiles beside them, and the third does, what the second
adds, and what of them all is no variant of the compile tool.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator

import torch
from compile_kernels import variants
from recording import Compilation, identity, record
from torch import nn

from zimage_lite.convert.synthetic import open_synthetic
from zimage_lite.doctor.selftest import checks
from zimage_lite.doctor.selftest.agreement import prepared
from zimage_lite.model.compute import Compute
from zimage_lite.model.linear import Linear, bind
from zimage_lite.model.side_path import SidePath
from zimage_lite.model.text_encoder import TextEncoder
from zimage_lite.model.transformer import Modulation, Transformer
from zimage_lite.pipeline.reencoding import Scratch
from zimage_lite.pipeline.weights import Component

META, PROMPT_TOKENS = torch.device("meta"), 50
SIZES = ((1024, 1024), (832, 1216))


def run_checks(arch: int) -> None:
    """To the end, although what no kernel has written is wrong."""
    for name in ("worst", "rounded", "same_rows"):
        setattr(checks, name, lambda *_, **__: None)
    with prepared(torch.device("cpu")):
        for check, least in checks.CHECKS.values():
            if arch >= least:
                check(checks.compute_dtype(torch.device("cpu")))


def bound(component: Component, dtype: torch.dtype) -> Component:
    """With weights that have no bytes."""
    weights = {f"{name}.{own}": t for name, tensors in component.weights.items() for own, t in tensors.items()}
    for name, tensor in (weights | component.rest).items():
        packed = tensor.packed_in(torch.empty(tensor.packed_bytes, dtype=torch.uint8, device=META))
        bind(component.model, {name: packed}, dtype)
    return component


def draw(transformer: Component, encoder: Component, size: tuple[int, int], dtype: torch.dtype) -> None:
    model, config = transformer.model, transformer.model.config
    scratch = Scratch(transformer.stored, META)

    def passed(blocks: Iterable[nn.Module]) -> Iterator[nn.Module]:
        yield from blocks

    rows = torch.empty(PROMPT_TOKENS, encoder.model.config.hidden_size, dtype=dtype, device=META)
    features = encoder.model(rows, [PROMPT_TOKENS])
    stream = scratch.through(passed)
    captions = model.refine_captions(features, stream)
    vectors = [torch.empty(n, 4, config.dim, dtype=dtype, device=META) for n in (2, config.n_layers)]
    modulation = Modulation(*vectors, torch.empty(config.dim, dtype=dtype, device=META))
    latent = torch.empty(16, size[1] // 8, size[0] // 8, dtype=dtype, device=META)
    model([latent], captions, modulation, stream)


def adapt(model: nn.Module, dtype: torch.dtype) -> None:
    """A LoRA of the usual rank, for the next picture."""
    for name, module in model.named_modules():
        if isinstance(module, Linear) and name.startswith(("layers", "noise_refiner", "context_refiner")):
            rows, columns = module.weight.shape
            a, b = (torch.empty(shape, dtype=dtype, device=META) for shape in ((32, columns), (rows, 32)))
            module.side = SidePath(a, b)


def taken(recorded: set[Compilation]) -> set[Compilation]:
    found = set(recorded)
    recorded.clear()
    return found


arch, name = int(sys.argv[1]), sys.argv[2]
recorded = record(arch)
run_checks(arch)
checked = taken(recorded)
files, dtype = open_synthetic(f"synthetic:{name}"), torch.float16 if arch < 80 else torch.bfloat16
blocks = ("context_refiner", "noise_refiner", "layers")
skeleton = Transformer(files.transformer.config, Compute("triton", int8=True))
parts = (
    Component(skeleton, files.transformer, blocks),
    Component(TextEncoder(files.text_encoder.config, "triton"), files.text_encoder, ("layers",)),
)
with torch.inference_mode():
    pictures = []
    for size in SIZES:
        draw(bound(parts[0], dtype), bound(parts[1], dtype), size, dtype)
        pictures.append(taken(recorded))
    adapt(skeleton, dtype)
    draw(*parts, SIZES[0], dtype)
    adapted = taken(recorded)
counts = {"checked": len(checked), "used": len(pictures[0] & checked)}
known = {
    identity(v.kernel.__name__, v.signature, v.constexprs, v.aligned, v.num_warps, v.num_stages) for v in variants(arch)
}
lists = {
    "unchecked": pictures[0] - checked,
    "added": pictures[1] - pictures[0],
    "of_a_lora": adapted - checked,
    "unknown": (pictures[0] | adapted) - known,
}
print(json.dumps(counts | {key: sorted(map(str, found)) for key, found in lists.items()}))

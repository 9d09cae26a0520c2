"""Codecs of quanto's formats, against quanto. It computes in the model's dtype: its result is ours rounded to that."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from foreign_codecs import CODECS, as_bytes, as_stored, weights
from oracles import relative_error
from torch import Tensor

from zimage_lite.quant import quanto

QUANTO = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}


def quantize_with_quanto(x: Tensor, name: str) -> tuple[dict[str, Tensor], Tensor]:
    """What quanto saves of a layer, by full name, and the weight that it computes with.

    As the layer itself does, but without repacking for the CPU at hand, which costs some shifts their last bit.
    """
    from optimum import quanto as library  # seconds, which collecting the tests need not take

    linear = torch.nn.Linear(x.shape[1], x.shape[0], bias=False, dtype=x.dtype)
    layer = library.QLinear.from_module(linear, weights=library.qtypes[name])
    layer.weight.data, kind, group = x, layer.weight_qtype, layer.weight_group_size
    if kind.bits == 8:
        scales: Any = {"scale": layer.optimizer(x, qtype=kind, axis=0)}
    else:
        scales = dict(zip(("scale", "shift"), layer.optimizer(x, kind, axis=0, group_size=group), strict=True))
    weight = library.quantize_weight(x, kind, 0, group_size=group, optimized=False, **scales)
    saved: dict[str, Tensor] = {"input_scale": layer.input_scale, "output_scale": layer.output_scale}
    weight.save_to_state_dict(saved, "weight.", False)
    layer.freeze()
    assert {key: part.shape for key, part in layer.state_dict().items()} == {
        key: part.shape for key, part in saved.items()
    }
    return saved, weight.dequantize()


@pytest.mark.slow
@pytest.mark.usefixtures("quanto_without_a_compiler")
@pytest.mark.parametrize("dtype", list(QUANTO))
@pytest.mark.parametrize("name", list(quanto.CODECS))
@pytest.mark.parametrize("shape", [(64, 640), (48, 64), (33, 96), (20, 192), (3, 128)])  # the last: 3 groups, padded
def test_quanto(name: str, dtype: str, shape: tuple[int, int]) -> None:
    codec, x, model_dtype = CODECS[name], weights(*shape), QUANTO[dtype]
    saved, theirs = quantize_with_quanto(x.to(model_dtype), "qfloat8_e4m3fn" if name == "qfloat8" else name)
    options = {**codec.options(shape[1]), "dtype": dtype}
    stored = as_stored(codec, codec.quantize(x, options), shape, options)
    assert {codec.names.get(suffix, "weight" + suffix) for suffix in stored} == set(saved)
    for suffix, part in stored.items():
        expected = saved[codec.names.get(suffix, "weight" + suffix)]
        assert part.shape == expected.shape, suffix
        assert torch.equal(as_bytes(part), as_bytes(expected)), suffix
    assert torch.equal(codec.dequantize(stored, shape[1], options).to(model_dtype), theirs)

    best = codec.dequantize(codec.quantize(x, options, "best"), shape[1], options)
    assert relative_error(best, x) <= relative_error(theirs.float(), x) * 1.001

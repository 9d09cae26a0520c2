"""The true model's sizes with random weights, and figures that any way of computing with them has."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from eager import EagerInt8
from timing import Times, milliseconds
from torch import Tensor, nn

from zimage_lite.bench.ceilings import Ceilings
from zimage_lite.config import TransformerConfig
from zimage_lite.convert.synthetic import distribution
from zimage_lite.memory.machine import Work
from zimage_lite.model.linear import Linear, shapes
from zimage_lite.model.transformer import is_time_weight
from zimage_lite.quant.formats import FORMATS
from zimage_lite.quant.int8 import rotation_group
from zimage_lite.quant.tensor import QTensor

CONFIG = TransformerConfig()
DEVICE, DTYPE = "cuda", torch.bfloat16
LATENT, IMAGE_TOKENS, CAPTION_TOKENS = 128, 4096, 128  # of 1024x1024
OURS, OURS16 = "int8, kernels", "16-bit, kernels"
Weights = dict[str, QTensor]
PLAIN = {torch.bfloat16: FORMATS["bf16"], torch.float16: FORMATS["f16"], torch.float32: FORMATS["f32"]}


def random_weights(module: nn.Module) -> Weights:
    """As `quantize --to int8` would write them, of the usual size, on the GPU."""
    return {name: _random(name, shape) for name, shape in shapes(module).items()}


def _random(name: str, shape: tuple[int, ...]) -> QTensor:
    mean, deviation = distribution(name, shape)
    x = torch.randn(shape, device=DEVICE)
    if not is_of_block(name) or len(shape) < 2:
        return QTensor(PLAIN[DTYPE], shape, {"": x.mul_(deviation).add_(mean).to(DTYPE)})
    scale = torch.full((shape[0], 1), deviation / 40, device=DEVICE)
    parts = {"": x.mul_(40).round_().clamp_(-127, 127).char(), "_scale": scale}
    return QTensor(FORMATS["int8"], shape, parts, {"group": rotation_group(shape[1])})


def is_of_block(name: str) -> bool:
    return not is_time_weight(name) and {"attention", "feed_forward"} & set(name.split(".")) != set()


def unpacked(weights: Weights, dtype: torch.dtype) -> Weights:
    """The same in a plain format."""
    return {name: QTensor(PLAIN[dtype], w.shape, {"": w.dequantize(dtype)}) for name, w in weights.items()}


def weight_tensors(module: nn.Module) -> list[Tensor]:
    found = [parameter for parameter in module.parameters() if parameter.device.type != "meta"]
    for owner in module.modules():
        if isinstance(owner, Linear) and owner.packed is not None:
            found += owner.packed.parts.values()
        elif isinstance(owner, EagerInt8):
            found += [owner.codes, owner.scale]
    return found


def relative_error(got: Tensor, truth: Tensor) -> float:
    return float((got.float() - truth.float()).norm() / truth.float().norm())


def per_call(call: Callable[[], Any], calls: int = 1, rep: int = 400) -> Times:
    def all_calls() -> None:
        for _ in range(calls):
            call()

    low, middle, high = (one / calls for one in milliseconds(all_calls, rep))
    return low, middle, high


def cpu_ms(call: Callable[[], Any]) -> float:
    """Until Python has launched all of a call, the least of three: where that is about the time itself, it is measured
    and not the GPU."""
    found = []
    for _ in range(3):
        torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        found.append(1000 * (time.perf_counter() - start))
    torch.cuda.synchronize()
    return min(found)


def memory(call: Callable[[], Any], module: nn.Module) -> dict[str, int]:
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    weights_bytes = sum(tensor.nbytes for tensor in weight_tensors(module))
    return {"work_bytes": torch.cuda.max_memory_allocated() - before, "weights_bytes": weights_bytes}


def work(lengths: list[int], int8: bool) -> Work:
    """Of a block for each of these numbers of tokens."""
    weights = 4 * CONFIG.dim**2 + 3 * CONFIG.dim * CONFIG.ffn_dim
    return Work(2 * weights * sum(lengths), 4 * CONFIG.dim * sum(n**2 for n in lengths), int8=int8)


def limit_ms(lengths: list[int], rates: dict[str, Any], linears8: bool, attention8: bool) -> float:
    """The least that the products take, at the ceilings of `bench_linear_int8`. In 8 bits: linears; queries x keys."""
    limit = Ceilings("bf16", rates["bf16_tflops"], rates["int8_tops"], attention8)
    return 1000 * limit.seconds(work(lengths, linears8))

"""diffusers' ZImagePipeline in the settings that its documentation advises where memory is short
(optimization/memory.md, quantization/*.md), and as it is on the CPU. On CUDA the VAE decodes in tiles.

Every quantizer but GGUF's quantizes while the pipeline is loaded from 16 bits, the text encoder, too. GGUF files hold
the transformer alone; the text encoder beside it stays in 16 bits.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from harness import Case, Clock, Work, answer, class_of, drawn

from zimage_lite.bench.tiers import DONE, OOM
from zimage_lite.memory.machine import CUDA_CONTEXT_BYTES
from zimage_lite.memory.nvml import Nvml

_PEER = "diffusers"
_STREAM = {"use_stream": True, "non_blocking": True, "record_stream": True}

# Where weights are while nobody needs them -> what enable_group_offload is told, or nothing for the other ways.
PLACES: dict[str, dict[str, Any]] = {
    "model offload": {},
    "sequential offload": {},
    "group offload, blocks, stream": {"offload_type": "block_level", "num_blocks_per_group": 1, **_STREAM},
    "group offload, leaves, stream": {"offload_type": "leaf_level", **_STREAM},
    "group offload, leaves, stream, little RAM": {
        "offload_type": "leaf_level", **_STREAM, "low_cpu_mem_usage": True,
    },
}  # fmt: skip
_MODEL, _LEAVES = "model offload", "group offload, leaves, stream"

# Quantizers -> bits, what has to be installed, and where their documentation keeps the weights.
QUANTIZERS: dict[str, tuple[int, tuple[str, ...], tuple[str, ...]]] = {
    "bitsandbytes nf4": (4, ("bitsandbytes",), (_MODEL,)),
    "quanto int8": (8, ("optimum-quanto",), (_MODEL,)),
    "torchao int8, weights only": (8, ("torchao",), (_MODEL, "group offload, blocks, stream")),
    "torchao int8, activations too": (8, ("torchao",), (_MODEL, "group offload, blocks, stream")),
}


def cases(model: str | None, ggufs: Mapping[str, str], device: str) -> list[Case]:
    """model: a folder of 16-bit weights in diffusers' layout; ggufs: format -> file of a transformer, if any."""
    cuda = device == "cuda"
    found: list[tuple[str, int, dict[str, str]]] = []
    if cuda:
        found += [("bf16", 16, {"place": place}) for place in PLACES]
    else:
        found += [("bf16", 16, {}), ("float32", 32, {})]
    for name, file in (ggufs or {"q8_0": ""}).items():
        ways = [{"place": place} for place in (_MODEL, _LEAVES)] if cuda else [{}]
        found += [(f"GGUF {name}", class_of(name), {"gguf": file, **way}) for way in ways]
    if cuda:
        for name, (bits, _, places) in QUANTIZERS.items():
            found += [(name, bits, {"quantizer": name, "place": place}) for place in places]
    return [_case(name, bits, device, model, settings) for name, bits, settings in found]


def _case(name: str, bits: int, device: str, model: str | None, settings: Mapping[str, str]) -> Case:
    needs = ["diffusers", "transformers", "accelerate"]
    needs += ["gguf"] if "gguf" in settings else []
    needs += QUANTIZERS[name][1] if name in QUANTIZERS else ()
    told: dict[str, Any] = {"device": device, "model": model, "vae_tiling": device == "cuda", **settings}
    told["dtype"] = "float32" if bits == 32 else "bfloat16"
    if options := PLACES.get(settings.get("place", "")):
        told["group_offload"] = options
    lacks = None if model else "needs --model"
    if settings.get("gguf") == "":
        lacks = "needs --quantized"
    setting = ", ".join([name, *([settings["place"]] if "place" in settings else [])])
    return Case(_PEER, setting, bits, device, "with_diffusers.py", told, tuple(needs), lacks, beside=("torch",))


# --- In the process of a case


def measure(settings: dict[str, Any], work: Work) -> dict[str, Any]:
    import torch

    from zimage_lite.memory.failures import is_out_of_memory

    runs: list[dict[str, Any]] = []
    found: dict[str, Any] = {"outcome": DONE, "runs": runs}
    torch.set_num_threads(work.threads)
    try:
        if settings["device"] == "cuda" and work.vram_bytes:
            found["context_bytes"] = hold_to(work.vram_bytes)
        pipeline = loaded(settings)
        drawn(lambda: one_image(pipeline, work, settings["device"]), work, runs)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        found |= {"outcome": OOM, "reason": str(error).splitlines()[0]}
    if settings["device"] == "cuda":
        found["peak_vram_bytes"] = torch.cuda.max_memory_allocated()
    return found


def hold_to(vram_bytes: int) -> int:
    """Make the CUDA context and set a hard cap, as zimage_lite.bench.case does. -> the context's bytes."""
    import torch

    nvml = Nvml()
    before = nvml.used()
    torch.zeros(1, device="cuda")
    context = nvml.used() - before if nvml.works else CUDA_CONTEXT_BYTES
    total = torch.cuda.get_device_properties(0).total_memory
    room = vram_bytes - max(context, CUDA_CONTEXT_BYTES)
    torch.cuda.set_per_process_memory_fraction(min(room / total, 1.0), 0)
    return context


def loaded(settings: dict[str, Any]) -> Any:
    """The pipeline, its weights in their place."""
    import torch
    from diffusers import ZImagePipeline

    dtype = getattr(torch, settings["dtype"])
    more: dict[str, Any] = {}
    if "gguf" in settings:
        more["transformer"] = from_gguf(settings["gguf"], settings["model"], dtype)
    if "quantizer" in settings:
        more["quantization_config"] = quantization(settings["quantizer"], dtype)
    pipeline = ZImagePipeline.from_pretrained(settings["model"], torch_dtype=dtype, **more)
    pipeline.set_progress_bar_config(disable=True)
    if settings["vae_tiling"]:
        pipeline.vae.enable_tiling()
    if settings["device"] == "cuda":
        put(pipeline, settings)
    return pipeline


def from_gguf(file: str, model: str, dtype: Any) -> Any:
    from diffusers import GGUFQuantizationConfig, ZImageTransformer2DModel

    return ZImageTransformer2DModel.from_single_file(
        file, config=os.path.join(model, "transformer"), torch_dtype=dtype,
        quantization_config=GGUFQuantizationConfig(compute_dtype=dtype),
    )  # fmt: skip


def quantization(name: str, dtype: Any) -> Any:
    """For transformer and text encoder, which is transformers' own."""
    import diffusers
    import transformers
    from diffusers import PipelineQuantizationConfig

    def both(ours: Any, theirs: Any) -> Any:
        return PipelineQuantizationConfig(quant_mapping={"transformer": ours, "text_encoder": theirs})

    if name == "bitsandbytes nf4":
        options = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": dtype}
        return both(diffusers.BitsAndBytesConfig(**options), transformers.BitsAndBytesConfig(**options))
    if name == "quanto int8":
        return both(diffusers.QuantoConfig(weights_dtype="int8"), transformers.QuantoConfig(weights="int8"))
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, Int8WeightOnlyConfig

    kind = Int8WeightOnlyConfig if name.endswith("weights only") else Int8DynamicActivationInt8WeightConfig
    return both(diffusers.TorchAoConfig(kind()), transformers.TorchAoConfig(kind()))


def put(pipeline: Any, settings: dict[str, Any]) -> None:
    import torch

    if settings["place"] == "model offload":
        pipeline.enable_model_cpu_offload()
    elif settings["place"] == "sequential offload":
        pipeline.enable_sequential_cpu_offload()
    else:
        pipeline.enable_group_offload(
            onload_device=torch.device("cuda"), offload_device=torch.device("cpu"), **settings["group_offload"]
        )


def one_image(pipeline: Any, work: Work, device: str) -> list[float]:
    import torch

    clock = Clock()

    def ended(_pipeline: Any, _step: int, _time: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        if device == "cuda":
            torch.cuda.synchronize()
        clock.end()
        return tensors

    hook = pipeline.transformer.register_forward_pre_hook(lambda *_: clock.begin())
    try:
        pipeline(
            work.prompt, width=work.size, height=work.size, num_inference_steps=work.steps, guidance_scale=0.0,
            generator=torch.Generator("cpu").manual_seed(work.seed), callback_on_step_end=ended,
        )  # fmt: skip
    finally:
        hook.remove()
    return clock.steps()


if __name__ == "__main__":
    os.environ["HF_HUB_OFFLINE"] = "1"  # all files are here
    answer(measure)

"""Files that are no adapter for this model, or half of one: one line says what is wrong."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from adapter_files import TINY, Described

from zimage_lite.adapters.reading import open_adapter
from zimage_lite.errors import UserError

A, B = torch.ones(4, 64), torch.ones(64, 4)
Q = "transformer.layers.0.attention.to_q"
PAIR = {f"{Q}.lora_A.weight": A, f"{Q}.lora_B.weight": B}
BAD: dict[str, tuple[dict[str, torch.Tensor], str]] = {
    "nothing": ({}, "no adapter for Z-Image: got 0 tensors"),
    "Flux": (
        {"lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight": torch.ones(4, 3072)},
        "made for Flux: expected a LoRA for Z-Image",
    ),
    "Flux by diffusers": ({"transformer.single_transformer_blocks.0.attn.to_q.lora_A.weight": A}, "made for Flux"),
    "SDXL": ({"lora_unet_input_blocks_4_1_proj_in.lora_down.weight": A}, "made for Stable Diffusion or SDXL"),
    "a text encoder alone": ({"lora_te_layers_0_mlp.lora_down.weight": A}, "changes only the text encoder"),
    "a whole model": ({"layers.0.attention.to_q.weight": torch.ones(64, 64)}, "no adapter for Z-Image"),
    "another width": (
        {f"{Q}.lora_A.weight": torch.ones(4, 2304), f"{Q}.lora_B.weight": torch.ones(2304, 4)},
        r"made for another model \(Lumina-Image-2 is 2304 wide\): got \[2304, 2304\], expected \[64, 64\]",
    ),
    "orphan A": ({f"{Q}.lora_A.weight": A}, "up missing: got down alone; the file is incomplete"),
    "orphan B": ({f"{Q}.lora_B.weight": B}, "down missing: got up alone"),
    "orphan among others": (
        {**PAIR, "transformer.layers.1.attention.to_q.lora_A.weight": A},
        "layers.1.attention.to_q: up missing",
    ),
    "half a LoHa": ({f"{Q}.hada_w1_a": B, f"{Q}.hada_w1_b": A}, "hada_w2_a, hada_w2_b missing"),
    "half a LoKr": ({f"{Q}.lokr_w1": torch.ones(8, 8)}, "lokr_w2_a, lokr_w2_b missing"),
    "two ranks": (
        {f"{Q}.lora_A.weight": A, f"{Q}.lora_B.weight": torch.ones(64, 3)},
        "up and down have different ranks: got 3 and 4",
    ),
    "two ranks of a LoHa": (
        {f"{Q}.hada_w1_a": B, f"{Q}.hada_w1_b": torch.ones(3, 64), f"{Q}.hada_w2_a": B, f"{Q}.hada_w2_b": A},
        "hada_w1_a and hada_w1_b have different ranks: got 4 and 3",
    ),
    "two ranks of a LoKr": (
        {f"{Q}.lokr_w1": torch.ones(8, 8), f"{Q}.lokr_w2_a": torch.ones(8, 2), f"{Q}.lokr_w2_b": torch.ones(3, 8)},
        "lokr_w2_a and lokr_w2_b have different ranks: got 2 and 3",
    ),
    "no rank": ({f"{Q}.lora_A.weight": A[:0], f"{Q}.lora_B.weight": B[:, :0]}, r"up: got \[64, 0\], expected a matrix"),
    "a vector for a matrix": ({f"{Q}.lora_A.weight": A[0], f"{Q}.lora_B.weight": B}, r"down: got \[64\], expected"),
    "a number for a matrix": ({f"{Q}.lokr_w1": A[0, 0], f"{Q}.lokr_w2": A}, r"lokr_w1: got \[\], expected"),
    "no alpha in alpha": (
        {**PAIR, f"{Q}.alpha": torch.ones(0)},
        r"alpha: got \[0\], expected one number",
    ),
    "infinite alpha": (
        {**PAIR, f"{Q}.alpha": torch.tensor(float("inf"))},
        "alpha: got inf, expected a finite number",
    ),
    "integers": ({f"{Q}.lora_A.weight": A.int(), f"{Q}.lora_B.weight": B}, "lora_A.weight: got I32, expected floats"),
    "under two names": (
        {**PAIR, "lora_unet_layers_0_attention_to_q.lora_down.weight": A},
        "has down twice, under two spellings",
    ),
    "a convolution's": ({**PAIR, f"{Q}.lora_mid.weight": A},
        "lora_mid belongs to a convolution"),
    "a whole weight": ({f"{Q}.set_weight": torch.ones(64, 64)}, "set_weight is of no kind of adapter known here"),
    "a whole weight beside a LoRA": (
        {**PAIR, f"{Q}.set_weight": torch.ones(64, 64)},
        "set_weight is of no kind of adapter known here",
    ),
    "IA3": ({f"{Q}.on_input": torch.ones(())}, "on_input is of no kind of adapter known here"),
    "AdaLoRA": (
        {**PAIR, f"{Q}.lora_E": torch.ones(4, 1)},
        r"layers\.0\.attention\.to_q\.lora_E is of no kind of adapter known here",
    ),
    "a whole bias beside a LoRA": (
        {**PAIR, f"{Q}.base_layer.bias": torch.ones(64)},
        r"to_q\.base_layer\.bias is of no kind of adapter known here",
    ),
    "alpha alone": ({f"{Q}.alpha": torch.ones(())}, "alpha alone is of no kind of adapter known here"),
    "a magnitude alone": ({f"{Q}.dora_scale": torch.ones(64, 1)}, "a DoRA magnitude, without the one LoRA"),
    "a magnitude of another length": (
        {**PAIR, f"{Q}.magnitude": torch.ones(32)},
        r"magnitude, a DoRA magnitude: got \[32\], expected 64 or 64 numbers",
    ),
    "BOFT": ({f"{Q}.oft_blocks": torch.ones(2, 8, 8, 8)}, r"oft_blocks: got \[2, 8, 8, 8\], expected"),
    "OFT of outputs across q, k, v": (
        {"layers.0.attention.qkv.oft_blocks": torch.ones(2, 96, 96)}, "blocks of 96 rows reach across fused modules",
    ),
    "OFT factors of another length": (
        {f"{Q}.oft_blocks": torch.ones(8, 8, 8), f"{Q}.rescale": torch.ones(9)},
        r"rescale: got \[9\], expected 64 numbers",
    ),
    "OFT of inputs of another size": ({f"{Q}.oft_R.weight": torch.ones(8, 27)}, r"oft_R: got \[8, 27\], expected"),
    "OFT of inputs of no size": ({f"{Q}.oft_R.weight": torch.ones(0)}, r"oft_R: got \[0\], expected"),
    "a difference of another size": ({f"{Q}.diff": A[:, :32]}, r"another model: got \[4, 32\], expected \[64, 64\]"),
    "a bias of another size": ({f"{Q}.diff_b": torch.ones(63)}, r"diff_b: got \[63\], expected 64 numbers"),
    "a LoRA's bias of another size": (
        {**PAIR, f"{Q}.lora_B.bias": torch.ones(63)},
        r"up_bias: got \[63\], expected 64 numbers",
    ),
    "a LoRA of a norm": (
        {"layers.0.attention_norm1.lora_A.weight": A, "layers.0.attention_norm1.lora_B.weight": B[:1]},
        "a vector: got LoRA, expected its difference",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_one_line_says_what_is_wrong(name: str, tmp_path: Path) -> None:
    tensors, message = BAD[name]
    path = Described(tensors={key: tensor.clone() for key, tensor in tensors.items()}).write(tmp_path)
    with pytest.raises(UserError, match=message) as refused:
        open_adapter(path, TINY)
    assert str(refused.value).startswith(str(path)) and len(str(refused.value)) < len(str(path)) + 300

"""Adapters of other kinds than LoRA, as LyCORIS and others write them: LoHa, LoKr, DoRA, OFT."""

from __future__ import annotations

from collections.abc import Callable

import torch
from adapter_files import ATTENTION, FEED_FORWARD, KOHYA, Described, kohya, qkv, size


def loha() -> Described:
    made = Described()
    for module in [ATTENTION[0], *FEED_FORWARD[:3], "noise_refiner.0.adaLN_modulation.0"]:
        made.loha(kohya(module, "lycoris_"), module, 3, alpha=1.5)
    made.loha("lycoris_layers_1_attention_to_q", "layers.1.attention.to_q", 8, alpha=4.0)  # 64 ranks: wider than dense
    return made


def lokr_whole() -> Described:
    """Both factors whole: alpha, infinite in float16, says nothing."""
    made = Described()
    for module, w1 in [
        ("layers.0.attention.to_q", (8, 8)),
        ("layers.0.feed_forward.w1", (10, 4)),
        ("layers.1.feed_forward.w2", (4, 17)),
    ]:
        made.lokr(f"diffusion_model.{module}", module, w1, alpha=float("inf"), alpha_dtype=torch.float16)
    return made


def lokr_decomposed() -> Described:
    made = Described()
    for name, own in (("to_q", (0, 2)), ("to_k", (2, 0)), ("to_v", (2, 3))):
        made.lokr(f"lora_unet_layers_0_attention_{name}", f"layers.0.attention.{name}", (4, 8), own, alpha=5.0)
    made.lokr("lora_unet_layers_0_feed_forward_w1", "layers.0.feed_forward.w1", (2, 64), (0, 5), alpha=5.0)  # 320 ranks
    return made


def mixed() -> Described:
    """As musubi's converter leaves a LoKr: the fused part is a LoRA."""
    made = Described()
    made.lora("lora_unet_layers_0_attention_qkv", qkv("layers.0"), 6, alpha=6.0, ends=KOHYA)
    made.lokr("lora_unet_layers_0_feed_forward_w1", "layers.0.feed_forward.w1", (10, 8), (0, 2), alpha=2.0)
    return made


def lokr_fused(w1_rows: int) -> Callable[[], Described]:
    """Rows of the factors that end where q, k and v do, or do not."""

    def make() -> Described:
        made = Described()
        made.lokr("diffusion_model.layers.0.attention.qkv", qkv("layers.0"), (w1_rows, 8))
        return made

    return make


def dora(end: str, shape: Callable[[int, int], tuple[int, ...]], by_column: bool) -> Callable[[], Described]:
    """On a square linear, a wide and a tall one, and on a fused one."""

    def make() -> Described:
        made = Described()
        for module in ("layers.0.attention.to_q", "layers.0.feed_forward.w1", "layers.0.feed_forward.w2"):
            made.lora(f"diffusion_model.{module}", module, alpha=2.0, ends=KOHYA)
            made.dora(f"diffusion_model.{module}.{end}", module, by_column, shape(*size(module)))
        fused = qkv("layers.1")
        made.lora("diffusion_model.layers.1.attention.qkv", fused, alpha=2.0, ends=KOHYA)
        made.dora(f"diffusion_model.layers.1.attention.qkv.{end}", fused, by_column, shape(192, 64))
        return made

    return make


def dora_by_length() -> Described:
    """A vector as long as the inputs, on linears that have another number of outputs."""
    made = Described()
    for module in ("layers.0.feed_forward.w1", "layers.0.feed_forward.w2"):
        made.lora(f"transformer.{module}", module, alpha=2.0)
        made.dora(f"transformer.{module}.dora_scale", module, True)
    return made


def dora_of_others() -> Described:
    made = Described()
    made.loha("lycoris_layers_0_attention_to_q", "layers.0.attention.to_q", 2, alpha=1.0)
    made.dora("lycoris_layers_0_attention_to_q.dora_scale", "layers.0.attention.to_q", False, (64, 1))
    made.lokr("lycoris_layers_0_attention_to_k", "layers.0.attention.to_k", (8, 8))
    made.dora("lycoris_layers_0_attention_to_k.dora_scale", "layers.0.attention.to_k", True, (1, 64))
    for block, by_column, shape in (("layers.1", True, (1, 64)), ("noise_refiner.0", False, (192, 1))):
        made.lokr(f"{block}.attention.qkv", qkv(block), (2, 8))  # 96 rows: across q, k and v
        made.dora(f"{block}.attention.qkv.dora_scale", qkv(block), by_column, shape)
    return made


def rotated_outputs(constraint: float, is_rescaled: bool = False) -> Callable[[], Described]:
    """LyCORIS: the norm of Q at most alpha N; then factors for each output."""

    def make() -> Described:
        made = Described()
        for module, rows in (("layers.0.attention.to_q", 8), ("layers.0.feed_forward.w1", 17)):
            spelled = kohya(module, "lycoris_")
            blocks = made.add(f"{spelled}.oft_blocks", size(module)[0] // rows, rows, rows, scale=0.1)
            made.say(f"{spelled}.alpha", constraint)
            factors = (
                made.add(f"{spelled}.rescale", size(module)[0], 1) if is_rescaled else torch.ones(size(module)[0], 1)
            )
            made.change(module, _turned_rows(blocks, constraint * size(module)[0], factors))
        return made

    return make


def _turned_rows(blocks: torch.Tensor, most: float, factors: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    q = blocks - blocks.transpose(1, 2)
    if 0 < most < q.norm():
        q = q * most / q.norm()
    identity = torch.eye(q.shape[1]).double()
    turn = torch.block_diag(*((identity + q) @ torch.linalg.inv(identity - q)))
    return lambda weight: factors * (turn.T @ weight) - weight


def rotated_inputs(is_shared: bool, is_scaled: bool) -> Callable[[], Described]:
    """peft, OneTrainer: each block of inputs as a row vector times I + 2Q + 2Q^2 + 2Q^3 + Q^4."""

    def make() -> Described:
        made = Described()
        for modules, spelled in (
            ("layers.0.attention.to_q", "layers.0.attention.to_q"),
            (qkv("layers.1"), "layers.1.attention.qkv"),
        ):
            upper = made.add(f"transformer.{spelled}.oft_R.weight", 1 if is_shared else 8, 28, scale=0.1)
            if is_scaled:
                made.tensors[f"transformer.{spelled}.oft_R.scaled_oft"] = torch.ones(())
            q = torch.zeros(len(upper), 8, 8).double()
            rows, columns = torch.triu_indices(8, 8, 1)
            q[:, rows, columns] = upper / (2 * 7**0.5 if is_scaled else 1)
            q = q - q.transpose(1, 2)
            turn = torch.eye(8) + 2 * q + 2 * q @ q + 2 * q @ q @ q + q @ q @ q @ q
            whole = torch.block_diag(*turn.expand(8, -1, -1))
            made.change(modules, lambda weight, whole=whole: weight @ whole.T - weight)
        return made

    return make

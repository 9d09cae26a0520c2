"""One adapter of each kind that is met, spelled as the tool that writes it does, with what it does to the weights."""

from __future__ import annotations

import json
from collections.abc import Callable

import torch
from adapter_files import Described, kohya, qkv, size, w31

BLOCKS = ("layers.0", "layers.1", "noise_refiner.0", "context_refiner.0")
ATTENTION = [f"{block}.attention.{name}" for block in BLOCKS for name in ("to_q", "to_k", "to_v", "to_out.0")]
FEED_FORWARD = [f"layers.{i}.feed_forward.w{j}" for i in (0, 1) for j in (1, 2, 3)]
KOHYA = ("lora_down.weight", "lora_up.weight")
DEFAULT = ("lora_A.default.weight", "lora_B.default.weight")


def peft() -> Described:
    made = Described()
    for module in ATTENTION:
        made.lora(f"transformer.{module}", module)
    return made


def ai_toolkit() -> Described:
    made = Described()
    for module in [*ATTENTION[:8], *FEED_FORWARD, "layers.0.adaLN_modulation.0", "layers.1.adaLN_modulation.0"]:
        made.lora(f"diffusion_model.{module}", module)
    return made


def musubi() -> Described:
    made = Described()
    for module in [*ATTENTION[:8], *FEED_FORWARD]:
        made.lora(kohya(module), module, alpha=2.0, ends=KOHYA)
    return made


def videox() -> Described:
    made = Described()
    for module in [name for name in ATTENTION if "to_out" not in name] + FEED_FORWARD:
        made.lora(kohya(module, "lora_unet__"), module, alpha=3.0, ends=KOHYA)
    return made


def diffsynth(prefix: str) -> Callable[[], Described]:
    def make() -> Described:
        made = Described()
        for module in [*ATTENTION, *FEED_FORWARD]:
            made.lora(prefix + module, module, ends=DEFAULT)
        return made

    return make


def peft_folder() -> Described:
    """alpha 8, 3 for to_v; rank 4, 2 for w1; scale alpha / sqrt(rank)."""
    config = {"r": 4, "lora_alpha": 8, "use_rslora": True, "rank_pattern": {"feed_forward.w1": 2}}
    made = Described(config=config | {"alpha_pattern": {r"layers\.\d\.attention\.to_v": 3}})
    for module in [*ATTENTION[:4], *FEED_FORWARD]:
        rank = 2 if module.endswith("w1") else 4
        alpha = 3 if module.endswith("to_v") else 8
        made.lora(f"base_model.model.{module}", module, rank, scale=alpha / rank**0.5)
    return made


def native_fused() -> Described:
    made = Described()
    for block in BLOCKS:
        made.lora(f"diffusion_model.{block}.attention.qkv", qkv(block))
        made.lora(f"diffusion_model.{block}.attention.out", f"{block}.attention.to_out.0")
    made.lora("diffusion_model.layers.0.feed_forward.w13", w31("layers.0"))
    return made


def block_diagonal() -> Described:
    """Three LoRAs of different alphas in one of three times the rank, whose alpha is three times as large as well."""
    made = Described()
    downs, ups = [], []
    for module, alpha in zip(qkv("layers.1"), (2.0, 4.0, 1.0), strict=True):
        a, b = made.random(4, 64), made.random(64, 4) * alpha / 4
        made.change(module, b.double() @ a.double())
        downs, ups = [*downs, a], [*ups, b]
    spelled = "lora_unet_layers_1_attention_qkv"
    made.tensors |= {f"{spelled}.{KOHYA[0]}": torch.cat(downs), f"{spelled}.{KOHYA[1]}": torch.block_diag(*ups)}
    made.say(f"{spelled}.alpha", 12.0)
    return made


def two_of_three() -> Described:
    made = Described()
    for name in ("to_q", "to_v"):
        made.lora(f"transformer.layers.0.attention.{name}", f"layers.0.attention.{name}")
    return made


def twice() -> Described:
    """The same updates under fused and native names, and under diffusers' own: applied once."""
    made = Described()
    a, b, ends = made.random(4, 64), made.random(192, 4), KOHYA
    for name, rows in [
        ("attention_qkv", slice(0, 192)),
        *((f"attention_to_{x}", slice(64 * i, 64 * i + 64)) for i, x in enumerate("qkv")),
    ]:
        made.tensors |= {
            f"lora_unet_layers_0_{name}.{ends[0]}": a.clone(),
            f"lora_unet_layers_0_{name}.{ends[1]}": b[rows].clone(),
        }
    made.change(qkv("layers.0"), b.double() @ a.double())
    made.lora("lora_unet_layers_0_attention_to_out_0", "layers.0.attention.to_out.0", ends=ends)
    for end in ends:
        made.tensors[f"lora_unet_layers_0_attention_out.{end}"] = made.tensors[
            f"lora_unet_layers_0_attention_to_out_0.{end}"
        ].clone()
    return made


def one_tuner() -> Described:
    """OneTrainer's old files: alpha 1."""
    made = Described()
    for module in ATTENTION[:4]:
        made.lora(f"transformer.{module}", module, 8, alpha=1.0, ends=KOHYA)
    return made


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


def differences() -> Described:
    made = Described()
    for module, end in [
        ("layers.0.attention.norm_q", "diff"),
        ("layers.0.attention_norm1", "w_norm"),
        ("x_pad_token", "diff"),
    ]:
        made.change(module, made.add(f"diffusion_model.{module}.{end}", size(module)[1])[None])
    for module in ("layers.0.feed_forward.w2", "all_x_embedder.2-1", "cap_embedder.1"):
        made.change(module, made.add(f"diffusion_model.{module}.diff", *size(module)))
    for module in ("layers.0.adaLN_modulation.0", "cap_embedder.1", "t_embedder.mlp.0"):
        made.biases[module] = made.add(f"diffusion_model.{module}.diff_b", size(module)[0])
    biases = made.add("diffusion_model.layers.0.attention.qkv.diff_b", 192).split(64)
    made.biases |= dict(zip(qkv("layers.0"), biases, strict=True))
    return made


def biases_of_lora() -> Described:
    """peft's lora_bias, scaled as its LoRA."""
    made = Described()
    for module in ("layers.0.attention.to_q", "layers.0.adaLN_modulation.0"):
        made.lora(f"transformer.{module}", module, alpha=2.0)
        made.biases[module] = 0.5 * made.add(f"transformer.{module}.lora_B.bias", size(module)[0])
    return made


def dotted() -> Described:
    """musubi's converter took every underscore for a dot."""
    made = Described()
    for module in (
        "noise_refiner.0.attention.to_q",
        "context_refiner.0.feed_forward.w2",
        "layers.1.adaLN_modulation.0",
    ):
        made.lora("diffusion_model." + module.replace("_refiner", ".refiner").replace("_mod", ".mod"), module)
    return made


def mixed_ranks() -> Described:
    made = Described()
    for rank, module in enumerate([*ATTENTION[:4], *FEED_FORWARD], 1):
        made.lora(f"transformer.{module}", module, rank)
    return made


def described_in_metadata() -> Described:
    """diffusers' own: alpha 6, rank 4."""
    said = {"transformer.lora_alpha": 6, "transformer.r": 4, "transformer.use_rslora": False}
    made = Described(metadata={"lora_adapter_metadata": json.dumps(said), "format": "pt"})
    for module in ATTENTION[:4]:
        made.lora(f"transformer.{module}", module, scale=6 / 4)
    return made


def every_float() -> Described:
    made, dtypes = Described(), ("float32", "bfloat16", "float16", "float8_e4m3fn", "float8_e5m2", "float64")
    for dtype, module in zip(dtypes, ATTENTION, strict=False):
        made.lora(f"diffusion_model.{module}", module, dtype=getattr(torch, dtype))
    for module, dtype in zip(ATTENTION, (torch.bfloat16, torch.float16), strict=False):  # alpha as a list of one
        made.say(f"diffusion_model.{module}.alpha", 4.0, dtype, (1,))
    return made


def with_text_encoder() -> Described:
    made = peft()
    for name in (
        "lora_te_layers_0_self_attn_q_proj.lora_down.weight",
        "text_encoder.layers.1.mlp.up_proj.lora_A.weight",
    ):
        made.tensors[name] = torch.zeros(4, 64)
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


def scale_beside_alpha() -> Described:
    """stable-diffusion.cpp's `.scale` stands for alpha / rank, whatever alpha is."""
    made = Described()
    for module in ATTENTION[:2]:
        made.lora(f"transformer.{module}", module, scale=0.25)
        made.say(f"transformer.{module}.scale", 0.25)
    made.say(f"transformer.{ATTENTION[0]}.alpha", 9.0)
    return made


def alpha_of_nothing() -> Described:
    """LyCORIS and musubi take 0 for the rank."""
    made = Described()
    made.lora("transformer.layers.0.attention.to_q", "layers.0.attention.to_q", scale=1.0)
    made.say("transformer.layers.0.attention.to_q.alpha", 0.0)
    return made


def whole_alphas() -> Described:
    """Numbers of people's own scripts."""
    made = Described()
    kinds = ((torch.int64, ()), (torch.int32, (1,)), (torch.int16, (1, 1)), (torch.uint8, ()))
    for module, (dtype, shape) in zip(ATTENTION, kinds, strict=False):
        made.lora(f"transformer.{module}", module, scale=0.75)
        made.say(f"transformer.{module}.alpha", 3, dtype, shape)
    return made


ADAPTERS: dict[str, Callable[[], Described]] = {
    "peft in diffusers": peft,
    "ai-toolkit with adaLN": ai_toolkit,
    "musubi, alpha not the rank": musubi,
    "VideoX, two underscores, no to_out": videox,
    "DiffSynth, bare, .default": diffsynth(""),
    "DiffSynth, pipe.dit.": diffsynth("pipe.dit."),
    "peft folder, rslora, patterns": peft_folder,
    "native fused": native_fused,
    "kohya fused, block-diagonal": block_diagonal,
    "q and v alone": two_of_three,
    "fused and split": twice,
    "down and up, alpha 1": one_tuner,
    "LoHa": loha,
    "LoKr whole, alpha infinite": lokr_whole,
    "LoKr decomposed": lokr_decomposed,
    "LoKr fused, rows of q, k, v apart": lokr_fused(12),
    "LoKr fused, rows across q, k, v": lokr_fused(2),
    "LoKr and LoRA": mixed,
    "DoRA [N, 1]": dora("dora_scale", lambda rows, columns: (rows, 1), False),
    "DoRA [1, K]": dora("dora_scale", lambda rows, columns: (1, columns), True),
    "DoRA magnitude": dora("magnitude", lambda rows, columns: (rows,), False),
    "DoRA vector": dora("lora_magnitude_vector", lambda rows, columns: (rows,), False),
    "DoRA vector.weight": dora("lora_magnitude_vector.weight", lambda rows, columns: (rows,), False),
    "DoRA by length": dora_by_length,
    "DoRA of LoHa and LoKr": dora_of_others,
    "differences": differences,
    "lora_bias": biases_of_lora,
    "dotted": dotted,
    "mixed ranks": mixed_ranks,
    "metadata": described_in_metadata,
    "every float": every_float,
    "with a text encoder": with_text_encoder,
    "OFT of outputs": rotated_outputs(0.0),
    "OFT of outputs, constrained": rotated_outputs(0.001),
    "OFT of outputs, rescaled": rotated_outputs(0.0, is_rescaled=True),
    "OFT of inputs": rotated_inputs(False, False),
    "OFT of inputs, scaled": rotated_inputs(False, True),
    "OFT of inputs, shared": rotated_inputs(True, False),
    ".scale": scale_beside_alpha,
    "alpha 0": alpha_of_nothing,
    "whole alphas": whole_alphas,
}

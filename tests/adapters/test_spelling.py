"""Every tool's name for every module lands on that module, at full size; what else such names say is recognised."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from zimage_lite.adapters.spelling import Target, is_text_encoder, split, squashed, stranger, table
from zimage_lite.config import TransformerConfig

# The true model's own names and [rows, columns], as diffusers has them. (1, n): a vector.
ATTENTION = {f"attention.to_{x}": (3840, 3840) for x in ("q", "k", "v", "out.0")}
NORMS = dict.fromkeys(("attention_norm1", "attention_norm2", "ffn_norm1", "ffn_norm2"), (1, 3840))
HEADS = {"attention.norm_q": (1, 128), "attention.norm_k": (1, 128)}
FEED_FORWARD = {"feed_forward.w1": (10240, 3840), "feed_forward.w2": (3840, 10240), "feed_forward.w3": (10240, 3840)}
ADALN = {"adaLN_modulation.0": (15360, 256)}
IN_BLOCK = ATTENTION | NORMS | HEADS | FEED_FORWARD
BLOCKS = {f"layers.{i}": IN_BLOCK | ADALN for i in range(30)}
BLOCKS |= {f"noise_refiner.{i}": IN_BLOCK | ADALN for i in range(2)}
BLOCKS |= {f"context_refiner.{i}": IN_BLOCK for i in range(2)}
REST = {
    "all_x_embedder.2-1": (3840, 64), "all_final_layer.2-1.linear": (64, 3840),
    "all_final_layer.2-1.adaLN_modulation.1": (3840, 256), "t_embedder.mlp.0": (1024, 256),
    "t_embedder.mlp.2": (256, 1024), "cap_embedder.0": (1, 2560), "cap_embedder.1": (3840, 2560),
    "x_pad_token": (1, 3840), "cap_pad_token": (1, 3840),
}  # fmt: skip
MODULES = {f"{block}.{name}": size for block, names in BLOCKS.items() for name, size in names.items()} | REST

# What else a module is called: ending of its own name -> other endings; beginning -> other beginnings.
ENDINGS = {
    "attention.to_out.0": ("attention.out", "attention.out.0", "attention.wo", "attention.to_out"),
    "attention.norm_q": ("attention.q_norm",),
    "attention.norm_k": ("attention.k_norm",),
}
BEGINNINGS = {"all_x_embedder.2-1": "x_embedder", "all_final_layer.2-1": "final_layer", "t_embedder.": "t_embedder_2."}
QKV = ("attention.to_q", "attention.to_k", "attention.to_v")
FUSED = {"attention.qkv": QKV, "feed_forward.w13": ("feed_forward.w3", "feed_forward.w1")}

DOTTED = (
    "", "transformer.", "diffusion_model.", "transformer.diffusion_model.", "base_model.model.",
    "base_model.model.transformer.", "model.diffusion_model.", "pipe.dit.", "dit.", "default.", "unet.",
)  # fmt: skip
FLAT = ("lora_unet_", "lora_unet__", "lora_transformer_", "lycoris_")


def other_names(module: str) -> Iterator[str]:
    for ending, others in ENDINGS.items():
        if module.endswith(ending):
            yield from (module.removesuffix(ending) + other for other in others)
    for beginning, other in BEGINNINGS.items():
        if module.startswith(beginning):
            yield other + module.removeprefix(beginning)
    if module.endswith(".adaLN_modulation.0"):
        yield module[:-1] + "1"


def half_dotted(module: str) -> str:
    """As musubi's converter leaves them."""
    return module.replace("_refiner", ".refiner").replace("_modulation", ".modulation")


WAYS: dict[str, Callable[[str], str]] = {
    **{f"{prefix or 'bare'} dotted": (lambda module, prefix=prefix: prefix + module) for prefix in DOTTED},
    **{
        f"{prefix} flat": (lambda module, prefix=prefix: prefix + module.replace(".", "_").replace("-", "_"))
        for prefix in FLAT
    },
    "half-dotted": lambda module: "diffusion_model." + half_dotted(module),
    "dotted behind a flat prefix": lambda module: "lora_unet_" + module,
    "lower case": lambda module: "lycoris_" + module.lower().replace(".", "_"),
}


@pytest.fixture(scope="module")
def full() -> dict[str, tuple[Target, ...]]:
    return dict(table(TransformerConfig()))


@pytest.fixture(scope="module")
def spellings() -> dict[str, tuple[tuple[str, int], ...]]:
    """Spelling -> the modules that it means, with the row at which each begins."""
    found = {}
    for module in MODULES:
        for name in (module, *other_names(module)):
            assert name not in found
            found[name] = ((module, 0),)
    for block in BLOCKS:
        for fused, parts in FUSED.items():
            starts = [i * MODULES[f"{block}.{part}"][0] for i, part in enumerate(parts)]
            found[f"{block}.{fused}"] = tuple((f"{block}.{part}", at) for part, at in zip(parts, starts, strict=True))
    return found


def test_the_table_holds_the_models_modules_and_no_others(full) -> None:
    found = {target.module: (target.rows, target.columns) for targets in full.values() for target in targets}
    assert found == MODULES
    linears = {target.module for targets in full.values() for target in targets if target.is_linear}
    assert linears == {name for name, (rows, _) in MODULES.items() if rows > 1}


@pytest.mark.parametrize("way", WAYS)
def test_every_spelling_of_every_module(full, spellings, way: str) -> None:
    met = set()
    for name, wanted in spellings.items():
        key = split(f"{WAYS[way](name)}.lora_down.weight")
        assert key is not None and key.parameter == "down"
        met.add(squashed(key.module))
        targets = full[squashed(key.module)]
        assert [(target.module, target.first_row) for target in targets] == list(wanted), name
        assert {target.all_rows for target in targets} == {sum(MODULES[module][0] for module, _ in wanted)}
    assert len(met) == len(spellings)  # no two spellings run together, however squashed


PARAMETERS = {
    "down": (
        "lora_A.weight", "lora_A.default.weight", "lora_A.my_adapter.weight", "lora_A.v1.0.weight", "lora_A",
        "lora_down.weight", "lora_down", "lora.down.weight", "lora_linear_layer.down.weight",
    ),
    "up": (
        "lora_B.weight", "lora_B.default.weight", "lora_B.default_0.weight", "lora_B", "lora_up.weight",
        "lora.up.weight", "lora_linear_layer.up.weight",
    ),
    "up_bias": ("lora_B.bias", "lora_B.default.bias", "lora_up.bias"),
    "lora_magnitude_vector": (
        "lora_magnitude_vector", "lora_magnitude_vector.weight", "lora_magnitude_vector.default.weight",
        "lora_magnitude_vector.default",
    ),
    "lora_mid": ("lora_mid.weight",),
    "oft_R.weight": ("oft_R.weight", "oft_R.default.weight"),
    "oft_R.scaled_oft": ("oft_R.scaled_oft",),
    **{
        name: (name,)
        for name in (
            "alpha", "scale", "dora_scale", "magnitude", "diff", "diff_b", "w_norm", "b_norm", "set_weight",
            "oft_blocks", "rescale", "reshape_weight", "on_input", "a1.weight", "b2.weight", "hada_w1_a", "hada_w1_b",
            "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2", "lokr_w1", "lokr_w2", "lokr_w1_a", "lokr_w1_b", "lokr_w2_a",
            "lokr_w2_b", "lokr_t1", "lokr_t2", "bias_indices", "bias_values", "bias_size",
        )
    },
}  # fmt: skip


@pytest.mark.parametrize(("parameter", "ending"), [(one, text) for one, texts in PARAMETERS.items() for text in texts])
def test_every_ending_of_a_name(full, parameter: str, ending: str) -> None:
    for module in ("layers.7.attention.to_q", "layers.29.feed_forward.w2", "noise_refiner.1.adaLN_modulation.0"):
        for way in ("transformer. dotted", "lora_unet__ flat", "half-dotted"):
            key = split(f"{WAYS[way](module)}.{ending}")
            assert key is not None and key.parameter == parameter
            (target,) = full[squashed(key.module)]
            assert target.module == module


def test_an_ending_of_old_diffusers_files(full) -> None:
    key = split("transformer.layers.3.attention.to_k_lora.up.weight")
    assert key is not None and key.parameter == "up"
    assert full[squashed(key.module)][0].module == "layers.3.attention.to_k"


@pytest.mark.parametrize(
    "name", ["layers.0.attention.to_q.weight", "cap_embedder.1.bias", "x_pad_token", "rescaled", ""]
)
def test_a_models_own_tensors_are_no_adapters(name: str) -> None:
    assert split(name) is None


@pytest.mark.parametrize(
    "name",
    [
        "text_encoders.qwen3_4b.transformer.model.layers.3.self_attn.q_proj.lora_A.weight",
        "text_encoders.transformer.model.layers.3.mlp.up_proj.lora_down.weight",
        "text_encoder.layers.0.self_attn.q_proj.lora_A.weight",
        "base_model.model.text_encoder.layers.0.mlp.gate_proj.lora_B.weight",
        "lora_te_layers_0_self_attn_q_proj.lora_down.weight",
        "lora_te1_layers_0_self_attn_q_proj.alpha",
    ],
)
def test_tensors_of_a_text_encoder(name: str) -> None:
    assert is_text_encoder(name)


def test_no_module_is_taken_for_a_text_encoders_or_a_strangers(spellings) -> None:
    for name in spellings:
        assert not any(is_text_encoder(way(name)) or stranger(way(name)) for way in WAYS.values()), name


@pytest.mark.parametrize(
    ("name", "model"),
    [
        ("lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight", "Flux"),
        ("diffusion_model.single_blocks.3.linear1.lora_A.weight", "Flux"),
        ("transformer.single_transformer_blocks.0.attn.to_q.lora_A.weight", "Flux"),
        ("transformer.transformer_blocks.0.attn.to_q.lora_A.weight", "Qwen-Image"),
        ("lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight", "Stable Diffusion"),
        ("lora_unet_input_blocks_4_1_proj_in.lora_down.weight", "SDXL"),
    ],
)
def test_other_models_are_named(name: str, model: str) -> None:
    assert model in (stranger(name) or "")

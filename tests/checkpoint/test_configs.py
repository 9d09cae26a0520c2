"""Sizes from shapes, and configs that contradict them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from make_checkpoint import SIZES, component_shapes
from stubs import TEXT_ENCODER, TINY, TRANSFORMER, VAE, Shape, foreign, write

from zimage_lite.checkpoint import gguf
from zimage_lite.checkpoint.checkpoint import CONFIG_KEY, open_checkpoint
from zimage_lite.checkpoint.configs import control_config, text_encoder_config, transformer_config, vae_config
from zimage_lite.checkpoint.diffusers_config import config_json
from zimage_lite.checkpoint.model_files import open_model
from zimage_lite.checkpoint.tokenizer import tokenizer_from
from zimage_lite.config import ControlConfig, TextEncoderConfig, TransformerConfig, VaeConfig
from zimage_lite.errors import UserError, WrongModelError

# --- Sizes

CONFIGS = {
    "transformer": (transformer_config, TRANSFORMER, TransformerConfig()),
    "text_encoder": (text_encoder_config, TEXT_ENCODER, TextEncoderConfig()),
    "vae": (vae_config, VAE, VaeConfig()),
    "controlnet": (control_config, component_shapes(ControlConfig()), ControlConfig()),
}


@pytest.mark.parametrize("component", CONFIGS)
def test_sizes_from_shapes(component: str) -> None:
    measure, shapes, config = CONFIGS[component]
    assert measure(shapes, {}, "x") == config
    assert measure(shapes, config_json(config), "x") == config


@pytest.mark.parametrize(
    ("component", "given"),
    [
        ("transformer", {"dim": 2560}), ("transformer", {"n_layers": 29}), ("transformer", {"n_heads": 15}),
        ("transformer", {"n_refiner_layers": 1}), ("transformer", {"cap_feat_dim": 4096}),
        ("text_encoder", {"num_hidden_layers": 35}), ("text_encoder", {"num_key_value_heads": 32}),
        ("text_encoder", {"vocab_size": 151669}), ("text_encoder", {"intermediate_size": 9729}),
        ("controlnet", {"control_in_dim": 16}), ("controlnet", {"n_refiner_layers": 1}),
        ("vae", {"latent_channels": 4}), ("vae", {"block_out_channels": [128, 256, 512]}),
    ],
)  # fmt: skip
def test_config_that_contradicts_the_shapes(component: str, given: dict[str, Any]) -> None:
    measure, shapes, _ = CONFIGS[component]
    ((name, value),) = given.items()
    said = tuple(value) if isinstance(value, list) else value
    with pytest.raises(WrongModelError) as refused:
        measure(shapes, given, "x")
    assert f"x: the config says {name} is {said}, the tensors say" in str(refused.value)


@pytest.mark.parametrize("component", CONFIGS)
def test_config_of_any_json_is_refused_or_right(component: str) -> None:
    measure, shapes, config = CONFIGS[component]
    odd = [None, "1", True, 0, -1, 1.5, 2**70, [], {}, [1, 2, 3], ["a"], [None], {"rope_theta": "x"}]
    for name in [*config.__dataclass_fields__, "rope_parameters", "use_quant_conv", "unknown"]:
        for value in odd:
            try:
                found = measure(shapes, {name: value}, "x")
            except UserError:
                continue
            said = tuple(value) if isinstance(value, list) else value
            assert found == config or getattr(found, name) == said


@pytest.mark.parametrize("component", CONFIGS)
@pytest.mark.parametrize("shape", [(), (0,), (0, 0), (1,), (1, 1, 1, 1, 1), (2**40, 0)])
def test_misshapen_tensors_give_no_sizes(component: str, shape: Shape) -> None:
    measure, shapes, config = CONFIGS[component]
    measured = ["cap_embedder.1.weight", "layers.0.attention.norm_q.weight", "all_x_embedder.2-1.weight"]
    measured += ["embed_tokens.weight", "layers.0.self_attn.q_norm.weight", "layers.0.self_attn.q_proj.weight"]
    measured += ["control_all_x_embedder.2-1.weight", "control_layers.0.attention.norm_q.weight"]
    measured += ["decoder.conv_in.weight", "decoder.conv_out.weight", "decoder.up_blocks.0.resnets.0.conv1.weight"]
    for name in measured:
        if name in shapes:
            try:
                assert measure({**shapes, name: shape}, {}, "x") != config
            except UserError as error:
                assert "\n" not in str(error)
            with pytest.raises(WrongModelError, match="is missing"):
                measure({other: shapes[other] for other in shapes if other != name}, {}, "x")


@pytest.mark.slow
@pytest.mark.parametrize("component", TINY)
@pytest.mark.parametrize("shape", [(), (0,), (1,), (0, 0)])
def test_misshapen_tensors_in_a_file(tmp_path: Path, component: str, shape: Shape) -> None:
    """Any tensor of the file, not only those that sizes are taken from."""
    for name in list(TINY[component])[:40]:
        path = write(tmp_path / "x.safetensors", TINY[component] | {name: shape})
        with pytest.raises(UserError):
            open_checkpoint(path).restricted_to(TINY[component])


def test_no_name_makes_the_model_large() -> None:
    other = {"cap_embedder.1.weight": (1920, 2560), "layers.999999999.attention_norm1.weight": (1920,)}
    assert transformer_config(TRANSFORMER | other, {}, "x").n_layers <= 32


def test_head_dimensions_split_as_in_the_true_model() -> None:
    shapes = {**TRANSFORMER, "layers.0.attention.norm_q.weight": (64,)}
    assert transformer_config(shapes, {}, "x").axes_dims == (16, 24, 24)
    assert transformer_config(shapes, {"axes_dims": [32, 16, 16]}, "x").axes_dims == (32, 16, 16)


def test_last_layer_may_be_left_out() -> None:
    shapes = {name: shape for name, shape in TEXT_ENCODER.items() if not name.startswith("layers.35.")}
    assert text_encoder_config(shapes, {"num_hidden_layers": 36}, "x") == TextEncoderConfig()
    assert text_encoder_config(shapes, {}, "x") == TextEncoderConfig()


def test_rope_theta_where_transformers_5_puts_it() -> None:
    assert text_encoder_config(TEXT_ENCODER, {"rope_parameters": {"rope_theta": 5e6}}, "x").rope_theta == 5e6


def test_sizes_in_the_metadata_of_a_gguf(tmp_path: Path) -> None:
    shapes = foreign("text_encoder")
    metadata: dict[str, Any] = {"qwen3.block_count": 4, "qwen3.rope.freq_base": 5e6, "qwen3.context_length": 77}
    header, offsets = gguf.encode_header([(name, "f16", shape) for name, shape in shapes.items()], metadata)
    path = tmp_path / "x.gguf"
    path.write_bytes(header + bytes(offsets[-1] + 1000))
    config = open_checkpoint(path).config
    assert (config.num_hidden_layers, config.rope_theta, config.max_position_embeddings) == (4, 5e6, 77)


@pytest.mark.parametrize(("text", "message"), [("{", "is not JSON"), ('{"dim": 512}', "the config says dim is 512")])
def test_config_inside_the_file(tmp_path: Path, text: str, message: str) -> None:
    path = write(tmp_path / "x.safetensors", TINY["transformer"], metadata={CONFIG_KEY: text})
    with pytest.raises(UserError, match=message):
        open_checkpoint(path)


# --- Parts that do not go together


def test_vae_of_another_latent_space(tmp_path: Path, tiny: Path) -> None:
    vae = write(tmp_path / "vae.safetensors", foreign("vae") | {"decoder.conv_in.weight": (64, 4, 3, 3)})
    with pytest.raises(WrongModelError, match="latent channels of the VAE: got 4, expected 16"):
        open_model(tiny, {"vae": vae})


def test_text_encoder_of_another_width(tmp_path: Path, tiny: Path) -> None:
    config = replace(SIZES["tiny"][1], hidden_size=96)
    encoder = write(tmp_path / "encoder.safetensors", component_shapes(config))
    with pytest.raises(WrongModelError, match="width of the text encoder: got 96, expected 128"):
        open_model(tiny, {"text_encoder": encoder})


def test_tokenizer_with_more_tokens_than_the_encoder_has_rows(tmp_path: Path, tiny: Path) -> None:
    tokenizer = tokenizer_from(tiny / "tokenizer").tokenizer
    tokenizer.add_tokens([f"<{n}>" for n in range(320 - tokenizer.get_vocab_size())])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert open_model(tiny, {"tokenizer": tmp_path}).tokenizer.encode("<1>")
    tokenizer.add_tokens(["<one more>"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(WrongModelError, match="the highest token: got 320, expected less than 320"):
        open_model(tiny, {"tokenizer": tmp_path})

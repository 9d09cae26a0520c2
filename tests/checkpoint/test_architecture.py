"""What GGUF files say of themselves: settings under any Qwen's keys, and the names of models that are refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import gguf as gguf_py
import numpy as np
import pytest
from safetensors.torch import load_file

from zimage_lite.checkpoint.architecture import other_encoder
from zimage_lite.checkpoint.checkpoint import open_checkpoint
from zimage_lite.checkpoint.names import LLAMA_CPP_QWEN3
from zimage_lite.cli import run
from zimage_lite.convert.quantize import quantize

Arrays = dict[str, np.ndarray]


@pytest.fixture(scope="module")
def encoder(tiny: Path) -> Arrays:
    """Under llama.cpp's names."""
    (file,) = (tiny / "text_encoder").glob("*.safetensors")
    tensors = {name.removeprefix("model."): tensor for name, tensor in load_file(file).items()}
    return {new: tensors[old].float().numpy() for new, (old,) in LLAMA_CPP_QWEN3.to_foreign(tensors).items()}


def gguf_file(path: Path, architecture: str, arrays: Arrays, theta: float = 1e6) -> Path:
    """By gguf-py, which puts the architecture before its keys."""
    writer = gguf_py.GGUFWriter(path, architecture)
    writer.add_block_count(4)
    writer.add_context_length(77)
    writer.add_rope_freq_base(theta)
    writer.add_layer_norm_rms_eps(1e-5)
    for name, array in arrays.items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize(
    ("architecture", "theta", "note"),
    [
        ("qwen3", 1e6, ""),
        ("qwen3", 5e6, "rope_theta is 5e+06, not 1e6: it is another Qwen3"),
        ("qwen3vl", 5e6, "the text encoder is Qwen3-VL (rope_theta 5e+06)"),
    ],
)
def test_settings_of_any_qwen3(
    encoder: Arrays, tmp_path: Path, tiny: Path, capsys: pytest.CaptureFixture[str],
    architecture: str, theta: float, note: str,
) -> None:  # fmt: skip
    file = gguf_file(tmp_path / "te.gguf", architecture, encoder, theta)
    found = open_checkpoint(file)
    assert found.layout == f"GGUF ({architecture})"
    config = found.config
    assert (config.num_hidden_layers, config.rope_theta, config.rms_norm_eps) == (4, theta, pytest.approx(1e-5))
    assert config.max_position_embeddings == 77

    size = ("--width", "64", "--height", "64", "--steps", "1")
    command = ["generate", "x", "--model", str(tiny), "--text-encoder", str(file), *size, "-o", str(tmp_path / "x.png")]
    assert run(command) == 0
    notes = [line for line in capsys.readouterr().err.splitlines() if line.startswith("note: ")]
    assert [note in line for line in notes] == ([True] if note else [])

    quantize(file, tmp_path / "q8.gguf", "q8_0")
    assert open_checkpoint(tmp_path / "q8.gguf").config == config


@pytest.mark.parametrize("architecture", ["pig", "cow"])
def test_what_says_nothing_is_told_by_its_tensors(encoder: Arrays, tmp_path: Path, architecture: str) -> None:
    found = open_checkpoint(gguf_file(tmp_path / "te.gguf", architecture, encoder))
    assert found.component == "text_encoder" and other_encoder(found.metadata, found.config) is None


ONE = np.ones((4, 4), np.float32)


@pytest.mark.parametrize(
    ("architecture", "names", "message"),
    [
        ("llama", None, "this is a llama text encoder: expected the architecture qwen3"),
        ("gemma3", ["token_embd.weight", "blk.0.post_ffw_norm.weight"], "a Gemma text encoder (it says gemma3)"),
        ("mistral3", ["token_embd.weight", "blk.0.attn_q.weight"], "another language model (it says mistral3)"),
        ("flux", ["double_blocks.0.img_attn.qkv.weight"], "a Flux transformer (it says flux)"),
        ("clip", ["v.blk.0.attn_q.weight"], "reads images (mmproj) (it says clip)"),
        ("wan", ["blocks.0.ffn.0.weight"], "no model that is known here (it says wan)"),
    ],
)
def test_others_are_named(
    encoder: Arrays, tmp_path: Path, refused: Callable[..., str], architecture: str, names: list[str] | None,
    message: str,
) -> None:  # fmt: skip
    arrays = encoder if names is None else dict.fromkeys(names, ONE)
    file = gguf_file(tmp_path / "other.gguf", architecture, arrays)
    assert message in refused("quantize", file, "--to", "q8_0", "-o", tmp_path / "out.gguf")

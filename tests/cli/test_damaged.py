"""Model files that are damaged or of another model: refused in one line that names what is wrong."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from zimage_lite.cli import run
from zimage_lite.pipeline.encode import Encode

SMALL = ("--width", 64, "--height", 64, "--steps", 2, "--device", "cpu")
Refused = Callable[..., str]


def only_file(folder: Path) -> Path:
    (file,) = folder.glob("*.safetensors")
    return file


@pytest.fixture
def model(tiny: Path, tmp_path: Path) -> Path:
    """A copy of the tiny model that may be damaged."""
    return Path(shutil.copytree(tiny, tmp_path / "model"))


@pytest.fixture
def out(tmp_path: Path) -> Path:
    (tmp_path / "out").mkdir()
    return tmp_path / "out" / "image.png"


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1000])


def empty(file: Path) -> None:
    file.write_bytes(b"")


def header_beyond_the_file(file: Path) -> None:
    file.write_bytes(struct.pack("<Q", 10**9) + file.read_bytes()[8:])


def pickle(file: Path) -> None:
    torch.save({"weight": torch.zeros(2)}, file)


def edit(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    """Changes the weights and saves them again."""

    def damage(file: Path) -> None:
        tensors = load_file(file)
        change(tensors)
        save_file(tensors, file)

    return damage


def edit_header(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    def damage(file: Path) -> None:
        raw = file.read_bytes()
        length = struct.unpack("<Q", raw[:8])[0]
        header = json.loads(raw[8 : 8 + length])
        change(header)
        text = json.dumps(header).encode()
        file.write_bytes(struct.pack("<Q", len(text)) + text + raw[8 + length :])

    return damage


PROJECTION = "layers.1.feed_forward.w1.weight"


def overlap(header: dict[str, Any]) -> None:
    names = [name for name in header if name != "__metadata__"]
    same = [name for name in names if header[name]["shape"] == header[names[0]]["shape"]]
    header[same[1]] = header[same[0]]


def set_nan(tensors: dict[str, Any], value: float = float("nan")) -> None:
    tensors[PROJECTION][3, 5] = value


DAMAGES = {
    "truncated": (truncate, "truncated"),
    "empty": (empty, "empty"),
    "header beyond the file": (header_beyond_the_file, "truncated"),
    "pickle": (pickle, "pickle"),
    "overlap": (edit_header(overlap), "overlaps"),
    "absurd shape": (edit_header(lambda header: header[PROJECTION].update(shape=[2**40, 2**40])), "needs"),
    "missing tensor": (edit(lambda tensors: tensors.pop(PROJECTION)), f"tensor {PROJECTION} missing"),
    "wrong shape": (edit(lambda t: t.update({PROJECTION: t[PROJECTION][:10].contiguous()})), PROJECTION),
    "NaN": (edit(set_nan), f"{PROJECTION} holds NaN"),
    "infinity": (edit(lambda tensors: set_nan(tensors, float("inf"))), f"{PROJECTION} holds NaN or infinite"),
    "not UTF-8": (lambda file: file.write_bytes(struct.pack("<Q", 4) + b"\xff\xfe\xff\xfe"), "JSON in UTF-8"),
    "broken JSON": (lambda file: file.write_bytes(struct.pack("<Q", 4) + b'{"a"'), "JSON in UTF-8"),
    "Lumina2": (edit(lambda t: t.update({"layers.0.adaLN_modulation.1.weight": torch.zeros(2)})), "Lumina"),
    "Flux": (lambda file: save_file({"double_blocks.0.x": torch.zeros(2)}, file), "Flux"),
    "SDXL": (lambda file: save_file({"input_blocks.0.0.weight": torch.zeros(2)}, file), "SDXL"),
}


@pytest.mark.slow
@pytest.mark.parametrize("verb", ["generate", "quantize"])
@pytest.mark.parametrize("name", DAMAGES)
def test_damaged_transformer(model: Path, out: Path, refused: Refused, name: str, verb: str) -> None:
    damage, says = DAMAGES[name]
    damage(only_file(model / "transformer"))
    if verb == "generate":
        line = refused("generate", "cat", "--model", model, "-o", out, *SMALL)
    else:
        line = refused("quantize", model, "-o", out.parent / "q8_0", "--to", "q8_0")
    assert says in line
    assert list(out.parent.iterdir()) == []


@pytest.mark.parametrize(
    ("part", "lost", "named"),
    [
        ("transformer", "layers.1.", "layers.1.attention.to_q.weight and 14 more"),
        ("transformer", "noise_refiner.0.", "noise_refiner.0.attention.to_q.weight and 14 more"),
        ("text_encoder", "model.layers.1.", "layers.1.self_attn.q_proj.weight and 10 more"),
        ("vae", "decoder.conv_norm_out.", "decoder.conv_norm_out.weight and 1 more"),
    ],
)
def test_what_is_missing_is_told_before_anything_is_computed(
    model: Path, out: Path, refused: Refused, monkeypatch: pytest.MonkeyPatch, part: str, lost: str, named: str
) -> None:
    monkeypatch.setattr(Encode, "run", lambda *_: pytest.fail("it began"))
    edit(lambda tensors: [tensors.pop(name) for name in list(tensors) if name.startswith(lost)])(
        only_file(model / part)
    )
    for line in (
        refused("generate", "cat", "--model", model, "-o", out, *SMALL),
        refused("plan", "--model", model, "--gpu", "RTX 3060 Laptop"),
    ):
        assert f"{named} missing; the file is incomplete, so get it again" in line


def test_two_spellings_of_one_tensor(model: Path, out: Path, refused: Refused) -> None:
    edit(lambda t: t.update({"x_embedder.weight": t["all_x_embedder.2-1.weight"].clone()}))(
        only_file(model / "transformer")
    )
    assert "twice" in refused("generate", "cat", "--model", model, "-o", out, *SMALL)


def test_no_terminal_escape_gets_into_a_message(tmp_path: Path, refused: Refused) -> None:
    line = refused("inspect", tmp_path / "\x1b[2Jfile.gguf")
    assert line.isprintable()


def test_damaged_config(model: Path, out: Path, refused: Refused) -> None:
    config = model / "transformer" / "config.json"
    values = json.loads(config.read_text())
    for text, says in (
        (b"\xff\xfe", "not JSON in UTF-8"),
        (b'{"dim":', "not JSON in UTF-8"),
        (b"[]", "not a JSON object"),
        (json.dumps({**values, "dim": 3840}).encode(), "dim is 3840, the tensors say 256"),
        (json.dumps({**values, "rope_theta": "high"}).encode(), "rope_theta: got 'high'"),
        (json.dumps({**values, "axes_dims": [1, 2, 3]}).encode(), "does not add up"),
        (json.dumps({**values, "norm_eps": -1}).encode(), "norm_eps"),
        (json.dumps({**values, "norm_eps": float("nan")}).encode(), "norm_eps: got nan"),
        (json.dumps({**values, "rope_theta": 10**400}).encode(), "rope_theta: got 1000"),
    ):
        config.write_bytes(text)
        assert says in refused("generate", "cat", "--model", model, "-o", out, *SMALL)


def test_text_encoder_of_another_width(tiny: Path, tmp_path: Path, out: Path, refused: Refused) -> None:
    """A Qwen3 of another size: every shape is consistent, but the transformer expects another width."""
    narrow = {}
    for name, tensor in load_file(only_file(tiny / "text_encoder")).items():
        narrow[name] = tensor[tuple(slice(0, 64) if size == 128 else slice(None) for size in tensor.shape)].contiguous()
    for name in [name for name in narrow if name.endswith((".q_proj.weight", ".k_proj.weight", ".v_proj.weight"))]:
        narrow[name] = load_file(only_file(tiny / "text_encoder"))[name][:, :64].contiguous()
    for name in [name for name in narrow if name.endswith(".o_proj.weight")]:
        narrow[name] = load_file(only_file(tiny / "text_encoder"))[name][:64].contiguous()
    save_file(narrow, tmp_path / "encoder.safetensors")
    line = refused("generate", "cat", "--model", tiny, "--text-encoder", tmp_path / "encoder.safetensors", "-o", out)
    assert "width of the text encoder: got 64, expected 128" in line


@pytest.mark.slow  # a picture for each flip
def test_flipped_bytes_in_the_body_never_crash(model: Path, out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each flip gives an image or the name of a tensor that is not finite."""
    generator = torch.Generator().manual_seed(0)
    file = only_file(model / "transformer")
    sound = file.read_bytes()
    start = 8 + struct.unpack("<Q", sound[:8])[0]
    codes = set()
    for _ in range(10):
        raw = bytearray(sound)
        for at in torch.randint(start, len(raw), (2000,), generator=generator).tolist():
            raw[at] ^= 0xFF
        file.write_bytes(raw)
        code = run([str(arg) for arg in ("generate", "cat", "--model", model, "-o", out, *SMALL, "--steps", 1)])
        said = capsys.readouterr().err
        assert code == 0 or (code == 2 and "NaN or infinite values" in said and "tensor" in said)
        codes.add(code)
    assert codes

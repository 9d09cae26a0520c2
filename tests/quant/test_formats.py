"""Every format, against code that we did not write: gguf-py for ggml's blocks, a few lines of numpy for int8."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from oracles import relative_error
from packing import rotated
from safetensors.torch import save_file
from zimage_kernels import hadamard_rotate
from zimage_kernels.rotation import hadamard_matrix

from zimage_lite.checkpoint.opening import open_tensor_file
from zimage_lite.checkpoint.packed import stored_tensors
from zimage_lite.convert.recipe import target, targets
from zimage_lite.errors import FileFormatError, UserError
from zimage_lite.quant import blocks as ggml_blocks
from zimage_lite.quant import rows_cpu
from zimage_lite.quant import tensor as tensor_module
from zimage_lite.quant.comfy import from_marker
from zimage_lite.quant.formats import DTYPE_BYTES, FORMATS, GGML_TYPES
from zimage_lite.quant.tensor import TORCH_DTYPES, QTensor

OURS = ("q8_0", "q4_0", "q4_1")  # the simplest of ggml's types; the others have a test file of their own
WRITABLE = tuple(name for name, row in FORMATS.items() if row.writable)

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # gguf-py divides by zero and overflows in passing


def ggml_type(name: str) -> gguf.GGMLQuantizationType:
    if not hasattr(gguf.GGMLQuantizationType, name.upper()):
        pytest.skip(f"this gguf-py does not know {name}")
    return gguf.GGMLQuantizationType[name.upper()]


def pack(name: str, x: np.ndarray) -> np.ndarray:
    return FORMATS[name].codec.quantize(torch.from_numpy(x.copy()), {})[""].numpy()


def unpack(name: str, blocks: np.ndarray) -> np.ndarray:
    row = FORMATS[name]
    part = torch.from_numpy(blocks.copy()).view(TORCH_DTYPES[row.dtype])
    _, block, block_bytes = GGML_TYPES[name]
    columns = blocks.shape[1] // block_bytes * block
    return row.codec.dequantize({"": part}, columns, {}).numpy()


def halves() -> np.ndarray:
    """Blocks whose scale is a power of two and whose elements lie on the border of two codes, or just beside it."""
    rows = []
    for extremes in ((127.0,), (-127.0,), (-8.0,), (8.0,), (0.0, 15.0)):
        borders = np.arange(-15.5, 16.5)[len(extremes) :].astype(np.float32).clip(min(-8, *extremes), max(extremes))
        for beside in (borders, np.nextafter(borders, np.float32(99)), np.nextafter(borders, np.float32(-99))):
            rows += [np.concatenate((extremes, beside)) * scale for scale in (1, 2.0**-9, 2.0**7)]
    return np.stack(rows)


def hard_inputs() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(7)
    normal = rng.normal(0, 1, (64, 256))
    signs = np.where(rng.random((16, 64)) < 0.5, -1.0, 1.0)
    cases = {
        "a million": rng.normal(0, 0.02, (1024, 1024)),
        "zeros": np.zeros((4, 64)),
        "minus zeros": -np.zeros((4, 64)),
        "equal": np.full((4, 64), 0.37),
        "equal, negative": np.full((4, 64), -0.37),
        "all +m or -m": 0.3 * signs,
        "extremes tied": np.where(rng.random((16, 64)) < 0.1, 2.0 * signs, normal[:16, :64].clip(-2, 2)),
        "one of 32": np.eye(32) * -3,
        "positive": abs(normal),
        "negative": -abs(normal),
        "outliers": np.where(rng.random((64, 256)) < 0.02, 1e4, 1e-4) * normal,
        "borders": halves(),
        "scale below float16's normal": normal * 1e-5,
        "scale rounds to 0": normal * 1e-10,
        "very small": normal * 1e-30,
        "large": normal * 1e3,
        "scale overflows float16": normal * 1e7,
        "very large": normal * 1e37,
        "largest": np.full((2, 32), np.finfo(np.float32).max),
        "integers": rng.integers(-127, 128, (64, 256)),
    }
    return {name: np.ascontiguousarray(x, dtype=np.float32) for name, x in cases.items()}


HARD = hard_inputs()


@pytest.mark.parametrize("case", HARD)
@pytest.mark.parametrize("name", OURS)
def test_blocks_are_those_of_gguf_py(name: str, case: str) -> None:
    x = HARD[case]
    truth = gguf.quantize(x, ggml_type(name))
    np.testing.assert_array_equal(pack(name, x), truth)
    np.testing.assert_array_equal(unpack(name, truth), gguf.dequantize(truth, ggml_type(name)))


@pytest.mark.parametrize("size", [1e-38, 1e-40, 1e-45])
@pytest.mark.parametrize("name", OURS)
def test_denormal_weights_become_zero(name: str, size: float) -> None:
    """1 / scale overflows, in gguf-py as well, and the codes are anybody's; the float16 scale of 0 makes up for it."""
    x = (np.random.default_rng(8).normal(0, 1, (64, 64)) * size).astype(np.float32)
    theirs = gguf.dequantize(gguf.quantize(x, ggml_type(name)), ggml_type(name))
    ours = unpack(name, pack(name, x))
    assert np.all(ours == 0) and np.all(theirs == 0)


@pytest.mark.parametrize("case", HARD)
@pytest.mark.parametrize("name", ["q8_0", "q4_0"])
def test_the_torch_version_makes_the_bytes_of_the_compiled_one(name: str, case: str) -> None:
    """Elsewhere than on the CPU it is what runs. Codes of blocks whose scale is 0 or infinite are anybody's."""
    x = torch.from_numpy(HARD[case]).reshape(-1, 32)
    compiled, plain = rows_cpu.PACK[name](x), ggml_blocks.PACK[name](x)
    scales = plain[:, :2].clone().view(torch.float16)
    assert torch.equal(compiled[:, :2].clone().view(torch.float16).abs(), scales.abs())
    sound = (torch.isfinite(scales) & (scales != 0)).squeeze(1)
    assert torch.equal(compiled[sound], plain[sound])


@pytest.mark.parametrize("group", [0, 16, 64, 256, 1024])
def test_the_torch_version_of_int8_agrees_with_the_compiled_one(group: int) -> None:
    x = torch.randn(40, 2048, generator=torch.Generator().manual_seed(3)) * 0.02
    codes, scale = rows_cpu.pack_int8(x, group)
    wide = hadamard_rotate(x, group) if group else x
    true_scale = wide.abs().amax(1, keepdim=True) / 127
    torch.testing.assert_close(scale, true_scale, rtol=2e-6, atol=0)
    exact = wide / true_scale
    # The rotation adds up in another order, so what lies within 1e-3 of a border may fall to either side.
    assert (codes - exact).abs().max() <= 0.5 + 1e-3


@pytest.mark.parametrize("name", OURS)
def test_zeros_of_either_sign_become_zero(name: str) -> None:
    """Which sign the scale gets depends on which zero a vector instruction finds first; the values do not."""
    x = np.where(np.random.default_rng(9).random((16, 64)) < 0.5, -0.0, 0.0).astype(np.float32)
    assert np.all(unpack(name, pack(name, x)) == 0)


@pytest.mark.parametrize("name", GGML_TYPES)
def test_any_bytes_are_unpacked_as_gguf_py_does(name: str) -> None:
    kind, row_bytes = ggml_type(name), 12 * GGML_TYPES[name][2]
    blocks = np.random.default_rng(10).integers(0, 256, (40, row_bytes), dtype=np.uint8)
    try:
        truth = gguf.dequantize(blocks, kind)
    except NotImplementedError:  # only what our own codecs know
        truth = blocks.view(np.float64).astype(np.float32)
        assert name == "f64"
    assert truth.shape == (40, 12 * GGML_TYPES[name][1])
    np.testing.assert_array_equal(unpack(name, blocks), truth)


def test_a_type_that_gguf_py_cannot_unpack_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object) -> None:
        raise NotImplementedError

    monkeypatch.setattr(gguf, "dequantize", refuse)
    with pytest.raises(UserError, match="ggml type iq3_xxs"):
        unpack("iq3_xxs", np.zeros((1, 98), dtype=np.uint8))


@pytest.mark.parametrize("name", GGML_TYPES)
def test_table_of_ggml_types(name: str) -> None:
    kind = ggml_type(name)
    assert GGML_TYPES[name] == (kind.value, *gguf.GGML_QUANT_SIZES[kind])
    assert FORMATS[name].bits_per_weight(256 * 15) == GGML_TYPES[name][2] * 8 / GGML_TYPES[name][1]


# Relative RMSE of ggml's own quantizers on the same distribution (formats.md, section 10).
@pytest.mark.parametrize(("name", "truth"), [("q8_0", 0.0054), ("q4_0", 0.0866), ("q4_1", 0.0783)])
def test_quantization_error(name: str, truth: float) -> None:
    assert error_of(name) == pytest.approx(truth, rel=0.03)


def test_quantization_error_of_int8() -> None:
    assert error_of("int8") <= 2 * error_of("q8_0")


def error_of(name: str) -> float:
    x = torch.randn(8, 3840, generator=torch.Generator().manual_seed(11)) * 0.02
    return relative_error(quantized(name, x).dequantize(), x)


def quantized(name: str, x: torch.Tensor) -> QTensor:
    row = FORMATS[name]
    options = row.codec.options(x.shape[1])
    return QTensor(row, tuple(x.shape), row.codec.quantize(x, options), options)


@pytest.mark.parametrize(
    ("name", "bits"),
    [("f32", 32), ("bf16", 16), ("f16", 16), ("q8_0", 8.5), ("q4_0", 4.5), ("q4_1", 5), ("int8", 8 + 32 / 3840),
     ("q6_k", 6.5625), ("q5_k", 5.5), ("q5_1", 6), ("q5_0", 5.5), ("q4_k", 4.5), ("q3_k", 3.4375), ("q2_k", 2.625),
     ("iq4_nl", 4.5), ("iq4_xs", 4.25), ("bnb-int8", 8 + (32 * 3840 + 8) / 3840**2), ("fp8", 8 + 32 / 3840**2)],
)  # fmt: skip
def test_bits_per_weight(name: str, bits: float) -> None:
    assert FORMATS[name].bits_per_weight() == pytest.approx(bits, rel=1e-12)


@pytest.mark.parametrize("blocks", [1, 3, 24])
@pytest.mark.parametrize("name", WRITABLE)
def test_layout_says_what_the_codec_makes(name: str, blocks: int) -> None:
    columns = blocks * FORMATS[name].block
    packed = quantized(name, torch.randn(6, columns))
    layout = FORMATS[name].layout(6, columns)
    assert {suffix: (part.dtype, tuple(part.shape)) for suffix, part in packed.parts.items()} == {
        suffix: (TORCH_DTYPES[dtype], shape) for suffix, (dtype, shape) in layout.items()
    }
    assert all(DTYPE_BYTES[dtype] == TORCH_DTYPES[dtype].itemsize for dtype, _ in layout.values())
    assert packed.nbytes == FORMATS[name].nbytes(6, columns)
    assert packed.dequantize().shape == (6, columns)


@pytest.mark.parametrize("name", WRITABLE)
def test_stored_shapes_are_of_the_same_bytes(name: str) -> None:
    row = FORMATS[name]
    options = row.codec.options(768)
    layout, stored = row.layout(256, 768, options), row.codec.stored(256, 768, options)
    assert {suffix: math.prod(shape) for suffix, shape in stored.items()} == {
        suffix: math.prod(shape) for suffix, (_, shape) in layout.items()
    }


@pytest.mark.parametrize("name", ["q9_0", "", "q4_k", "iq3_xxs", "nvfp4", "f64", "f32", "../formats", "keep"])
def test_unknown_target_names_the_known_ones(name: str) -> None:
    with pytest.raises(UserError) as caught:
        target(name, "--some-flag")
    line = str(caught.value)
    assert line.startswith("--some-flag") and f"got {name!r}, expected " in line
    assert line.rpartition("expected ")[2].split(", ") == list(targets())


def test_targets_may_be_spelled_in_capitals() -> None:
    assert [target(name.upper()).name for name in targets()] == list(targets())


# int8: ComfyUI's int8_tensorwise with ConvRot, from its description alone (formats.md, section 5.2).
GROUPS = {256: 512, 64: 192, 16: 80, 0: 682}  # group -> columns for which it is chosen


def int8_inputs(columns: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(12)
    normal = rng.normal(0, 0.02, (96, columns))
    cases = {
        "normal": normal,
        "outliers": normal * np.where(rng.random(columns) < 0.01, 100, 1),
        "zeros": 0 * normal,
        "equal": np.full((4, columns), -0.37),
        "small": normal * 1e-25,
        "large": normal * 1e25,
        "rows of many sizes": normal * 10.0 ** rng.integers(-12, 12, (96, 1)),
    }
    return {name: x.astype(np.float32) for name, x in cases.items()}


@pytest.mark.parametrize("case", int8_inputs(16))
@pytest.mark.parametrize("group", GROUPS)
def test_int8_codes_are_those_of_the_reference(group: int, case: str) -> None:
    x = int8_inputs(GROUPS[group])[case]
    packed = quantized("int8", torch.from_numpy(x))
    assert packed.options == {"group": group}
    wide = rotated(x, group)
    scale = np.maximum(abs(wide).max(axis=1, keepdims=True) / 127, 1e-30)
    np.testing.assert_allclose(packed.parts["_scale"].numpy(), scale, rtol=2e-6)
    exact, codes = wide / scale, packed.parts[""].numpy().astype(np.float64)
    torn = abs(abs(exact - np.floor(exact)) - 0.5) < 1e-4  # float32 may round these to either side
    assert torn.mean() < 1e-3
    np.testing.assert_array_equal(codes[~torn], np.rint(exact)[~torn])
    assert abs(codes - exact).max() <= 0.5 + 1e-4


def test_int8_rounds_half_to_even() -> None:
    x = torch.tensor([[127.0, 0.5, 1.5, 2.5, 3.5, -0.5, -1.5, -2.5, 126.5, -126.5]])
    codes = FORMATS["int8"].codec.quantize(x, {"group": 0})[""]
    assert codes.tolist() == [[127, 0, 2, 2, 4, 0, -2, -2, 126, -126]]


@pytest.mark.parametrize("group", GROUPS)
def test_int8_error_is_that_of_rounding(group: int) -> None:
    x = int8_inputs(GROUPS[group])["normal"]
    packed = quantized("int8", torch.from_numpy(x))
    error = packed.dequantize().numpy().astype(np.float64) - x
    steps = rotated(error, group) / packed.parts["_scale"].numpy()  # a rotation keeps lengths, so look before it
    assert abs(steps).max() <= 0.5 + 1e-3
    assert steps.std() == pytest.approx(12**-0.5, rel=0.02)  # of a uniform distribution of width 1


def test_rotation_is_what_makes_outliers_harmless() -> None:
    x = torch.from_numpy(int8_inputs(512)["outliers"])
    row, plain = FORMATS["int8"], {"group": 0}
    unrotated = QTensor(row, tuple(x.shape), row.codec.quantize(x, plain), plain)
    assert relative_error(quantized("int8", x).dequantize(), x) < 0.5 * relative_error(unrotated.dequantize(), x)


@pytest.mark.parametrize("group", [4, 16, 64, 256])
def test_hadamard_rotation(group: int) -> None:
    x = torch.randn(3, 5, 2 * group, dtype=torch.float64)
    once = hadamard_rotate(x, group)
    np.testing.assert_allclose(once.flatten(0, 1).numpy(), rotated(x.flatten(0, 1).numpy(), group), rtol=0, atol=1e-12)
    torch.testing.assert_close(hadamard_rotate(once, group), x, rtol=0, atol=1e-12)  # its own inverse
    torch.testing.assert_close(once.norm(dim=-1), x.norm(dim=-1), rtol=1e-12, atol=0)  # orthogonal
    h = hadamard_matrix(group).double()
    assert torch.equal(h @ h.T, torch.eye(group, dtype=torch.float64))  # entries are powers of two: exact


@pytest.mark.parametrize("group", [2, 32, 128, 100])
def test_hadamard_groups_are_powers_of_four(group: int) -> None:
    with pytest.raises(ValueError, match=f"got {group}, expected a power of 4"):
        hadamard_rotate(torch.ones(1, group), group)


@pytest.mark.parametrize("columns", [3840, 10240, 512, 192, 80, 682, 16, 8])
def test_int8_marker_says_how_to_undo_the_rotation(columns: int) -> None:
    codec = FORMATS["int8"].codec
    options = codec.options(columns)
    marker = codec.marker(options)
    assert marker["format"] == "int8_tensorwise"
    assert ("convrot" in marker) == (columns % 16 == 0)
    assert from_marker(marker, columns, "here") == options
    assert from_marker({"format": "int8_tensorwise", "params": marker}, columns, "here") == options


@pytest.mark.parametrize("group", [0, -256, 32, 1024, "256", 256.0, None, [256]])
def test_int8_marker_with_an_impossible_group_is_refused(group: object) -> None:
    with pytest.raises(FileFormatError, match="convrot_groupsize"):
        from_marker({"format": "int8_tensorwise", "convrot": True, "convrot_groupsize": group}, 512, "here")


@pytest.mark.parametrize("group", GROUPS)
def test_int8_linear_is_the_product_with_the_unpacked_weight(group: int) -> None:
    columns = GROUPS[group]
    weight, x = quantized("int8", torch.randn(160, columns) * 0.02), torch.randn(33, columns)
    wide = weight.parts[""].double() * weight.parts["_scale"].double()
    truth = torch.from_numpy(rotated(x.numpy(), group)) @ wide.T
    # Each of `columns` additions, and of `group` more in the rotation, rounds to 24 bits: independent errors of at
    # most 2^-24 of the sum so far add up to 2^-24 * sqrt(columns + group). Twice that is allowed.
    tolerance = 2 * 2**-24 * (columns + group) ** 0.5
    assert relative_error(weight.linear(x), truth) <= tolerance
    assert relative_error(x @ weight.dequantize().T, truth) <= tolerance
    # In bf16 the order of the roundings differs; neither order may be much worse than the other.
    plain = relative_error(x.bfloat16() @ weight.dequantize(torch.bfloat16).T, truth)
    assert relative_error(weight.linear(x.bfloat16()), truth) <= 1.5 * plain


@pytest.mark.parametrize("name", [*OURS, "int8", "bf16"])
def test_linear_in_pieces_is_linear(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    weight, x = quantized(name, torch.randn(50, 512)), torch.randn(7, 512)
    whole = weight.linear(x)
    monkeypatch.setattr(tensor_module, "CPU_PIECE_WEIGHTS", 3 * 512 + 5)
    pieces = weight.linear(x)
    assert pieces.shape == whole.shape == (7, 50)
    assert relative_error(pieces, whole) <= 1e-6  # the matrix product may split its sums differently
    assert relative_error(whole, x @ weight.dequantize().T) <= 2e-6


@pytest.mark.parametrize("name", [*OURS, "int8", "bf16", "f32"])
def test_what_is_not_finite_is_seen(name: str) -> None:
    weight = quantized(name, torch.randn(4, 64))
    assert weight.is_finite()
    part = next((part for part in weight.parts.values() if part.is_floating_point()), weight.parts[""])
    damaged = part.clone()
    if damaged.is_floating_point():
        damaged[2] = float("nan")
    else:
        damaged[2, :2] = torch.tensor([0x00, 0x7C])  # the scale of a block: +infinity in float16
    suffix = next(suffix for suffix, value in weight.parts.items() if value is part)
    assert not replace(weight, parts={**weight.parts, suffix: damaged}).is_finite()


def test_int8_in_float16_does_not_overflow_before_it_is_scaled() -> None:
    """Sums of x times codes reach 3000 times those of x times weights, which reach 10^4 themselves."""
    codec = FORMATS["int8"].codec
    weight, x = torch.randn(64, 3840) * 0.01, torch.randn(4, 3840) * 5000
    parts, options = codec.quantize(weight, codec.options(3840)), codec.options(3840)
    y = codec.linear(x.half(), parts, options)
    truth = x @ codec.dequantize(parts, 3840, options).T
    assert torch.isfinite(y).all()
    assert (y.float() - truth).norm() / truth.norm() <= 2e-3  # of float16's own 5e-4 per rounding


def test_one_scale_for_all_rows_is_read_for_any_of_them(tmp_path: Path) -> None:
    marker = torch.frombuffer(bytearray(b'{"format":"int8_tensorwise"}'), dtype=torch.uint8)
    tensors = {"a.weight": torch.ones(3, 32, dtype=torch.int8), "a.weight_scale": torch.tensor(0.5)}
    save_file({**tensors, "a.comfy_quant": marker}, tmp_path / "x.safetensors")
    (stored,) = stored_tensors(open_tensor_file(tmp_path / "x.safetensors"))
    assert torch.equal(stored.gather([0, 1, 2]), torch.full((3, 32), 0.5))

"""ggml's K-quants, IQ4 types, q5_0 and q5_1: against the bytes of ggml, against gguf-py, and against ourselves."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from types import ModuleType

import gguf
import golden_ggml
import numba
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from zimage_kernels._numba import compiled

from zimage_lite.quant import blocks, flat, kquants, kquants_cpu, refine, search
from zimage_lite.quant.formats import GGML_TYPES

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # gguf-py multiplies infinities in passing

KQUANTS = tuple(kquants.PACK)
FLAT = tuple(flat.PACK_BEST)
UNPACK = {**kquants.UNPACK, "q5_0": blocks.UNPACK["q5_0"], "q5_1": blocks.UNPACK["q5_1"]}
COMPILED_OR_NOT = pytest.mark.parametrize("searches", [kquants_cpu, search], ids=["compiled", "torch"])
# Where the float16 scales of a block are.
HALVES = {
    "q2_k": (80, 82), "q3_k": (108,), "q4_k": (0, 2), "q5_k": (0, 2), "q6_k": (208,), "iq4_nl": (0,), "iq4_xs": (0,),
    "q5_0": (0,), "q5_1": (0, 2),
}  # fmt: skip
# Relative RMSE of ggml for normally distributed weights; to within a percent, whatever the variance.
GGML_ERROR = {
    "q2_k": 0.297, "q3_k": 0.151, "q4_k": 0.0715, "q5_k": 0.0362, "q6_k": 0.0178, "iq4_nl": 0.0762, "iq4_xs": 0.0768,
}  # fmt: skip


def block_of(name: str) -> int:
    return GGML_TYPES[name][1]


def by_gguf_py(name: str, blocks: np.ndarray) -> np.ndarray:
    return gguf.dequantize(blocks, gguf.GGMLQuantizationType[name.upper()])


def weights(seed: int, tails: bool = False, count: int = 2**16) -> Tensor:
    rng = np.random.default_rng(seed)
    x = rng.standard_t(3, count) if tails else rng.normal(0, 1, count)
    return torch.from_numpy((0.02 * x).astype(np.float32))


def block_errors(name: str, blocks: Tensor, x: Tensor) -> np.ndarray:
    """The squared error of each block."""
    wide = by_gguf_py(name, blocks.numpy()).astype(np.float64)
    return np.square(wide - x.numpy()).sum(1)


@pytest.fixture(scope="module")
def golden() -> dict[str, np.ndarray]:
    with np.load(golden_ggml.GOLDEN) as file:
        return dict(file)


def test_golden_inputs_are_those_of_then(golden: dict[str, np.ndarray]) -> None:
    assert golden_ggml.checksum(golden_ggml.inputs()) == golden["checksum"]


def assert_golden(golden: dict[str, np.ndarray], name: str, pack: Callable[[Tensor], Tensor]) -> None:
    x = torch.from_numpy(np.stack(list(golden_ggml.inputs().values())))
    packed = pack(x.view(-1, block_of(name))).numpy().reshape(len(x), -1)
    same = (packed == golden[name]).all(1)
    assert same.all(), [case for case, equal in zip(golden_ggml.inputs(), same, strict=True) if not equal]


@COMPILED_OR_NOT
@pytest.mark.parametrize("name", KQUANTS)
def test_reference_gives_ggml_bytes(golden: dict[str, np.ndarray], name: str, searches: ModuleType) -> None:
    assert_golden(golden, name, lambda x: kquants.pack(name, x, "reference", searches))


@pytest.mark.parametrize("name", ["q5_0", "q5_1"])
def test_q5_gives_ggml_bytes(golden: dict[str, np.ndarray], name: str) -> None:
    assert_golden(golden, name, blocks.PACK[name])


@pytest.mark.parametrize("name", UNPACK)
def test_unpack_is_gguf_py(name: str) -> None:
    rng = np.random.default_rng(3)
    blocks = rng.integers(0, 256, (64, GGML_TYPES[name][2]), dtype=np.uint8)
    for at in HALVES[name]:
        scales = (rng.normal(0, 1, 64) * 10.0 ** rng.integers(-7, 4, 64)).astype(np.float16)
        blocks[:, at : at + 2] = scales[:, None].view(np.uint8)
    ours = UNPACK[name](torch.from_numpy(blocks)).numpy()
    theirs = by_gguf_py(name, blocks)
    assert ours.dtype == np.float32
    assert np.array_equal(ours.view(np.int32), theirs.view(np.int32))


@pytest.mark.parametrize("tails", [False, True], ids=["normal", "heavy tails"])
@pytest.mark.parametrize("name", KQUANTS)
def test_efforts_pay(name: str, tails: bool) -> None:
    x = weights(1, tails).view(-1, block_of(name))
    errors = {effort: block_errors(name, kquants.PACK[name](x, effort), x) for effort in kquants.EFFORTS}
    relative = {effort: np.sqrt(error.sum() / x.double().square().sum().item()) for effort, error in errors.items()}
    assert (errors["best"] <= errors["reference"] * (1 + 1e-6)).all()
    assert relative["best"] < 0.98 * relative["reference"]
    assert relative["fast"] < 1.03 * relative["reference"]
    if not tails:
        assert relative["reference"] == pytest.approx(GGML_ERROR[name], rel=0.02)


@pytest.mark.parametrize("tails", [False, True], ids=["normal", "heavy tails"])
@pytest.mark.parametrize("name", FLAT)
def test_best_of_flat_blocks_beats_ggml(name: str, tails: bool) -> None:
    x = weights(2, tails).view(-1, 32)
    ggml = torch.from_numpy(gguf.quantize(x.numpy(), gguf.GGMLQuantizationType[name.upper()]))
    best = flat.PACK_BEST[name](x)
    assert best.shape == ggml.shape
    before, after = block_errors(name, ggml, x), block_errors(name, best, x)
    assert (after <= before * (1 + 1e-6)).all()
    assert np.sqrt(after.sum() / before.sum()) < 0.98


def test_q8_0_best_never_stores_minus_128() -> None:
    x = torch.cat((weights(4), torch.full((32,), -1.0), torch.full((32,), 1.0))).view(-1, 32)
    assert flat.PACK_BEST["q8_0"](x)[:, 2:].view(torch.int8).min() == -127


def odd_rows(seed: int, exponent: int) -> Tensor:
    """768 weights around 10^exponent, some runs of them zero, equal or out of line."""
    rng = np.random.default_rng(seed)
    x = rng.standard_t(1.5, (48, 16))
    x[rng.random(48) < 0.15] = 0
    x[rng.random(48) < 0.15] *= 1e-3
    flat_runs = rng.random(48) < 0.15
    x[flat_runs] = x[flat_runs, :1]
    return torch.from_numpy((x / abs(x).max() * 10.0**exponent).astype(np.float32).reshape(-1))


@pytest.mark.parametrize("effort", kquants.EFFORTS)
@pytest.mark.parametrize("name", KQUANTS)
@settings(max_examples=4, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), exponent=st.integers(-42, 4))
def test_torch_and_compiled_agree(name: str, effort: str, seed: int, exponent: int) -> None:
    x = odd_rows(seed, exponent).view(-1, block_of(name))
    compiled = kquants.pack(name, x, effort, kquants_cpu)
    assert torch.equal(compiled, kquants.pack(name, x, effort, search))
    wide = kquants.UNPACK[name](compiled)
    assert wide.isfinite().all()
    # The worst case is one scale for a super-block of values a thousand times apart, in the smallest of which all
    # turns to noise; and scales that float16 rounds to zero.
    assert (wide - x).abs().max() <= 2 * x.abs().max() + 1e-6


@pytest.mark.parametrize("name", FLAT)
@settings(max_examples=3, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), exponent=st.integers(-42, 4))
def test_torch_and_compiled_agree_on_flat_blocks(name: str, seed: int, exponent: int) -> None:
    x = odd_rows(seed, exponent).view(-1, 32)
    compiled = flat.pack_best(name, x, kquants_cpu)
    assert torch.equal(compiled, flat.pack_best(name, x, search))
    assert np.isfinite(by_gguf_py(name, compiled.numpy())).all()


@pytest.mark.parametrize("name", ["q4_k", "q6_k", "iq4_xs"])
def test_a_block_does_not_depend_on_its_neighbours(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    x = weights(5, count=20 * 256).view(-1, 256)
    together = kquants.PACK[name](x, "best")
    monkeypatch.setattr(refine, "CPU_PIECE_WEIGHTS", 3 * 256)
    assert torch.equal(kquants.PACK[name](x, "best"), together)
    assert torch.equal(kquants.PACK[name](x[7:8], "best"), together[7:8])


def test_threads_do_not_disturb_each_other() -> None:
    rows = [weights(seed).view(-1, 256) for seed in range(4)]
    jobs = [(name, x) for x in rows for name in ("q4_k", "q6_k", "iq4_xs")]
    alone = [kquants.PACK[name](x, "reference") for name, x in jobs]
    with ThreadPoolExecutor(2) as pool:
        at_once = list(pool.map(lambda job: kquants.PACK[job[0]](job[1], "reference"), jobs))
    assert all(map(torch.equal, alone, at_once))


def test_no_folder_for_compiled_code(monkeypatch: pytest.MonkeyPatch) -> None:
    """numba refuses cache=True where it finds nothing to write to; then the code is compiled in each run."""
    real = numba.njit

    def without_a_folder(cache: bool = False, **options: object) -> object:
        if cache:

            def refuse(function: object) -> object:
                raise RuntimeError("cannot cache function: no locator available")

            return refuse
        return real(**options)

    monkeypatch.setattr(numba, "njit", without_a_folder)
    assert compiled(lambda x: x + 1)(41) == 42


def test_unknown_effort() -> None:
    with pytest.raises(ValueError, match="expected one of"):
        kquants.PACK["q4_k"](torch.zeros(1, 256), "thorough")

"""Quantizers that know what weights will be multiplied by: against ggml's bytes, and against plain arithmetic."""

from __future__ import annotations

from types import ModuleType

import gguf
import golden_ggml
import numpy as np
import pytest
import torch
from marking import always
from torch import Tensor

from zimage_lite.quant import flat, kquants, kquants_cpu, search
from zimage_lite.quant.compensate import improve, rounded
from zimage_lite.quant.formats import EFFORTS, FORMATS, GGML_TYPES
from zimage_lite.quant.importance import Importance
from zimage_lite.quant.inputs import DAMPING, LEAST, Inputs

TYPES = tuple(golden_ggml.WEIGHTED_TYPES)
COMPENSATED = ("q2_k", "q3_k", "q4_k", "q5_k", "q6_k", "iq4_xs", "iq4_nl", "q4_0", "q4_1", "q5_0", "q5_1", "q8_0")


def by_gguf_py(name: str, packed: Tensor) -> Tensor:
    return torch.from_numpy(gguf.dequantize(packed.numpy(), gguf.GGMLQuantizationType[name.upper()]))


@pytest.fixture(scope="module")
def golden() -> dict[str, np.ndarray]:
    with np.load(golden_ggml.WEIGHTED) as file:
        return dict(file)


@pytest.mark.parametrize("name", TYPES)
def test_reference_gives_ggml_bytes(golden: dict[str, np.ndarray], name: str) -> None:
    x = torch.from_numpy(np.stack(list(golden_ggml.inputs().values())))
    inputs = Inputs(torch.from_numpy(golden_ggml.importance()))
    same = (FORMATS[name].codec.quantize(x, {}, "reference", inputs)[""].numpy() == golden[name]).all(1)
    assert same.all(), [case for case, equal in zip(golden_ggml.inputs(), same, strict=True) if not equal]


@pytest.mark.parametrize("name", always("q3_k", "q4_k", of=[name for name in TYPES if name != "q8_0"]))
@pytest.mark.parametrize("effort", always("reference", of=EFFORTS))
def test_torch_and_compiled_agree(name: str, effort: str) -> None:
    x = torch.from_numpy(np.stack(list(golden_ggml.inputs().values())))
    block = GGML_TYPES[name][1]
    importance = Importance.of(name, x, torch.from_numpy(golden_ggml.importance()), block)

    def packed(searches: ModuleType) -> Tensor:
        if name in kquants.GRIDS:
            return kquants.pack(name, x.view(-1, block), effort, searches, importance)
        pack = flat.pack_best if effort == "best" else flat.pack_weighted
        return pack(name, x.view(-1, block), searches=searches, importance=importance)

    assert torch.equal(packed(kquants_cpu), packed(search))


def weights(seed: int, rows: int = 16, columns: int = 512) -> Tensor:
    rng = np.random.default_rng(seed)
    return torch.from_numpy((0.02 * rng.standard_t(4, (rows, columns))).astype(np.float32))


def inputs(seed: int, columns: int = 512, width: int = 512) -> Inputs:
    """Of channels that go together, some of them much larger than the others."""
    rng = np.random.default_rng(seed)
    x = rng.normal(0, 1, (4096, columns // 4)) @ rng.normal(0, 1, (columns // 4, columns))
    x = (x + rng.normal(0, 2, x.shape)) * np.where(rng.random(columns) < 0.02, 30, 1)
    blocks = [x[:, at : at + width].T @ x[:, at : at + width] / len(x) for at in range(0, columns, width)]
    return Inputs(
        torch.from_numpy(np.square(x).mean(0).astype(np.float32)),
        torch.from_numpy(np.stack(blocks).astype(np.float32)),
    )


@pytest.mark.parametrize("name", always("q3_k", "q4_0", "q4_k", of=[name for name in TYPES if name != "q8_0"]))
def test_best_never_weighs_worse(name: str) -> None:
    x, known = weights(1), Inputs(inputs(1).squares)
    error = {}
    for effort in ("reference", "best"):
        packed = FORMATS[name].codec.quantize(x, {}, effort, known)[""]
        block = ((by_gguf_py(name, packed) - x).square() * known.squares).double().view(-1, GGML_TYPES[name][1])
        error[effort] = block.sum(1)
    assert (error["best"] <= error["reference"] * (1 + 1e-5)).all()
    assert error["best"].sum() < error["reference"].sum()


@pytest.mark.parametrize("name", always("q2_k", "q4_0", of=COMPENSATED))
@pytest.mark.parametrize("width", [256, 512])
def test_errors_are_made_up_for(name: str, width: int) -> None:
    """By at least a fifth of what comes out wrong."""
    x, known = weights(2), inputs(2, width=width)
    codec = FORMATS[name].codec
    weighted = codec.quantize(x, {}, "best", Inputs(known.squares))[""]
    made_up = codec.quantize(x, {}, "best", known)[""]
    assert made_up.shape == weighted.shape
    errors = [known.error(by_gguf_py(name, packed) - x).sum() for packed in (weighted, made_up)]
    assert errors[1] < 0.8 * errors[0]


class Steps:
    """A grid of even steps, which keeps what it was given."""

    def __init__(self, step: float, columns: int, rows: int) -> None:
        self.step, self.values = step, torch.zeros(columns, rows)

    def __call__(self, column: int, x: Tensor) -> Tensor:
        self.values[column] = (x / self.step).round() * self.step
        return self.values[column]

    def sub_blocks(self) -> list[slice]:
        return []

    def refit(self, sub: int, pull: Tensor, hessian: Tensor) -> Tensor:
        raise NotImplementedError


def dampened(hessian: Tensor) -> Tensor:
    squares = hessian.double().diagonal()
    return hessian.double() + (DAMPING * squares + LEAST * squares.mean()).diag()


@pytest.mark.parametrize(("width", "size"), [(96, 96), (96, 32), (48, 96), (48, 16)])
def test_compensation_is_that_of_the_paper(width: int, size: int) -> None:
    """Column by column with the inverse of what is left of H each time, in float64."""
    x, known = weights(3, 5, 96), inputs(3, 96, width)
    seen, columns = list[Tensor](), x.t().contiguous()
    for span in known.spans(size):
        own, columns = columns[: len(span.hessian)].clone(), columns[len(span.hessian) :]
        blocks = rounded(own, span.factor, size, lambda block, counts: Steps(0.01, size, 5))
        seen += [block.values for block in blocks]
    expected = []
    assert known.hessian is not None
    for at, hessian in zip(range(0, 96, width), known.hessian, strict=True):
        w, left = x[:, at : at + width].double(), dampened(hessian)
        while len(left):
            inverse = torch.linalg.inv(left)
            expected.append((w[:, 0] / 0.01).round() * 0.01)
            off = (w[:, 0] - expected[-1]) / inverse[0, 0]
            w, left = w[:, 1:] - off.unsqueeze(1) * inverse[0, 1:], left[1:, 1:]
    same = torch.isclose(torch.cat(seen).double(), torch.stack(expected), atol=1e-6)
    assert same.float().mean() > 0.99  # float32 may take the other side of a border


def test_no_column_is_left_that_could_be_better() -> None:
    """Until nothing moves: then every other value of a column is worse, counted in float64."""
    x, known = weights(5, 3, 64), inputs(5, 64, 64)
    (span,) = known.spans(32)
    blocks = rounded(x.t().clone(), span.factor, 32, lambda block, counts: Steps(0.02, 32, 3))
    for _ in range(50):
        improve(x.t().contiguous(), blocks, span)
    values = torch.cat([block.values for block in blocks]).t().double()
    hessian = dampened(span.hessian)

    def error(y: Tensor) -> Tensor:
        return ((y - x) @ hessian * (y - x)).sum(1)

    for column in range(64):
        for step in (-0.02, 0.02):
            other = values.clone()
            other[:, column] += step
            assert (error(other) >= error(values) * (1 - 1e-6)).all()


@pytest.mark.parametrize("name", always("q2_k", "q4_0", of=COMPENSATED))
def test_each_round_makes_it_better(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What comes out of it is measured on the bytes, with the damped H that it is about."""
    x, known = weights(6, 4), inputs(6)
    assert known.hessian is not None
    hessian, errors = dampened(known.hessian[0]).float(), []
    for rounds in range(3):
        monkeypatch.setattr("zimage_lite.quant.compensate.ROUNDS", rounds)
        gap = by_gguf_py(name, FORMATS[name].codec.quantize(x, {}, "best", known)[""]) - x
        errors.append((gap @ hessian * gap).sum(1))
    assert (errors[1] < errors[0]).all() and (errors[2] <= errors[1]).all()
    assert errors[2].sum() < 0.9 * errors[0].sum()


def test_error_is_what_comes_out() -> None:
    rng = np.random.default_rng(4)
    x, gap = rng.normal(0, 1, (1000, 64)), torch.from_numpy(rng.normal(0, 1, (3, 64)).astype(np.float32))
    known = Inputs(torch.ones(64), torch.from_numpy((x.T @ x / len(x)).astype(np.float32)).unsqueeze(0))
    measured = torch.from_numpy(np.square(x @ gap.numpy().T).mean(0)).float()
    assert torch.allclose(known.error(gap), measured, rtol=1e-4)
    assert torch.allclose(Inputs(torch.full((64,), 2.0)).error(gap), 2 * gap.square().sum(1), rtol=1e-5)

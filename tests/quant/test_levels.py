"""int4, nf4 and int8 that know what weights will be multiplied by: measured on what is read back."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor
from zimage_kernels import hadamard_rotate

from zimage_lite.quant.formats import FORMATS
from zimage_lite.quant.inputs import Inputs

NAMES, COLUMNS = ("int8", "int4", "nf4"), 512


def weights(rows: int = 24) -> Tensor:
    """With a row of zeros, one that is next to nothing, and one with a single large weight."""
    rng = np.random.default_rng(1)
    x = torch.from_numpy((0.02 * rng.standard_t(4, (rows, COLUMNS))).astype(np.float32))
    x[5], x[6], x[7, 100] = 0, 1e-12, 30
    return x


def known(x: np.ndarray, width: int = COLUMNS) -> Inputs:
    """Of such rows."""
    blocks = [x[:, at : at + width].T @ x[:, at : at + width] / len(x) for at in range(0, COLUMNS, width)]
    hessian = torch.from_numpy(np.stack(blocks).astype(np.float32))
    return Inputs(hessian.diagonal(dim1=1, dim2=2).flatten(), hessian)


def together() -> np.ndarray:
    """Channels that go together, some of them much larger than the others."""
    rng = np.random.default_rng(2)
    x = rng.normal(0, 1, (2048, 128)) @ rng.normal(0, 1, (128, COLUMNS)) + rng.normal(0, 2, (2048, COLUMNS))
    return x * np.where(rng.random(COLUMNS) < 0.02, 30, 1)


def kinds() -> Iterator[Inputs]:
    rng = np.random.default_rng(3)
    yield known(together())
    yield known(together(), 128)  # half a group
    yield known(rng.normal(0, 1, (2048, COLUMNS)))  # hardly together
    yield known(np.eye(COLUMNS))
    yield known(np.diag(np.exp(rng.normal(0, 3, COLUMNS))))
    yield known(rng.normal(0, 1, (8, COLUMNS)))  # of rank 8
    yield known(np.zeros((1, COLUMNS)))


def read_back(name: str, x: Tensor, effort: str, inputs: Inputs | None, **more: int) -> Tensor:
    codec = FORMATS[name].codec
    options = {**codec.options(COLUMNS), **more}
    parts = codec.quantize(x, options, effort, inputs)
    found = {suffix: tuple(part.shape) for suffix, part in parts.items()}
    assert found == {suffix: shape for suffix, (_, shape) in codec.layout(len(x), COLUMNS, options).items()}
    return codec.dequantize(parts, COLUMNS, options)


@pytest.mark.parametrize("name", NAMES)
def test_best_is_never_worse_than_blind(name: str) -> None:
    """In no row, whatever the inputs are; where they go together by four fifths."""
    x = weights()
    blind = read_back(name, x, "reference", None)
    for i, inputs in enumerate(kinds()):
        best = read_back(name, x, "best", inputs)
        before, after = (inputs.error(y - x) for y in (blind, best))
        noise = 1e-8 * inputs.error(x)  # of float32, where rows are exact
        assert torch.isfinite(best).all() and (after <= before * (1 + 1e-4) + noise).all(), i
        assert i != 0 or after.sum() < 0.2 * before.sum()


@pytest.mark.parametrize("name", ["int8", "int4"])
def test_a_rotation_makes_channels_go_together(name: str) -> None:
    """Mean squares are enough to make up for errors, where they differ within a group."""
    x, inputs = weights(), Inputs(known(together()).squares)
    before, after = (inputs.error(read_back(name, x, *how) - x).sum() for how in (("best", None), ("best", inputs)))
    assert after < 0.3 * before


@pytest.mark.parametrize("nested", [0, 256])
def test_scales_are_searched_by_what_errors_count(nested: int) -> None:
    x, inputs = weights(), Inputs(known(together()).squares)
    blind, weighed = (read_back("nf4", x, "reference", own, nested_blocksize=nested) for own in (None, inputs))
    assert inputs.error(weighed - x).sum() < 0.5 * inputs.error(blind - x).sum()


@pytest.mark.parametrize(("width", "group"), [(512, 256), (256, 256), (128, 256), (96, 64), (128, 16)])
def test_inputs_are_rotated_as_weights_are(width: int, group: int) -> None:
    """What comes out of a gap is the same on either side of the rotation, as far as blocks hold the groups."""
    rng = np.random.default_rng(4)
    columns = np.lcm(width, group)
    x = rng.normal(0, 1, (300, columns)).astype(np.float32)
    blocks = np.stack([x[:, at : at + width].T @ x[:, at : at + width] for at in range(0, columns, width)])
    own = Inputs(torch.from_numpy(np.square(x).sum(0)), torch.from_numpy(blocks))
    gap = torch.from_numpy(rng.normal(0, 1, (3, columns)).astype(np.float32))
    found = own.rotated(group)
    assert torch.allclose(found.error(hadamard_rotate(gap, group)), own.error(gap), rtol=1e-4)
    whole = torch.block_diag(*own.hessian if own.hessian is not None else ())
    rotation = torch.block_diag(*[hadamard_rotate(torch.eye(group), group)] * (columns // group))
    assert torch.allclose(found.squares, (rotation @ whole @ rotation).diagonal(), rtol=1e-3)


def test_rows_are_compensated_a_few_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the doubly quantized scales of their own place: 192 blocks of 256 in the first piece, and so on."""
    x, inputs = weights(96), known(together())
    whole = read_back("nf4", x, "best", inputs)
    monkeypatch.setattr("zimage_lite.quant.bnb.PIECE_COMPENSATED", 24 * COLUMNS)
    some = read_back("nf4", x, "best", inputs)
    assert (some == whole).float().mean() > 0.99
    assert torch.allclose(inputs.error(some - x), inputs.error(whole - x), rtol=0.02)

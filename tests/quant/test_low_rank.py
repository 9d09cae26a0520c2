"""Updates of low rank, against the singular value decomposition of the weighted gap in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from zimage_lite.quant.inputs import Inputs
from zimage_lite.quant.low_rank import low_rank

ROWS, COLUMNS = 96, 128


def inputs(width: int) -> Inputs:
    """width: of the blocks that are known; 0: mean squares alone."""
    rng = np.random.default_rng(1)
    x = rng.normal(0, 1, (500, COLUMNS)) @ rng.normal(0, 1, (COLUMNS, COLUMNS)) * np.exp(rng.normal(0, 1, COLUMNS))
    hessian = torch.from_numpy((x.T @ x / len(x)).astype(np.float32))
    blocks = [hessian[at : at + width, at : at + width] for at in range(0, COLUMNS, width or COLUMNS)]
    return Inputs(hessian.diagonal().clone(), torch.stack(blocks) if width else None)


def whole(own: Inputs) -> np.ndarray:
    return (own.squares.diag() if own.hessian is None else torch.block_diag(*own.hessian)).double().numpy()


@pytest.mark.parametrize("width", [0, 32, 128])
@pytest.mark.parametrize("rank", [1, 12])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_is_the_best_of_its_rank(width: int, rank: int, dtype: torch.dtype) -> None:
    """Within 1 % of the least that any could leave, although the spectrum is flat; and it says what it leaves."""
    own = inputs(width)
    gap = torch.from_numpy(np.random.default_rng(2).normal(0, 1, (ROWS, COLUMNS))).to(dtype)
    found = low_rank(gap, own, rank)
    assert found.up.shape == (ROWS, rank) and found.down.shape == (rank, COLUMNS)
    wide, hessian = gap.double().numpy(), whole(own)
    singular = np.linalg.svd(wide @ np.linalg.cholesky(hessian), compute_uv=False)
    least, rest = np.square(singular[rank:]).sum(), wide - (found.up @ found.down).double().numpy()
    left = np.trace(rest @ hessian @ rest.T)
    assert least * (1 - 1e-4) <= left <= 1.01 * least
    assert found.before == pytest.approx(np.square(singular).sum(), rel=1e-4)
    assert found.after == pytest.approx(left, rel=1e-2)


def test_what_leaves_nothing() -> None:
    """A gap of that rank, one of zeros, more rank than there are rows, and inputs that are always zero."""
    rng, own = np.random.default_rng(3), inputs(32)
    thin = torch.from_numpy((rng.normal(0, 1, (ROWS, 4)) @ rng.normal(0, 1, (4, COLUMNS))).astype(np.float32))
    gaps = [(thin, 4), (torch.zeros(ROWS, COLUMNS), 4), (thin[:10].clone(), 40)]
    for gap, rank in gaps:
        found = low_rank(gap, own, rank)
        assert found.up.shape[1] == min(rank, len(gap))
        assert torch.allclose(found.up @ found.down, gap, atol=1e-3)
    silent = low_rank(thin, Inputs(torch.zeros(COLUMNS)), 4)
    assert torch.isfinite(silent.up @ silent.down).all() and silent.after == 0

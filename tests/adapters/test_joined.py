"""Several adapters at once: each adds its change of the original weight, whatever the others do."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from adapted import Wanted, Weights, assert_applied, joined_modules, set_of, side_of
from adapter_files import TINY, Described, size
from torch import Tensor
from trainers import ADAPTERS

from zimage_lite.adapters.joined import by_block, merged
from zimage_lite.adapters.reading import Adapter, open_adapter

Q, W1 = "layers.0.attention.to_q", "layers.0.feed_forward.w1"


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Weights:
    return Weights(tmp_path_factory.mktemp("tiny"))


def of(kind: str, seed: int, module: str = Q) -> Described:
    """An adapter of one linear."""
    made, (rows, columns) = Described(_random=torch.Generator().manual_seed(seed)), size(module)
    if kind == "LoKr":
        made.lokr(module, module, (2, 4))
    elif kind == "LoHa":
        made.loha(module, module, 3, alpha=1.5)
    elif kind == "difference":
        made.change(module, made.add(f"{module}.diff", rows, columns))
        made.biases[module] = made.add(f"{module}.diff_b", rows)
    else:
        made.lora(module, module, 5, alpha=2.0)
    if kind.startswith("DoRA"):
        made.dora(f"{module}.dora_scale", module, "column" in kind, (1, columns) if "column" in kind else (rows, 1))
    return made


def opened(described: list[Described], folder: Path) -> list[Adapter]:
    return [open_adapter(one.write(folder, str(number)), TINY) for number, one in enumerate(described)]


def summed(wanted: list[Wanted], strengths: list[float]) -> Wanted:
    found: Wanted = {}
    for one, m in zip(wanted, strengths, strict=True):
        for module, parts in one.items():
            before = found.get(module, (None, None))
            pairs = zip(before, parts, strict=True)
            found[module] = tuple(a if b is None else m * b if a is None else a + m * b for a, b in pairs)  # type: ignore[assignment]
    return found


STRENGTHS = [0.7, -0.5, 1.5, 2.0, -1.0]
TOGETHER = (
    ("LoRA", "LoRA"),
    ("LoRA", "DoRA by row", "LoKr"),
    ("DoRA by row", "DoRA by row"),
    ("DoRA by column", "LoRA", "DoRA by column"),
    ("LoKr", "LoHa", "LoKr", "difference", "difference"),
)


@pytest.mark.parametrize("module", [Q, W1])
@pytest.mark.parametrize("kinds", TOGETHER, ids=" + ".join)
def test_changes_add_up(kinds: tuple[str, ...], module: str, weights: Weights, tmp_path: Path) -> None:
    described = [of(kind, seed, module) for seed, kind in enumerate(kinds)]
    strengths = STRENGTHS[: len(kinds)]
    wanted = summed([weights.wanted(one) for one in described], strengths)
    assert_applied(list(zip(opened(described, tmp_path), strengths, strict=True)), wanted, weights)


def test_fused_and_split_files_add_up(weights: Weights, tmp_path: Path) -> None:
    """Files for whole models: each module gets what any of them has for it."""
    names = ["native fused", "peft in diffusers", "LoKr fused, rows across q, k, v", "DoRA vector", "OFT of outputs"]
    described = [ADAPTERS[name]() for name in names]
    wanted = summed([weights.wanted(one) for one in described], STRENGTHS)
    assert_applied(list(zip(opened(described, tmp_path), STRENGTHS, strict=True)), wanted, weights)


def test_changes_of_inputs_and_of_outputs_multiply(weights: Weights, tmp_path: Path) -> None:
    """With no second product: W'' = (I + U) W (I + T), as if one came after the other, in either order."""
    rows, columns = of("DoRA by row", 0), of("DoRA by column", 1)
    by_rows, by_columns = (adapter for adapter in opened([rows, columns], tmp_path))
    weight = weights.of(Q)

    def change(*adapters: Adapter) -> Tensor:
        (joined,) = joined_modules([(adapter, 1.0) for adapter in adapters], weights).values()
        return merged(weight, side_of(joined)).double() - weight

    (one,), (other,) = ([side_of(joined_modules([(a, 1.0)], weights)[Q])] for a in (by_rows, by_columns))
    assert one.out_gain is not None and other.in_gain is not None
    both = one.out_gain.double()[:, None] * weight.double() * other.in_gain.double()
    wanted = change(by_rows) + change(by_columns) + both
    assert (change(by_rows, by_columns) - wanted).norm() <= 1e-5 * wanted.norm()


def test_parts_lie_where_they_were_counted(weights: Weights, tmp_path: Path) -> None:
    """Ranks side by side, up to a multiple of 16; in the dtype to compute in, but gains and biases in float32."""
    described = [of(kind, seed) for seed, kind in enumerate(("LoRA", "DoRA by row", "LoHa", "difference"))]
    adapters = set_of(*((adapter, 1.0) for adapter in opened(described, tmp_path)))
    adapters.measure(weights.stored)
    for dtype in (torch.float32, torch.bfloat16):
        joined = adapters.modules(dtype)[Q]
        # Ranks 5, 5 and 9; LoHa's products of 3 by 3.
        assert joined.shapes == {"a": (32, 64), "b": (64, 32), "out_gain": (64,), "dense": (64, 64), "bias": (64,)}
        assert joined.packed_bytes == (2 * 32 * 64 + 64 * 64) * dtype.itemsize + 2 * 64 * 4
        assert joined.flops == 2 * (2 * 32 * 64 + 64 * 64)
        side = side_of(joined)
        assert side.a is not None and side.b is not None and side.bias is not None
        assert side.a.dtype == side.b.dtype == dtype and side.bias.dtype == torch.float32
        assert not side.a[19:].any() and not side.b[:, 19:].any() and side.a[:19].all(1).all()


def test_modules_by_block(tmp_path: Path) -> None:
    """Those of the time are read apart from their block."""
    made = ADAPTERS["ai-toolkit with adaLN"]()
    for module in ("noise_refiner.0.attention.to_q", "cap_embedder.1", "t_embedder.mlp.0"):
        made.lora(module, module)
    modules = set_of((open_adapter(made.write(tmp_path), TINY), 1.0)).modules(torch.float32)
    blocks, rest = by_block(modules.values())
    assert {name: len(own) for name, own in blocks.items()} == {"layers.0": 7, "layers.1": 7, "noise_refiner.0": 1}
    assert [joined.module for joined in rest] == ["cap_embedder.1"]
    own = {joined.module.removeprefix("layers.1.") for joined in by_block(modules.values())[0]["layers.1"]}
    assert own == {
        *(f"attention.to_{x}" for x in ("q", "k", "v", "out.0")),
        *(f"feed_forward.w{i}" for i in (1, 2, 3)),
    }

"""The checks of the self-test: sound kernels pass, and what is sabotaged, raises or cannot be tried is called so."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import zimage_kernels as kernels
from torch import Tensor
from zimage_kernels import Int8Rows

from zimage_lite.doctor.selftest import agreement, checks, process
from zimage_lite.doctor.selftest.checks import CHECKS
from zimage_lite.doctor.selftest.process import Verdict, run_checks

pytest.importorskip("triton")

DEVICE = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")


def verdict_of(op: str) -> Verdict:
    (began, nothing), (ended, verdict) = run_checks(DEVICE, [op])
    assert began == ended == op and nothing is None and verdict is not None
    return verdict


@pytest.mark.parametrize("op", ["linear_int8", "swiglu_int8", "flash_attention", "attention_int8", "add_norm"])
def test_a_sound_kernel_passes(op: str) -> None:
    """norm_rope, quantize_rows, dequantize and requantize take the interpreter seconds: the next test runs three of
    them, and the first goes through the whole process below."""
    assert verdict_of(op) == Verdict("ok")


def off_by(factor: float) -> Callable[[Tensor], Tensor]:
    """One element, by this much of itself. The largest, so that no allowance for small ones hides it."""

    def spoil(y: Tensor) -> Tensor:
        flat = y.clone().flatten()
        at = flat.abs().argmax()
        flat[at] = flat[at] * (1 + factor)
        return flat.view(y.shape)

    return spoil


def one_nan(y: Tensor) -> Tensor:
    return y.flatten().index_fill(0, torch.tensor([5], device=y.device), float("nan")).view(y.shape)


def truncated(rows: Int8Rows) -> Int8Rows:
    """As if rounding were forgotten: codes that are too near zero by one, here a tenth of them."""
    codes = rows.codes.clone().flatten()
    codes[::10] -= codes[::10].sign()
    return Int8Rows(codes.view(rows.codes.shape), rows.scale)


def scaled(rows: Int8Rows) -> Int8Rows:
    return Int8Rows(rows.codes, rows.scale * (1 + 2.0**-11))


# 0.003 is 6 roundings of float16, where one is allowed; attention is allowed two of its sizes.
SABOTAGE: list[tuple[str, Callable[[Any], Any], str]] = [
    ("linear_int8", off_by(0.003), "off by"),
    ("linear_int8", one_nan, "off by inf"),
    ("swiglu_int8", off_by(0.003), "off by"),
    ("project_rows", off_by(0.003), "off by"),
    ("flash_attention", off_by(0.006), "off by"),
    ("attention_int8", one_nan, "off by inf"),
    ("quantize_rows", truncated, "codes differ"),
    ("quantize_rows", scaled, "scales: off by"),
]


@pytest.mark.parametrize(("op", "spoil", "reason"), SABOTAGE)
def test_a_sabotaged_kernel_is_wrong(
    op: str, spoil: Callable[[Any], Any], reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    sound = getattr(kernels, op)

    def sabotaged(*args: Any, **kwargs: Any) -> Any:
        y = sound(*args, **kwargs)
        return y if "reference" in args else spoil(y)

    monkeypatch.setattr(checks.ops, op, sabotaged)
    verdict = verdict_of(op)
    assert verdict.state == "wrong" and not verdict.trusted
    assert reason in verdict.reason


def test_weights_that_are_unpacked_wrongly(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only in the last element of the last row, only for one format, which the verdict names."""
    monkeypatch.setattr(checks, "KINDS", ("q8_0", "int4"))
    sound = kernels.dequantize
    assert verdict_of("dequantize") == verdict_of("requantize") == Verdict("ok")

    def sabotaged(kind: str, parts: Any, options: Any, out: Tensor) -> None:
        sound(kind, parts, options, out)
        if kind == "int4":
            out[-1, -1] += 0.01

    monkeypatch.setattr(checks.ops, "dequantize", sabotaged)
    verdict = verdict_of("dequantize")
    assert verdict.state == "wrong" and verdict.reason.startswith("int4: ")


def test_an_element_that_is_not_written_is_seen() -> None:
    with agreement.prepared(DEVICE):
        assert torch.empty(3).isnan().all()
        assert torch.empty(1).device.type == DEVICE.type
    assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (RuntimeError("\n\nFailed to find C compiler.\nmore"), "RuntimeError: Failed to find C compiler."),
        (ValueError("x" * 999), "ValueError: " + "x" * 200),
    ],
)
def test_a_kernel_that_raises_cannot_compile(error: Exception, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def raises(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(checks.ops, "flash_attention", raises)
    assert verdict_of("flash_attention") == Verdict("cannot compile", expected)


def test_a_full_gpu_is_no_verdict(monkeypatch: pytest.MonkeyPatch) -> None:
    def raises(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 MiB")

    monkeypatch.setattr(checks.ops, "flash_attention", raises)
    assert verdict_of("flash_attention").state == "not tested"


@pytest.mark.parametrize("op", ["linear_int8", "swiglu_int8"])
def test_products_of_compute_capability_7_5(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's, with a kernel behind them: both are judged."""
    for module in ("zimage_kernels._triton", "zimage_lite.doctor.selftest.checks"):
        monkeypatch.setattr(f"{module}.capability", lambda device: 75)
    monkeypatch.setattr(checks, "TORCH_PRODUCTS", ((32, 64, 32),))
    assert verdict_of(op) == Verdict("ok")
    sound = kernels.integer_product

    def sabotaged(x: Tensor, w: Tensor) -> Tensor:
        sums = sound(x, w)
        sums[3, 5] += 10_000
        return sums

    monkeypatch.setattr(checks.ops, "integer_product", sabotaged)
    expected = Verdict("wrong", "torch's sums of 32 x 64 x 32") if op == "linear_int8" else Verdict("ok")
    assert verdict_of(op) == expected
    monkeypatch.setattr("zimage_kernels.unfused_int8.integer_product", sabotaged)
    assert verdict_of(op).state == "wrong"


def test_what_the_card_lacks_is_not_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "capability", lambda device: 75)
    monkeypatch.setattr(process, "_broken", lambda device: None)
    monkeypatch.setitem(CHECKS, "linear_int8", (lambda dtype: pytest.fail("was tried"), 80))
    (_, verdict) = list(run_checks(torch.device("cuda"), ["linear_int8"]))[1]
    assert verdict == Verdict("not supported", "needs compute capability 8.0, this GPU has 7.5")


def test_a_gpu_that_only_gives_errors_ends_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """After an illegal access no later op of the same process can be judged."""
    monkeypatch.setattr(process, "_broken", lambda device: "CUDA error: an illegal memory access was encountered")
    said = list(run_checks(DEVICE, ["flash_attention", "add_norm"]))
    crashed = Verdict("crashed", "CUDA error: an illegal memory access was encountered")
    assert said == [("flash_attention", None), ("flash_attention", crashed)]


@pytest.mark.parametrize(
    "op", ["linear_int8", "swiglu_int8", "project_rows", "flash_attention", "quantize_rows", "add_norm", "norm_rope"]
)
def test_torch_passes_in_bfloat16(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the model computes in on most cards, and Triton's interpreter cannot. A tolerance that torch's own rounding
    exceeds would call sound kernels wrong there. (attention_int8 is held to more than its reference, which rounds
    queries and keys to bfloat16; the others have no reference that takes the place of a kernel.)"""
    sound = getattr(kernels, op)

    def reference(*args: Any, **kwargs: Any) -> Any:
        args = tuple("reference" if isinstance(argument, str) else argument for argument in args)
        return sound(*args, **(kwargs | {"backend": "reference"} if "backend" in kwargs else kwargs))

    monkeypatch.setattr(checks.ops, op, reference)
    with agreement.prepared(DEVICE):
        assert CHECKS[op][0](torch.bfloat16) is None

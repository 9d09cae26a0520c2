"""Which backend computes, and why another does not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from computing import INT8, PLAIN, as_on_turing
from zimage_kernels._triton import interpreted

from zimage_lite.config import RuntimeOptions
from zimage_lite.doctor.selftest.checks import CHECKS
from zimage_lite.doctor.selftest.process import Verdict
from zimage_lite.errors import UserError
from zimage_lite.model.compute import Compute
from zimage_lite.pipeline.backends import choose
from zimage_lite.quant.formats import FORMATS

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(not interpreted(), reason="kernels on CPU tensors: needs TRITON_INTERPRET=1")


@pytest.fixture
def turing(monkeypatch: pytest.MonkeyPatch) -> None:
    as_on_turing(monkeypatch)


CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def chosen(
    obstacle: str | None,
    device: torch.device,
    *formats: str,
    head_dim: int = 128,
    state: str = "ok",
    op: str = "attention_int8",
    faster: bool = False,
    **options: str,
) -> Any:
    """state: what the self-test says of this op. faster: whether a CPU multiplies int8 faster than float32."""
    tested = dict.fromkeys(CHECKS, Verdict("ok")) | {op: Verdict(state, "3.0 of 1.0")}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("zimage_lite.pipeline.backends.triton_obstacle", lambda device: obstacle)
        patch.setattr("zimage_lite.doctor.selftest.verdicts.verdicts", lambda device, tell: tested)
        patch.setattr("zimage_lite.pipeline.backends.cpu_int8_is_faster", lambda: faster)
        return choose(RuntimeOptions(**options), device, head_dim, [FORMATS[name] for name in formats])


@pytest.mark.parametrize(
    ("device", "formats", "options", "compute"),
    [
        (CUDA, ("int8", "bf16"), {}, INT8["triton"]),
        (CUDA, ("q4_k", "q6_k"), {}, INT8["triton"]),
        (CUDA, ("bf16",), {}, PLAIN["triton"]),
        (CUDA, ("fp8",), {}, PLAIN["triton"]),
        (CUDA, ("int8",), {"compute": "16bit"}, PLAIN["triton"]),
        (CUDA, ("int8",), {"backend": "reference"}, PLAIN["reference"]),
        (CPU, ("int8",), {}, PLAIN["reference"]),
        (CPU, ("int8",), {"faster": True}, INT8["reference"]),
        (CPU, ("int8",), {"faster": True, "compute": "16bit"}, PLAIN["reference"]),
        (CPU, ("q8_0",), {}, PLAIN["reference"]),
        (CPU, ("q8_0",), {"faster": True}, INT8["reference"]),
        (CPU, ("bf16", "fp8"), {"faster": True}, PLAIN["reference"]),
        (CPU, ("q8_0",), {"compute": "int8"}, INT8["reference"]),
        (CPU, ("int8",), {"compute": "int8"}, INT8["reference"]),
        (CPU, ("q8_0",), {"backend": "triton"}, INT8["triton"]),
    ],
)
def test_choices(device: torch.device, formats: tuple[str, ...], options: dict[str, Any], compute: Compute) -> None:
    choice = chosen(None, device, *formats, **options)
    assert choice.compute == compute and choice.note is None


def test_a_cpu_whose_loops_cannot_be_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights in int8 need none."""
    monkeypatch.setattr("zimage_lite.pipeline.backends.loops_obstacle", lambda: "numba needs another numpy")
    assert chosen(None, CPU, "q8_0", faster=True).compute == PLAIN["reference"]
    assert chosen(None, CPU, "int8", faster=True).compute == INT8["reference"]
    with pytest.raises(UserError, match="re-encode: got numba needs another numpy; mend it, or use --compute 16bit"):
        chosen(None, CPU, "q8_0", compute="int8")


def test_falling_back_is_told() -> None:
    choice = chosen("Triton is not installed", CUDA, "int8")
    assert choice.compute == PLAIN["reference"]
    assert choice.note == "the Triton kernels cannot run: Triton is not installed; torch computes"
    assert chosen("got tensors on cpu, expected cuda", CPU, "int8").note is None


def test_compute_capability_7_5(turing: None) -> None:
    """What cannot run there is not missed; what failed there is."""
    for options, compute in (({}, INT8), ({"backend": "triton"}, INT8), ({"compute": "16bit"}, PLAIN)):
        choice = chosen(None, CUDA, "q4_k", state="not supported", **options)
        assert (choice.compute, choice.backend) == (compute["triton"], "triton+torch")
        assert choice.note is not None and "torch multiplies" in choice.note
    failed = chosen(None, CUDA, "q4_k", state="wrong", op="add_norm")
    assert (failed.compute, failed.backend, failed.unpacking) == (PLAIN["reference"], "reference", "reference")


def test_older_than_7_5(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("zimage_kernels._triton.capability", lambda device: 61)
    choice = choose(RuntimeOptions(), CUDA, 128, [FORMATS["int8"]])
    assert choice.compute == PLAIN["reference"]
    assert choice.note is not None and "got compute capability 6.1, expected at least 7.5" in choice.note


def test_a_kernel_that_failed_its_self_test_is_not_taken() -> None:
    """Unless it is asked for. Others are, where it is not needed."""
    choice = chosen(None, CUDA, "int8", state="wrong", op="add_norm")
    assert choice.compute == PLAIN["reference"]
    assert choice.note is not None and "add_norm: wrong (3.0 of 1.0)" in choice.note
    assert chosen(None, CUDA, "int8", state="wrong", backend="triton").compute == INT8["triton"]


@pytest.mark.parametrize(
    ("op", "formats", "compute"),
    [
        ("attention_int8", ("int8",), PLAIN["triton"]),
        ("swiglu_int8", ("q4_k", "q6_k"), PLAIN["triton"]),
        ("flash_attention", ("int8",), INT8["triton"]),
        ("flash_attention", ("int8", "bf16"), PLAIN["reference"]),
        ("requantize", ("int8",), INT8["triton"]),
        ("requantize", ("int4",), PLAIN["triton"]),
        ("dequantize", ("int4",), INT8["triton"]),
        ("dequantize", ("int4", "bf16"), PLAIN["reference"]),
        ("dequantize", ("bf16",), PLAIN["triton"]),
        ("project_rows", ("int8",), INT8["triton"]),  # asked for by adapters alone, who fall back by themselves
        ("linear_int8", ("bf16",), PLAIN["triton"]),
    ],
)
@pytest.mark.parametrize("state", ["wrong", "crashed", "not tested"])
def test_only_what_is_needed_is_missed(op: str, formats: tuple[str, ...], compute: Compute, state: str) -> None:
    choice = chosen(None, CUDA, *formats, op=op, state=state)
    assert choice.compute == compute
    as_before = chosen(None, CUDA, *formats).compute
    assert (choice.note is None) == (choice.compute == as_before)
    assert choice.unpacking == ("auto" if op != "dequantize" and compute.backend == "triton" else "reference")
    assert choice.projecting == ("reference" if op == "project_rows" else None)


@pytest.mark.parametrize(
    ("obstacle", "device", "formats", "options", "says"),
    [
        (
            "Triton is not installed",
            CUDA,
            ("int8",),
            {"backend": "triton"},
            "--backend triton: Triton is not installed",
        ),
        (None, CUDA, ("int8",), {"backend": "triton", "head_dim": 64}, "--backend triton: got heads of 64"),
        ("absent", CUDA, ("int8",), {"compute": "int8"}, "--compute int8 needs the Triton kernels on cuda"),
        (
            None,
            CUDA,
            ("bf16",),
            {"compute": "int8"},
            "--compute int8: got bf16, expected weights quantized to integers",
        ),
        (
            "absent",
            CPU,
            ("fp8",),
            {"compute": "int8"},
            "--compute int8: got fp8, expected weights quantized to integers",
        ),
    ],
)
def test_what_cannot_be(obstacle: str | None, device: torch.device, formats: Any, options: Any, says: str) -> None:
    with pytest.raises(UserError, match=f"^{says}"):
        chosen(obstacle, device, *formats, **options)

"""The benchmarks of ops: their arithmetic by hand, what they count, and all that they do before a clock is read."""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

import bench_block
import bench_elementwise
import bench_linear_int8
import bench_step
import check_laptop_ptx
import full_width
import timing
from activations import DEVICE
from eager import EagerInt8, Rows
from torch import nn
from traffic import Traffic
from zimage_kernels import Int8Rows, add_norm
from zimage_kernels.norm import Norm
from zimage_kernels.rotation import hadamard_matrix

from zimage_lite.config import TransformerConfig
from zimage_lite.convert.recipe import target
from zimage_lite.convert.synthetic import synthetic_checkpoint
from zimage_lite.model import linear as linear_module
from zimage_lite.report.sections import sections

pytestmark = pytest.mark.slow  # whole blocks in Triton's interpreter

ROOT = Path(__file__).parents[2]
OPS = ROOT / "benchmarks" / "ops"
SCRIPTS = [*sorted(OPS.glob("bench_*.py")), OPS / "check_laptop_ptx.py", OPS / "gpu_facts.py"]
SMALL = TransformerConfig(dim=384, n_layers=1, n_refiner_layers=1, n_heads=3, cap_feat_dim=64)
RATES = {"op": "ceilings", "int8_tops": 2.0, "bf16_tflops": 1.0}


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_without_a_gpu_there_is_one_line(
    script: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", [str(script)])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(script), run_name="__main__")
    assert end.value.code == 2
    assert capsys.readouterr() == ("", "error: this needs a CUDA GPU, and torch finds none\n")


# --- Rows


def test_the_copy_copies() -> None:
    """A length that no program divides, and nothing behind it."""
    pytest.importorskip("triton")
    source = torch.arange(9001, dtype=torch.int32, device=DEVICE)
    into = torch.zeros(9002, dtype=torch.int32, device=DEVICE)
    bench_elementwise.copied(source, into)
    assert torch.equal(into[:-1], source) and into[-1] == 0


def test_share_of_a_copy() -> None:
    """1 GB in 2 ms is 500 GB/s; the copy took 1.5 ms, 667 GB/s: three quarters."""
    row = bench_elementwise.judged(10**9, (1.9, 2.0, 2.1), 1.5, rotates=True)
    assert (row["gbps"], row["copy_gbps"], row["of_copy"]) == pytest.approx((500, 2000 / 3, 0.75))
    assert row["kept"] and not bench_elementwise.judged(10**9, (1.9, 2.0, 2.1), 1.5, rotates=False)["kept"]
    assert (row["ms_p20"], row["ms"], row["ms_p80"]) == (1.9, 2.0, 2.1)
    issue_bound = bench_elementwise.judged(10**9, (1.9, 2.0, 2.1), 1.5, rotates=False, issue_gbps=580)
    assert issue_bound["kept"] and issue_bound["of_copy"] == row["of_copy"]


def test_what_is_moved() -> None:
    """x and a weight of 8 channels in, 16-bit; out: nothing but h, for x is handed through."""
    x, weight = torch.ones(3, 8).half(), torch.ones(8).half()
    result = add_norm(x, None, Norm(weight, None, 1e-5), None, "reference")
    assert bench_elementwise.moved([x, weight], result) == 2 * (24 + 8 + 24)
    int8 = add_norm(x, None, Norm(weight, None, 1e-5), 4, "reference")
    assert bench_elementwise.moved([x, weight], int8) == 2 * (24 + 8) + 24 + 3 * 4


def test_buffers_keep_each_other_out_of_the_cache() -> None:
    assert timing.sets_for(13_000_000, 50_000_000) == 16  # 208 MB
    assert timing.sets_for(2**31, 50_000_000) == 2


def test_product_beside_its_ceilings() -> None:
    """4e12 operations in 4 ms are 1000 TOPS, of 1250; bf16 took 6.4 or 6."""
    row = bench_linear_int8.judged("w2", 4224, 4e12, (3.0, 4.0, 5.0), 6.4, 1250.0)
    assert (row["tops"], row["of_ceiling"], row["times_bf16"], row["kept"]) == (1000, 0.8, 1.6, True)
    assert not bench_linear_int8.judged("w2", 4224, 4e12, (3.0, 4.0, 5.0), 6.0, 1250.0)["kept"]
    assert not bench_linear_int8.judged("w2", 4224, 4e12, (3.0, 4.0, 5.0), 6.4, 1400.0)["kept"]
    assert "kept" not in bench_linear_int8.judged("w2", 128, 4e12, (3.0, 4.0, 5.0), 6.4, 1250.0)


def test_least_time_of_a_block() -> None:
    """Two sequences of 10 and 20 tokens: 30 times the weights, and 500 products of queries and keys in each channel."""
    linears = 2 * 30 * (4 * 3840**2 + 3 * 3840 * 10240)
    attention = 2 * 500 * 3840  # queries x keys; as many again for weights x values
    limit = full_width.limit_ms([10, 20], RATES, linears8=True, attention8=True)
    assert limit == pytest.approx((linears / 2e12 + attention / 2e12 + attention / 1e12) * 1000)
    plain = full_width.limit_ms([10, 20], RATES, linears8=False, attention8=False)
    assert plain == pytest.approx((linears + 2 * attention) / 1e12 * 1000)


def test_rows_are_kept_as_they_come(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And shown by `zimage-lite report`, with what went wrong pointed out."""
    monkeypatch.setattr(timing, "card", lambda: {"name": "a card", "commit": "abc"})
    out = tmp_path / "ops.json"

    def rows() -> Any:
        yield {"op": "one", "ms": 0.12345, "kept": True, "check": "ok"}
        assert len(json.loads(out.read_text())["rows"]) == 1
        yield {"op": "two", "ms": 1.0, "kept": False, "check": "wrong: sum"}
        yield {"op": "three", "error": "not installed"}

    assert [row["op"] for row in timing.report(rows(), out)] == ["one", "two", "three"]
    ops, *_, machines = sections({"ops.json": json.loads(out.read_text())})
    (table,), (about,) = ops.parts, machines.parts
    assert table.header == ["op", "ms", "kept", "check", "error"]
    assert table.rows[0] == ["one", "0.123", "yes", "ok", "-"] and table.rows[1][2:4] == ["no", "wrong: sum"]
    assert table.bad == {(1, 2), (1, 3), (2, 4)}
    assert about.rows == [["ops.json", "name a card, commit abc"]]


# --- What is run


def test_passes_are_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every pass of a block in the interpreter, in the rows that the model has."""
    monkeypatch.setattr(bench_elementwise, "DEVICE", "cpu")
    bench_elementwise.dtype.cache_clear()
    seen = []
    for one in bench_elementwise.passes(2):
        call = one.make()
        assert one.check(call) is None, one
        seen.append((one.op, one.rotates))
    assert len(seen) == 10 and sum(rotates for _, rotates in seen) == 6
    got = Int8Rows(torch.zeros(2, 4, dtype=torch.int8), torch.ones(2))
    wrong = got._replace(codes=got.codes + 2)
    assert bench_elementwise.difference((got, None), (wrong, None)) is not None


@pytest.mark.parametrize(
    "name",
    [pytest.param("q4_k_s", marks=pytest.mark.full_size), "int4", pytest.param("nf4", marks=pytest.mark.full_size)],
)
def test_weights_are_compared(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_elementwise, "DEVICE", "cpu")
    bench_elementwise.dtype.cache_clear()
    tensors = synthetic_checkpoint(TransformerConfig(dim=256, n_layers=1, n_heads=2), target(name)).tensors
    for one in bench_elementwise.unpacking(tensors["layers.0.attention.to_out.0.weight"]):
        call = one.make()
        assert one.check(call) is None, one
        results, n_bytes = call.run("triton"), sum(part.nbytes for part in call.reads)
        assert bench_elementwise.moved(call.reads, results) - n_bytes == 256 * (
            256 + 4 if one.op == "requantize" else 512
        )


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """The scripts of block and step on the CPU, in float16, which the interpreter knows, without a clock."""
    found = {"DEVICE": "cpu", "DTYPE": torch.float16, "CONFIG": SMALL, "IMAGE_TOKENS": 32, "CAPTION_TOKENS": 32}
    for module in (full_width, bench_block, bench_step):
        for name, value in found.items():
            monkeypatch.setattr(module, name, value)
    monkeypatch.setattr(bench_step, "LATENT", 8)
    for module in (bench_block, bench_step):
        monkeypatch.setattr(module, "per_call", lambda call, *_, **__: call() is None or (1.0, 2.0, 3.0))
        monkeypatch.setattr(module, "memory", lambda call, block: {"work_bytes": 1})
        monkeypatch.setattr(module, "cpu_ms", lambda call: 1.5)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)


@pytest.mark.full_size  # interpreted, for developers
def test_a_block_in_all_ways(small: None) -> None:
    with torch.inference_mode():
        rows = list(bench_block.blocks(RATES))
    assert [row["way"].split(",")[0] for row in rows] == ["int8", "16-bit", "int8", "int8", "16-bit"]
    assert rows[0]["check"] == rows[1]["check"] == "ok"
    assert all(0.002 < row["relative_error"] < 0.1 for row in rows if row["way"].startswith("int8"))
    assert all(row["relative_error"] < 0.004 for row in rows if row["way"].startswith("16-bit"))
    n, dim, hidden = 64, SMALL.dim, SMALL.ffn_dim
    scales = 4 * n * (1 + 3 + 2 * 3 + 2 * 3 + 2 + 1 + 1 + 2)
    halves = 2 * n * dim * (1 + 3 + 2 + 2 + 1 + 1 + 3 + 1 + 3) + 2 * n * hidden * 2
    codes = n * dim * (1 + 3 + 2 + 2 + 1 + 1 + 1 + 1) + n * hidden * 2
    small_vectors = rows[0]["activation_bytes"] - scales - halves - codes
    assert 0 <= small_vectors < 2 * 4 * 64 * n * 2 + 10_000  # angles of RoPE, and vectors of dim
    assert rows[0]["activation_bytes"] < rows[1]["activation_bytes"] < rows[4]["activation_bytes"]


@pytest.mark.full_size  # interpreted, for developers
def test_a_step(small: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "diffusers", None)  # as where it is not installed
    with torch.inference_mode():
        int8, half, theirs = bench_step.steps(RATES)
    assert int8["ms"] == half["ms"] == 2.0 and half["times_as_long"] == 1.0
    assert 1e-4 < half["difference_to_int8"] < 0.1
    assert theirs == {"op": "step", "way": "bf16, diffusers", "error": "not installed"}


# --- What is counted


def test_traffic_of_torchs_operations() -> None:
    x, weight = torch.ones(3, 8), torch.ones(8)
    with Traffic([weight]) as counter:
        y = x * weight  # reads x, writes y
        y.t().view(8, 3)[1:].expand(7, 3)  # nothing
        assert counter.n_bytes == 2 * 96
        y.add_(x)  # reads both, writes one
        assert counter.n_bytes == 5 * 96
        z = torch.empty(8, 3)  # nothing
        z.copy_(y.t())  # reads one, writes one
        assert counter.n_bytes == 7 * 96
        y.t().contiguous()
        assert counter.n_bytes == 9 * 96
        z.sum()
    assert counter.n_bytes == 10 * 96 + 4


def test_traffic_of_an_op_with_a_kernel() -> None:
    """Whatever happens inside, it is one pass: codes and scales in, a result out; weights are left out."""
    x, scale = torch.ones(4, 16, dtype=torch.int8), torch.ones(4)
    w, w_scale = torch.ones(8, 16, dtype=torch.int8), torch.ones(8)
    counter = Traffic([w, w_scale])
    with counter, counter.kernels({linear_module: ["linear_int8"]}):
        linear_module.linear_int8(x, scale, w, w_scale, out_dtype=torch.float16, backend="reference")
    assert counter.n_bytes == 64 + 16 + 2 * 4 * 8
    assert linear_module.linear_int8.__name__ == "linear_int8"


def test_eager_linears_quantize_an_input_once(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(20, 64)
    x[:, 3] *= 100
    weights = [torch.randn(32, 64) / 8 for _ in range(2)]
    errors = []
    for matrix in (None, hadamard_matrix(64)):
        rows = Rows(matrix)
        linears: list[nn.Module] = [EagerInt8(weight, rows) for weight in weights]
        assert rows.of(x)[0] is rows.of(x)[0] and rows.of(x)[0] is not rows.of(x + 1)[0]
        for one, weight in zip(linears, weights, strict=True):
            errors.append(full_width.relative_error(one(x), x @ weight.T))
    assert max(errors) < 0.05 and max(errors[2:]) < min(errors[:2])  # an outlier is what the rotation is for


# --- Laptop code


def test_what_is_checked_must_have_been_loaded() -> None:
    judged = check_laptop_ptx.judged
    assert judged(["k for sm_86"], 86, "ok") == {"kernels": 1, "check": "ok", "kept": True}
    assert not judged([], 86, "ok")["kept"]
    assert not judged(["k for sm_86", "k for sm_90a"], 86, "ok")["kept"]
    assert not judged(["k for sm_86"], 86, "wrong: sums")["kept"]
    pairs = check_laptop_ptx.applicable([75, 86], ["add_norm", "attention_int8"])
    assert sorted(pairs) == [(75, "add_norm"), (86, "add_norm"), (86, "attention_int8")]


def test_the_driver_is_given_the_laptops_ptx() -> None:
    """In a process that interprets nothing: compiled for 8.6 by a launch on a pretended 9.0."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    folders = ("", "kernels", "benchmarks/ops", "tests/ops")
    environment["PYTHONPATH"] = os.pathsep.join(str(ROOT / folder) for folder in folders)
    script = ROOT / "tests" / "helpers" / "pretended_laptop.py"
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["given"] == [{"name": "_quantize_kernel", "entry": ["_quantize_kernel"], "target": ["sm_86"]}]
    assert found["launched"] == [8] and found["row"] == {"kernels": 1, "check": "ok", "kept": True}

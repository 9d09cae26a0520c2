"""The comparison with other programs: its arithmetic by hand, what it tells them, what it says where they miss."""

from __future__ import annotations

import inspect
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import harness
import pytest
import run
import torch
import with_diffusers
import with_sd_cpp
import with_zimage_lite
from harness import Case, Clock
from peer_cases import PEERS, TIER, WORK, needs_posix

from zimage_lite.bench import case as bench_case
from zimage_lite.bench.tiers import DONE, FAILED, NOT_RUN, OOM
from zimage_lite.page.html import Table, as_html, as_markdown
from zimage_lite.report.sections import sections

# --- Arithmetic


def raw(*images: tuple[float, list[float]], **more: Any) -> dict[str, Any]:
    runs = [{"seconds": seconds, "step_seconds": steps} for seconds, steps in images]
    return {"outcome": DONE, "runs": runs, "peak_rss_bytes": 10**9, **more}


def test_summary_is_of_the_warm_images() -> None:
    found = harness.summary(raw((20.0, [9.0, 4.0]), (8.0, [6.0, 1.0]), (12.0, [7.0, 3.0]), (9.0, [8.0, 2.0])))
    assert found["seconds"] == {"cold": 20.0, "warm": {"median": 9.0, "min": 8.0, "max": 12.0, "spread": 0.4444}}
    assert found["step_seconds"]["median"] == 2.0  # of 1, 3 and 2: first steps load, in every image


def test_summary_of_a_single_image() -> None:
    found = harness.summary(raw((20.0, [9.0, 4.0, 5.0])))
    assert found["seconds"] == {"cold": 20.0} and found["step_seconds"]["median"] == 4.5
    assert "step_seconds" not in harness.summary(raw((20.0, [9.0])))
    failed = {"outcome": OOM, "reason": "no more", "runs": []}
    assert harness.summary(failed) == failed


def test_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first step begins at 2 and the others where the one before ended."""
    moments: Iterator[float] = iter([2.0, 5.0, 7.0, 8.0])
    monkeypatch.setattr("time.perf_counter", lambda: next(moments))
    clock = Clock()
    clock.begin()
    for _ in range(3):
        clock.end()
        clock.begin()  # of the later ones
    assert clock.steps() == [3.0, 2.0, 1.0]


def test_classes_of_precision() -> None:
    names = {"q8_0": 8, "q4_k_m": 4, "int8": 8, "nf4": 4, "bf16": 16, "iq4_xs": 4, "bnb-int8": 8, "f32": 32}
    assert {name: harness.class_of(name) for name in names} == names


def test_paths_stay_at_home() -> None:
    told = {"model": "/home/me/x/model", "options": ["--llm", "/home/me/t.gguf"], "way": "a/b", "cap": 5.5}
    assert harness.without_paths(told) == {
        "model": "model", "options": ["--llm", "t.gguf"], "way": "a/b", "cap": 5.5,
    }  # fmt: skip


# --- What is missing


def case(**changes: Any) -> Case:
    return replace(Case("peer", "way", 8, "cpu", "none.py", {}), **changes)


def test_obstacles() -> None:
    assert harness.obstacle(case(), None) is None
    assert harness.obstacle(case(device="cuda"), None) == "needs CUDA"
    assert harness.obstacle(case(device="cuda"), "a card") is None
    assert harness.obstacle(case(needs=("torch", "no-such-package")), None) == "not installed: no-such-package"
    assert harness.obstacle(case(lacks="needs --model"), None) == "needs --model"


def test_rows_of_what_is_not_run() -> None:
    row = harness.row_of(case(needs=("torch",), settings={"model": "/a/b"}), "needs CUDA")
    assert (row["outcome"], row["reason"], row["settings"]) == (NOT_RUN, "needs CUDA", {"model": "b"})
    assert row["versions"] == {"torch": torch.__version__}


def test_alone_there_is_nothing_to_compare() -> None:
    ours, other = case(peer="zimage-lite"), case(lacks="needs --model")
    assert run.obstacles([ours, other], None) == ["nothing here to compare it with", "needs --model"]
    assert run.obstacles([ours, other, case()], None) == [None, "needs --model", None]


def test_without_files_every_peer_keeps_its_rows() -> None:
    for device in ("cpu", "cuda"):
        todo = [*with_diffusers.cases(None, {}, device), *with_sd_cpp.cases({}, None, device)]
        reasons = [harness.obstacle(replace(one, needs=()), "a card") for one in todo]
        assert {one.peer for one in todo} == {"diffusers", "stable-diffusion.cpp", "stable-diffusion-cpp-python"}
        assert set(reasons) == {"needs --model", "needs --quantized", "needs --sd-cpp"}


def test_what_is_measured_is_said_first() -> None:
    line = run.first_line([case(), case(), case(device="cuda")], [None, "needs --model", "needs CUDA"], None)
    assert line.startswith("Measures 1 of 3 cases on the CPU. Not run: 1: needs --model; 1: needs CUDA (there, zim")
    assert run.first_line([case(device="cuda")], [None], "a card") == "Measures 1 of 1 cases on a card"


def test_only_cuda_is_held_to_the_tier() -> None:
    assert run.within(WORK, TIER, case()) == WORK
    held = run.within(WORK, TIER, case(device="cuda"))
    assert (held.vram_bytes, held.ram_bytes) == (TIER.vram_bytes, TIER.ram_bytes)


def test_asks_for_the_image_of_bench() -> None:
    assert harness.PROMPT == bench_case.PROMPT


# --- Processes


@needs_posix
def test_a_case_that_takes_too_long() -> None:
    """What it started ends with it: else its end of the pipe would stay open for a minute."""
    code, *_ = harness.run(["sh", "-c", "sleep 60; true"], os.environ, limit=0.2)
    assert code is None


@needs_posix
def test_how_cases_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness, "HERE", tmp_path)
    ends = {
        "raise ValueError('no such weight')": (FAILED, "ValueError: no such weight"),
        "print('not JSON')": (FAILED, "ended with 0"),
        "import os; os.kill(os.getpid(), 9)": (OOM, "killed by the system"),
        "print('a line'); print('{\"outcome\": \"done\"}')": (DONE, None),
    }
    for program, (outcome, reason) in ends.items():
        (tmp_path / "none.py").write_text(program)
        found = harness.measured(case(), WORK, limit=60)
        assert (found["outcome"], found.get("reason")) == (outcome, reason) and found["peak_rss_bytes"] > 10**6


@needs_posix
def test_what_c_libraries_print_last_is_no_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = f"""
import atexit, os, sys
sys.path.insert(0, {str(PEERS)!r})
from harness import answer
atexit.register(lambda: os.write(1, b"from a buffer\\n"))
answer(lambda settings, work: {{"outcome": "done", "size": work.size, **settings}})
"""
    (tmp_path / "none.py").write_text(program)
    monkeypatch.setattr(harness, "HERE", tmp_path)
    found = harness.measured(case(settings={"way": "x"}), WORK, limit=60)
    assert (found["outcome"], found["size"], found["way"]) == (DONE, 64, "x")


@needs_posix
def test_the_command_holds_little() -> None:
    """Or its memory would count as that of every case."""
    heavy = {"torch", "numpy", "diffusers", "transformers", "gguf", "PIL", "safetensors", "stable_diffusion_cpp"}
    program = f"import sys; sys.path.insert(0, {str(PEERS)!r}); import run; print(sorted({heavy!r} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, check=True)
    assert done.stdout.strip() == "[]"


# --- diffusers


def test_diffusers_knows_what_it_is_told() -> None:
    from diffusers import DiffusionPipeline

    known = set(inspect.signature(DiffusionPipeline.enable_group_offload).parameters)
    for options in with_diffusers.PLACES.values():
        assert set(options) <= known
    for _, _, places in with_diffusers.QUANTIZERS.values():
        assert set(places) <= set(with_diffusers.PLACES)


def test_places_of_weights() -> None:
    class Pipeline:
        def __getattr__(self, name: str) -> Any:
            return lambda **options: called.append((name, options))

    called: list[tuple[str, dict[str, Any]]] = []
    for one in with_diffusers.cases("/model", {}, "cuda")[: len(with_diffusers.PLACES)]:
        with_diffusers.put(Pipeline(), dict(one.settings))
    assert [name for name, _ in called[:3]] == [
        "enable_model_cpu_offload", "enable_sequential_cpu_offload", "enable_group_offload",
    ]  # fmt: skip
    assert called[2][1]["offload_type"] == "block_level" and called[2][1]["onload_device"] == torch.device("cuda")
    assert [options.get("low_cpu_mem_usage") for _, options in called[3:]] == [None, True]


@pytest.mark.slow  # a process that imports diffusers
@pytest.mark.filterwarnings("ignore")
def test_diffusers_draws(tiny: Path, q8_0: Path) -> None:
    """From 16 bits and from our GGUF file, in as many steps as asked for."""
    file = with_sd_cpp.files_in(q8_0)["diffusion_model"]
    work = replace(WORK, threads=torch.get_num_threads(), repeats=1)
    for one in with_diffusers.cases(str(tiny), {"q8_0": file}, "cpu"):
        found = with_diffusers.measure(dict(one.settings), work)
        assert found["outcome"] == DONE
        assert [len(image["step_seconds"]) for image in found["runs"]] == [4, 4]
        for image in found["runs"]:
            assert 0 < sum(image["step_seconds"]) < image["seconds"]


def test_diffusers_without_memory_is_a_result(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_more(_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB\nand more lines")

    monkeypatch.setattr(with_diffusers, "loaded", no_more)
    found = with_diffusers.measure({"device": "cpu"}, replace(WORK, threads=torch.get_num_threads()))
    assert (found["outcome"], found["reason"]) == (OOM, "CUDA out of memory. Tried to allocate 2 GiB")


# --- zimage-lite


@pytest.mark.slow  # a process for each case
def test_ours_is_measured_as_bench_does(q8_0: Path) -> None:
    (one,) = with_zimage_lite.cases([str(q8_0)], "cpu")
    assert (one.setting, one.bits) == ("q8_0", 8)
    found = with_zimage_lite.measure(dict(one.settings), WORK)
    assert found["outcome"] == DONE and "reason" not in found
    assert [len(image["step_seconds"]) for image in found["runs"]] == [4, 4, 4]
    assert set(harness.summary({**found, "peak_rss_bytes": 1})["seconds"]) == {"cold", "warm"}


def test_ours_is_planned_where_there_is_no_gpu() -> None:
    (one,) = with_zimage_lite.cases(["synthetic:int8"], "cuda")
    found = with_zimage_lite.measure({**one.settings, "predict": "6gb"}, replace(WORK, size=1024))
    assert found["outcome"] == DONE and found["gpu"] == TIER.gpu.name
    fast, slow = found["planned_seconds"]
    assert 8 * found["planned_step_seconds"][0] < fast <= slow
    assert found["process_peak_bytes"] < TIER.vram_bytes and found["planned_ram_bytes"] <= TIER.ram_bytes


# --- The page


def result() -> dict[str, Any]:
    rows = []

    def add(peer: str, device: str = "cuda", **more: Any) -> None:
        one = Case(peer, f"way {len(rows)}", 8, device, "x.py", {})
        rows.append({**harness.row_of(one, None), "versions": {"x": "1.0"}, **more})

    memory = {"peak_rss_bytes": 2 * 10**9, "process_peak_bytes": 4 * 2**30}
    add("zimage-lite", **harness.summary(raw((9.0, [2.0, 1.0]), (6.0, [2.0, 0.5]), **memory)))
    add("zimage-lite", **harness.summary(raw((9.0, [2.0, 1.0]), (5.0, [2.0, 0.8]), **memory)))
    add("diffusers", **harness.summary(raw((9.0, [2.0, 1.0]), (20.0, [2.0, 1.0]), **memory)))
    add("diffusers", **harness.summary(raw((9.0, [2.0]), **{**memory, "process_peak_bytes": 7 * 2**30})))
    add("diffusers", outcome=OOM, reason="CUDA out of memory", **memory)
    add("diffusers", device="cpu", reason="not installed: diffusers")
    planned = {"planned_seconds": [3.0, 4.0], "planned_step_seconds": [0.25, 0.5], "planned_ram_bytes": 10**9}
    add("zimage-lite", outcome=DONE, prediction=True, gpu="RTX 3060", process_peak_bytes=5 * 2**30, **planned)
    return {
        "kind": run.PEERS, "machine": {"cpu": "of a test"}, "commit": "abc", "tier": {"vram_bytes": TIER.vram_bytes},
        "size": 1024, "steps": 8, "repeats": 1, "rows": rows,
    }  # fmt: skip


def test_page() -> None:
    """Ratios are to the fastest of ours: 5 s an image and 0.5 s a step."""
    found = sections({"p.json": result()})
    table = next(part for part in found[0].parts if isinstance(part, Table))
    cells = [list(row[2:]) for row in table.rows]
    assert cells[0] == ["6.00 (1.20 x)", "0.50 (1.00 x)", "4.00 GiB", "2.00 GB", "done"]
    assert cells[1][:2] == ["5.00 (1.00 x)", "0.80 (1.60 x)"]
    assert cells[2][:2] == ["20.00 (4.00 x)", "1.00 (2.00 x)"]
    assert cells[3] == ["9.00 (1.80 x)", "-", "7.00 GiB", "2.00 GB", "more memory than the tier has"]
    assert cells[4] == ["-", "-", "-", "-", "out of memory: CUDA out of memory"]
    assert cells[5] == ["-", "-", "-", "-", "not run: not installed: diffusers"]
    assert cells[6] == ["3.00 to 4.00", "0.25 to 0.50", "5.00 GiB", "1.00 GB", "prediction for RTX 3060"]
    assert {row for row, _ in table.bad} == {3, 4, 5}
    assert "x 1.0" in as_markdown("t", found)
    assert "<script>" not in as_html("t", sections({"p": json.loads(re.sub("way", "<script>", json.dumps(result())))}))

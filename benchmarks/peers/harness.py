"""What all peers share: the work that each is asked for, a process of its own for each case, and what is made of it.

Neither this file nor those of the peers load torch before a case runs, in the process of that case: the operating
system's peak of a process begins with what the program that started it held then.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from itertools import pairwise
from pathlib import Path
from typing import Any

from zimage_lite.bench.harness import spread
from zimage_lite.bench.tiers import DONE, FAILED, NOT_RUN, OOM
from zimage_lite.memory.nvml import Nvml, Peak

PROMPT = "a red circle on a blue background"  # that of zimage_lite.bench.case
HERE = Path(__file__).parent
LEAST_VRAM_BYTES = 100_000_000  # of a process that computes on the GPU; a CUDA context alone takes more


@dataclass(frozen=True)
class Work:
    """What every case does: one cold image and `repeats` warm ones, size x size pixels, without guidance.

    threads: of the CPU; vram_bytes: the cap of cases on CUDA, context included; ram_bytes: what zimage-lite plans for
    in these, the others cannot be told.
    """

    size: int
    steps: int
    repeats: int
    threads: int
    vram_bytes: int | None = None
    ram_bytes: int | None = None
    seed: int = 0
    prompt: str = PROMPT


@dataclass(frozen=True)
class Case:
    """One row. bits: the class that weights of the transformer are in, 4 for q4_k_m; device: "cuda" or "cpu"; script:
    the file here that measures it; settings: all that it is told; needs: distributions; lacks: what else is missing."""

    peer: str
    setting: str
    bits: int
    device: str
    script: str
    settings: Mapping[str, Any]
    needs: tuple[str, ...] = ()
    lacks: str | None = None
    beside: tuple[str, ...] = ()  # distributions whose versions matter, too

    @property
    def name(self) -> str:
        return f"{self.peer}: {self.setting}"


def class_of(format_name: str) -> int:
    """Bits of a weight as the name has them: 4 of "q4_k_m"."""
    found = re.search(r"\d+", format_name)
    return int(found[0]) if found else 0


def versions(names: Iterable[str]) -> dict[str, str]:
    """Of those that are installed; nothing is imported."""
    found = {}
    for name in names:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def obstacle(case: Case, gpu: str | None) -> str | None:
    """Why a case cannot run here; None if it can. gpu: its name."""
    if case.device == "cuda" and not gpu:
        return "needs CUDA"
    absent = [name for name in case.needs if name not in versions(case.needs)]
    if absent:
        return f"not installed: {', '.join(absent)}"
    return case.lacks


def row_of(case: Case, reason: str | None) -> dict[str, Any]:
    """Before it is run, or because it is not."""
    return {
        "peer": case.peer,
        "setting": case.setting,
        "bits": case.bits,
        "device": case.device,
        "prediction": False,
        "versions": versions((*case.needs, *case.beside)),
        "settings": without_paths(case.settings),
        "outcome": NOT_RUN,
        "reason": reason,
    }


def without_paths(value: Any) -> Any:
    """Where files lie is nobody's business."""
    if isinstance(value, Mapping):
        return {key: without_paths(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [without_paths(one) for one in value]
    return Path(value).name if isinstance(value, str) and os.path.isabs(value) else value


# --- In the process of the command


def measured(case: Case, work: Work, limit: float) -> dict[str, Any]:
    """What the process of a case said, with peaks that were seen from outside."""
    command = [sys.executable, str(HERE / case.script), json.dumps({"settings": case.settings, "work": asdict(work)})]
    environment = {**os.environ, **({"CUDA_VISIBLE_DEVICES": ""} if case.device == "cpu" else {})}
    nvml = Nvml() if case.device == "cuda" else None
    before = nvml.used() if nvml else 0
    with Peak(nvml) as peak:
        code, printed, complaint, rss_bytes = run(command, environment, limit)
    if code is None:
        return {"outcome": FAILED, "reason": f"took longer than {limit:g} s", "peak_rss_bytes": rss_bytes}
    if code == -signal.SIGKILL:
        return {"outcome": OOM, "reason": "killed by the system", "peak_rss_bytes": rss_bytes}
    try:
        raw = dict(json.loads(printed.strip().splitlines()[-1]))
    except (ValueError, TypeError, IndexError):
        lines = complaint.strip().splitlines() or [f"ended with {code}"]
        return {"outcome": FAILED, "reason": lines[-1][-500:], "peak_rss_bytes": rss_bytes}
    seen: dict[str, Any] = {"peak_rss_bytes": rss_bytes}
    if nvml and nvml.works:
        seen["process_peak_bytes"] = peak.bytes - before
        if raw["outcome"] == DONE and seen["process_peak_bytes"] < LEAST_VRAM_BYTES:
            raw |= {"outcome": FAILED, "reason": "did not use the GPU"}
    return {**seen, **raw}  # a case that measured itself better is believed


def run(command: list[str], environment: Mapping[str, str], limit: float) -> tuple[int | None, str, str, int]:
    """-> exit code, None if it ran out of time; stdout; stderr; and the peak memory of the process that held most."""
    with tempfile.TemporaryFile("w+", errors="replace") as errors:
        process = subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=errors, text=True, errors="replace",
            start_new_session=True,
        )  # fmt: skip
        late = threading.Event()

        def stop() -> None:
            late.set()
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # those that it started, too

        timer = threading.Timer(limit, stop)
        timer.start()
        try:
            assert process.stdout
            printed = process.stdout.read()
            _, status, usage = os.wait4(process.pid, 0)
        except BaseException:
            stop()
            raise
        finally:
            timer.cancel()
        process.returncode = os.waitstatus_to_exitcode(status)
        errors.seek(0)
        code = None if late.is_set() else process.returncode
        return code, printed, errors.read(), usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def summary(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Medians and spreads of the warm images, or what the cold one took where there is no other."""
    runs = raw.get("runs", [])
    if raw["outcome"] != DONE:
        return dict(raw)
    warm = runs[1:]
    steps = [seconds for one in warm or runs for seconds in one["step_seconds"][1:]]  # the first one loads
    found: dict[str, Any] = {**raw, "seconds": {"cold": runs[0]["seconds"]}}
    if warm:
        found["seconds"]["warm"] = spread(one["seconds"] for one in warm)
    if steps:
        found["step_seconds"] = spread(steps)
    return found


# --- In the process of a case


def answer(measure: Callable[[dict[str, Any], Work], dict[str, Any]]) -> None:
    """The main program of a peer's file. Whatever else is printed goes to stderr, what C libraries print at the end,
    too."""
    asked = json.loads(sys.argv[1])
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as out:
        os.dup2(2, 1)
        print(json.dumps(measure(asked["settings"], Work(**asked["work"]))), file=out)


def drawn(draw: Callable[[], list[float]], work: Work, runs: list[dict[str, Any]]) -> None:
    """draw: one image -> the seconds of each step. What each took goes to `runs` as it comes."""
    for _ in range(1 + work.repeats):
        start = time.perf_counter()
        steps = draw()
        seconds = time.perf_counter() - start
        runs.append({"seconds": round(seconds, 4), "step_seconds": [round(one, 4) for one in steps]})


class Clock:
    """Seconds of each step, by the moments at which the first began and all ended."""

    def __init__(self) -> None:
        self._moments: list[float] = []

    def begin(self) -> None:
        """Of the first step; later calls change nothing."""
        if not self._moments:
            self._moments = [time.perf_counter()]

    def end(self) -> None:
        self._moments.append(time.perf_counter())

    def steps(self) -> list[float]:
        return [end - start for start, end in pairwise(self._moments)]

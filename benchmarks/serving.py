"""What the server itself costs, and whether it holds: requests of many clients against its queue, and memory over many
pictures of the demo. On one machine, over sockets, drawing and asking beside each other.

    python benchmarks/serving.py [--clients 20] [--requests 200] [--pictures 1000] [--out RESULT.json]
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import httpx2 as httpx
import psutil

ROOT = Path(__file__).parents[1]
REQUEST = {"prompt": "a red circle", "steps": 2, "seed": 1}


def started(folder: str) -> tuple[subprocess.Popen[str], str]:
    """A server of the demo, and its address."""
    command = [
        sys.executable,
        "-m",
        "zimage_lite",
        "serve",
        "--no-browser",
        "--port",
        "0",
        "--device",
        "cpu",
        "--folder",
        folder,
    ]
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    environment = {**os.environ, "PYTHONPATH": path}
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment, cwd="/")
    assert process.stderr
    for line in process.stderr:
        if line.startswith("http://"):
            return process, line.split()[0]
    raise RuntimeError("the server did not start")


def overhead(address: str, requests: int) -> dict[str, float]:
    """Milliseconds from a request to its answer, of what draws nothing: an order that is refused, a status."""
    found = {}
    with httpx.Client(base_url=address) as client:
        asks = {
            "refused": lambda: client.post("/v1/images/generations", json={"prompt": "x", "size": "1x1"}),
            "status": lambda: client.get("/api/status"),
            "progress": lambda: client.get("/sdapi/v1/progress"),
        }
        for name, ask in asks.items():
            times = []
            for _ in range(requests):
                start = time.perf_counter()
                ask()
                times.append(1000 * (time.perf_counter() - start))
            found |= {f"{name}_p50_ms": _part(times, 50), f"{name}_p99_ms": _part(times, 99)}
    return found


def _part(times: list[float], percent: int) -> float:
    return round(statistics.quantiles(times, n=100)[percent - 1], 2)


def load(address: str, clients: int, requests: int) -> dict[str, Any]:
    """All at once; who finds the queue full comes no more."""

    def ask(number: int) -> tuple[int, bool, float]:
        start = time.perf_counter()
        answer = httpx.post(f"{address}/v1/images/generations", json={**REQUEST, "seed": number}, timeout=600)
        well = answer.status_code == 200 or (
            answer.status_code == 429 and 1 <= int(answer.headers["retry-after"]) <= 120 and "error" in answer.json()
        )
        return answer.status_code, well, time.perf_counter() - start

    with ThreadPoolExecutor(clients) as pool:
        answers = list(pool.map(ask, range(requests)))
    slowest = {str(status): round(max(s for code, _, s in answers if code == status), 2) for status, _, _ in answers}
    counts = {str(status): count for status, count in Counter(status for status, _, _ in answers).items()}
    return {"answers": counts, "well_formed": sum(well for _, well, _ in answers), "slowest_s": slowest}


def memory(address: str, process: subprocess.Popen[str], pictures: int) -> list[dict[str, float]]:
    """Resident MB of the server after so many pictures, ten a job."""
    found, start = [], time.perf_counter()
    with httpx.Client(base_url=address, timeout=600) as client:
        for done in range(0, pictures, 10):
            client.post("/v1/images/generations", json={**REQUEST, "n": 10, "seed": done}).raise_for_status()
            if not (done + 10) % max(pictures // 10, 10):
                rss = psutil.Process(process.pid).memory_info().rss / 1e6
                found.append(
                    {"pictures": done + 10, "rss_mb": round(rss, 1), "s": round(time.perf_counter() - start, 1)}
                )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    for name, default in (("clients", 20), ("requests", 200), ("pictures", 1000)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    with TemporaryDirectory() as folder:
        start = time.perf_counter()
        process, address = started(folder)
        try:
            listening_s = time.perf_counter() - start
            httpx.post(f"{address}/v1/images/generations", json=REQUEST, timeout=600).raise_for_status()
            result = {
                "machine": platform.machine(), "cores": os.cpu_count(), "python": platform.python_version(),
                "start_to_listening_s": round(listening_s, 2),
                "start_to_first_picture_s": round(time.perf_counter() - start, 2),
                "overhead": overhead(address, args.requests), "load": load(address, args.clients, args.requests),
                "memory": memory(address, process, args.pictures),
            }  # fmt: skip
        finally:
            process.terminate()
            process.wait(60)
    text = json.dumps(result, indent=1)
    print(text)
    if args.out:
        args.out.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

"""Whether the Triton kernels can be trusted here: each is checked once on this machine before it is used.

None of us owns the laptops that this is for. So with every new GPU, driver, Triton, torch or version of our kernels
each of them runs once on small data, against its torch reference; verdicts are kept in the user's cache folder. The
checks run in a process of their own: a kernel may kill it, hang, or leave a GPU context that answers nothing but
errors. What was running then has crashed, and another process goes on with the rest. What takes too long is not tested
and not kept: compilations may be slow, and those that are done are not done again the next time.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import subprocess
import sys
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import asdict
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
import zimage_kernels
from zimage_kernels import _triton
from zimage_kernels._triton import capability, interpreted

from ...cache_root import cache_root
from ...checkpoint.output import replacing
from ...errors import UserError
from .. import nvidia
from ..toolchain import compiled_folder, compiler, has_headers, triton_version
from .checks import CHECKS
from .process import STATES, Verdict, one_line

COMPILATIONS = 68  # at most, in all checks
TIMEOUT_S = 300  # of a process with all checks: so many compilations, of half a second to two
_log = logging.getLogger(__name__)
_known: dict[str, dict[str, Verdict]] = {}  # of this process, by situation: the folder may be switched off


def verdicts(
    device: torch.device, refresh: bool = False, tell: Callable[[str], None] = lambda line: None
) -> dict[str, Verdict]:
    """One for each op of checks.CHECKS, by its name. Raises nothing for what kernels, disk or processes do.

    The first call in a new situation takes up to a minute, most of it compilations that are used later, and says so by
    `tell` before. The same where Triton has lost what it compiled. refresh: test again, and replace what was kept.
    """
    obstacle = _obstacle(device)
    if obstacle:
        return dict.fromkeys(CHECKS, Verdict("not supported", obstacle))
    here = situation(device)
    key = hashlib.sha256(json.dumps(here, sort_keys=True).encode()).hexdigest()[:32]
    if refresh or key not in _known:
        root = cache_root()
        path = None if root is None else root / "kernels" / f"{key}.json"
        kept = None if refresh else _read(path, here)
        if kept and not here["interpreted"] and _are_lost(kept):
            kept = None
        if kept is None:
            where = f"; they are kept in {compiled_folder()}"
            tell(f"compiling and checking up to {COMPILATIONS} Triton kernels, once, which may take a minute{where}")
        found = kept or _test(device)
        if kept is None:
            _write(path, here, found)
        _known[key] = found
    return dict(_known[key])


def situation(device: torch.device) -> dict[str, Any]:
    """All that a verdict depends on. What a compilation needs is in it, for it may be installed later."""
    gpu = device.type == "cuda"
    driver = nvidia.driver() if gpu else None
    return {
        "gpu": torch.cuda.get_device_name(device) if gpu else None,
        "capability": capability(device) if gpu else None,
        "interpreted": interpreted(),
        "driver": driver.version if driver else None,
        "triton": triton_version(),
        "torch": torch.__version__,
        "kernels": _source_hash(),
        "compiler": compiler(),
        "headers": has_headers(),
    }


def _source_hash() -> str:
    """Of the kernels, their tiles, and this test."""
    digest = hashlib.sha256()
    for folder in (Path(str(files(zimage_kernels))), Path(__file__).parent):
        for file in sorted(folder.rglob("*")):
            if file.suffix in (".py", ".json"):
                digest.update(file.name.encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()


def _obstacle(device: torch.device) -> str | None:
    if _triton.load() is None:
        return "Triton is not installed" if triton_version() is None else "Triton cannot be imported"
    if device.type != "cuda" and not interpreted():
        return f"kernels need CUDA, the device is {device.type}"
    return None


def _are_lost(kept: dict[str, Verdict]) -> bool:
    """Whether kernels that compiled are no longer in Triton's cache, so that the first picture would compile them."""
    try:
        found = any(compiled_folder().iterdir())
    except OSError:
        found = False
    return not found and any(verdict.trusted for verdict in kept.values())


# --- Kept verdicts


def _read(path: Path | None, here: dict[str, Any]) -> dict[str, Verdict] | None:
    """None for what is missing, damaged, of another situation, or lacks a kernel."""
    if path is None:
        return None
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))
        found = {op: Verdict(str(kept["verdicts"][op]["state"]), str(kept["verdicts"][op]["reason"])) for op in CHECKS}
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    same = kept.get("situation") == here and all(verdict.state in STATES for verdict in found.values())
    return found if same else None


def _write(path: Path | None, here: dict[str, Any], found: dict[str, Verdict]) -> None:
    if path is None or any(verdict.state == "not tested" for verdict in found.values()):
        return
    text = json.dumps({"situation": here, "verdicts": {op: asdict(verdict) for op, verdict in found.items()}}, indent=1)
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with replacing(path) as partial:
            partial.write_text(text, encoding="utf-8")
    except (OSError, UserError) as error:
        _log.debug("verdicts cannot be kept: %s", error)


# --- The test, from outside


def _test(device: torch.device) -> dict[str, Verdict]:
    found: dict[str, Verdict] = {}
    while missing := [op for op in CHECKS if op not in found]:
        said, running, end, timed_out = _run(command(device, missing))
        found |= said
        if running is not None and running not in said:
            found[running] = Verdict("not tested" if timed_out else "crashed", end)
        elif not said:
            return found | dict.fromkeys(missing, Verdict("not tested", end))
    return {op: found[op] for op in CHECKS}


def command(device: torch.device, ops: Iterable[str]) -> list[str]:
    return [sys.executable, "-m", "zimage_lite.doctor.selftest.process", str(device), *ops]


def _run(arguments: list[str]) -> tuple[dict[str, Verdict], str | None, str, bool]:
    """What a process said, the op that it began last, how it ended, and whether that was for want of time."""
    # It finds what this process found, wherever that stands, and nothing in the current folder (Python 3.11 and newer).
    paths = os.pathsep.join(path for path in sys.path if path)
    environment = {**os.environ, "PYTHONPATH": paths, "PYTHONSAFEPATH": "1"}
    environment.pop("TORCH_ALLOW_TF32_CUBLAS_OVERRIDE", None)  # some containers set it: references would lose 13 bits
    timed_out = False
    try:
        done = subprocess.run(
            arguments, capture_output=True, timeout=TIMEOUT_S, env=environment, stdin=subprocess.DEVNULL
        )
        out, errors = done.stdout, done.stderr.decode(errors="replace").strip().splitlines()
        end = f"the process ended with code {done.returncode}" + (f": {errors[-1].strip()}" if errors else "")
    except subprocess.TimeoutExpired as error:
        timed_out = True
        out, end = error.stdout or b"", f"no answer within {TIMEOUT_S} s"
    except OSError as error:
        return {}, None, f"{arguments[0]}: {error.strerror}", False
    said: dict[str, Verdict] = {}
    running = None
    for line in out.decode(errors="replace").splitlines():
        with suppress(ValueError, KeyError, TypeError):
            message = json.loads(line)
            if message["op"] in CHECKS:
                running = message["op"]
                if "state" in message:
                    said[running] = Verdict(message["state"], message["reason"])
    return said, running, one_line(end), timed_out

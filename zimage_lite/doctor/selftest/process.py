"""The process in which kernels are checked, and which a kernel may kill:
python -m zimage_lite.doctor.selftest.process
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass

import torch
from zimage_kernels._triton import capability

from .agreement import prepared
from .checks import CHECKS, compute_dtype

STATES = ("ok", "wrong", "cannot compile", "crashed", "not supported", "not tested")


@dataclass(frozen=True)
class Verdict:
    """state: one of STATES. reason: in one line, empty for "ok".

    "cannot compile" is whatever the launch raised; "not tested", the only one that is not kept, says that the machine
    could not run the test now, such as for lack of GPU memory.
    """

    state: str
    reason: str = ""

    @property
    def trusted(self) -> bool:
        return self.state == "ok"


def one_line(text: object) -> str:
    """The first line that says something, 200 characters at most."""
    lines = [line.strip() for line in str(text).splitlines() if line.strip()]
    return lines[0][:200] if lines else ""


def run_checks(device: torch.device, ops: Iterable[str]) -> Iterator[tuple[str, Verdict | None]]:
    """(op, None) before its check begins, and (op, verdict) after. Ends once the GPU answers nothing but errors."""
    for op in ops:
        yield op, None
        check, least = CHECKS[op]
        if device.type == "cuda" and capability(device) < least:
            reason = f"needs compute capability {least / 10}, this GPU has {capability(device) / 10}"
            yield op, Verdict("not supported", reason)
            continue
        try:
            with prepared(device):
                problem = check(compute_dtype(device))
            verdict = Verdict("wrong", problem) if problem else Verdict("ok")
        except (torch.OutOfMemoryError, MemoryError) as error:
            verdict = Verdict("not tested", one_line(error))
        except Exception as error:  # noqa: BLE001 - of whatever kind: Triton, ptxas, gcc and drivers have their own
            verdict = Verdict("cannot compile", f"{type(error).__name__}: {one_line(error)}")
        broken = _broken(device)
        if broken:
            yield op, Verdict("crashed", broken)
            return
        yield op, verdict


def _broken(device: torch.device) -> str | None:
    """An illegal access makes every later call of the process fail."""
    try:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    except RuntimeError as error:
        return one_line(error)
    return None


def main(arguments: list[str]) -> None:
    """A device and ops; says in lines of JSON what it is doing and what it finds."""
    for op, verdict in run_checks(torch.device(arguments[0]), arguments[1:]):
        print(json.dumps({"op": op} | (asdict(verdict) if verdict else {})), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])

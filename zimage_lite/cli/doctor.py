"""zimage-lite doctor"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, replace
from typing import TYPE_CHECKING

import click

from ..errors import EXIT_USER
from ..units import format_gb
from . import leaving_at_once, print_json, say, table_printer

if TYPE_CHECKING:
    from ..doctor.installation import Installation


@click.command(name="doctor")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object to stdout.")
def command(as_json: bool) -> None:
    """Say what is installed, test the kernels on the GPU, and name the command that mends what is wrong.

    Works without torch and without Triton. Leaves with 0 where images can be drawn, even slowly and whatever was found,
    and with 2 where torch cannot be imported, so that nothing can run.
    """
    from ..doctor import installation, remedies

    with leaving_at_once():
        found = installation.probe()
    if remedies.uses_kernels(found):
        say("testing the kernels on the GPU, up to a minute the first time ...")
        found = replace(found, verdicts=installation.kernel_verdicts())
    show = table_printer(as_json)
    for name, text in _lines(found):
        show(f"{name:<9} {text}")
    show(f"{'backend':<9} {remedies.backend(found)}")
    problems = remedies.problems(found)
    for problem in problems:
        show(f"problem: {problem}")
    if not problems:
        show("no problems found")
    runs = remedies.can_run(found)
    if as_json:
        told = {"backend": remedies.backend(found), "can_run": runs, "problems": [asdict(each) for each in problems]}
        print_json({**asdict(found), "pinned_limit_bytes": found.pinned_limit_bytes, **told})
    if not runs:
        raise click.exceptions.Exit(EXIT_USER)


def _lines(found: Installation) -> Iterator[tuple[str, str]]:
    yield "python", f"{found.python}, {found.executable}"
    torch = found.torch
    if torch is None or torch.error:
        yield "torch", "not installed" if torch is None else f"cannot be imported: {torch.error}"
    else:
        build = f"for CUDA {torch.cuda}" if torch.cuda else "without CUDA"
        yield "torch", f"{torch.version}, built {build}, computes on {torch.device}"
    if found.driver is None:
        yield "gpu", "no NVIDIA driver"
    else:
        yield "driver", f"{found.driver.version}, runs CUDA {_dotted(found.driver.cuda)}"
        for card in found.driver.cards:
            free, total = (f"{n / 2**30:.1f} GiB" for n in (card.free_bytes, card.total_bytes))
            yield "gpu", f"{card.name}, compute capability {_dotted(card.capability)}, {free} of {total} free"
    compiler = found.compiler or ("brought by Triton" if found.system == "win32" else "missing")
    headers = "there" if found.headers else "missing"
    yield "triton", f"{found.triton or 'not installed'}, C compiler: {compiler}, Python's headers: {headers}"
    pinned = found.pinned_limit_bytes
    limit = f", of which {format_gb(pinned)} can be pinned" if pinned else ""
    yield "ram", f"{format_gb(found.ram_free_bytes)} of {format_gb(found.ram_bytes)} free{limit}"
    yield "cache", f"{found.cache}, {format_gb(found.cache_bytes)}" if found.cache else "off"
    for number, (op, verdict) in enumerate(found.verdicts.items()):
        reason = f": {verdict.reason}" if verdict.reason else ""
        yield "" if number else "kernels", f"{op:<16} {verdict.state}{reason}"


def _dotted(numbers: tuple[int, int]) -> str:
    return f"{numbers[0]}.{numbers[1]}"

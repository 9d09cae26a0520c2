"""The command line: one file per verb, each loaded when its verb is used.

Exit codes: 0 done; 2 the input is at fault, told in one line; 3 it does not fit the budget, or memory ran out twice;
130 interrupted; 1 our fault, with the traceback. Human text goes to stderr, but the tables that a verb is there to
print go to stdout; with --json, stdout holds one line with one JSON object, and all text goes to stderr.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from glob import glob
from importlib import import_module
from threading import current_thread, main_thread
from typing import Any

import click

from .. import __version__
from ..errors import EXIT_INTERRUPTED, EXIT_OK, EXIT_USER, UserError
from .streams import lost_output, outlive_readers

_ENDING = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGBREAK") if hasattr(signal, name)]
_INTERRUPTED = "interrupted; nothing was left half-written"
_VERBS = {
    "generate": "Draw images from prompts.",
    "serve": "Draw for other programs, over HTTP: OpenAI's API, A1111's, and our own.",
    "train-lora": "Teach a model what some pictures show, as a LoRA.",
    "calibrate": "Gather what a model's linears are given, for better quantizing.",
    "quantize": "Turn a checkpoint into a smaller one.",
    "plan": "Predict memory and time, for any GPU.",
    "bench": "Measure time and memory, or predict them for a tier of hardware.",
    "compare": "Draw the same pictures with several models, and say how alike they are.",
    "report": "Turn results of bench and compare into a page.",
    "inspect": "Say what a file or folder is.",
    "doctor": "Say what is installed, which kernels can be trusted, and how to mend the rest.",
    "formats": "List the formats, what they cost and who reads them.",
}


class _Verbs(click.Group):
    """Finds a verb's module by its name, so that --help loads none of them."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_VERBS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in _VERBS:
            return None
        with leaving_at_once():
            return import_module(f".{name.replace('-', '_')}", __package__).command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(_VERBS.items()))


@click.group(cls=_Verbs, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="zimage-lite")
def cli() -> None:
    """Z-Image-Turbo on a small GPU, or none: quantize the checkpoint, draw inside the memory you name."""


def main(args: list[str] | None = None) -> None:
    """The console script. Leaves with the exit code."""
    # Before torch is loaded: OpenMP threads that spin while they wait lose their time slices to any other program.
    # The demo model took 0.84 s instead of 0.02 s per step beside one, on two cores; alone, spinning gained nothing
    # that a person would notice.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    # And Intel's Fortran, which torch brings on Windows since 2.7 (ComfyUI's issue 7771), would end the process on
    # Ctrl-C before Python hears of it.
    os.environ.setdefault("FOR_DISABLE_CONSOLE_CTRL_HANDLER", "1")
    outlive_readers()
    for number in _ENDING:  # unfinished outputs are removed then as on Ctrl-C
        if signal.getsignal(number) is signal.SIG_DFL:  # what nohup and & ignore stays ignored
            signal.signal(number, signal.default_int_handler)
    code = run(args)
    if code == EXIT_OK and (lost := lost_output()):
        say(f"error: stdout: {lost.strerror}")
        code = EXIT_USER
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # all is done: while Python ends, it would only print a traceback
    sys.exit(code)


def run(args: list[str] | None = None) -> int:
    """Run a command line and return its exit code. Only faults of our own leave as exceptions."""
    try:
        os.getcwd()
    except FileNotFoundError:  # MKL, that looks for its libraries, would end the process
        say("error: the current folder has been deleted; cd to one that exists")
        return EXIT_USER
    try:
        # On Windows click would look for files of the name that a prompt makes, and put what variables hold into it.
        code = cli.main(args, prog_name="zimage-lite", standalone_mode=False, windows_expand_args=False)
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.ctx.get_help())
        return EXIT_OK
    except click.ClickException as error:
        say(f"error: {' '.join(error.format_message().split())}")
        return EXIT_USER
    except UserError as error:
        say(f"error: {error}")
        return error.exit_code
    except OSError as error:
        if error.filename is None:
            if getattr(error, "winerror", None) is None or "torch" in sys.modules:
                raise
            say(f"error: torch cannot be loaded ({error.strerror}); run zimage-lite doctor, which says what is missing")
            return EXIT_USER
        say(f"error: {error.filename}: {error.strerror}")  # a name too long, a folder that may not be read
        return EXIT_USER
    except (KeyboardInterrupt, click.Abort):
        say(_INTERRUPTED)
        return EXIT_INTERRUPTED
    return code or EXIT_OK  # click hands over the code of its own Exit, and what a verb returns, which is nothing


@contextmanager
def leaving_at_once() -> Iterator[None]:
    """For imports that load torch, before anything is written: an interrupt ends the process there and then. Raised as
    an exception into C++ that calls Python, it made torch abort, with a message of its own."""
    raising = [number for number in _ENDING if signal.getsignal(number) is signal.default_int_handler]
    if "torch" in sys.modules or current_thread() is not main_thread():
        raising = []
    for number in raising:
        signal.signal(number, _leave)
    try:
        yield
    finally:
        for number in raising:
            signal.signal(number, signal.default_int_handler)


def _leave(*_: object) -> None:
    with suppress(OSError):
        os.write(2, f"{_INTERRUPTED}\n".encode())
    os._exit(EXIT_INTERRUPTED)


def files_meant(patterns: Sequence[str]) -> list[str]:
    """Those that match, where a shell leaves that to programs, as those of Windows do. What matches nothing stays."""
    if sys.platform != "win32":
        return list(patterns)
    return [name for pattern in patterns for name in sorted(glob(pattern)) or [pattern]]


def say(text: str) -> None:
    """A line for people. What comes from file names and headers may not break it, nor steer the terminal."""
    _print(text, err=True)


def table_printer(as_json: bool) -> Callable[[str], None]:
    """Prints lines of what the verb is there to tell: on stdout, unless that belongs to the JSON object."""
    return partial(_print, err=as_json)


def _print(text: str, err: bool) -> None:
    # Named, or click looks for the file below what progress bars have put there, and they wipe the line out.
    click.echo("".join(char if char.isprintable() else " " for char in text), file=sys.stderr if err else None)


def print_json(result: dict[str, Any]) -> None:
    """The one JSON object, on the last line of stdout."""
    click.echo(json.dumps(result))  # in ASCII: a redirected stdout on Windows takes little else

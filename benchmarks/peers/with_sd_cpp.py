"""stable-diffusion.cpp on the GGUF files that `zimage-lite quantize` writes: its program, where a path to one is given,
and its Python package, where that is installed.

Each version knows other options. Those that the program's --help or the package's signature does not name are left
out, and a setting that consists of them is not run. Its documentation (z_image.md, performance.md) advises flash
attention everywhere, weights in RAM where the card is small, and streamed layers where it is smaller still. The
program draws one image per run, so that none of its images is warm but for the files in the page cache: its seconds
are those of its log, which leave out what is loaded before the image.
"""

from __future__ import annotations

import inspect
import re
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from harness import Case, Clock, Work, answer, class_of, drawn, without_paths

from zimage_lite.bench.tiers import DONE, FAILED, NOT_RUN, OOM

_PROGRAM, _PACKAGE = "stable-diffusion.cpp", "stable-diffusion-cpp-python"
_SCRIPT = "with_sd_cpp.py"

# For people -> options of the program, and what they are called in the package. {cap}: GiB.
WAYS: dict[str, dict[str, tuple[tuple[str, ...], dict[str, Any]]]] = {
    "cpu": {"flash attention": (("--diffusion-fa",), {"diffusion_flash_attn": True})},
    "cuda": {
        "flash attention, weights in RAM": (
            ("--diffusion-fa", "--offload-to-cpu", "--vae-tiling", "--max-vram", "{cap}"),
            {"diffusion_flash_attn": True, "offload_params_to_cpu": True, "max_vram": "{cap}"},
        ),
        "flash attention, streamed layers": (
            ("--diffusion-fa", "--offload-to-cpu", "--vae-tiling", "--max-vram", "{cap}", "--stream-layers"),
            {"diffusion_flash_attn": True, "offload_params_to_cpu": True, "max_vram": "{cap}", "stream_layers": True},
        ),
    },
}
_ESSENTIAL = {"--stream-layers", "stream_layers"}  # without these, a way is another
_WELCOME = {"--stream-layers": ("--layer-prefetch-depth", "1")}  # what the documentation stacks on it
_NO_MEMORY = re.compile(r"out of memory|cannot allocate|failed to allocate|alloc\w* failed|bad_alloc", re.IGNORECASE)


def cases(folders: Mapping[str, str], program: str | None, device: str) -> list[Case]:
    """folders: format -> a model folder that quantize wrote, if there is one; program: its path."""
    found = []
    for name, folder in (folders or {"q8_0": ""}).items():
        lacks = None if folder else "needs --quantized"
        for way in WAYS[device]:
            settings = {**(files_in(Path(folder)) if folder else {}), "device": device, "way": way}
            case = Case(_PACKAGE, f"{name}, {way}", class_of(name), device, _SCRIPT, settings, (_PACKAGE,), lacks)
            by_program = {**settings, "program": program}
            no_program = None if program else "needs --sd-cpp"
            found += [replace(case, peer=_PROGRAM, settings=by_program, needs=(), lacks=no_program or lacks), case]
    return found


def files_in(folder: Path) -> dict[str, str]:
    """The three that it reads."""
    patterns = {"diffusion_model": "transformer/*.gguf", "llm": "text_encoder/*.gguf", "vae": "vae/*.safetensors"}
    return {name: str(next(iter(sorted(folder.glob(pattern))), "")) for name, pattern in patterns.items()}


def measure(settings: dict[str, Any], work: Work) -> dict[str, Any]:
    return by_program(settings, work) if "program" in settings else by_package(settings, work)


# --- The program


def by_program(settings: dict[str, Any], work: Work) -> dict[str, Any]:
    program = settings["program"]
    try:
        help_text = said(program, "--help")
    except OSError as error:
        return {"outcome": FAILED, "reason": f"{Path(program).name}: {error.strerror}"}
    options, _ = WAYS[settings["device"]][settings["way"]]
    unknown = sorted(_ESSENTIAL.intersection(options) - known_options(help_text))
    if unknown:
        return {"outcome": NOT_RUN, "reason": f"this version has no {', '.join(unknown)}"}
    arguments = command_line(settings, work, help_text)
    found: dict[str, Any] = {"outcome": DONE, "runs": [], "command": without_paths([program, *arguments])}
    if named := re.search(r"stable-diffusion\.cpp version .*", help_text):
        found["version"] = named[0]
    with tempfile.TemporaryDirectory() as folder:  # for the picture
        for _ in range(1 + work.repeats):
            code, log, moments = watched([program, *arguments], folder, work.steps)
            if code:
                return {**found, **failure(log, code)}
            found["runs"].append(told_by(log, moments, work.steps))
    return found


def said(program: str, option: str) -> str:
    done = subprocess.run([program, option], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=60)
    return done.stdout.decode(errors="replace")


def known_options(help_text: str) -> set[str]:
    """Long options at the beginning of a line, as a help lists them."""
    lines = (re.match(r"\s*(?:-\w,\s*)?(--[\w-]+)", line) for line in help_text.splitlines())
    return {found[1] for found in lines if found}


def command_line(settings: Mapping[str, Any], work: Work, help_text: str) -> list[str]:
    """Without the program. Files are passed under the names that this version has for them."""
    known = known_options(help_text)
    llm = "--llm" if "--llm" in known else "--qwen2vl"  # its name until the end of 2025
    found = ["--diffusion-model", settings["diffusion_model"], llm, settings["llm"], "--vae", settings["vae"]]
    size, steps, seed, threads = map(str, (work.size, work.steps, work.seed, work.threads))
    found += ["--prompt", work.prompt, "--width", size, "--height", size, "--steps", steps, "--seed", seed]
    found += ["--cfg-scale", "1.0", "--threads", threads, "--output", "image.png"]
    options, _ = WAYS[settings["device"]][settings["way"]]
    return found + chosen(options, known, work)


def chosen(options: Sequence[str], known: set[str], work: Work) -> list[str]:
    """Those of these options that are known, with their values."""
    found: list[str] = []
    keep = False
    for word in options:
        if word.startswith("--"):
            keep = word in known
        if keep:
            found.append(word.replace("{cap}", cap(work)))
        welcome = _WELCOME.get(word, ())
        if keep and welcome and welcome[0] in known:
            found += welcome
    return found


def cap(work: Work) -> str:
    """For --max-vram, in GiB: 0, which is none, without a cap."""
    return f"{(work.vram_bytes or 0) / 2**30:.2f}"


def watched(command: Sequence[str], folder: str, steps: int) -> tuple[int, str, list[float]]:
    """-> exit code, log, and the moments at which its progress bar had counted one, two ... of so many steps. What the
    bar says of their speed is each step's in some versions, and the mean so far in others."""
    process = subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, bufsize=0)
    assert process.stdout
    log, moments = b"", list[float]()
    while chunk := process.stdout.read(65536):
        log += chunk
        counted = [
            int(step) for step, of in re.findall(rb"(\d+)/(\d+) - ", log[-len(chunk) - 20 :]) if int(of) == steps
        ]
        if len(moments) + 1 in counted:
            moments.append(time.perf_counter())
    return process.wait(), log.decode(errors="replace"), moments


def told_by(log: str, moments: Sequence[float], steps: int) -> dict[str, Any]:
    """Of an image. The first step is what the others leave of the sampling. Raises ValueError if the log lacks one."""
    whole = re.findall(r"generate_image completed in ([\d.]+)s", log)
    sampling = re.findall(r"sampling completed, taking ([\d.]+)s", log)
    if not whole or not sampling:
        raise ValueError("no image in the log of stable-diffusion.cpp")
    each = [float(sampling[-1]) / steps] * steps
    if len(moments) == steps:
        later = [end - start for start, end in pairwise(moments)]
        each = [max(float(sampling[-1]) - sum(later), 0.0), *later]
    return {"seconds": float(whole[-1]), "step_seconds": [round(seconds, 4) for seconds in each]}


def failure(log: str, code: int) -> dict[str, Any]:
    lines = [line.strip() for line in log.splitlines() if line.strip()] or [f"ended with {code}"]
    for line in lines:
        if _NO_MEMORY.search(line):
            return {"outcome": OOM, "reason": line[-300:]}
    complaints = [line for line in lines if "ERROR" in line]
    return {"outcome": FAILED, "reason": (complaints or lines)[-1][-300:]}


# --- The package


def by_package(settings: dict[str, Any], work: Work) -> dict[str, Any]:
    from stable_diffusion_cpp import StableDiffusion

    _, wanted = WAYS[settings["device"]][settings["way"]]
    wanted = {name: float(cap(work)) if value == "{cap}" else value for name, value in wanted.items()}
    known = set(inspect.signature(StableDiffusion.__init__).parameters)
    unknown = sorted(_ESSENTIAL.intersection(wanted) - known)
    if unknown:
        return {"outcome": NOT_RUN, "reason": f"this version has no {', '.join(unknown)}"}
    options = {name: value for name, value in wanted.items() if name in known}
    model = StableDiffusion(
        diffusion_model_path=settings["diffusion_model"], llm_path=settings["llm"], vae_path=settings["vae"],
        n_threads=work.threads, **options,
    )  # fmt: skip
    runs: list[dict[str, Any]] = []
    drawn(lambda: one_image(model, work), work, runs)
    return {"outcome": DONE, "runs": runs, "arguments": options}


def one_image(model: Any, work: Work) -> list[float]:
    clock = Clock()

    def progress(step: int, steps: int, _seconds: float) -> None:
        if steps == work.steps:  # not of loading
            (clock.end if step else clock.begin)()

    model.generate_image(
        prompt=work.prompt, width=work.size, height=work.size, sample_steps=work.steps, cfg_scale=1.0, seed=work.seed,
        progress_callback=progress,
    )  # fmt: skip
    return clock.steps()


if __name__ == "__main__":
    answer(measure)

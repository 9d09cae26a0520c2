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
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from harness import Case, Clock, Work, answer, class_of, drawn, without_paths

from zimage_lite.tiers import DONE, FAILED, OOM

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
            settings = {**files_in(Path(folder)), "device": device, "way": way}
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
        return {"outcome": FAILED, "reason": f"this version has no {', '.join(unknown)}"}
    arguments = command_line(settings, work, help_text)
    found: dict[str, Any] = {"outcome": DONE, "runs": [], "command": without_paths([program, *arguments])}
    if "--version" in known_options(help_text):
        found["version"] = said(program, "--version").strip().splitlines()[0]
    with tempfile.TemporaryDirectory() as folder:  # for the picture
        for _ in range(1 + work.repeats):
            done = subprocess.run([program, *arguments], cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
            log = done.stdout.decode(errors="replace")
            if done.returncode:
                return {**found, **failure(log, done.returncode)}
            found["runs"].append(told_by(log, work.steps))
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
    found += ["--prompt", work.prompt, "--width", str(work.size), "--height", str(work.size)]
    found += [
        "--steps",
        str(work.steps),
        "--seed",
        str(work.seed),
        "--cfg-scale",
        "1.0",
        "--threads",
        str(work.threads),
    ]
    found += ["--output", "image.png"]
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


def told_by(log: str, steps: int) -> dict[str, Any]:
    """What its log says of an image. Raises ValueError if it says nothing of it."""
    whole = re.findall(r"generate_image completed in ([\d.]+)s", log)
    sampling = re.findall(r"sampling completed, taking ([\d.]+)s", log)
    if not whole or not sampling:
        raise ValueError("no image in the log of stable-diffusion.cpp")
    return {"seconds": float(whole[-1]), "step_seconds": steps_of(log, steps) or [float(sampling[-1]) / steps] * steps}


def steps_of(log: str, steps: int) -> list[float]:
    """Seconds of each step, from what the progress bar said of it; nothing if it does not count to `steps`."""
    found: dict[int, float] = {}
    before, _, _ = log.rpartition("sampling completed")
    for step, of, rate, unit in re.findall(r"(\d+)/(\d+) - ([\d.]+)(s/it|it/s)", before):
        if int(of) == steps and float(rate):
            found[int(step)] = float(rate) if unit == "s/it" else round(1 / float(rate), 4)
    return [found[step] for step in range(1, steps + 1)] if len(found) == steps else []


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
        return {"outcome": FAILED, "reason": f"this version has no {', '.join(unknown)}"}
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

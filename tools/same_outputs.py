"""What must not change between two commits, as SHA-256: pictures and quantized files of the demo, and what --json says.

    python tools/same_outputs.py CHECKOUT          prints the hashes as JSON
    python tools/same_outputs.py BEFORE AFTER      names what differs, and exits with 1 if anything does

Compares on one machine only: other processors round otherwise."""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from PIL import Image

CAPTIONS = (
    "a red circle on a blue background",
    "a small green square on a yellow background",
    "蓝色背景上的黄色星形",
)
MODELS = {"16bit": "demo", "int8": "int8"}  # --compute, and a model that takes it
FORMATS = ("q8_0", "q4_k_m", "int8", "int4", "nf4", "qint8", "bf16")  # each container and kind of packing
MEASURED = ("seconds", "peak_", "rss", "_ms", "read_bytes", "copied_bytes", "images")  # images: paths of files


def zimage(checkout: Path, work: Path, *args: object) -> tuple[int, str]:
    """-> exit code and stdout of that checkout's zimage-lite, run in that folder."""
    environment = {**os.environ, "PYTHONPATH": f"{checkout}{os.pathsep}{checkout / 'kernels'}"}
    environment["ZIMAGE_LITE_CACHE"] = "off"
    command = [sys.executable, "-m", "zimage_lite", *map(str, args)]
    done = subprocess.run(command, env=environment, cwd=work, capture_output=True, text=True)
    if done.returncode not in (0, 2):
        raise SystemExit(f"{' '.join(command)}: exit code {done.returncode}\n{done.stderr}")
    return done.returncode, done.stdout if done.returncode == 0 else done.stderr


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def steady(value: Any, path: str = "") -> dict[str, Any]:
    """Path -> value of each leaf, without what is measured anew in each run, and without the places of files."""
    if isinstance(value, dict):
        kept = {key: one for key, one in value.items() if not any(word in key for word in MEASURED)}
        return {at: leaf for key in sorted(kept) for at, leaf in steady(kept[key], f"{path}.{key}").items()}
    return {path: value}


def pictures(checkout: Path, work: Path, compute: str) -> dict[str, str]:
    """Of each caption, the file, its pixels and the last line of --json; or the refusal, where it is not supported."""
    found = {}
    for index, caption in enumerate(CAPTIONS):
        out, name = work / f"{compute}-{index}.png", f"picture {index} in {compute}"
        options = ["--model", MODELS[compute], "--compute", compute, "--device", "cpu", "--seed", index]
        code, said = zimage(checkout, work, "generate", caption, *options, "--json", "-o", out.name)
        if code:
            return {f"pictures in {compute}": f"refused: {said.strip().splitlines()[-1]}"}
        found[f"{name}: file"] = sha256(out.read_bytes())
        found[f"{name}: pixels"] = sha256(Image.open(out).tobytes())
        told = steady(json.loads(said.splitlines()[-1]))
        found |= {f"{name}: --json {at}": sha256(json.dumps(leaf).encode()) for at, leaf in told.items()}
    return found


def conversions(checkout: Path, work: Path) -> dict[str, str]:
    found = {}
    for name in FORMATS:
        out = work / name
        code, said = zimage(checkout, work, "quantize", "demo", "--to", name, "-o", name)
        if code:
            raise SystemExit(said)
        files = sorted(file for file in out.rglob("*") if file.is_file())
        found |= {f"{name}: {file.relative_to(out).as_posix()}": sha256(file.read_bytes()) for file in files}
    return found


def hashes(checkout: Path) -> dict[str, str]:
    with tempfile.TemporaryDirectory() as folder:
        found = conversions(checkout, Path(folder))
        for compute in MODELS:
            found |= pictures(checkout, Path(folder), compute)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkout", type=Path, nargs="+")
    checkouts = [path.resolve() for path in parser.parse_args().checkout]
    results = [hashes(path) for path in checkouts]
    if len(results) == 1:
        print(json.dumps(results[0], indent=1, ensure_ascii=False))
        return 0
    before, *others = results
    names = {name: None for result in results for name in result}
    differing = [name for name in names if any(result.get(name) != before.get(name) for result in others)]
    said = [f"differs: {name}: {' and '.join(str(result.get(name)) for result in results)}" for name in differing]
    print("\n".join(said) or f"all {len(names)} are the same")
    return 1 if differing else 0


if __name__ == "__main__":
    sys.exit(main())

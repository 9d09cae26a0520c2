"""A real ComfyUI, run headless on the CPU with our nodes in it, and asked over HTTP.

COMFYUI names its folder, COMFYUI_PYTHON the Python that has what it needs (else the one that runs the tests),
COMFYUI_GGUF a folder of ComfyUI-GGUF to be run beside ours.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

ROOT = Path(__file__).parents[2]
NODES = ROOT / "integrations" / "comfyui"
Prompt = dict[str, dict[str, Any]]  # in the API's format: node -> class_type, inputs

# torchvision and torchaudio of PyPI do not import beside a torch for CPUs, and nothing here needs them.
_STAND_INS = """
import importlib.abc, importlib.machinery, sys, types

class Module(types.ModuleType):
    __version__ = "0.0"

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})

class Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torchvision", "torchaudio"):
            return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def create_module(self, spec):
        return Module(spec.name)

    def exec_module(self, module):
        pass

sys.meta_path.append(Finder())
"""


class FailedError(Exception):
    """What a node raised, as ComfyUI tells it."""


class Comfy:
    def __init__(self, port: int, base: Path, pid: int) -> None:
        self.url, self.base, self.pid = f"http://127.0.0.1:{port}", base, pid

    def get(self, path: str) -> Any:
        with urllib.request.urlopen(f"{self.url}/{path}", timeout=60) as answer:
            return json.load(answer)

    def post(self, path: str, content: Mapping[str, Any]) -> Any:
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(f"{self.url}/{path}", json.dumps(content).encode(), headers)
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                text = answer.read()
        except urllib.error.HTTPError as error:
            raise FailedError(error.read().decode()) from error
        return json.loads(text) if text else None

    def node(self, kind: str, **inputs: Any) -> dict[str, Any]:
        """For a prompt, with the defaults of what is not said, as the page fills them in."""
        described = self.get(f"object_info/{kind}")[kind]["input"]
        defaults = {}
        for name, (values, *options) in {**described.get("required", {}), **described.get("optional", {})}.items():
            said = options[0] if options else {}
            choices = said.get("options") if values == "COMBO" else values
            if "default" in said or isinstance(choices, list):
                defaults[name] = said.get("default", choices[0] if isinstance(choices, list) and choices else None)
            elif values == "STRING":
                defaults[name] = ""
        return {"class_type": kind, "inputs": {**defaults, **inputs}}

    def order(self, prompt: Prompt) -> str:
        """-> its id. Raises FailedError for what is refused at once."""
        return str(self.post("prompt", {"prompt": prompt, "client_id": uuid.uuid4().hex})["prompt_id"])

    def wait(self, ordered: str, seconds: float = 300) -> dict[str, Any]:
        """-> what each output node showed, by its id. Raises FailedError."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            found = self.get(f"history/{ordered}").get(ordered)
            if found and found["status"].get("status_str"):
                return self._outputs(found)
            time.sleep(0.05)  # how often it is asked; nothing depends on it
        raise TimeoutError(f"ComfyUI did not end {ordered} in {seconds:.0f} s")

    def run(self, prompt: Prompt) -> dict[str, Any]:
        return self.wait(self.order(prompt))

    def pictures(self, shown: Mapping[str, Any]) -> list[np.ndarray]:
        """Of SaveImage or PreviewImage: [h, w, 3] uint8 each."""
        found = []
        for place in shown["images"]:
            query = "&".join(f"{name}={place[name]}" for name in ("filename", "subfolder", "type"))
            with urllib.request.urlopen(f"{self.url}/view?{query}", timeout=60) as answer:
                found.append(np.asarray(Image.open(BytesIO(answer.read()))))
        return found

    def latent(self, shown: Mapping[str, Any]) -> Tensor:
        """Of SaveLatent: [batch, channels, h, w]."""
        (place,) = shown["latents"]
        return load_file(self.base / "output" / place["subfolder"] / place["filename"])["latent_tensor"]

    def _outputs(self, found: Mapping[str, Any]) -> dict[str, Any]:
        if found["status"]["status_str"] == "success":
            return dict(found["outputs"])
        for kind, details in found["status"]["messages"]:
            if kind == "execution_error":
                raise FailedError(f"{details['exception_type']}: {details['exception_message']}".strip())
            if kind == "execution_interrupted":
                raise FailedError("interrupted")
        raise FailedError(str(found["status"]))


@contextmanager
def running(base: Path, nodes: Mapping[str, Path], *arguments: str) -> Iterator[Comfy]:
    """base: a new folder for its models and outputs; nodes: by the names of their folders."""
    comfy, python = Path(os.environ["COMFYUI"]), os.environ.get("COMFYUI_PYTHON", sys.executable)
    for folder in ("custom_nodes", "web", "stand_ins", "models"):
        (base / folder).mkdir(parents=True, exist_ok=True)
    (base / "web" / "index.html").write_text("<html></html>")
    (base / "stand_ins" / "sitecustomize.py").write_text(_STAND_INS)
    for name, place in nodes.items():
        (base / "custom_nodes" / name).symlink_to(place, target_is_directory=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        python, "main.py", "--cpu", "--listen", "127.0.0.1", "--port", str(port), "--base-directory", str(base),
        "--disable-api-nodes", "--disable-all-custom-nodes", "--whitelist-custom-nodes", *nodes,
        "--front-end-root", str(base / "web"), "--database-url", "sqlite:///:memory:", *arguments,
    ]  # fmt: skip
    paths = [str(base / "stand_ins"), str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), "ZIMAGE_LITE_CACHE": "off"}
    log = base / "log.txt"
    with open(log, "w") as file:
        process = subprocess.Popen(command, cwd=comfy, env=environment, stdout=file, stderr=subprocess.STDOUT)
    try:
        found = Comfy(port, base, process.pid)
        _await(found, process, log)
        yield found
    finally:
        process.terminate()
        process.wait(60)


def _await(comfy: Comfy, process: subprocess.Popen[bytes], log: Path) -> None:
    for _ in range(600):
        if process.poll() is not None:
            raise RuntimeError(f"ComfyUI ended at once:\n{log.read_text()[-3000:]}")
        try:
            comfy.get("system_stats")
            return
        except OSError:
            time.sleep(0.5)
    raise TimeoutError(f"ComfyUI did not listen:\n{log.read_text()[-3000:]}")

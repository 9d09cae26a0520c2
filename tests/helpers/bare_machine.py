"""pytest where only what a bare machine with a GPU has can be imported: python bare_machine.py PYTEST_ARGUMENTS..."""

from __future__ import annotations

import sys
from importlib.abc import MetaPathFinder

import pytest

MISSING = {"accelerate", "bitsandbytes", "comfy_kitchen", "diffusers", "gguf", "optimum", "platformdirs"}


class Bare(MetaPathFinder):
    def find_spec(self, fullname: str, path: object, target: object = None) -> None:
        if fullname.partition(".")[0] in MISSING:
            raise ModuleNotFoundError(f"No module named '{fullname}'", name=fullname)


if __name__ == "__main__":
    sys.meta_path.insert(0, Bare())
    sys.exit(pytest.main(sys.argv[1:]))

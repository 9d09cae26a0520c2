"""What Triton needs on a machine: its package, a C compiler, Python's headers. Loads no torch and no Triton."""

from __future__ import annotations

import os
import shutil
import sysconfig
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

_PACKAGES = ("triton", "triton-windows")


def triton_version() -> str | None:
    """Of the installed package, which need not be importable."""
    for package in _PACKAGES:
        with suppress(PackageNotFoundError):
            return version(package)
    return None


def compiler() -> str | None:
    """The C compiler that Triton would take, which compiles its link to the driver. triton-windows brings its own."""
    return os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")


def has_headers() -> bool:
    """Python's own, which that link includes."""
    return (Path(sysconfig.get_paths()["include"]) / "Python.h").is_file()


def compiled_folder() -> Path:
    """Where Triton keeps what it compiled."""
    home = os.environ.get("TRITON_HOME") or os.path.expanduser("~/")
    return Path(os.environ.get("TRITON_CACHE_DIR") or os.path.join(home, ".triton", "cache"))


def package_manager() -> str | None:
    """The program that installs what is missing of these, on Linux."""
    return next((name for name in ("apt-get", "dnf", "zypper", "pacman") if shutil.which(name)), None)

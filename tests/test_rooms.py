"""What is installed, what importing it costs, and which way the imports run."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator, Mapping
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import Any

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
TREES = {"zimage_lite": ROOT / "zimage_lite", "zimage_kernels": ROOT / "kernels" / "zimage_kernels"}
FILES = [file for tree in TREES.values() for file in sorted(tree.rglob("*.py"))]
HEAVY = {"torch", "transformers", "diffusers", "numpy", "PIL", "gguf", "safetensors", "tokenizers", "bitsandbytes"}

# Who may import whom: only what stands on a floor below. Rooms on one floor do not know each other.
FLOORS = (
    ("__main__",),
    ("cli",),
    ("report", "serve", "diffusers"),
    ("workers",),
    ("compare",),
    ("bench", "train"),
    ("api",),
    ("pipeline",),
    ("plan",),
    ("convert",),
    ("adapters", "calibration"),
    ("doctor", "pictures"),
    ("checkpoint", "model"),
    ("memory", "quant", "page"),
)
NEVER = {"checkpoint": {"memory"}, "model": {"memory"}}  # though it stands below
FREE = {"config", "errors", "units", "cache_root"}  # imported from anywhere, and import nothing but their like
LEVEL = {room: level for level, rooms in enumerate(FLOORS) for room in rooms}
LOOSE = {"__init__", "__main__", "api", *FREE}  # files at the top
OUTSIDE = {"tools", "benchmarks", "tests", "conftest"} | {
    file.stem for folder in ("tools", "tests/helpers") for file in (ROOT / folder).glob("*.py")
}


def module_name(file: Path) -> str:
    """zimage_lite/cli/__init__.py -> zimage_lite.cli"""
    tree = next(name for name, folder in TREES.items() if folder in file.parents)
    parts = [tree, *file.relative_to(TREES[tree]).with_suffix("").parts]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(file): file for file in FILES}


@cache
def parsed(source: str) -> ast.Module:
    return ast.parse(source)


def walk(node: ast.AST, types: bool) -> Iterator[ast.AST]:
    """The node and all below it. types: also what only type checkers see."""
    yield node
    seen_by_checkers = isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
    for below in node.orelse if seen_by_checkers and not types else ast.iter_child_nodes(node):
        yield from walk(below, types)


def imports(name: str, source: str, is_package: bool, types: bool = True) -> Iterator[str]:
    """Every module that `source` imports anywhere, by its full name. types: also where only type checkers look."""
    package = name if is_package else name.rpartition(".")[0]
    for node in walk(parsed(source), types):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) + 1 - node.level] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            for alias in node.names:
                full = f"{base}.{alias.name}"
                yield full if full in MODULES else base


def place(name: str) -> str:
    """zimage_lite.cli.generate -> cli; the package itself -> ''."""
    return [*name.split("."), ""][1]


def fault(importer: str, imported: str) -> str | None:
    """The rule that an import breaks, or None."""
    top = imported.split(".")[0]
    if top in OUTSIDE:
        return "nothing installed imports what is only for developers"
    if top not in TREES:
        return None
    if importer.startswith("zimage_kernels"):
        return "kernels know nothing of zimage_lite" if top == "zimage_lite" else None
    source, target = place(importer), place(imported)
    if top != "zimage_lite" or source == target or target in FREE:
        return None
    if not source or not target:  # the package itself: the front door, and its version
        return None
    if source in FREE:
        return f"{source} is imported from anywhere, so it imports nothing but its like"
    unknown = {source, target} - LEVEL.keys()
    if unknown:
        return f"{unknown.pop()} stands on no floor"
    if target in NEVER.get(source, ()):
        return f"{source} never imports {target}"
    return f"{target} does not stand below {source}" if LEVEL[target] <= LEVEL[source] else None


def faults(name: str, source: str, is_package: bool = False) -> list[str]:
    found = {imported: fault(name, imported) for imported in imports(name, source, is_package)}
    return [f"{name} imports {imported}: {rule}" for imported, rule in found.items() if rule]


def test_every_file_has_a_room() -> None:
    """A new file at the top, or a room that nobody placed, is a question to answer first (see ARCHITECTURE.md)."""
    top = ROOT / "zimage_lite"
    folders = {path.name for path in top.iterdir() if (path / "__init__.py").exists()}
    assert {file.stem for file in top.glob("*.py")} == LOOSE - folders
    assert folders - FREE == LEVEL.keys() - LOOSE
    page = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8")
    assert [room for room in sorted(folders) if f"{room}/" not in page] == []


def test_no_name_repeats_its_folder() -> None:
    """checkpoint/checkpoint.py is the one exception: it holds the class of that name, which is the room's idea."""
    same = {file for file in FILES if file.stem == file.parent.name}
    assert same == {ROOT / "zimage_lite" / "checkpoint" / "checkpoint.py"}


@pytest.mark.parametrize("name", MODULES)
def test_imports_run_one_way(name: str) -> None:
    file = MODULES[name]
    assert faults(name, file.read_text(encoding="utf-8"), file.name == "__init__.py") == []


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("zimage_lite.memory.plan", "from ..model import linear"),
        ("zimage_lite.memory.plan", "def f():\n    import zimage_lite.model.linear"),
        ("zimage_lite.model.linear", "from ..memory.plan import Plan"),
        ("zimage_lite.model.linear", "if TYPE_CHECKING:\n    from ..checkpoint.stored import StoredTensor"),
        ("zimage_lite.model.linear", "from .. import checkpoint"),
        ("zimage_lite.checkpoint.writer", "from zimage_lite.model import linear"),
        ("zimage_lite.checkpoint.writer", "from .. import pipeline"),
        ("zimage_lite.checkpoint.writer", "from ..memory import meter"),
        ("zimage_lite.quant.formats", "from ..checkpoint.stored import StoredTensor"),
        ("zimage_lite.plan.job", "from ..pipeline.weights import Component"),
        ("zimage_lite.pipeline.weights", "from ..api import load"),
        ("zimage_lite.pipeline.weights", "from ..somewhere import thing"),
        ("zimage_lite.checkpoint.writer", "from ..cli import say"),
        ("zimage_lite.convert.streaming", "from ..pipeline import weights"),
        ("zimage_lite.pipeline.drawing", "from ..cli.progress import phase_progress"),
        ("zimage_lite.errors", "from .checkpoint import names"),
        ("zimage_lite.pipeline.weights", "import conftest"),
        ("zimage_lite.pipeline.weights", "from make_checkpoint import SIZES"),
        ("zimage_lite.pipeline.weights", "from benchmarks.tiers import run"),
        ("zimage_kernels.norm", "from zimage_lite.errors import UserError"),
    ],
)
def test_wrong_imports_are_found(name: str, source: str) -> None:
    assert len(faults(name, source)) == 1


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("zimage_lite.memory.plan", "from ..errors import BudgetError\nfrom ..units import format_gb\nimport torch"),
        ("zimage_lite.model.linear", "from ..quant.tensor import QTensor\nfrom zimage_kernels import rms_norm"),
        ("zimage_lite.cli.generate", "from ..pipeline import Pipeline\nfrom . import say\nfrom .. import __version__"),
        ("zimage_lite.checkpoint.packed", "from ..quant import int8\nfrom .. import config"),
    ],
)
def test_right_imports_are_not(name: str, source: str) -> None:
    assert faults(name, source) == []


def circle(sources: Mapping[str, tuple[str, bool]]) -> list[str]:
    """Modules of which each imports the next, wherever in its source, and the last the first; [] if there are none.

    sources: name -> source, and whether it is a package.
    """
    graph: TopologicalSorter[str] = TopologicalSorter()
    for name, (source, is_package) in sources.items():
        graph.add(name, *(sources.keys() & set(imports(name, source, is_package, types=False)) - {name}))
    try:
        graph.prepare()
    except CycleError as error:
        return list(reversed(error.args[1]))
    return []


def test_no_imports_run_in_a_circle() -> None:
    sources = {name: (file.read_text(encoding="utf-8"), file.name == "__init__.py") for name, file in MODULES.items()}
    assert circle(sources) == []
    first, second, third = "zimage_kernels.norm", "zimage_kernels.qk", "zimage_kernels.rope"
    longer = {first: ("from .qk import f", False), second: ("def g():\n    from . import rope", False)}
    back = "if TYPE_CHECKING:\n    from .qk import f\n"
    assert circle({**longer, third: (back, False)}) == []
    found = circle({**longer, third: (f"{back}else:\n    from .norm import f", False)})
    assert found[0] == found[-1] and set(found) == {first, second, third}


# --- What is loaded

PRINT_LOADED = "print(' '.join(sorted({name.partition('.')[0] for name in sys.modules})))"


def loaded_by(code: str) -> set[str]:
    done = subprocess.run(
        [sys.executable, "-c", f"import sys\n{code}\n{PRINT_LOADED}"],
        capture_output=True,
        text=True,
        check=True,
        cwd="/",
    )
    return set(done.stdout.splitlines()[-1].split())


@pytest.mark.slow
def test_a_picture_on_the_cpu_needs_nothing_of_the_server_and_no_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    command = "['generate', 'x', '--steps', '1', '--device', 'cpu', '--no-cache', '-o', os.path.join(folder, 'x.png')]"
    loaded = loaded_by(
        f"import os, tempfile\nfrom zimage_lite.cli import run\n"
        f"with tempfile.TemporaryDirectory() as folder:\n    assert run({command}) == 0"
    )
    assert "torch" in loaded and not loaded & {
        "starlette",
        "uvicorn",
        "python_multipart",
        "httpx2",
        "sqlite3",
        "anyio",
        "ray",
        "triton",
    }


@pytest.mark.slow
def test_a_server_of_one_process_needs_nothing_of_ray() -> None:
    loaded = loaded_by("import zimage_lite.cli.serve, zimage_lite.serve.running, zimage_lite.workers.drawer")
    assert "uvicorn" in loaded and "ray" not in loaded and "zimage_lite.workers.cluster" not in loaded


def test_importing_the_package_is_light() -> None:
    loaded = loaded_by("import zimage_lite")
    assert "zimage_lite" in loaded
    assert not loaded & {*HEAVY, "click", "rich"}


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["--help"],
        ["--version"],
        ["generate", "-h"],
        ["quantize", "--help"],
        ["bench", "-h"],
        ["report", "-h"],
        ["compare", "-h"],
    ],
)
def test_help_is_light(arguments: list[str]) -> None:
    loaded = loaded_by(f"from zimage_lite.cli import run\nassert run({arguments}) == 0")
    assert {"zimage_lite", "click"} <= loaded
    assert not loaded & HEAVY


@pytest.mark.slow
def test_public_names_are_there() -> None:
    """Looking one up is what loads torch."""
    loaded = loaded_by("import zimage_lite\nfor name in zimage_lite.__all__:\n    getattr(zimage_lite, name)")
    assert {"torch", "zimage_lite"} <= loaded


# --- What is installed


@pytest.mark.parametrize("folder", ["kernels", "tools", "tests", "benchmarks"])
def test_folder_is_no_package(folder: str) -> None:
    """A top-level `kernels` package would shadow the one of Hugging Face; the others have common names too."""
    assert not (ROOT / folder / "__init__.py").exists()
    assert not (ROOT / folder / "kernels").exists()  # it lands on sys.path, and would bring its own


def setuptools_options() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]


def test_every_package_is_installed() -> None:
    options = setuptools_options()
    assert sorted(options["packages"]) == sorted(module_name(file) for file in FILES if file.name == "__init__.py")
    for name, folder in TREES.items():
        assert ROOT / options["package-dir"][name] == folder
    for folder in {file.parent for file in FILES}:
        assert (folder / "__init__.py").exists(), f"{folder} has modules but is no package"


@pytest.mark.parametrize("name", TREES)
def test_all_data_is_installed(name: str) -> None:
    patterns = setuptools_options().get("package-data", {}).get(name, [])
    installed = {file for pattern in patterns for file in TREES[name].glob(pattern)}
    files = {file for file in TREES[name].rglob("*") if file.is_file() and "__pycache__" not in file.parts}
    assert {file for file in files if file.suffix != ".py"} <= installed


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_size(file: Path) -> None:
    source = file.read_text(encoding="utf-8")
    assert len(source.splitlines()) <= 400
    for node in ast.walk(parsed(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno - node.lineno + 1 <= 60, f"{node.name} is too long"

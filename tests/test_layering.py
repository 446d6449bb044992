"""Which folder may include or import which, read from the sources; docs/architecture.md draws it."""

from __future__ import annotations

import ast
import graphlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# Folder of csrc -> the folders it may include from.
CPP_MAY_INCLUDE = {
    "core": {"core"},
    "cpu": {"core", "cpu"},
    "cuda": {"core", "cuda"},
    "torch": {"core", "cpu", "cuda", "torch"},
}
# Headers that only csrc/torch may know.
TORCH_HEADERS = ("torch/", "ATen/", "c10/", "pybind11/", "Python.h")

# Room of the package (a folder, or a module at its top) -> the rooms it may import, beside itself. docs/architecture.md
# draws this table.
_OPS = {
    "_C",
    "_build",
    "_numbers",
    "_ops",
    "_version",
    "arguments",
    "divergences",
    "functional",
    "logit_maps",
    "options",
    "reference",
    "sharded",
    "topk",
}
PYTHON_MAY_IMPORT: dict[str, set[str]] = {
    "_build": set(),
    "_numbers": set(),
    "_version": set(),
    "files": set(),
    "ranks": set(),
    "notes": set(),
    "provenance": {"_ops", "_version"},
    "lock": {"files", "ranks", "notes"},
    "models": {"ranks", "files", "data"},
    "recipes": set(),
    "_ops": {"_C", "_build", "_version"},
    "arguments": {"_numbers"},
    "divergences": {"_numbers"},
    "logit_maps": {"_numbers"},
    "topk": {"_numbers", "arguments"},
    "sharded": {"options"},
    "options": {"_numbers", "divergences"},
    "reference": {"_numbers", "arguments", "divergences", "options", "topk"},
    "functional": _OPS,
    "composed": _OPS,
    "linear": _OPS,
    "nn": _OPS,
    "pages": {"files"},
    "influence": {*_OPS, "nn", "files", "ranks"},
    "selection": {*_OPS, "influence", "nn", "pages", "files", "ranks"},
    "recipe": {"divergences", "recipes"},
    "data": {"topk", "files", "recipe"},
    "features": {"models", "recipe"},
    "compat": {"divergences", "files", "functional", "linear", "nn", "selection"},
    "train": {
        *_OPS,
        "composed",
        "nn",
        "files",
        "lock",
        "notes",
        "provenance",
        "ranks",
        "models",
        "recipe",
        "data",
        "features",
        "influence",
        "selection",
    },
    "report": {"files", "recipe", "pages", "selection", "train", "models"},
    "cli": {
        *_OPS,
        "files",
        "lock",
        "notes",
        "models",
        "recipe",
        "data",
        "influence",
        "selection",
        "pages",
        "train",
        "report",
    },
    "__main__": {"cli"},
}


def cpp_violations(folder: str, text: str) -> list[str]:
    found = []
    for include in re.findall(r'^\s*#\s*include\s*[<"]([^>"]+)[>"]', text, re.MULTILINE):
        layer = include.split("/")[0] if "/" in include else None
        if layer in CPP_MAY_INCLUDE and not include.startswith("torch/csrc") and include != "torch/library.h":
            if layer not in CPP_MAY_INCLUDE[folder]:
                found.append(include)
        else:
            forbidden: tuple[str, ...] = () if folder == "torch" else TORCH_HEADERS
            if folder in ("core", "cpu"):
                forbidden += ("cuda", "cooperative_groups")
            if include.startswith(forbidden):
                found.append(include)
    return found


def imports(text: str, *, types: bool = True) -> list[tuple[str, str]]:
    """(module, name) of every import of the text, in functions too; ("", module) for a plain import. types: those that
    only type checkers read as well."""
    tree = ast.parse(text)
    skipped: set[ast.AST] = set()
    if not types:
        for node in ast.walk(tree):
            if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
                skipped |= {inner for statement in node.body for inner in ast.walk(statement)}
    found: list[tuple[str, str]] = []
    for node in ast.walk(tree):
        if node in skipped:
            continue
        if isinstance(node, ast.Import):
            found += [("", alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            found += [("." * node.level + (node.module or ""), alias.name) for alias in node.names]
    return found


def python_violations(room: str, text: str) -> list[str]:
    """The imports that a module in this room must not have."""
    found = []
    for module, name in imports(text):
        path = module or name
        parts = path.split(".")
        if path.startswith("."):
            found.append("relative import")
        elif parts[0] in ("benchmarks", "tests", "examples"):
            found.append(path)
        elif parts[0] != "lrds_fast":
            if room == "reference" and parts[0] not in ("torch", "math", "typing", "collections", "__future__"):
                found.append(path)
            if room == "recipe" and parts[0] == "torch":
                found.append(path)
        else:
            # `from lrds_fast import x` names the room x, or what the front door offers: __version__, kd_loss.
            imported = name if path == "lrds_fast" and module else parts[1] if len(parts) > 1 else ""
            if imported in {*PYTHON_MAY_IMPORT, "_C"}:
                if imported not in {room, *PYTHON_MAY_IMPORT[room]}:
                    found.append(path if path != "lrds_fast" else f"lrds_fast.{name}")
            elif room not in ("cli", "train", "__main__"):
                found.append(f"{path} (from the front door)")
        if module.startswith("lrds_fast.") and name.startswith("_") and not name.startswith("__"):
            found.append(f"{module}.{name} is private")
    return found


def module_graph() -> dict[str, set[str]]:
    """Module of the package -> those it imports, but for what only type checkers read."""
    paths = {
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
        for path in (ROOT / "lrds_fast").rglob("*.py")
    }
    graph: dict[str, set[str]] = {}
    for name, path in paths.items():
        graph[name] = set()
        for module, imported in imports(path.read_text(encoding="utf-8"), types=False):
            inner = f"{module}.{imported}"
            target = inner if inner in paths else (module or imported)
            if target in paths and target != name:
                graph[name].add(target)
    return graph


def circle(graph: dict[str, set[str]]) -> list[str]:
    """Modules that import each other in a circle; [] where there is none."""
    try:
        tuple(graphlib.TopologicalSorter(graph).static_order())
    except graphlib.CycleError as error:
        return list(error.args[1])
    return []


@pytest.mark.parametrize("path", sorted((ROOT / "csrc").rglob("*.*")), ids=lambda path: str(path.relative_to(ROOT)))
def test_cpp_includes_go_one_way(path: Path) -> None:
    folder = path.relative_to(ROOT / "csrc").parts[0]
    assert cpp_violations(folder, path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    "path",
    sorted(p for p in (ROOT / "lrds_fast").rglob("*.py") if p.name != "__init__.py" or p.parent.name != "lrds_fast"),
    ids=lambda path: str(path.relative_to(ROOT)),
)
def test_python_imports_go_one_way(path: Path) -> None:
    room = path.relative_to(ROOT / "lrds_fast").parts[0].removesuffix(".py")
    assert python_violations(room, path.read_text(encoding="utf-8")) == []


def test_no_modules_import_each_other_in_a_circle() -> None:
    assert circle(module_graph()) == []


def test_a_planted_cycle_is_detected() -> None:
    graph = module_graph()
    graph["lrds_fast.ranks"].add("lrds_fast.train.step")
    assert {"lrds_fast.ranks", "lrds_fast.train.step"} <= set(circle(graph))


def test_every_folder_has_a_rule() -> None:
    rooms = {p.stem for p in (ROOT / "lrds_fast").iterdir() if p.suffix == ".py" or (p / "__init__.py").is_file()}
    assert rooms - {"__init__", "lrds_fast"} == set(PYTHON_MAY_IMPORT)


@pytest.mark.parametrize(
    ("folder", "line"),
    [
        ("core", '#include "cpu/kd_loss.h"'),
        ("core", "#include <ATen/ATen.h>"),
        ("cpu", '#include "cuda/kd_loss.h"'),
        ("cpu", "#include <cuda_runtime.h>"),
        ("cuda", "#include <torch/library.h>"),
        ("cuda", "#  include <c10/cuda/CUDAStream.h>"),
        ("cuda", '#include "cpu/kd_loss.h"'),
    ],
)
def test_a_forbidden_include_is_detected(folder: str, line: str) -> None:
    assert cpp_violations(folder, f"#pragma once\n{line}\n#include <cmath>\n")


@pytest.mark.parametrize(
    ("layer", "line"),
    [
        ("reference", "import numpy"),
        ("reference", "from lrds_fast import functional"),
        ("functional", "from lrds_fast.nn import KDLoss"),
        ("nn", "import lrds_fast.influence"),
        ("influence", "def f():\n    from lrds_fast.selection import select"),
        ("influence", "from lrds_fast import kd_loss"),
        ("models", "from lrds_fast.train.loop import train"),
        ("train", "from lrds_fast.report.runs import read_run"),
        ("data", "from lrds_fast.selection import Selection"),
        ("recipe", "import torch"),
        ("linear", "from lrds_fast.functional import _scalar"),
        ("train", "from tests import kd_cases"),
        ("data", "from . import memory"),
    ],
)
def test_a_forbidden_import_is_detected(layer: str, line: str) -> None:
    assert python_violations(layer, line + "\n")


def test_no_attic() -> None:
    """No file has a catch-all name."""
    attics = {"utils.py", "util.py", "helpers.py", "common.h", "common.py", "misc.py", "utils.h", "utils.cuh"}
    sources = [p for top in ("csrc", "lrds_fast", "benchmarks", "tests") for p in (ROOT / top).rglob("*")]
    assert [p.name for p in sources if p.name in attics] == []

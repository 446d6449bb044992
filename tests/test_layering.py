"""The house has one street: who may include or import whom, read from the sources themselves."""

from __future__ import annotations

import ast
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

# Layer of the package -> the layers it may import, itself included.
_CORE = {"arguments", "functional", "_numbers", "_ops", "_C", "_build", "reference", "divergences", "topk", "_version"}
_CORE |= {"files", "rand_augment"}
PYTHON_MAY_IMPORT = {
    "_numbers": {"_numbers"},
    "arguments": {"arguments", "_numbers"},
    "divergences": {"divergences", "_numbers"},
    "topk": {"topk", "arguments", "_numbers"},
    "reference": {"reference", "arguments", "divergences", "topk"},
    "_version": {"_version"},
    "files": {"files"},
    "charts": {"charts", "files"},
    "_build": {"_build"},
    "rand_augment": {"rand_augment"},
    "_ops": {"_ops", "_C", "_build", "_version"},
    "functional": _CORE,
    "nn": {"nn", *_CORE},
    "composed": {"composed", *_CORE},
    "linear": {"linear", *_CORE},
    "influence": {"influence", "nn", *_CORE},
    "picture": {"picture"},
    "selection": {"selection", "influence", "picture", "nn", *_CORE},
    "models": {"models", *_CORE},
    "data": {"data", "selection", "influence", "nn", *_CORE},
    "recipes": {"recipes"},
    "compat": {"compat", "selection", "nn"},
    "train": {"train", "composed", "picture", "data", "models", "selection", "influence", "nn", "recipes", *_CORE},
    "__main__": {"train"},
}


def cpp_violations(folder: str, text: str) -> list[str]:
    found = []
    for include in re.findall(r'^\s*#\s*include\s*[<"]([^>"]+)[>"]', text, re.MULTILINE):
        layer = include.split("/")[0] if "/" in include else None
        if layer in CPP_MAY_INCLUDE and not include.startswith("torch/csrc") and include != "torch/library.h":
            if layer not in CPP_MAY_INCLUDE[folder]:
                found.append(include)
        else:
            forbidden = () if folder == "torch" else TORCH_HEADERS
            if folder in ("core", "cpu"):
                forbidden += ("cuda", "cooperative_groups")
            if include.startswith(forbidden):
                found.append(include)
    return found


def python_violations(layer: str, text: str) -> list[str]:
    found = []
    for node in ast.walk(ast.parse(text)):
        modules: list[str] = []
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            # `from lrds_fast import x` names the module x.
            modules = [f"{base}.{alias.name}" for alias in node.names] if base == "lrds_fast" else [base]
            if node.level:
                found.append("relative import")
        for module in modules:
            parts = module.split(".")
            if parts[0] in ("benchmarks", "tests", "examples"):
                found.append(module)
            if parts[0] != "lrds_fast":
                if layer == "reference" and parts[0] not in ("torch", "math", "typing", "collections", "__future__"):
                    found.append(module)
                continue
            imported = parts[1] if len(parts) > 1 else "__init__"
            # Names of the package itself (`from lrds_fast import __version__`, `kd_loss`) come from its front door.
            known = set(PYTHON_MAY_IMPORT) | {"_C"}
            if imported in known and imported not in PYTHON_MAY_IMPORT[layer]:
                found.append(module)
            if imported not in known and layer not in ("train", "__main__"):
                found.append(f"{module} (from the front door)")
    return found


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
    layer = path.relative_to(ROOT / "lrds_fast").parts[0].removesuffix(".py")
    assert python_violations(layer, path.read_text(encoding="utf-8")) == []


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
def test_a_planted_include_is_found(folder: str, line: str) -> None:
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
        ("train", "from tests import kd_cases"),
        ("data", "from . import memory"),
    ],
)
def test_a_planted_import_is_found(layer: str, line: str) -> None:
    assert python_violations(layer, line + "\n")


def test_no_attic() -> None:
    """No drawer for everything: a file says what it holds."""
    attics = {"utils.py", "util.py", "helpers.py", "common.h", "common.py", "misc.py", "utils.h", "utils.cuh"}
    sources = [p for top in ("csrc", "lrds_fast", "benchmarks", "tests") for p in (ROOT / top).rglob("*")]
    assert [p.name for p in sources if p.name in attics] == []

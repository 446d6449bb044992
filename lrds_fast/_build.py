"""The facts of the build, and the reasons why the extension may not load. Reads files only; imports no torch."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import re
import shlex
import sys
import urllib.parse
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import Any

#: The file with build_info() that setup.py writes beside the extension.
RECORD = "_build.json"
_HERE = Path(__file__).resolve().parent


def record() -> dict[str, Any] | None:
    """The facts of the build, build_info() of the extension; None without a readable record."""
    try:
        facts: dict[str, Any] = json.loads((_HERE / RECORD).read_text(encoding="utf-8"))
        return facts if isinstance(facts["torch_version"], str) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def installed_torch() -> dict[str, str | None] | None:
    """`version` and `cuda` (None for a CPU build) of the installed torch; None if torch is not installed."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return None
    try:
        text = Path(spec.origin).with_name("version.py").read_text(encoding="utf-8")
    except OSError:
        return None
    values = dict(re.findall(r"^(__version__|cuda)\b[^=\n]*= *['\"]([^'\"]+)['\"]", text, re.MULTILINE))
    return {"version": values.get("__version__", "unknown"), "cuda": values.get("cuda")}


def problem(torch_version: str | None = None) -> str | None:
    """One line that says why the extension cannot be used and how to fix it; None if no problem is known.

    torch_version: the version of the imported torch; None: of the installed one.
    """
    facts = record()
    if torch_version is None:
        torch = installed_torch()
        if torch is None:
            versions = f"=={_release(facts['torch_version'])}.*" if facts else ">=2.11"
            return f"lrds_fast needs PyTorch, which {sys.executable} does not have: pip install 'torch{versions}'"
        torch_version = str(torch["version"])
    if _extension(_HERE) is None:
        return _not_built()
    return None if facts is None else mismatch(facts["torch_version"], torch_version)


def mismatch(built_for: str, installed: str) -> str | None:
    """The error for an extension built for another minor release of torch; None if the releases agree."""
    if "unknown" in (built_for, installed) or _release(built_for) == _release(installed):
        return None
    return f"lrds_fast was built for torch {built_for}, this is torch {installed}; rebuild it: {how_to_rebuild()}"


def how_to_rebuild() -> str:
    """The command that builds the extension for the installed torch."""
    if _is_source(_HERE.parent):
        return f"pip install --no-build-isolation -e {shlex.quote(str(_HERE.parent))}"
    source = _installed_from()
    folder = "/path/to/the/source/of/lrds-fast" if source is None else shlex.quote(str(source))
    return f"pip install --no-build-isolation --no-deps --force-reinstall {folder}"


def _installed_from() -> Path | None:
    """The source folder that pip installed lrds-fast from; None if it no longer exists."""
    try:
        origin = json.loads(importlib.metadata.distribution("lrds-fast").read_text("direct_url.json") or "{}")
    except (importlib.metadata.PackageNotFoundError, ValueError):
        return None
    url = urllib.parse.urlsplit(str(origin.get("url", "")))
    folder = Path(urllib.parse.unquote(url.path))
    return folder if url.scheme == "file" and _is_source(folder) else None


def _not_built() -> str:
    others = sorted(path.name for path in _HERE.glob("_C.*.so"))
    if others:
        version = ".".join(map(str, sys.version_info[:2]))
        return f"lrds_fast was built for another Python ({others[0]}), this is {version}; rebuild: {how_to_rebuild()}"
    if not _is_source(_HERE.parent):
        return f"lrds_fast in {_HERE} has no compiled extension; build it: {how_to_rebuild()}"
    hidden = _hidden_installation()
    if hidden is not None:
        return (
            f"{_HERE.parent} is a source folder in which the extension was never built, and it hides the lrds_fast"
            f" installed in {hidden}; run from another directory, or build here too: make venv"
        )
    return (
        f"lrds_fast's extension was never built in {_HERE.parent}; build it there: make venv, or into this environment:"
        f" {how_to_rebuild()}"
    )


def _hidden_installation() -> Path | None:
    """The folder of another lrds_fast on sys.path that has its extension."""
    for entry in sys.path:
        folder = Path(entry or ".", "lrds_fast").resolve()
        if folder != _HERE and _extension(folder) is not None:
            return folder
    return None


def _extension(folder: Path) -> Path | None:
    paths = (folder / f"_C{suffix}" for suffix in EXTENSION_SUFFIXES)
    return next((path for path in paths if path.is_file()), None)


def _is_source(folder: Path) -> bool:
    return (folder / "setup.py").is_file() and (folder / "csrc").is_dir()


def _release(version: str) -> str:
    """'2.15.0+cu132' -> '2.15': patch releases keep the C++ ABI."""
    return ".".join(version.split("+")[0].split(".")[:2])

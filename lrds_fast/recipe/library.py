"""The files of lrds_fast.recipes: recipes, protocols, ablations, published accuracies, the JSON schema."""

from __future__ import annotations

import sys
from importlib import resources

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

__all__ = ["library_text", "library_toml", "tomllib"]


def library_text(name: str) -> str:
    """The text of the file of that name."""
    return resources.files("lrds_fast.recipes").joinpath(name).read_text(encoding="utf-8")


def library_toml(folder: str = "") -> dict[str, str]:
    """The texts of the TOML files of a folder, by name without .toml, in alphabetical order."""
    entries = resources.files("lrds_fast.recipes").joinpath(folder).iterdir()
    texts = {entry.name[:-5]: entry.read_text(encoding="utf-8") for entry in entries if entry.name.endswith(".toml")}
    return dict(sorted(texts.items()))

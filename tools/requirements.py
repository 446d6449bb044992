"""Prints what pyproject.toml asks for, one requirement a line.

requirements.py [EXTRA]        build system, package, and an extra (default: dev)
requirements.py --only EXTRA   the extra alone
"""

from __future__ import annotations

import re
import sys
from pathlib import Path


def requirements(text: str, extra: str = "dev", *, only: bool = False) -> list[str]:
    """The requirements in `text`, a pyproject.toml; extras of this package are replaced by what they list. Runs before
    tomli is installed.

    only: those of the extra, without the build system's and the package's.
    """
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        from pip._vendor import tomli as tomllib
    parsed = tomllib.loads(text)
    project = parsed["project"]
    extras: dict[str, list[str]] = project["optional-dependencies"]
    listed = [] if only else parsed["build-system"]["requires"] + project["dependencies"]

    def add(extra: str) -> None:
        for requirement in extras[extra]:
            extras_of_this = re.fullmatch(re.escape(project["name"]) + r"\[(.+)\]", requirement)
            if extras_of_this is None:
                listed.append(requirement)
                continue
            for name in extras_of_this.group(1).split(","):
                add(name.strip())

    add(extra)
    return sorted(set(listed))


if __name__ == "__main__":
    arguments = [argument for argument in sys.argv[1:] if argument != "--only"]
    wanted = requirements(
        Path("pyproject.toml").read_text(encoding="utf-8"), *arguments, only=len(arguments) < len(sys.argv) - 1
    )
    sys.stdout.write("\n".join(wanted) + "\n")

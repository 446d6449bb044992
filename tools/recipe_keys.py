"""Writes what is made from the options of recipes: the JSON schema for editors, and the table of docs/training.md.

python tools/recipe_keys.py            # writes both files
python tools/recipe_keys.py --check    # exit code 1, and the names of the files, where one is out of date
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from lrds_fast.recipe.keys import SCHEMA, markdown_table, recipe_keys
from lrds_fast.recipe.schema import editor_schema, editor_schema_text

ROOT = Path(__file__).resolve().parent.parent
BEGIN = "<!-- keys of a recipe: written by tools/recipe_keys.py -->"
END = "<!-- end of the keys -->"


def contents() -> dict[Path, str]:
    """Each generated file and what it should hold. ValueError where the page has not both marks."""
    page = ROOT / "docs" / "training.md"
    text = page.read_text(encoding="utf-8")
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(
            f"{page} must have the lines {BEGIN!r} and {END!r}, between which the table of keys is written"
        )
    table = markdown_table(recipe_keys(editor_schema()))
    return {
        ROOT / "lrds_fast" / "recipes" / SCHEMA: editor_schema_text(),
        page: f"{before}{BEGIN}\n{table}\n{END}{after}",
    }


def outdated() -> list[Path]:
    """The generated files that do not hold what they should."""
    return [path for path, text in contents().items() if not path.is_file() or path.read_text(encoding="utf-8") != text]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing")
    if parser.parse_args().check:
        paths = outdated()
        for path in paths:
            print(f"{path.relative_to(ROOT)} is out of date: run python tools/recipe_keys.py", file=sys.stderr)
        return 1 if paths else 0
    for path, text in contents().items():
        path.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())

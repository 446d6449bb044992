"""A griffe extension for the site's reference: the arguments in a docstring become a list.

The docstrings of the package describe an argument, or several, in a paragraph that begins with `name: ` or
`name, other: `, whose further lines are indented. Markdown would run these paragraphs together.
"""

from __future__ import annotations

import re
from typing import Any

import griffe

_ARGUMENT = re.compile(r"^( *)(\*{0,2}[a-z_]\w*(?:, \*{0,2}[a-z_]\w*)*): (?=\S)")
# Sentences that begin a paragraph of their own.
_AFTER = re.compile(r"^(Returns|Raises|Deterministic|Source|Under torchrun)\b")


def listed(text: str) -> str:
    """A docstring as Markdown: a list item for each argument, four spaces deeper where its line is."""
    lines: list[str] = []
    inside = False  # an item is open
    paragraphs = False  # and has several paragraphs
    for line in text.splitlines():
        argument = _ARGUMENT.match(line)
        if argument:
            indent, names = argument.groups()
            if (paragraphs or not inside) and lines and lines[-1]:
                lines.append("")
            code = ", ".join(f"`{name}`" for name in names.split(", "))
            line = f"{indent}- {code}: {line[argument.end() :]}"
            inside, paragraphs = True, False
        elif inside and line and not line.startswith(" ") and (_AFTER.match(line) or not lines[-1]):
            lines.append("")
            inside = False
        paragraphs |= inside and not line
        lines.append(line)
    return "\n".join(lines)


class Arguments(griffe.Extension):
    """Applies `listed` to every docstring."""

    def on_object(self, *, obj: griffe.Object, loader: griffe.GriffeLoader, **kwargs: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = listed(obj.docstring.value)

"""A parser of HTML pages for tests: well-formedness, headings, tables, external resources."""

from __future__ import annotations

from html.parser import HTMLParser


class Page(HTMLParser):
    """A parsed page; an element that is not closed, or not in its place, is an AssertionError.

    headings: of <h1> to <h3>. tables: rows of cells, a cell of n columns as itself and n - 1 empty ones. texts: the
    text of every <text> in the drawings. sources: what src and href name. tags: how often each element is there.
    """

    VOID = frozenset({"meta", "img", "br", "link"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: dict[str, int] = {}
        self.headings: list[str] = []
        self.tables: list[list[list[str]]] = []
        self.texts: list[str] = []
        self.sources: list[str] = []
        self._open: list[str] = []
        self._span = 1
        self.feed(text)
        self.close()
        assert self._open == [], f"not closed: {self._open}"
        assert "<script" not in text and all(source.startswith(("data:", "#")) for source in self.sources)

    def table(self, *head: str) -> list[list[str]]:
        """The rows below `head`, the first cells of a table's line of titles."""
        (found,) = [
            table[i + 1 :] for table in self.tables for i, row in enumerate(table) if tuple(row[: len(head)]) == head
        ]
        return found

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] = self.tags.get(tag, 0) + 1
        self.sources += [value for name, value in attrs if name in ("src", "href", "xlink:href") and value]
        if tag not in self.VOID:
            self._open.append(tag)
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self._span = int(dict(attrs).get("colspan") or 1)
            self.tables[-1][-1] += [""] * self._span
        elif tag in ("h1", "h2", "h3"):
            self.headings.append("")
        elif tag == "text":
            self.texts.append("")

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        inside = self._open[-1] if self._open else ""
        if inside in ("td", "th"):
            self.tables[-1][-1][-self._span] += data
        elif inside in ("h1", "h2", "h3"):
            self.headings[-1] += data
        elif inside == "text":
            self.texts[-1] += data

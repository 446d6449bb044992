"""mkdocs hooks: pages from outside docs/, and links out of docs/ that resolve on the site as they do on GitHub.

README.md is the home page; the others are listed in PAGES. A link to any other file of the repository leads to a copy
of that file under source/ on the site. Links inside docs/ are left as they are.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files
    from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parent.parent
#: File of the repository -> page of the site.
PAGES = {
    "README.md": "index.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "RELEASING.md": "releasing.md",
}
#: Pages of docs/ that the navigation gets where they exist: page -> (section, title).
OPTIONAL = {"architecture.md": ("Development", "Architecture")}
_LINK = re.compile(r"(!?\[[^\]]*\]\()([^)\s#]+)(#[^)\s]*)?(\))")
_FENCE = re.compile(r"^( {0,3})(`{3,}|~{3,}).*?^ {0,3}\2`*$", re.MULTILINE | re.DOTALL)


def site_path(path: str) -> str:
    """Where a file of the repository is on the site. path: from the root of the repository."""
    if path in PAGES:
        return PAGES[path]
    return path.removeprefix("docs/") if path.startswith("docs/") else f"source/{path}"


def rewritten(text: str, source: str) -> tuple[str, set[str]]:
    """A page with its links as the site needs them, and the files outside docs/ that they lead to.

    source: the page's file, from the root of the repository. Links with a scheme, links to nothing and text in code
    fences stay as they are.
    """
    linked: set[str] = set()
    here = posixpath.dirname(site_path(source))

    def link(match: re.Match[str]) -> str:
        before, target, anchor, after = match.groups()
        if ":" in target or target.startswith("/"):
            return match.group()
        path = posixpath.normpath(posixpath.join(posixpath.dirname(source), target))
        if not (ROOT / path).is_file():
            return match.group()
        if site_path(path).startswith("source/"):
            linked.add(path)
        return f"{before}{posixpath.relpath(site_path(path), here or '.')}{anchor or ''}{after}"

    parts, end = [], 0
    for fence in _FENCE.finditer(text):
        parts += [_LINK.sub(link, text[end : fence.start()]), fence.group()]
        end = fence.end()
    return "".join([*parts, _LINK.sub(link, text[end:])]), linked


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Adds the pages of OPTIONAL to the navigation."""
    for page, (section, title) in OPTIONAL.items():
        if (ROOT / "docs" / page).is_file():
            (pages,) = (part[section] for part in config.nav or [] if section in part)
            if {title: page} not in pages:
                pages.insert(0, {title: page})
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the pages of PAGES and the files that pages link to."""
    from mkdocs.structure.files import File

    linked: set[str] = set()
    for source, page in PAGES.items():
        text, more = rewritten((ROOT / source).read_text(encoding="utf-8"), source)
        files.append(File.generated(config, page, content=text))
        linked |= more
    for file in files.documentation_pages():
        if file.src_uri not in PAGES.values():
            linked |= rewritten(file.content_string, f"docs/{file.src_uri}")[1]
    for path in sorted(linked):
        files.append(File.generated(config, site_path(path), abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """The links of a page in docs/ that lead out of it."""
    if page.file.src_uri in PAGES.values():
        return markdown
    return rewritten(markdown, f"docs/{page.file.src_uri}")[0]

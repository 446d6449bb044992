"""The documentation: its commands and snippets run, and its links have targets."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
TASKS = sorted((ROOT / "docs" / "tasks").glob("*.md"))
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
sys.path.insert(0, str(ROOT / "tools"))

import site_pages  # noqa: E402


def blocks(page: Path, language: str) -> list[tuple[int, str]]:
    """The code blocks of a language in a page: the line where each begins, and its text."""
    text = page.read_text(encoding="utf-8")
    return [
        (text.count("\n", 0, found.start(2)), found.group(2)) for found in FENCE.finditer(text) if found[1] == language
    ]


def pages() -> list[Path]:
    return sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / ".github").rglob("*.md")])


def test_there_is_a_page_for_every_task() -> None:
    assert [page.stem for page in TASKS] == [
        "cache",
        "divergence",
        "drop_in",
        "gpu",
        "language",
        "machines",
        "select",
        "student",
        "train",
    ]
    for page in TASKS:
        assert blocks(page, "python"), page


@pytest.mark.parametrize("page", TASKS, ids=lambda page: page.name)  # "gpu" alone would be a marker
def test_snippets_of_a_task_page_run(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, one_thread: None
) -> None:
    """The snippets of a page run one after the other, in one namespace and an empty folder."""
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, Any] = {"__name__": "__main__"}
    torch.manual_seed(0)
    for line, code in blocks(page, "python"):
        # As many empty lines in front as the page has, so that a traceback gives the page's line.
        exec(compile("\n" * line + code, str(page), "exec"), namespace)


#: Section of docs/integrations.md -> the package that its snippets need.
LIBRARIES = {
    "timm": "timm.task",
    "transformers": "transformers",
    "Lightning": "lightning",
    "TRL": "trl",
    "Liger": "liger_kernel",
    "ModelOpt": "modelopt",
    "torchtune": "torchtune",
    "RepDistiller and mdistiller": "torch",
}
INTEGRATIONS = ROOT / "docs" / "integrations.md"


def test_every_adapter_has_a_section_with_a_snippet() -> None:
    lines = INTEGRATIONS.read_text(encoding="utf-8").splitlines()
    sections = [line.removeprefix("## ") for line in lines if line.startswith("## ")]
    assert set(LIBRARIES) <= set(sections)
    inside = {
        sections[len([heading for heading in lines[:at] if heading.startswith("## ")]) - 1]
        for at, _ in blocks(INTEGRATIONS, "python")
    }
    assert inside == set(LIBRARIES)


@pytest.mark.parametrize("section", LIBRARIES)
def test_snippets_of_the_integrations_run(
    section: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, one_thread: None
) -> None:
    """One after the other, in one namespace for a section and an empty folder."""
    package = LIBRARIES[section]
    if importlib.util.find_spec(package.partition(".")[0]) is None:
        pytest.skip(f"needs {package.partition('.')[0]}: pip install 'lrds-fast[compat]'")
    monkeypatch.chdir(tmp_path)
    lines = INTEGRATIONS.read_text(encoding="utf-8").splitlines()
    begin = lines.index(f"## {section}")
    end = next((at for at in range(begin + 1, len(lines)) if lines[at].startswith("## ")), len(lines))
    namespace: dict[str, Any] = {"__name__": "__main__"}
    torch.manual_seed(0)
    for line, code in blocks(INTEGRATIONS, "python"):
        if begin < line < end:
            exec(compile("\n" * line + code, str(INTEGRATIONS), "exec"), namespace)


def test_commands_of_the_task_pages_exist() -> None:
    options: dict[str, set[str]] = {}
    seen = set()
    for page in TASKS:
        for _, text in blocks(page, "bash"):
            for line in text.splitlines():
                found = re.search(r"\blrds(?:-fast|_fast) ([a-z]+)(.*)", line.partition("#")[0])
                if found is None:
                    assert line.startswith(("pip install", "LRDS_FAST_CUDA=1", "make ")), f"{page}: {line}"
                    continue
                command = found[1]
                if command not in options:
                    done = subprocess.run(
                        [sys.executable, "-m", "lrds_fast", command, "--help"], capture_output=True, text=True, cwd=ROOT
                    )
                    assert done.returncode == 0, f"{page}: {line}\n{done.stderr}"
                    options[command] = set(re.findall(r"--[a-z-]+", done.stdout))
                    seen.add(command)
                for option in re.findall(r" (--[a-z-]+)", found[2]):
                    if (command, option) != ("recipes", "--resolved"):  # of `recipes show`
                        assert option in options[command], f"{page}: {line}"
    assert seen == {
        "bench",
        "cache",
        "doctor",
        "eval",
        "export",
        "predict",
        "recipes",
        "report",
        "score",
        "select",
        "sweep",
        "train",
    }


def slug(heading: str) -> str:
    """The anchor that GitHub and the site give a heading."""
    text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).replace("`", "").strip().lower()
    return re.sub(r"[^\w\- ]", "", text).replace(" ", "-")


def anchors(page: Path) -> set[str]:
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    return {slug(heading) for heading in re.findall(r"^#{1,6} +(.+?)#*$", text, re.MULTILINE)}


def broken(page: Path) -> list[str]:
    """The links of a page that lead to no file, or to no heading of a page."""
    found = []
    text = re.sub(r"`[^`\n]*`", "", FENCE.sub("", page.read_text(encoding="utf-8")))
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        path, _, anchor = target.partition("#")
        if ":" in target:
            continue
        goal = (page.parent / path).resolve() if path else page
        if not goal.exists() or (anchor and goal.suffix == ".md" and anchor not in anchors(goal)):
            found.append(target)
    return found


@pytest.mark.parametrize("page", pages(), ids=lambda page: str(page.relative_to(ROOT)))
def test_links_between_pages_have_targets(page: Path) -> None:
    assert broken(page) == []


def test_a_broken_link_is_detected(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("# One (1)\n[a](#one-1) [b](page.md#one-1) [c](absent.md) [d](#two) [e](https://x.org) `[f](g)`\n")
    assert broken(page) == ["absent.md", "#two"]


def navigation(part: Any) -> list[str]:
    if isinstance(part, str):
        return [part]
    return [page for child in (part.values() if isinstance(part, dict) else part) for page in navigation(child)]


def test_the_site_shows_every_page() -> None:
    text = re.sub(r"!!python/\S+", "", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    listed = navigation(pytest.importorskip("yaml").safe_load(text)["nav"])
    docs = ROOT / "docs"
    there = {page.relative_to(docs).as_posix() for page in docs.rglob("*.md")} - set(site_pages.OPTIONAL)
    assert sorted(set(listed) - set(site_pages.OPTIONAL)) == sorted(there | set(site_pages.PAGES.values()))
    assert len(set(listed)) == len(listed)


def test_links_out_of_docs_lead_to_copies() -> None:
    text, linked = site_pages.rewritten("[a](docs/method.md#x) ![b](docs/revision.svg) [c](LICENSE)\n", "README.md")
    assert text == "[a](method.md#x) ![b](revision.svg) [c](source/LICENSE)\n" and linked == {"LICENSE"}
    text, linked = site_pages.rewritten("[a](../../CHANGELOG.md) [b](../../LICENSE)", "docs/benchmarks/method.md")
    assert text == "[a](../changelog.md) [b](../source/LICENSE)" and linked == {"LICENSE"}
    untouched = "[a](absent.md) [b](https://x.org) [c](#here)\n```\n[d](LICENSE)\n```\n"
    assert site_pages.rewritten(untouched, "README.md") == (untouched, set())


def test_arguments_in_docstrings_become_a_list(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "griffe", SimpleNamespace(Extension=object))
    import site_docstrings

    text = """What it does.
x, y: (N,) numbers,
    of any kind.
by: One of
    ratio: a share.

    Or both.
size: a number.
Returns a float."""
    assert (
        site_docstrings.listed(text)
        == """What it does.

- `x`, `y`: (N,) numbers,
    of any kind.
- `by`: One of
    - `ratio`: a share.

    Or both.

- `size`: a number.

Returns a float."""
    )

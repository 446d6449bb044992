"""Pages in headless Chromium: nothing in the console, nothing cut off, and at 390 pixels nothing to scroll sideways."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import browser
import pytest
import torch
from test_report_page import make_run

from lrds_fast.report.page import html_report
from lrds_fast.selection import select

WINDOWS = [(width, dark) for dark in (False, True) for width in (1280, 390)]
LONG = "cifar100-short/resnet56-resnet20/kd+lr+ds@selection.by=kd_gain,loss.eta=0.5,with_no_place_to_break_it_at_all"


def start(stack: ExitStack) -> browser.Browser:
    """A browser that ends with the stack. Without a Chromium that starts, the test is skipped; it fails instead if
    LRDS_REQUIRE_BROWSER is 1."""
    try:
        return stack.enter_context(browser.browser())
    except (RuntimeError, OSError) as error:
        if os.environ.get("LRDS_REQUIRE_BROWSER") == "1":
            raise
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def tab() -> Iterator[browser.Browser]:
    with ExitStack() as stack:
        yield start(stack)


@pytest.mark.parametrize("chromium", [None, "/bin/false", "/nonexistent"])
def test_without_a_browser_tests_are_skipped_or_fail(chromium: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(browser, "CHROMIUM", chromium)
    for required, expected in (("", pytest.skip.Exception), ("1", (RuntimeError, OSError))):
        monkeypatch.setenv("LRDS_REQUIRE_BROWSER", required)
        with ExitStack() as stack, pytest.raises(expected):
            start(stack)


def test_the_browser_reports_layout_faults(tab: browser.Browser, tmp_path: Path) -> None:
    """Pages with known faults: the browser must report each of them."""
    page = tmp_path / "page.html"
    for body, message in (
        ("<div style='width:500px'>x</div>", "the page is"),
        ("<script>console.error('planted')</script>", "planted"),
        ("<script>nothing()</script>", "Uncaught"),
        ("<img src='absent.png'>", "ERR_FILE_NOT_FOUND"),
        ("<p id=a></p><p id=a></p>", "id a is there twice"),
        ("<svg width=100 height=50><text x=80 y=20>cut off</text></svg>", '"cut off" is cut off'),
    ):
        page.write_text(f"<!doctype html><title>t</title>{body}")
        assert any(message in problem for problem in tab.open(page, width=390)), body
    page.write_text(
        "<!doctype html><title>t</title><div style='overflow-x:auto'><div style='width:900px'>x</div></div>"
    )
    assert tab.open(page, width=390) == [], "what scrolls in its own box is fine"


def test_a_report_fits(tab: browser.Browser, tmp_path: Path) -> None:
    """Long names without a place to break them, many classes with long names, several arms and seeds."""
    classes = [f"class_with_a_long_name_{k}" for k in range(30)]
    runs = []
    for seed in range(3):
        teacher = make_run(tmp_path, "teacher", seed, accuracy=0.9, classes=30, names=classes)
        for name, accuracy in (("KD", 0.5), (LONG, 0.6)):
            path = tmp_path / f"{len(name)}_{seed}.parquet"
            scores = torch.randn(300, generator=torch.Generator().manual_seed(seed + len(name)))
            select({"kd_gain": scores, "kd_gain_standard_error": scores.abs() + 0.1}, ratio=0.7).save(path)
            taught: dict[str, Any] = {"teacher.model": "mlp", "teacher.checkpoint": str(teacher.folder / "last.pt")}
            taught |= {"selection.path": str(path), "loss.revise": "lr", "loss.eta": accuracy}
            wrong = [[k, (7 * k + 3) % 30, 30 - k] for k in range(30)]
            runs.append(
                make_run(tmp_path, name, seed, accuracy=accuracy, classes=30, names=classes, wrong=wrong, values=taught)
            )
        runs.append(teacher)
    page = tmp_path / "report.html"
    page.write_text(html_report(runs, title="A report", baseline="KD"), encoding="utf-8")
    papers = set()
    for width, dark in WINDOWS:
        assert tab.open(page, width=width, dark=dark) == [], (width, dark)
        papers.add(tab.value("getComputedStyle(document.body).backgroundColor"))
        assert tab.value("document.querySelectorAll('svg').length") == 13
        inked = "[...document.querySelectorAll('svg text')].every(e => getComputedStyle(e).fill === '{}')"
        assert tab.value(inked.format("rgb(230, 232, 235)" if dark else "rgb(29, 33, 39)"))
        assert tab.value("Math.min(...[...document.querySelectorAll('svg')].map(e => e.clientWidth))") > 330
    assert papers == {"rgb(255, 255, 255)", "rgb(20, 23, 28)"}


def test_a_selection_fits(tab: browser.Browser, tmp_path: Path) -> None:
    draws = torch.Generator().manual_seed(0)
    scores = {
        name: torch.randn(500, generator=draws) for name in ("kd_gain", "a_score_with_a_rather_long_name:kd", "x")
    }
    chosen = select(scores | {"kd_gain_standard_error": torch.full((500,), 0.3)}, threshold=0.0)
    page = tmp_path / "selection.html"
    chosen.report(page, pictures=lambda index: torch.full((8, 8), index % 256, dtype=torch.uint8))
    for width, dark in WINDOWS:
        assert tab.open(page, width=width, dark=dark) == [], (width, dark)

"""Skips tests that this machine cannot run, each with a reason; the summary says whether real data was found."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from lrds_fast.pages import charts


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Sets torch to one thread: in small networks several threads only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Title -> matplotlib's Figure, of every chart that a page gets during the test."""
    found: dict[str, Any] = {}
    svg = charts.svg

    def noted(made: Any, title: str) -> str:
        assert title not in found, "ids in the page would clash"
        found[title] = made
        return svg(made, title)

    monkeypatch.setattr(charts, "svg", noted)
    return found


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device: run `make gpu-check` on a machine with a GPU")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    data = os.environ.get("LRDS_DATA")
    found = f"real data from LRDS_DATA={data}" if data else "LRDS_DATA is not set: real-data tests were skipped"
    terminalreporter.write_line(f"lrds-fast: {found}")

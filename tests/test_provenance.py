"""Which commit a result names, in small repositories."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from lrds_fast import provenance
from lrds_fast.provenance import commit


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A repository with one commit, in which provenance.py lies as in the real one."""
    files = ("lrds_fast/provenance.py", "benchmarks/results/rows.csv", "benchmarks/teachers/README.md")
    for name in (*files, "benchmarks/teachers/one.safetensors", "docs/page.md"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("first")
    who = ("-c", "user.name=a", "-c", "user.email=a@example.org", "-c", "commit.gpgsign=false")
    for command in (("init", "-q"), ("add", "."), (*who, "commit", "-q", "-m", "first")):
        subprocess.run(["git", *command], cwd=tmp_path, check=True)
    monkeypatch.setattr(provenance, "__file__", str(tmp_path / files[0]))
    commit.cache_clear()
    yield tmp_path
    commit.cache_clear()


@pytest.mark.parametrize(
    ("changed", "is_dirty"),
    [
        ((), False),
        (("benchmarks/results/rows.csv", "benchmarks/teachers/README.md", "a_new_file"), False),
        (("lrds_fast/provenance.py",), True),
        (("benchmarks/results/rows.csv", "docs/page.md"), True),
        (("benchmarks/teachers/one.safetensors",), True),
    ],
)
def test_rows_of_a_benchmark_do_not_make_its_next_rows_dirty(
    checkout: Path, changed: tuple[str, ...], is_dirty: bool
) -> None:
    head = ["git", "rev-parse", "--short", "HEAD"]
    name = subprocess.run(head, cwd=checkout, capture_output=True, text=True, check=True).stdout.strip()
    for path in changed:
        (checkout / path).write_text("second")
    assert commit() == name + "-dirty" * is_dirty


def test_a_staged_change_counts_and_a_folder_without_git_has_no_commit(
    checkout: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (checkout / "docs/page.md").write_text("second")
    subprocess.run(["git", "add", "."], cwd=checkout, check=True)
    assert commit().endswith("-dirty")
    (checkout / ".git").rename(checkout / "elsewhere")
    for value in ("abc123", ""):
        monkeypatch.setenv("LRDS_COMMIT", value)
        commit.cache_clear()
        assert commit() == (value or "unknown")

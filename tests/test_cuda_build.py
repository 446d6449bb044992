"""The .cu files for every architecture we ship: no warning, no spill, and the table's registers."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
_spec = importlib.util.spec_from_file_location("kernel_registers", ROOT / "tools" / "kernel_registers.py")
assert _spec is not None and _spec.loader is not None
kernel_registers = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(kernel_registers)

Reports = dict[tuple[str, str], str]


@pytest.fixture(scope="module")
def nvcc() -> str:
    found = kernel_registers.find_nvcc()
    if found is None:
        pytest.skip("nvcc was not found: set CUDA_HOME to compile the CUDA kernels")
    return found


@pytest.fixture(scope="module")
def reports(nvcc: str, tmp_path_factory: pytest.TempPathFactory) -> Reports:
    """What ptxas said, by file and architecture."""
    return kernel_registers.compile_all(nvcc, tmp_path_factory.mktemp("cuda"))


def test_every_architecture_compiles(reports: Reports) -> None:
    assert {arch for _, arch in reports} == set(kernel_registers.ARCHS)
    assert {stem for stem, _ in reports} == {source.stem for source in kernel_registers.KERNELS}
    assert all((source.stem, "90") in reports for source in kernel_registers.KERNELS)


def test_no_kernel_spills(reports: Reports) -> None:
    rows = kernel_registers.table(reports, "")
    spilling = [f"{row['file']} sm_{row['arch']} {row['kernel']}" for row in rows if row["spill_bytes"] != "0"]
    assert spilling == []


def test_registers_are_the_tables(nvcc: str, reports: Reports) -> None:
    expected = kernel_registers.read_table()
    version = kernel_registers.nvcc_version(nvcc)
    if expected[0]["nvcc"] != version:
        pytest.skip(f"tests/kernel_registers.csv was made by nvcc {expected[0]['nvcc']}; this is {version}")
    changed = kernel_registers.differences(kernel_registers.table(reports, version), expected)
    assert changed == [], "if it is meant: python tools/kernel_registers.py --write"


def test_a_change_is_reported() -> None:
    rows = kernel_registers.read_table()
    more = [row | {"registers": str(int(row["registers"]) + 1)} if i == 3 else row for i, row in enumerate(rows)]
    assert len(kernel_registers.differences(more, rows)) == 1
    assert len(kernel_registers.differences(rows[1:], rows)) == 1
    assert kernel_registers.differences(rows, rows) == []

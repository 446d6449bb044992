"""The .cu files for every architecture we ship: no warning, no spill, the tables' registers and machine code."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tools"))
kernel_registers = importlib.import_module("kernel_registers")
kernel_sass = importlib.import_module("kernel_sass")

pytestmark = pytest.mark.nvcc

Row = dict[str, str]
Reports = dict[tuple[str, str], str]
# Kernels whose gradient leaves as vectors of 16 bytes: what their names contain.
VECTOR_KERNELS = (
    "kd_loss_bulk<",
    ", true, 4>(",
    ", true, 8>(",
    ", true, 4, ",
    ", true, 8, ",
    "kd_loss_flat<",
    "scale<",
)


@pytest.fixture(scope="module")
def nvcc() -> str:
    found: str | None = kernel_registers.find_nvcc()
    if found is None:
        pytest.skip("nvcc was not found: set CUDA_HOME to compile the CUDA kernels")
    return found


@pytest.fixture(scope="module")
def objects(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the compiled object files."""
    return tmp_path_factory.mktemp("cuda")


@pytest.fixture(scope="module")
def reports(nvcc: str, objects: Path) -> Reports:
    """The resource usage that ptxas reports, by file and architecture."""
    compiled: Reports = kernel_registers.compile_all(nvcc, objects)
    return compiled


@pytest.fixture(scope="module")
def machine_code(nvcc: str, objects: Path, reports: Reports) -> list[Row]:
    """The rows of the table of machine code."""
    cuobjdump = kernel_sass.find_cuobjdump()
    if cuobjdump is None:
        pytest.skip("cuobjdump and nvdisasm were not found: CUDA_HOME/bin, the PATH and triton's package were searched")
    rows: list[Row] = kernel_sass.table(cuobjdump, objects, sorted(reports), kernel_registers.nvcc_version(nvcc))
    return rows


def named(row: Row) -> str:
    return f"{row['file']} sm_{row['arch']} {row['kernel']}"


def test_every_architecture_compiles(reports: Reports) -> None:
    assert {arch for _, arch in reports} == set(kernel_registers.ARCHS)
    assert {stem for stem, _ in reports} == {source.stem for source in kernel_registers.KERNELS}
    assert all((source.stem, "90") in reports for source in kernel_registers.KERNELS)


def test_no_kernel_spills(reports: Reports) -> None:
    rows = kernel_registers.table(reports, "")
    spilling = [named(row) for row in rows if row["spill_bytes"] != "0"]
    assert spilling == []


def test_registers_match_the_table(nvcc: str, reports: Reports) -> None:
    expected = kernel_registers.read_table()
    version = kernel_registers.nvcc_version(nvcc)
    if expected[0]["nvcc"] != version:
        pytest.skip(f"tests/kernel_registers.csv was made by nvcc {expected[0]['nvcc']}; this is {version}")
    changed = kernel_registers.differences(kernel_registers.table(reports, version), expected)
    assert changed == [], "if it is meant: python tools/kernel_sass.py --write"


def test_gradients_are_stored_as_vectors(machine_code: list[Row]) -> None:
    # Before sm_90 the bulk kernel is empty.
    rows = [row for row in machine_code if any(part in row["kernel"] for part in VECTOR_KERNELS) and row["stg"]]
    assert len(rows) >= 20
    narrowed = [f"{named(row)}: {row['stg']}" for row in rows if "128x" not in row["stg"]]
    assert narrowed == []
    # A scattered vector is four or eight narrow stores at every place that stores a vector.
    few = 16
    for row in rows:
        stores = dict(store.split("x") for store in row["stg"].split())
        for bits, count in stores.items():
            assert bits == "128" or int(count) <= few, f"{named(row)}: {row['stg']}"


def test_the_usual_calls_have_no_local_memory(machine_code: list[Row]) -> None:
    rows = [row for row in machine_code if row["kernel"].startswith(("kd_loss_", "kd_family_simple<", "scale<"))]
    assert len(rows) >= 40
    assert [f"{named(row)}: {row['local']}" for row in rows if row["local"] != "0"] == []


def test_rows_wait_for_no_fence(machine_code: list[Row]) -> None:
    rows = [row for row in machine_code if row["kernel"].startswith(("kd_loss_", "kd_family_", "scale<"))]
    rows = [row for row in rows if not row["kernel"].startswith("kd_loss_finalize")]
    assert [f"{named(row)}: {row['fences']}" for row in rows if row["fences"] != "0"] == []
    # The blocks of a cluster meet once before their first row.
    at_most = {named(row): 1 if row["kernel"].startswith("kd_loss_bulk<") else 0 for row in rows}
    assert [f"{named(row)}: {row['cctl']}" for row in rows if int(row["cctl"]) > at_most[named(row)]] == []


def test_machine_code_matches_the_table(nvcc: str, machine_code: list[Row]) -> None:
    expected = kernel_sass.read_table()
    version = kernel_registers.nvcc_version(nvcc)
    if expected[0]["nvcc"] != version:
        pytest.skip(f"tests/kernel_sass.csv was made by nvcc {expected[0]['nvcc']}; this is {version}")
    changed = kernel_sass.differences(machine_code, expected)
    assert changed == [], "if it is meant: python tools/kernel_sass.py --write"


def test_a_change_of_registers_is_reported() -> None:
    rows = kernel_registers.read_table()
    more = [row | {"registers": str(int(row["registers"]) + 1)} if i == 3 else row for i, row in enumerate(rows)]
    assert len(kernel_registers.differences(more, rows)) == 1
    assert len(kernel_registers.differences(rows[1:], rows)) == 1
    assert kernel_registers.differences(rows, rows) == []


def test_a_change_of_machine_code_is_reported() -> None:
    rows = kernel_sass.read_table()
    narrowed = [row | {"stg": "16x64"} if i == 3 else row for i, row in enumerate(rows)]
    assert kernel_sass.differences(narrowed, rows) == [f"{named(rows[3])}: stg {rows[3]['stg']} -> 16x64"]
    assert kernel_sass.differences(rows[1:], rows) == [f"{named(rows[0])}: gone"]
    assert kernel_sass.differences(rows, rows) == []


# A loop over rows around two loops over elements. The block at 0110 lies behind the end of the kernel, as ptxas places
# what runs rarely; it returns into the middle of the loop over rows, which is no loop of its own.
DISASSEMBLY = """
\t\tFunction : _Z6kernelPf
\t.headerflags\t@"EF_CUDA_SM90"
        /*0000*/                   MOV R1, c[0x0][0x28] ;                        /* 0x00000a0000017a02 */
                                                                                 /* 0x000fe20000000f00 */
        /*0010*/                   LDG.E.128 R4, desc[UR4][R2.64] ;              /* 0x000000 */
        /*0020*/                   MUFU.EX2 R8, R4 ;                             /* 0x000000 */
        /*0030*/                   MUFU.EX2.FTZ R9, R5 ;                         /* 0x000000 */
        /*0040*/               @P0 BRA 0x20 ;                                    /* 0x000000 */
        /*0050*/                   STS.64 [R7], R8 ;                             /* 0x000000 */
        /*0060*/              @!P1 BRA 0x110 ;                                   /* 0x000000 */
        /*0070*/                   LDS.U16 R3, [R7] ;                            /* 0x000000 */
        /*0080*/                   STG.E.128 desc[UR4][R2.64], R4 ;              /* 0x000000 */
        /*0090*/                   STG.E.U16 desc[UR4][R2.64], R4 ;              /* 0x000000 */
        /*00a0*/                   BRA P2, 0x80 ;                                /* 0x000000 */
        /*00b0*/                   BRA.DIV UR4, 0x110 ;                          /* 0x000000 */
        /*00c0*/               @P3 BRA 0x10 ;                                    /* 0x000000 */
        /*00d0*/                   MEMBAR.ALL.GPU ;                              /* 0x000000 */
        /*00e0*/                   MEMBAR.ALL.CTA ;                              /* 0x000000 */
        /*00f0*/                   CCTL.IVALL ;                                  /* 0x000000 */
        /*00f8*/                   CCTL.E.PF2 [R2.64] ;                          /* 0x000000 */
        /*0100*/                   EXIT ;                                        /* 0x000000 */
        /*0110*/                   STL [R1], R3 ;                                /* 0x000000 */
        /*0120*/                   LDGSTS.E.BYPASS.128 [R7], desc[UR4][R2.64] ;  /* 0x000000 */
        /*0130*/                   BRA 0x70 ;                                    /* 0x000000 */
        /*0140*/                   NOP;                                          /* 0x000000 */
"""


def test_disassembly_is_read() -> None:
    code = kernel_sass.kernels(DISASSEMBLY)["_Z6kernelPf"]
    assert [code[0].address, code[-1].address] == [0, 0x140]
    assert kernel_sass.describe(code) == {
        "instructions": "21",
        "ldg": "128x1",
        "stg": "128x1 16x1",
        "lds": "16x1",
        "sts": "64x1",
        "copies": "128x1",
        "local": "1",
        "fences": "1",
        "cctl": "1",
        "loops": "3:2 3:0",
    }


def test_a_disassembly_without_kernels_is_refused() -> None:
    with pytest.raises(ValueError, match="no kernel"):
        kernel_sass.kernels("Fatbin elf code:\n")

"""Registers, stack and spills of every CUDA kernel as ptxas reports them; the table is tests/kernel_registers.csv.

python tools/kernel_registers.py                     compile and print the differences from the table
python tools/kernel_registers.py --write             write the table anew with this nvcc's figures

Large files are compiled for sm_90 and for one other architecture of the wheels, a different one from file to file;
small files for all architectures.
"""

from __future__ import annotations

import argparse
import csv
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
TABLE = ROOT / "tests" / "kernel_registers.csv"
ARCHS = ("80", "90", "100", "120")
KERNELS = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
# As torch's extension builder passes them: the kernels must do without these operators.
FLAGS = [
    "-std=c++20",
    "-O3",
    "-lineinfo",
    "-Werror",
    "all-warnings",
    "--expt-relaxed-constexpr",
    "-D__CUDA_NO_HALF_OPERATORS__",
    "-D__CUDA_NO_HALF_CONVERSIONS__",
    "-D__CUDA_NO_BFLOAT16_CONVERSIONS__",
    "-D__CUDA_NO_HALF2_OPERATORS__",
    f"-I{ROOT / 'csrc'}",
    "-Xptxas",
    "-v",
]
COLUMNS = ("nvcc", "file", "arch", "kernel", "registers", "stack_bytes", "spill_bytes")
Row = dict[str, str]


def find_nvcc() -> str | None:
    homes = [os.environ.get("CUDA_HOME"), "/usr/local/cuda"]
    homes += [str(path) for path in (Path(torch.__file__).parent.parent / "nvidia").glob("cu[0-9]*")]
    for home in homes:
        if home and (Path(home) / "bin" / "nvcc").is_file():
            return str(Path(home) / "bin" / "nvcc")
    return shutil.which("nvcc")


def nvcc_version(nvcc: str) -> str:
    text = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    version = re.search(r"V([\d.]+)", text)
    return version.group(1) if version else "unknown"


def compile_for(nvcc: str, source: Path, arch: str, target: Path) -> str:
    """ptxas's report. AssertionError with the compiler's output if there is an error or a warning."""
    command = [nvcc, *FLAGS, f"-arch=sm_{arch}", "-c", str(source), "-o", str(target)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{source.name} for sm_{arch}:\n{done.stderr}"
    return done.stderr


def object_path(folder: Path, stem: str, arch: str) -> Path:
    return folder / f"{stem}_{arch}.o"


def compile_all(nvcc: str, folder: Path) -> dict[tuple[str, str], str]:
    """Reports by file and architecture."""
    rows = [source for source in KERNELS if source.stem.startswith(("kd_loss_", "kd_family_"))]
    pairs = {(source, "90") for source in rows}
    pairs |= {(source, ARCHS[i % len(ARCHS)]) for i, source in enumerate(rows)}
    pairs |= {(source, arch) for source in KERNELS if source not in rows for arch in ARCHS}
    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        running = {
            (source.stem, arch): pool.submit(compile_for, nvcc, source, arch, object_path(folder, source.stem, arch))
            for source, arch in sorted(pairs)
        }
        return {pair: future.result() for pair, future in running.items()}


def demangle(names: list[str]) -> list[str]:
    """Names as in the source, without namespaces."""
    command = ["c++filt"]
    text = subprocess.run(command, input="\n".join(names), capture_output=True, text=True, check=True).stdout
    return [
        re.sub(r"\(anonymous namespace\)::|lrds::cuda::|lrds::", "", name.removeprefix("void "))
        for name in text.splitlines()
    ]


def parse(report: str) -> list[Row]:
    """One row per kernel, its name demangled. ValueError where ptxas reported none."""
    kernels = re.findall(
        r"Compiling entry function '(\w+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, "
        r"(\d+) bytes spill loads.*?Used (\d+) registers",
        report,
        re.DOTALL,
    )
    if not kernels:
        raise ValueError("ptxas reported no kernel")
    return [
        {
            "kernel": name,
            "registers": registers,
            "stack_bytes": stack,
            "spill_bytes": str(int(stores) + int(loads)),
        }
        for name, (_, stack, stores, loads, registers) in zip(
            demangle([name for name, *_ in kernels]), kernels, strict=True
        )
    ]


def table(reports: dict[tuple[str, str], str], version: str) -> list[Row]:
    rows = [
        {"nvcc": version, "file": stem, "arch": arch, **row}
        for (stem, arch), report in reports.items()
        for row in parse(report)
    ]
    return sorted(rows, key=lambda row: (row["file"], int(row["arch"]), row["kernel"]))


def read_rows(path: Path) -> list[Row]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def read_table() -> list[Row]:
    return read_rows(TABLE)


def write_rows(path: Path, columns: Sequence[str], rows: list[Row]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def differences(rows: list[Row], expected: list[Row]) -> list[str]:
    """What changed, a line each; empty where the tables are the same."""

    def by_kernel(rows: list[Row]) -> dict[str, str]:
        return {
            f"{row['file']} sm_{row['arch']} {row['kernel']}": f"{row['registers']} registers, {row['stack_bytes']} "
            f"bytes of stack, {row['spill_bytes']} spilled"
            for row in rows
        }

    before, now = by_kernel(expected), by_kernel(rows)
    return [
        f"{kernel}: {before.get(kernel, 'not there')} -> {now.get(kernel, 'not there')}"
        for kernel in sorted(before.keys() | now.keys())
        if before.get(kernel) != now.get(kernel)
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help=f"write {TABLE.relative_to(ROOT)}")
    arguments = parser.parse_args()
    nvcc = find_nvcc()
    if nvcc is None:
        sys.stderr.write("nvcc was not found: set CUDA_HOME\n")
        return 2
    with tempfile.TemporaryDirectory() as folder:
        rows = table(compile_all(nvcc, Path(folder)), nvcc_version(nvcc))
    if not arguments.write:
        changed = differences(rows, read_table())
        sys.stdout.write("\n".join([*changed, f"{len(rows)} kernels, {len(changed)} differences"]) + "\n")
        return 1 if changed else 0
    write_rows(TABLE, COLUMNS, rows)
    sys.stdout.write(f"{TABLE.relative_to(ROOT)}: {len(rows)} kernels\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())

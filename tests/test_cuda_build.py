"""The .cu files for every architecture we ship: nvcc's warnings are errors, and no kernel spills a register.

Each file is compiled for one architecture, so that the whole costs little; together the files meet every architecture.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
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


def find_nvcc() -> str | None:
    homes = [os.environ.get("CUDA_HOME"), "/usr/local/cuda"]
    homes += [str(path) for path in (Path(torch.__file__).parent.parent / "nvidia").glob("cu[0-9]*")]
    for home in homes:
        if home and (Path(home) / "bin" / "nvcc").is_file():
            return str(Path(home) / "bin" / "nvcc")
    return shutil.which("nvcc")


def compile_for(nvcc: str, source: Path, arch: str, target: Path) -> str:
    command = [nvcc, *FLAGS, f"-arch=sm_{arch}", "-c", str(source), "-o", str(target)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{source.name} for sm_{arch}:\n{done.stderr}"
    return done.stderr


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], str]:
    """What ptxas said, by file and architecture."""
    nvcc = find_nvcc()
    if nvcc is None:
        pytest.skip("nvcc was not found: set CUDA_HOME to compile the CUDA kernels")
    folder = tmp_path_factory.mktemp("cuda")
    # A row kernel's file meets one architecture, the small files all.
    rows = [source for source in KERNELS if source.stem.startswith(("kd_loss_", "kd_family_"))]
    others = [source for source in KERNELS if source not in rows]
    pairs = [(source, ARCHS[i % len(ARCHS)]) for i, source in enumerate(rows)]
    pairs += [(source, arch) for source in others for arch in ARCHS]
    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        running = {
            (source.stem, arch): pool.submit(compile_for, nvcc, source, arch, folder / f"{source.stem}_{arch}.o")
            for source, arch in pairs
        }
        return {pair: future.result() for pair, future in running.items()}


def test_every_architecture_compiles(reports: dict[tuple[str, str], str]) -> None:
    assert {arch for _, arch in reports} == set(ARCHS)
    assert {stem for stem, _ in reports} == {source.stem for source in KERNELS}


def test_no_kernel_spills(reports: dict[tuple[str, str], str]) -> None:
    spills = []
    for (stem, arch), text in reports.items():
        found = re.findall(
            r"Compiling entry function '(\w+)'.*?(\d+) bytes spill stores, (\d+) bytes spill loads",
            text,
            re.DOTALL,
        )
        assert found, f"ptxas reported no kernel of {stem} for sm_{arch}"
        spills += [
            f"{stem} sm_{arch} {kernel}: {stores} bytes stored, {loads} loaded"
            for kernel, stores, loads in found
            if (stores, loads) != ("0", "0")
        ]
    assert spills == []

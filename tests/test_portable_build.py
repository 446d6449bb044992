"""The CPU kernels cross-compiled for 64-bit ARM by Clang."""

from __future__ import annotations

import importlib.util
import re
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SOURCES = sorted((ROOT / "csrc" / "cpu").glob("*.cpp"))
AARCH64 = 183  # e_machine of an ELF file


def compiler() -> list[str]:
    if importlib.util.find_spec("ziglang") is not None:
        return [sys.executable, "-m", "ziglang", "c++", "-target", "aarch64-linux-gnu"]
    found = shutil.which("aarch64-linux-gnu-g++")
    if found is None:
        pytest.skip("no compiler for aarch64: pip install ziglang, or apt-get install g++-aarch64-linux-gnu")
    return [found]


def compile_to(output: Path, source: Path, *flags: str) -> None:
    command = [*compiler(), "-std=c++20", "-O3", "-g0", "-Wall", f"-I{ROOT / 'csrc'}", *flags]
    done = subprocess.run([*command, str(source), "-o", str(output)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


# Every class of the sweeps in two files, a minute each: the rest includes the same headers.
SLOW = ("kd_loss_baseline", "kd_family_double")


@pytest.mark.parametrize(
    "source",
    [pytest.param(path, id=path.stem, marks=pytest.mark.slow if path.stem in SLOW else ()) for path in SOURCES],
)
def test_compiles_for_arm(source: Path, tmp_path: Path) -> None:
    compile_to(tmp_path / "object.o", source, "-c", "-Werror")
    header = (tmp_path / "object.o").read_bytes()[:20]
    assert header[:4] == b"\x7fELF" and struct.unpack_from("<H", header, 18)[0] == AARCH64


@pytest.mark.slow
def test_the_sweep_is_vector_code(tmp_path: Path) -> None:
    """Four float lanes of NEON multiply and add; a sweep that fell back to scalars would have next to none."""
    compile_to(tmp_path / "sweep.s", ROOT / "csrc" / "cpu" / "kd_loss_baseline.cpp", "-S")
    text = (tmp_path / "sweep.s").read_text()
    assert len(re.findall(r"\bfml[as]\s+v\d+\.4s", text)) > 500

"""The CUDA kernels without a GPU: the .cu files, compiled by g++ for the interpreter in tests/simt, under ASan
and UBSan, against a float64 reference; and the interpreter against kernels with planted faults.

simt/test_kd_loss.cpp says which cases run. Both programs also run from ctest (CMakeLists.txt).
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SIMT = ROOT / "tests" / "simt"
KERNELS = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
FLAGS = [
    "-std=c++20",
    "-x",
    "c++",
    "-DLRDS_SIMT",
    "-O1",
    "-g1",
    "-fno-strict-aliasing",
    "-fno-omit-frame-pointer",
    "-fsanitize=address,undefined",
    "-fno-sanitize-recover=all",
    "-Wall",
    "-Wextra",
    "-Werror",
    "-Wno-unknown-pragmas",
    f"-I{ROOT / 'csrc'}",
    f"-I{SIMT / 'include'}",
    f"-I{SIMT}",
    # nvcc includes this by itself.
    "-include",
    "cuda_runtime.h",
]
WORKERS = int(os.environ.get("MAX_JOBS") or min(4, os.cpu_count() or 1))


def compiler() -> str:
    return os.environ.get("CXX", "g++")


def run(command: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, check=False)


def has_sanitizers(folder: Path) -> bool:
    source = folder / "empty.cpp"
    source.write_text("int main() { return 0; }\n")
    link = [compiler(), "-fsanitize=address,undefined", str(source), "-o", str(folder / "empty")]
    return shutil.which(compiler()) is not None and run(link).returncode == 0


def ninja_file() -> str:
    """How to build the programs; ninja builds again what has changed since the last run of the tests."""
    ccache = shutil.which("ccache")
    lines = [
        f"cxx = {f'{ccache} ' if ccache else ''}{compiler()}",
        f"flags = {shlex.join(FLAGS)}",
        "rule compile",
        "  command = $cxx $flags -MMD -MF $out.d -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        f"  command = {compiler()} -fsanitize=address,undefined $in -o $out",
    ]
    machine = SIMT / "simt.cpp"
    # What the family's kernels are compared with.
    exact = ROOT / "csrc" / "cpu" / "kd_family_double.cpp"
    programs = {
        "simt_kd_loss": [*KERNELS, SIMT / "test_kd_loss.cpp", machine],
        "simt_kd_family": [*KERNELS, SIMT / "test_kd_family.cpp", exact, machine],
        "simt_kd_moments": [*KERNELS, SIMT / "test_kd_moments.cpp", exact, machine],
        "simt_interpreter": [SIMT / "test_interpreter.cpp", machine],
    }
    # In the order given: the kernels take longest.
    sources = dict.fromkeys(source for parts in programs.values() for source in parts)
    lines += [f"build {source.name}.o: compile {str(source).replace(' ', '$ ')}" for source in sources]
    lines += [f"build {name}: link {' '.join(f'{part.name}.o' for part in parts)}" for name, parts in programs.items()]
    return "\n".join(lines) + "\n"


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of simt_kd_loss, simt_kd_family, simt_kd_moments and simt_interpreter."""
    if not has_sanitizers(tmp_path_factory.mktemp("simt")):
        pytest.skip(f"{compiler()} cannot link AddressSanitizer: install a g++ that has it, or set CXX")
    folder = ROOT / "build" / "simt"
    folder.mkdir(parents=True, exist_ok=True)
    text = ninja_file()
    if not (folder / "build.ninja").exists() or (folder / "build.ninja").read_text() != text:
        (folder / "build.ninja").write_text(text)
    done = run([sys.executable, "-m", "ninja", "-C", str(folder), "-j", str(WORKERS)])
    assert done.returncode == 0, done.stdout[-5000:]
    return folder


def test_every_kernel_is_interpreted() -> None:
    assert {path.stem for path in KERNELS} >= {"kd_loss", "kd_loss_f32", "kd_loss_bf16", "scale_gradient"}


# Part i of 5 is every fifth case from i on. `make test` runs two parts of simt_kd_loss, 0 and 4, which also
# hold the groups that are run once; `make test-full` runs all.
@pytest.mark.parametrize(
    ("name", "chosen", "parts"),
    [
        pytest.param("simt_kd_loss", (0, 4), 5, id="simt_kd_loss"),
        pytest.param("simt_kd_loss", (1, 2, 3), 5, id="simt_kd_loss, the rest", marks=pytest.mark.slow),
        pytest.param("simt_kd_family", (0, 1), 2, id="simt_kd_family"),
    ],
)
def test_kernels_match_the_reference(programs: Path, name: str, chosen: tuple[int, ...], parts: int) -> None:
    program = str(programs / name)
    with ThreadPoolExecutor(WORKERS) as pool:
        for done in pool.map(lambda part: run([program, str(part), str(parts)]), chosen):
            assert done.returncode == 0, done.stdout + done.stderr
            assert " 0 failures" in done.stdout


def test_moments_match_the_reference(programs: Path) -> None:
    done = run([str(programs / "simt_kd_moments")])
    assert done.returncode == 0, done.stdout + done.stderr
    assert " 0 failures" in done.stdout


def test_interpreter_runs_a_correct_kernel(programs: Path) -> None:
    done = run([str(programs / "simt_interpreter"), "none"])
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("exit", "divergent barrier"),
        ("branch", "divergent barrier"),
        ("two_barriers", "different barriers"),
        ("two_shuffles", "different collectives"),
        ("lane_left", "divergent barrier"),
        ("shared_overflow", "heap-buffer-overflow"),
        ("static_overflow", "out of bounds"),
        ("misaligned", "misaligned address"),
        ("mask", "not in its own collective's mask"),
        ("missing_barrier", "depends on who goes first"),
        ("overtaken", "depends on who goes first"),
        ("async_early", "before the copy was waited for"),
        ("async_too_few", "before the copy was waited for"),
        ("async_open", "before the copy was waited for"),
        ("cluster_early", "a barrier that was not initialised"),
        ("cluster_late", "shared memory of a block that has exited"),
        ("cluster_half", "divergent barrier"),
        ("cluster_async_early", "before the copy was waited for"),
        ("cluster_async_short", "a bulk copy that nobody waited for"),
        ("cluster_async_left", "a bulk copy that nobody waited for"),
        ("cluster_async_ahead", "divergent barrier"),
        ("async_bulk_early", "before the copy was waited for"),
        ("async_bulk_short", "a bulk copy that nobody waited for"),
        ("async_bulk_left", "a bulk copy that nobody waited for"),
        ("async_bulk_misaligned", "a size or alignment that CUDA does not have"),
        ("phase", "divergent barrier"),
    ],
)
def test_interpreter_catches(programs: Path, fault: str, message: str) -> None:
    done = run([str(programs / "simt_interpreter"), fault])
    assert done.returncode != 0
    assert message in done.stderr

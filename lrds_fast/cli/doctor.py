"""lrds-fast doctor: what is installed and built, what is missing and how to install it.

Reads files and does not import PyTorch.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from lrds_fast import _build
from lrds_fast._version import __version__
from lrds_fast.cli.command import FAILED, OK, Subparsers, add_command


class Finding(NamedTuple):
    """One line of the report. found: whether the thing is installed. detail: its version, or how to get it. needed:
    whether lrds-fast needs it."""

    name: str
    found: bool
    detail: str
    needed: bool = False


#: Distribution, what lrds-fast uses it for, and how to install it.
OPTIONAL = (
    ("torchvision", "folders of pictures and models torchvision:NAME", "pip install torchvision"),
    ("timm", "models timm:NAME", "pip install timm"),
    ("scikit-learn", "the demo's digits", "pip install scikit-learn"),
    ("matplotlib", "reports", "pip install matplotlib"),
    ("jinja2", "reports", "pip install jinja2"),
    ("torchdistill", "feature distillation", "pip install torchdistill"),
    ("onnxruntime", "model.onnx of lrds-fast export", "pip install onnx onnxscript onnxruntime"),
    ("tensorboard", "logs for TensorBoard", "pip install tensorboard"),
    ("nvidia-dali-cuda130", "decodes photographs twice as fast, also on a GPU", "pip install nvidia-dali-cuda130"),
)


def add_parser(subparsers: Subparsers) -> None:
    """Adds the command's parser."""
    add_command(
        subparsers,
        "doctor",
        run,
        summary="report what is installed and built, what is missing and how to install it",
        example="lrds-fast doctor",
    )


def run(options: argparse.Namespace) -> int:
    """Prints all findings; returns FAILED where a requirement is missing."""
    findings = examine()
    print(text(findings))
    return OK if healthy(findings) else FAILED


def examine() -> list[Finding]:
    """All findings, in the order they are printed."""
    problem = _build.problem()
    facts = None if problem else _build.record()
    if not problem and facts is None:
        facts, problem = _facts_by_import()
    torch = _build.installed_torch()
    findings = [
        Finding("python", True, platform.python_version(), needed=True),
        Finding("lrds-fast", not problem, problem or _built(facts or {}), needed=True),
        _torch(torch),
    ]
    if facts:
        findings += [_cpu_kernels(facts), _cuda_kernels(facts, torch)]
    findings += [_cuda_device(torch), _nvcc()]
    findings += [_distribution(name, purpose, how) for name, purpose, how in OPTIONAL]
    findings.append(_real_data())
    return findings


def text(findings: Sequence[Finding]) -> str:
    """The findings for a terminal."""
    width = max(len(finding.name) for finding in findings)
    lines = []
    for name, found, detail, needed in findings:
        state = "ok" if found else "MISSING" if needed else "-"
        lines.append(f"{state:<7}  {name:<{width}}  {detail}")
    return "\n".join(lines)


def healthy(findings: Sequence[Finding]) -> bool:
    """Whether all requirements are installed."""
    return all(finding.found for finding in findings if finding.needed)


def _facts_by_import() -> tuple[dict[str, Any] | None, str | None]:
    """(facts, None) of an extension without _build.json, or (None, why it does not load). Imports it in another
    process, which takes seconds."""
    code = "import json; from lrds_fast._ops import build_info; print(json.dumps(build_info()))"
    folder = str(Path(_build.__file__).parents[1])
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [folder, os.environ.get("PYTHONPATH")]))}
    try:
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True, env=environment
        )
        facts: dict[str, Any] = json.loads(done.stdout)
    except subprocess.CalledProcessError as error:
        lines = error.stderr.strip().splitlines() or [f"exit code {error.returncode}"]
        return None, f"the extension does not load: {lines[-1]}"
    except (OSError, ValueError, subprocess.TimeoutExpired) as error:
        return None, f"the extension does not load: {error}"
    return facts, None


def _built(facts: dict[str, Any]) -> str:
    return f"{__version__}, built by {facts['compiler']} for torch {facts['torch_version']}"


def _torch(torch: dict[str, str | None] | None) -> Finding:
    if torch is None:
        return Finding("torch", False, "not installed: pip install 'torch>=2.11'", needed=True)
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    threads = os.environ.get("OMP_NUM_THREADS")
    limit = f", OMP_NUM_THREADS={threads}" if threads else ""
    cuda = f"CUDA {torch['cuda']}" if torch["cuda"] else "a CPU build"
    return Finding("torch", True, f"{torch['version']}, {cuda}; {cpus} CPUs{limit}", needed=True)


def _cpu_kernels(facts: dict[str, Any]) -> Finding:
    levels = facts["cpu_isas"]
    return Finding(
        "cpu kernels",
        True,
        f"levels {', '.join(levels)}; this CPU runs {cpu_level(levels)}; OpenMP {'on' if facts['openmp'] else 'off'}",
        needed=True,
    )


def cpu_level(levels: Sequence[str]) -> str:
    """The compiled level that csrc/cpu/kd_loss.cpp chooses on this CPU. levels: the compiled ones, best first."""
    try:
        flags = set(re.findall(r"^flags\s*:(.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)[0].split())
    except (OSError, IndexError):
        return "the best of them that it supports"
    best = "baseline"
    if {"avx2", "fma"} <= flags:
        best = "avx2"
    if {"avx512f", "avx512bw", "avx512dq", "avx512vl"} <= flags:
        best = "avx512_bf16" if "avx512_bf16" in flags else "avx512"
    cap = os.environ.get("LRDS_FAST_CPU_ISA", best)
    allowed = [level for level in levels if level in (best, cap)]
    return allowed[0] if allowed else levels[-1]


def _cuda_kernels(facts: dict[str, Any], torch: dict[str, str | None] | None) -> Finding:
    if facts["cuda"]:
        detail = f"nvcc {facts['cuda_version']}, architectures {', '.join(facts['cuda_archs'])}"
        return Finding("cuda kernels", True, detail)
    if torch is None or torch["cuda"] is None:
        return Finding("cuda kernels", False, "not built: torch is a CPU build; install a CUDA build of torch first")
    return Finding("cuda kernels", False, f"not built; with nvcc: LRDS_FAST_CUDA=1 {_build.how_to_rebuild()}")


def _cuda_device(torch: dict[str, str | None] | None) -> Finding:
    if torch is not None and torch["cuda"] is None:
        return Finding("cuda device", False, "torch is a CPU build; training runs on the CPU")
    names = _devices()
    if not names:
        return Finding("cuda device", False, "NVIDIA's driver reports none (nvidia-smi); training runs on the CPU")
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    limit = "" if visible is None else f"; CUDA_VISIBLE_DEVICES={visible}"
    return Finding("cuda device", True, ", ".join(names) + limit)


def _devices() -> list[str]:
    """The names of the GPUs that NVIDIA's driver reports."""
    files = sorted(Path("/proc/driver/nvidia/gpus").glob("*/information"))
    names = [name for file in files for name in re.findall(r"^Model:\s*(\S.*)$", file.read_text(), re.MULTILINE)]
    if names or shutil.which("nvidia-smi") is None:
        return names
    command = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=5, check=True).stdout.splitlines()
    except (OSError, subprocess.SubprocessError):
        return []


def _nvcc() -> Finding:
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    candidates = [str(Path(home) / "bin" / "nvcc")] if home else []
    path = next((c for c in candidates if Path(c).is_file()), None) or shutil.which("nvcc")
    if path is None:
        return Finding(
            "nvcc",
            False,
            "only needed to build CUDA kernels: install the CUDA toolkit and set CUDA_HOME",
        )
    try:
        output = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError) as error:
        return Finding("nvcc", False, f"{path} does not run: {error}")
    release = next((line.strip() for line in output.splitlines() if "release" in line), "version unknown")
    return Finding("nvcc", True, f"{path}: {release}")


def _distribution(name: str, purpose: str, how: str) -> Finding:
    try:
        return Finding(name, True, importlib.metadata.version(name))
    except importlib.metadata.PackageNotFoundError:
        return Finding(name, False, f"only for {purpose}: {how}")


def _real_data() -> Finding:
    folder = os.environ.get("LRDS_DATA")
    if not folder:
        return Finding(
            "LRDS_DATA",
            False,
            "not set; tests on real data are skipped: point it at the data folder to run them",
        )
    if not Path(folder).is_dir():
        return Finding("LRDS_DATA", False, f"{folder} is not a folder; correct the variable")
    return Finding(
        "LRDS_DATA",
        True,
        f"{folder}: {', '.join(sorted(entry.name for entry in Path(folder).iterdir()))}",
    )

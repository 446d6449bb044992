"""What is installed, what was built, what is missing and how to get it."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

import lrds_fast


class Finding(NamedTuple):
    """One line: what, whether it is there, and the version or the way to get it. needed: nothing works without."""

    name: str
    found: bool
    detail: str
    needed: bool = False


#: Distribution name and what one gains by it.
OPTIONAL = (
    ("torchvision", "ImageFolder data and torchvision: models", "pip install torchvision"),
    ("timm", "timm: models", "pip install timm"),
    ("scikit-learn", "the demo's digits", "pip install scikit-learn"),
    ("torchdistill", "distillation of features", "pip install 'lrds-fast[features]'"),
    ("tensorboard", "the log as TensorBoard's events", "pip install tensorboard"),
    ("nvidia-dali-cuda130", "twice as fast photographs, on the GPU too", "pip install nvidia-dali-cuda130"),
)


def examine() -> list[Finding]:
    """All findings, in the order they are printed."""
    from lrds_fast import _C

    info: dict[str, Any] = _C.build_info()
    findings = [
        Finding("python", True, platform.python_version(), needed=True),
        Finding(
            "lrds-fast",
            True,
            f"{lrds_fast.__version__}, built by {info['compiler']} for torch {info['torch_version']}",
            needed=True,
        ),
        Finding("torch", True, f"{torch.__version__}, {torch.get_num_threads()} threads", needed=True),
        Finding(
            "cpu kernels",
            True,
            f"levels {', '.join(info['cpu_isas'])}; this CPU runs {info['cpu_isa']};"
            f" OpenMP {'on' if info['openmp'] else 'off'}",
            needed=True,
        ),
        _cuda_kernels(info),
        _cuda_device(),
        _nvcc(),
    ]
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
    """Whether everything needed is there."""
    return all(finding.found for finding in findings if finding.needed)


def _cuda_kernels(info: dict[str, Any]) -> Finding:
    if info["cuda"]:
        return Finding(
            "cuda kernels",
            True,
            f"CUDA {info['cuda_version']}, architectures {', '.join(info['cuda_archs'])}",
        )
    return Finding(
        "cuda kernels",
        False,
        "not built; with nvcc: LRDS_FAST_CUDA=1 pip install --no-build-isolation --force-reinstall --no-deps .",
    )


def _cuda_device() -> Finding:
    if not torch.cuda.is_available():
        why = (
            "torch is a CPU build"
            if torch.version.cuda is None
            else "torch sees none; check the driver with nvidia-smi"
        )
        return Finding("cuda device", False, f"{why}; training runs on the CPU")
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return Finding("cuda device", True, ", ".join(names))


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

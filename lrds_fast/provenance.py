"""The provenance of a result: versions, commit, processor, command."""

from __future__ import annotations

import functools
import os
import platform
import shlex
import subprocess
import sys
from pathlib import Path

import torch

from lrds_fast import _ops
from lrds_fast._version import __version__


def provenance(device: torch.device, processes: int = 1) -> dict[str, str]:
    """The facts of a run's provenance, by the names that reports print."""
    threads = torch.get_num_threads()
    facts = {
        "lrds-fast": f"{__version__}, commit {commit()}",
        "torch": torch.__version__,
        "Python": platform.python_version(),
        "processor": f"{cpu_name()}, {threads} thread{'s' * (threads > 1)}",
        "kernels": f"{_ops.build_info()['cpu_isa']} here, {torch.backends.cpu.get_cpu_capability()} in torch",
    }
    if device.type == "cuda":
        facts["device"] = f"{torch.cuda.get_device_name(device)}, CUDA {torch.version.cuda}"
    if processes > 1:
        facts["processes"] = str(processes)
    facts["command"] = shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])
    return facts


#: Benchmarks append rows to the first folder while they run, and a new teacher gets a row in the second file. Neither
#: changes what a run computes, so that they do not make the sources dirty. Weights of a teacher that change do.
_RESULTS = ("benchmarks/results", "benchmarks/teachers/README.md")


@functools.cache
def commit() -> str:
    """git's description of the sources, with "-dirty" if tracked files have changed, apart from the benchmarks'
    results; without git or history LRDS_COMMIT, else "unknown"."""
    root = Path(__file__).resolve().parents[1]
    description = ""
    if (root / ".git").exists():
        description = _git(root, "describe", "--always")
        places = [".", *(f":(exclude){path}" for path in _RESULTS)]
        if description and _git(root, "status", "--porcelain", "--untracked-files=no", "--", *places):
            description += "-dirty"
    return description or os.environ.get("LRDS_COMMIT", "") or "unknown"


def _git(root: Path, *command: str) -> str:
    """What a git command prints in that folder; "" where it fails or there is no git."""
    try:
        # Without optional locks, so that a run never stands in the way of a commit.
        whole = ["git", "--no-optional-locks", *command]
        return subprocess.run(whole, cwd=root, capture_output=True, text=True, check=False).stdout.strip()
    except OSError:
        return ""


def cpu_name() -> str:
    """The processor's name from /proc/cpuinfo, elsewhere from Python's platform module."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()

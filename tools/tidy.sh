#!/usr/bin/env bash
# tidy.sh VENV [FILE...]: clang-tidy (.clang-tidy) on the C++ sources without CUDA, or on some of them, JOBS at once.
set -euo pipefail
bin=$(cd "$1" && pwd)/bin
shift
[ $# -gt 0 ] || set -- csrc/cpu/*.cpp csrc/torch/*.cpp
# As system headers, so that nothing is reported in them.
headers=$("$bin/python" - <<'PYTHON'
import sysconfig
from importlib.util import find_spec
from pathlib import Path

torch, pybind11 = (Path(find_spec(name).origin).parent / "include" for name in ("torch", "pybind11"))
for folder in (torch, torch / "torch/csrc/api/include", pybind11, sysconfig.get_path("include")):
    print(f"-isystem{folder}")
PYTHON
)
# shellcheck disable=SC2086  # several arguments
printf '%s\0' "$@" | xargs -0 -P "${JOBS:-2}" -I FILE "$bin/clang-tidy" --quiet FILE -- \
  -std=c++20 -Icsrc $headers '-DLRDS_VERSION="0"' '-DLRDS_TORCH_VERSION="0"'

#!/usr/bin/env bash
# tidy.sh VENV [FILE...]: clang-tidy (.clang-tidy) on the C++ and CUDA sources, or on some of them, JOBS at once. It reads
# csrc/cuda as tests/test_simt.py compiles it: as C++, for the interpreter of tests/simt. How each file is compiled stands
# in build/tidy/compile_commands.json.
set -euo pipefail
bin=$(cd "$1" && pwd)/bin
shift
mkdir -p build/tidy
# Prints the names of all files.
files=$("$bin/python" - <<'PYTHON'
import json
import subprocess
import sys
import sysconfig
from importlib.util import find_spec
from pathlib import Path

sys.path.insert(0, "tests")
from test_simt import FLAGS, KERNELS, SIMT, compiler

# As system headers, so that nothing is reported in them.
torch, pybind11 = (Path(find_spec(name).origin).parent / "include" for name in ("torch", "pybind11"))
systems = [torch, torch / "torch/csrc/api/include", pybind11, sysconfig.get_path("include")]
extension = ["-std=c++20", "-Icsrc", *(f"-isystem{folder}" for folder in systems)]
extension += ['-DLRDS_VERSION="0"', '-DLRDS_TORCH_VERSION="0"']
# The sanitizers' headers come with g++; the package of clang-tidy has none.
ask = [compiler(), "-print-file-name=include"]
own = subprocess.run(ask, capture_output=True, text=True, check=True).stdout.strip()
root = Path.cwd()
flags = dict.fromkeys([*root.glob("csrc/cpu/*.cpp"), *root.glob("csrc/torch/*.cpp")], extension)
flags |= dict.fromkeys([*KERNELS, *SIMT.glob("*.cpp")], [*FLAGS, f"-idirafter{own}"])
commands = [
    {"directory": str(root), "file": str(file), "arguments": [compiler(), *flags[file], "-c", str(file)]}
    for file in sorted(flags)
]
Path("build/tidy/compile_commands.json").write_text(json.dumps(commands, indent=1) + "\n")
print(*(file.relative_to(root) for file in sorted(flags)), sep="\n")
PYTHON
)
# shellcheck disable=SC2086  # several files
[ $# -gt 0 ] || set -- $files
printf '%s\0' "$@" | xargs -0 -P "${JOBS:-2}" -n 1 "$bin/clang-tidy" --quiet -p build/tidy

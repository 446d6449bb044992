#!/usr/bin/env bash
# install.sh PYTHON VENV: makes the virtual environment and installs what the package and its tests need.
set -euo pipefail
python=$1
venv=$2

need() { echo "lrds-fast: $1" >&2; exit 1; }
command -v "$python" >/dev/null || need "$python was not found; install Python >= 3.10 (apt-get install python3)"
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
  need "$("$python" --version) is too old; PYTHON=/path/to/python3.10-or-newer make ..."
"$python" -c 'import venv, ensurepip' 2>/dev/null ||
  need "Python's venv module is missing (apt-get install python3-venv)"
command -v g++ >/dev/null || need "g++ was not found (apt-get install g++)"
header=$("$python" -c 'import sysconfig; print(sysconfig.get_paths()["include"] + "/Python.h")')
[ -f "$header" ] || need "Python's headers are missing (apt-get install python3-dev)"

[ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
echo "lrds-fast: installing torch and the tools into $venv (several GB on the first run)"
constraints=()
# The exact versions were tested on 3.11; older interpreters get the newest that the ranges allow.
"$venv/bin/python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' && constraints=(-c constraints.txt)
requirements=$("$venv/bin/python" tools/requirements.py)
mapfile -t packages <<<"$requirements"
"$venv/bin/python" -m pip install --quiet "${constraints[@]}" "${packages[@]}"

# Asked for CUDA kernels on a machine without a compiler: it exists as wheels, of the CUDA version that torch has.
if [ "${LRDS_FAST_CUDA:-}" = 1 ] && ! command -v nvcc >/dev/null && [ ! -x "${CUDA_HOME:-/usr/local/cuda}/bin/nvcc" ]; then
  cuda=$("$venv/bin/python" -c 'import torch; print(torch.version.cuda or "")')
  [ -n "$cuda" ] || need "LRDS_FAST_CUDA=1, but this torch is a CPU-only build"
  echo "lrds-fast: installing nvcc $cuda into $venv"
  "$venv/bin/python" -m pip install --quiet "nvidia-cuda-nvcc==$cuda.*" "nvidia-cuda-crt==$cuda.*" "nvidia-nvvm==$cuda.*"
fi

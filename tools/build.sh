#!/usr/bin/env bash
# build.sh VENV: compiles the extension in place and makes the checkout importable. Later calls compile what changed.
set -euo pipefail
python=$(cd "$1" && pwd)/bin/python
log=build/build.log
mkdir -p build
# CUDA kernels on a machine without nvcc: it exists as wheels, of the CUDA version that torch has.
if [ "${LRDS_FAST_CUDA:-}" = 1 ] && ! command -v nvcc >/dev/null && [ ! -x "${CUDA_HOME:-/usr/local/cuda}/bin/nvcc" ]; then
  cuda=$("$python" -c 'import torch; print(torch.version.cuda or "")')
  if [ -n "$cuda" ]; then  # else setup.py says what is missing
    echo "lrds-fast: installing nvcc $cuda into $1"
    "$python" -m pip install --quiet "nvidia-cuda-nvcc==$cuda.*" "nvidia-cuda-crt==$cuda.*" "nvidia-nvvm==$cuda.*"
  fi
fi
echo "lrds-fast: building the extension"
# Beside ninja in the environment, not whatever the machine may have.
PATH="$(dirname "$python"):$PATH" "$python" setup.py build_ext --inplace >"$log" 2>&1 || { tail -40 "$log" >&2; exit 1; }
grep '^lrds_fast: ' "$log" || true
# The files are in place: the editable install only writes where to find them.
if ! "$python" -m pip show --quiet lrds-fast 2>/dev/null; then
  LRDS_FAST_SKIP_BUILD=1 "$python" -m pip install --quiet --no-build-isolation --no-deps -e .
fi

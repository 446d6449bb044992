#!/usr/bin/env bash
# cpu_torch_build.sh PYTHON: installs the package into an environment of its own with a CPU-only torch and runs part of
# the tests there. LRDS_CPU_TORCH_PIP_ARGS reaches such a build where the default index has none, for example:
#   LRDS_CPU_TORCH_PIP_ARGS="--index-url https://download.pytorch.org/whl/cpu" make test
set -euo pipefail
python=$1
version=${LRDS_CPU_TORCH_VERSION:-2.13.0}
venv=.venv-cpu
skip() { echo "lrds-fast: SKIPPED the build against a CPU-only torch: $1"; exit 0; }

if [ ! -x "$venv/bin/python" ]; then
  "$python" -m venv "$venv"
fi
# What an earlier call installed is used again, without the index.
if ! "$venv/bin/python" -c "import torch; assert torch.__version__.split('+')[0] == '$version'" 2>/dev/null; then
  # The wheel alone first: a CUDA build brings gigabytes of packages that this check has no use for.
  # shellcheck disable=SC2086
  "$venv/bin/python" -m pip install --quiet --no-deps ${LRDS_CPU_TORCH_PIP_ARGS:-} "torch==$version" ||
    skip "torch==$version could not be installed"
fi
if ! grep -q "^cuda.*= None" "$venv"/lib/python*/site-packages/torch/version.py; then
  rm -rf "$venv"
  skip "the index's torch $version is a CUDA build; set LRDS_CPU_TORCH_PIP_ARGS"
fi
"$venv/bin/python" -m pip install --quiet "torch==$version" numpy pyarrow safetensors tqdm setuptools wheel ninja pybind11 \
  pytest hypothesis
# From a copy: the checkout's own build must stay what it is.
copy=$(mktemp -d)
trap 'rm -rf "$copy"' EXIT
git ls-files -z | xargs -0 cp --parents -t "$copy"
(cd "$copy" && LRDS_FAST_CUDA=0 PATH="$OLDPWD/$venv/bin:$PATH" "$OLDPWD/$venv/bin/python" -m pip install --quiet \
  --no-build-isolation --no-deps --force-reinstall .)
rm -rf "$copy/lrds_fast"  # only the installed package may be imported
cd "$copy"
"$OLDPWD/$venv/bin/python" - <<'PY'
import torch

import lrds_fast
from lrds_fast._ops import build_info

info = build_info()
if torch.version.cuda is not None or info["cuda"]:
    raise SystemExit(f"not a CPU-only build: torch {torch.__version__}, {info}")
print(f"lrds-fast {lrds_fast.__version__} built and imported with CPU-only torch {torch.__version__}")
PY
"$OLDPWD/$venv/bin/python" -m pytest -q -p no:cacheprovider -m "not slow and not gpu" tests/test_kd_loss_edges.py \
  tests/test_kd_loss_arguments.py tests/test_kd_loss_determinism.py

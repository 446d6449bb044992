#!/usr/bin/env bash
# gpu_check.sh: everything that needs a GPU, in one command, without network, with the Python it finds (PYTHON=...).
# Builds for this GPU, runs `pytest -m gpu`, compute-sanitizer on small cases and the GPU benchmarks with the roofline of
# the same run. CSVs and the log go to $OUT (default: ./out). Exits with the number of failed steps.
set -uo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
out=${OUT:-out}
mkdir -p "$out"
exec > >(tee "$out/gpu_check.log") 2>&1
failed=0
step() {
  local name=$1 begin=$SECONDS
  shift
  echo "== $name"
  if "$@"; then
    echo "== $name: ok, $((SECONDS - begin)) s"
  else
    failed=$((failed + 1))
    echo "== $name: FAILED, $((SECONDS - begin)) s"
  fi
}

"$python" - <<'PY' || exit 1
import sys

try:
    import torch
except ImportError:
    sys.exit("gpu-check: this Python has no torch; PYTHON=/path/to/python make gpu-check")
if not torch.cuda.is_available():
    sys.exit("gpu-check: torch finds no CUDA device here; this command is for a machine with a GPU")
print(f"torch {torch.__version__}, {torch.cuda.get_device_name(0)}, Python {sys.version.split()[0]}")
for name in ("pybind11", "pytest", "ninja", "hypothesis", "pytest_benchmark"):
    try:
        __import__(name)
    except ImportError:
        print(f"gpu-check: {name} is not installed here")
PY

# 9.0 is built as 9.0a: what only Hopper has is then allowed. `make gpu-check` must not leave the list to chance.
arch=$("$python" -c 'import torch; c = torch.cuda.get_device_capability(0); print(f"{c[0]}.{c[1]}" + ("a" if c == (9, 0) else ""))')
export LRDS_FAST_CUDA=1 TORCH_CUDA_ARCH_LIST=$arch PYTHONPATH=$PWD
step "build for $arch" "$python" setup.py build_ext --inplace
[ "$failed" = 0 ] || exit 1

step "pytest -m gpu" "$python" -m pytest -q -m gpu -p no:cacheprovider tests
if command -v compute-sanitizer >/dev/null; then
  for tool in memcheck racecheck; do
    step "compute-sanitizer $tool" compute-sanitizer --tool "$tool" --error-exitcode 1 --log-file "$out/$tool.log" \
      "$python" tests/gpu_small_cases.py
  done
else
  echo "gpu-check: compute-sanitizer was not found; its two checks did not run"
fi
for suite in kd_loss linear_kd_loss bandwidth; do
  step "benchmarks: $suite" "$python" "benchmarks/bench_$suite.py" --device cuda --csv "$out/${suite}_cuda.csv"
done
# From end to end: what torchvision, timm and DALI are needed for is left out where they are missing, with a line.
step "benchmarks: train" timeout 240 "$python" benchmarks/bench_train.py --device cuda --quick --budget 180 \
  --csv "$out/train_cuda.csv"
echo "gpu-check: $failed step(s) failed; results in $out"
exit "$failed"

#!/usr/bin/env bash
# gpu_check.sh [STEP...]: everything that needs a GPU, without network, with the Python it finds (PYTHON=...).
#
#   facts      what the machine has: device, tools, versions, clusters that fit at once
#   build      the extension for this GPU
#   smoke      each kernel path once against float64, each in a process of its own, then its time
#   tests      pytest -m gpu
#   memcheck   compute-sanitizer on our kernels, one case per path
#   racecheck  the same; information: bulk copies and mbarriers can make it report races that are none
#   bench      the GPU benchmarks, with the roofline of the same run; LRDS_BENCH="kd_loss linear_kd_loss bandwidth train"
#   profile    Nsight Compute on four kernels
#
# No STEP: all of them in this order. Results come into $OUT (default: ./out) as they are made. Each step has a time
# limit, all of them together LRDS_GPU_BUDGET seconds (default 2400). LRDS_GPU_LIMIT caps every command's limit.
# The exit code is the number of failed steps.
# shellcheck disable=SC2329 # steps are called by name
set -uo pipefail
cd "$(dirname "$0")/.." || exit 1
all=(facts build smoke tests memcheck racecheck bench profile)
steps=("$@")
[ "$#" -gt 0 ] || steps=("${all[@]}")
for step in "${steps[@]}"; do
  case " ${all[*]} " in
    *" $step "*) ;;
    *)
      echo "gpu-check: there is no step '$step'; there are: ${all[*]}" >&2
      exit 2
      ;;
  esac
done
python=${PYTHON:-python3}
out=${OUT:-out}
budget=${LRDS_GPU_BUDGET:-2400}
mkdir -p "$out"
exec > >(tee -a "$out/gpu_check.log") 2>&1
export PYTHONPATH=$PWD PYTHONUNBUFFERED=1 OUT=$out

left() { echo $((budget - SECONDS)); }

# within SECONDS COMMAND...: the command, ended at its limit or at the end of the budget, whichever is first.
within() {
  local limit=$1 remaining
  shift
  remaining=$(left)
  if [ "$remaining" -lt 1 ]; then
    echo "gpu-check: left out, the budget of $budget s is used up: $*"
    return 1
  fi
  [ "$limit" -le "$remaining" ] || limit=$remaining
  [ "$limit" -le "${LRDS_GPU_LIMIT:-$limit}" ] || limit=$LRDS_GPU_LIMIT
  timeout --kill-after=10 "$limit" "$@"
  local code=$?
  [ "$code" != 124 ] && [ "$code" != 137 ] || echo "gpu-check: stopped at its limit of $limit s: $*"
  return "$code"
}

# Seconds that a program may plan with so that it ends by itself before within() ends it.
plan() {
  local limit=$1 remaining
  remaining=$(left)
  [ "$limit" -le "$remaining" ] || limit=$remaining
  echo $((limit > 40 ? limit - 30 : 10))
}

version() {
  local tool=$1
  shift
  if command -v "$tool" >/dev/null; then
    echo "$tool: $(within 20 "$tool" "$@" 2>&1 | grep -m 1 '[0-9]\.[0-9]')"
  else
    echo "$tool: absent"
  fi
}

step_facts() {
  local code=0
  {
    if command -v nvidia-smi >/dev/null; then
      within 20 nvidia-smi --query-gpu=name,driver_version,memory.total,clocks.sm,clocks.mem --format=csv
    else
      echo "nvidia-smi: absent"
    fi
    for tool in git nvcc ncu compute-sanitizer ninja g++; do version "$tool" --version; done
    within 60 "$python" - <<'PY'
import importlib.metadata
import os
import sys

print(f"Python {sys.version.split()[0]}, {os.cpu_count()} processors")
for name in (
    "torch triton setuptools pybind11 ninja numpy pyarrow pydantic safetensors tqdm pytest pytest-xdist pytest-timeout "
    "hypothesis scipy torchvision timm liger-kernel torchdistill"
).split():
    try:
        print(f"{name}: {importlib.metadata.version(name)}")
    except importlib.metadata.PackageNotFoundError:
        print(f"{name}: absent")
PY
  } >"$out/facts.txt" || code=1
  cat "$out/facts.txt"
  local program
  program=$(mktemp -d)
  if within 60 nvcc -std=c++17 "-arch=sm_${arch//[.a]/}" -Icsrc -o "$program/gpu_facts" tools/gpu_facts.cu &&
    within 20 "$program/gpu_facts" >"$out/gpu_facts.json"; then
    cat "$out/gpu_facts.json"
  else
    code=1
  fi
  rm -rf "$program"
  return "$code"
}

step_build() {
  if within 420 env LRDS_FAST_CUDA=1 "TORCH_CUDA_ARCH_LIST=$arch" "MAX_JOBS=${MAX_JOBS:-$(nproc)}" \
    "$python" setup.py build_ext --inplace >"$out/build.log" 2>&1; then
    grep '^lrds_fast: ' "$out/build.log" || true
  else
    tail -40 "$out/build.log"
    return 1
  fi
}

step_smoke() { within 240 "$python" tools/gpu_smoke.py --budget "$(plan 240)" --out "$out/smoke.jsonl"; }

# The tests of 2^31 elements take most of the memory: they run alone.
step_tests() {
  local more=() code=0 large="two_to_the_31 or than_32_bits_count"
  "$python" -c 'import xdist' 2>/dev/null && more+=(-n 4)
  "$python" -c 'import pytest_timeout' 2>/dev/null && more+=(--timeout 60)
  within 330 "$python" -m pytest -q -m gpu -p no:cacheprovider "${more[@]}" -k "not ($large)" \
    "--junitxml=$out/tests.xml" tests || code=1
  within 120 "$python" -m pytest -q -m gpu -p no:cacheprovider -k "$large" "--junitxml=$out/tests_large.xml" tests || code=1
  return "$code"
}

sanitize() {
  local tool=$1 filter=(--kernel-name kernel_substring=lrds)
  if ! command -v compute-sanitizer >/dev/null; then
    echo "gpu-check: left out, compute-sanitizer was not found: $tool"
    return 0
  fi
  # Releases name the filter of kernels differently. All of ours are in the namespace lrds.
  compute-sanitizer --help 2>&1 | grep -q -e '--kernel-name' || filter=(--kernel-regex kns=lrds)
  within 200 compute-sanitizer --tool "$tool" "${filter[@]}" --error-exitcode 1 --log-file "$out/$tool.log" \
    "$python" tests/gpu_small_cases.py --paths
  local code=$?
  [ ! -f "$out/$tool.log" ] || tail -3 "$out/$tool.log"
  return "$code"
}

step_memcheck() { sanitize memcheck; }
step_racecheck() { sanitize racecheck || echo "gpu-check: racecheck reported something; it is not counted, read $out/racecheck.log"; }

step_bench() {
  local code=0 suite limit more
  for suite in ${LRDS_BENCH:-kd_loss linear_kd_loss bandwidth train}; do
    more=()
    case $suite in
      kd_loss)
        limit=330
        # The largest differences first: what the budget cuts off is the end.
        more=(--contenders "${LRDS_CONTENDERS:-ours,eager,compile,liger,triton}")
        [ -z "${LRDS_SHAPES:-}" ] || more+=(--shapes "$LRDS_SHAPES")
        ;;
      linear_kd_loss)
        limit=120
        more=(--quick)
        ;;
      train)
        limit=240
        more=(--quick)
        ;;
      *) limit=90 ;;
    esac
    within "$limit" "$python" -m "benchmarks.bench_$suite" --device cuda --budget "$(plan "$limit")" "${more[@]}" \
      --csv "$out/${suite}_cuda.csv" || code=1
  done
  return "$code"
}

step_profile() {
  local code=0 name
  if ! command -v ncu >/dev/null; then
    echo "gpu-check: left out, ncu was not found: profile"
    return 0
  fi
  for name in "warp vector bfloat16" "bulk, cluster 1 bfloat16" "bulk, clusters bfloat16" "family dkd bfloat16"; do
    local file=${name//[ ,]/_}
    # Clocks stay as they are. The first kernel of a call that sweeps the rows.
    within 90 ncu --clock-control none --set full -k 'regex:kd_(loss_(warp|flat|block|bulk)|family_rows)' -c 1 -f \
      -o "$out/$file" "$python" tools/gpu_profile.py "$name" || code=1
  done
  return "$code"
}

within 60 "$python" - <<'PY' || exit 1
import sys

try:
    import torch
except ImportError:
    sys.exit("gpu-check: this Python has no torch; PYTHON=/path/to/python make gpu-check")
if not torch.cuda.is_available():
    sys.exit("gpu-check: torch finds no CUDA device here; this command is for a machine with a GPU")
print(f"torch {torch.__version__}, {torch.cuda.get_device_name(0)}, Python {sys.version.split()[0]}")
PY
# 9.0 is built as 9.0a: what only Hopper has is then allowed. The list of architectures must not be left to chance.
arch=$("$python" -c 'import torch; c = torch.cuda.get_device_capability(0); print(f"{c[0]}.{c[1]}" + ("a" if c == (9, 0) else ""))')

failed=0
imports=""
for name in "${steps[@]}"; do
  if [ "$(left)" -lt 1 ]; then
    echo "== $name: left out, the budget of $budget s is used up"
    continue
  fi
  begin=$SECONDS
  echo "== $name"
  if [ "$name" != facts ] && [ "$name" != build ] && [ "$imports" != yes ]; then
    if within 60 "$python" -c 'import lrds_fast.functional'; then
      imports=yes
    else
      failed=$((failed + 1))
      echo "== $name: FAILED, there is nothing to import: see the step 'build'"
      continue
    fi
  fi
  if "step_$name"; then
    echo "== $name: ok, $((SECONDS - begin)) s"
  else
    failed=$((failed + 1))
    echo "== $name: FAILED, $((SECONDS - begin)) s"
  fi
done
echo "gpu-check: $failed step(s) failed; results in $out"
exit "$failed"

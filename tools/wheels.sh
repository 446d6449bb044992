#!/usr/bin/env bash
# wheels.sh VENV: a source archive and the wheel built from it, for VENV's Python and torch, into dist/; then the wheel
# is unpacked beside that torch and computes one loss. LRDS_FAST_CUDA and TORCH_CUDA_ARCH_LIST as for every build.
set -euo pipefail
venv=$(cd "$1" && pwd)
python=$venv/bin/python
work=build/wheels
rm -rf "$work"
mkdir -p "$work" dist
echo "lrds-fast: building a source archive, and the wheel from it"
PATH="$venv/bin:$PATH" "$python" -m build --no-isolation --outdir "$work" >"$work/build.log" 2>&1 ||
  { tail -40 "$work/build.log" >&2; exit 1; }
# torch brings these libraries. A second copy of OpenMP would have threads of its own, which torch.set_num_threads does
# not reach.
PATH="$venv/bin:$PATH" "$python" -m auditwheel repair --wheel-dir "$work/repaired" \
  --exclude 'libtorch*.so' --exclude 'libc10*.so' --exclude libgomp.so.1 --exclude 'libcudart.so.*' "$work"/*.whl
"$python" -m pip install --quiet --no-deps --target "$work/installed" "$work"/repaired/*.whl
# Away from the sources, which would hide the wheel's files.
(cd "$work/installed" && PYTHONPATH=$PWD "$python" - <<'PY')
import torch

import lrds_fast
from lrds_fast import reference

student, teacher = torch.randn(2, 64, 10, generator=torch.Generator().manual_seed(0)).unbind()
target = torch.arange(64) % 10
loss = lrds_fast.kd_loss(student, teacher, target)
expected = reference.kd_loss(student.double(), teacher.double(), target)
torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=1e-6)
print(f"lrds-fast {lrds_fast.__version__} from {lrds_fast.__file__} with torch {torch.__version__}: kd_loss is right")
PY
mv "$work"/*.tar.gz "$work"/repaired/*.whl dist/
ls -l dist

#!/usr/bin/env bash
# wheels.sh VENV: a source archive into dist/, and the wheel built from it, for VENV's Python and torch, into
# dist/torch-X.Y-cpu or dist/torch-X.Y-cuda: pip installs from such a folder (--find-links), and it holds the wheels of
# several Pythons. Then an empty environment installs from the folder, and examples/drop_in.py runs in it.
# LRDS_FAST_CUDA and TORCH_CUDA_ARCH_LIST as for every build.
set -euo pipefail
venv=$(cd "$1" && pwd)
python=$venv/bin/python
work=$PWD/build/wheels
rm -rf "$work"
mkdir -p "$work"
echo "lrds-fast: building a source archive, and the wheel from it"
PATH="$venv/bin:$PATH" "$python" -m build --no-isolation --outdir "$work" >"$work/build.log" 2>&1 ||
  { tail -40 "$work/build.log" >&2; exit 1; }
# torch brings these libraries. A second copy of OpenMP would have threads of its own, which torch.set_num_threads does
# not reach.
PATH="$venv/bin:$PATH" "$python" -m auditwheel repair --wheel-dir "$work/repaired" \
  --exclude 'libtorch*.so' --exclude 'libc10*.so' --exclude libgomp.so.1 --exclude 'libcudart.so.*' "$work"/*.whl
# The version of the package, which pip finds: torch.__version__ may have a suffix that the index does not.
torch=$("$python" -c 'from importlib.metadata import version; print(version("torch"))')
kind=$(unzip -p "$work"/repaired/*.whl lrds_fast/_build.json | "$python" -c '
import json, sys
print("cuda" if json.load(sys.stdin)["cuda"] else "cpu")')
index=dist/torch-$(cut -d. -f1,2 <<<"$torch")-$kind
mkdir -p "$index"
mv "$work"/*.tar.gz dist/
mv "$work"/repaired/*.whl "$index"
echo "lrds-fast: installing from $index into an empty environment with torch $torch"
"$python" -m venv "$work/empty"
"$work/empty/bin/python" -m pip install --quiet --find-links "$index" "torch==$torch" 'lrds-fast[demo]'
# Away from the sources, which would hide the wheel's files.
cp examples/drop_in.py "$work"
(cd "$work" && empty/bin/python - <<'PY' && empty/bin/python drop_in.py)
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
rm -rf "$work/empty"
ls -l dist "$index"

#!/usr/bin/env bash
# install.sh PYTHON VENV EXTRA: makes the virtual environment and installs the package's requirements and those of EXTRA,
# an optional dependency group of pyproject.toml. TORCH=VERSION overrides the version of torch in constraints.txt.
set -euo pipefail
python=$1
venv=$2
extra=$3

need() { echo "lrds-fast: $1" >&2; exit 1; }
command -v "$python" >/dev/null || need "$python was not found; install Python >= 3.10 (apt-get install python3)"
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
  need "$("$python" --version) is too old; PYTHON=/path/to/python3.10-or-newer make ..."
"$python" -c 'import venv, ensurepip' 2>/dev/null ||
  need "Python's venv module is missing (apt-get install python3-venv)"
command -v g++ >/dev/null || need "g++ was not found (apt-get install g++)"
header=$("$python" -c 'import sysconfig; print(sysconfig.get_paths()["include"] + "/Python.h")')
[ -f "$header" ] || need "Python's headers are missing (apt-get install python3-dev)"

# A terminal sees pip's own progress bars; a log gets one line for each download, with its size.
install() {
  if [ -t 1 ]; then
    "$venv/bin/python" -m pip install "$@"
  else
    "$venv/bin/python" -m pip install --progress-bar off "$@" | awk '
      /^ *Downloading [^ ]*\.whl / || /^ *Downloading [^ ]*\.tar\.gz / { sub(/^ *Downloading (https?:[^ ]*\/)?/, ""); print "  downloading " $0 }
      /^Installing collected packages/ { print "  installing " NF - 3 " packages" }
      { fflush() }'
  fi
}

[ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
constraints=$(mktemp)
trap 'rm -f "$constraints"' EXIT
# The exact versions were tested on 3.11; older interpreters get the newest versions that the ranges allow.
if "$venv/bin/python" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
  cp constraints.txt "$constraints"
fi
if [ -n "${TORCH:-}" ]; then
  # Each torchvision requires one torch: pip finds the matching version.
  sed -i -E '/^torch(vision)?==/d' "$constraints"
  echo "torch==$TORCH" >>"$constraints"
fi
echo "lrds-fast: installing torch ${TORCH:+$TORCH }and the requirements of [$extra] into $venv"
if [ -z "${TORCH:-}" ] && ! "$venv/bin/python" -c 'import torch' 2>/dev/null; then
  echo "  (torch with its CUDA libraries is a download of about 3 GB. A CPU-only build is an eighth of that: TORCH=2.13.0 make ..."
  echo "   If the package index has only the CUDA build of that version, set TORCH=2.13.0+cpu and"
  echo "   PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu)"
fi
requirements=$("$venv/bin/python" tools/requirements.py "$extra")
case "${TORCH:-}" in
  2.11*)  # torchdistill needs torch 2.12; the tests of feature distillation are skipped without it
    requirements=$(grep -v '^torchdistill' <<<"$requirements")
    ;;
esac
mapfile -t packages <<<"$requirements"
install -c "$constraints" "${packages[@]}"

#!/usr/bin/env bash
# compat_oldest.sh VENV: the tests of lrds_fast.compat and their examples on the oldest versions that pyproject.toml
# allows for the extra compat, one library at a time, in a folder that hides the newest one of VENV.
set -euo pipefail
python=$1/bin/python
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
failed=()
while read -r requirement; do
  package=${requirement%%[[>]*} version=${requirement##*>=}
  module=${package#nvidia-} module=${module%-kernel}
  overlay=("$package==$version")
  options=(--no-deps)
  case $package in
    lightning) overlay+=("pytorch-lightning==$version") ;;
    transformers) options=() ;;  # its tokenizers and hub go by its version; it does not bring torch
  esac
  "$python" -m pip install --quiet "${options[@]}" --target "$work/$package" "${overlay[@]}"
  echo "lrds-fast: compat.$module on $package $version"
  PYTHONPATH=$work/$package "$python" -m pytest -q -rs -p no:cacheprovider -m "not slow and not nvcc" \
    "tests/test_compat_$module.py" tests/test_examples.py -k "compat_$module or with_$module" || failed+=("$package")
  rm -rf "${work:?}/$package"
done < <("$python" tools/requirements.py --only compat)
[ ${#failed[@]} -eq 0 ] || { echo "lrds-fast: failed: ${failed[*]}" >&2; exit 1; }

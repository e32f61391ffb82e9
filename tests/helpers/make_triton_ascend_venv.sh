#!/bin/bash
# Builds .venv-ascend: triton-ascend 3.2.0, which cannot live beside upstream triton (same import name) and lowers a
# kernel to Linalg with neither CANN nor torch installed.
#
#   tests/helpers/make_triton_ascend_venv.sh    prints the interpreter's path; does nothing when the venv is complete
#
# The lowered Linalg is executed by Debian's LLVM 19: apt-get install mlir-19-tools llvm-19 clang-19.
# Safe to run from several processes at once: the second waits for the first.
set -euo pipefail
root="$(cd "$(dirname "$0")/../.." && pwd)"
venv="$root/.venv-ascend"
python="${PYTHON:-$root/.venv/bin/python}"
stamp="$venv/.complete-triton-ascend-3.2.0-1"
exec 9>"$root/.venv-ascend.lock"
flock -w 1200 9
if [ ! -e "$stamp" ]; then
    rm -rf "$venv"
    "$python" -m venv "$venv"
    pip=("$venv/bin/python" -m pip install --quiet --disable-pip-version-check)
    "${pip[@]}" "numpy<2" pybind11 >&2
    "${pip[@]}" --no-deps triton-ascend==3.2.0 >&2
    touch "$stamp"
fi
echo "$venv/bin/python"

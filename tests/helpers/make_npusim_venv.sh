#!/bin/bash
# Builds .venv-npusim: the real torch_npu 2.13.0 over the packages of the interpreter that runs the tests (torch, SGLang),
# for the simulated NPU (tests/helpers/npusim). A venv of its own, because once torch_npu is installed a plain
# `import torch` tries to load CANN.
#
#   tests/helpers/make_npusim_venv.sh     prints the interpreter's path; does nothing when the venv is complete
#
# Safe to run from several processes at once: the second waits for the first.
set -euo pipefail
root="$(cd "$(dirname "$0")/../.." && pwd)"
venv="$root/.venv-npusim"
python="${PYTHON:-$root/.venv/bin/python}"
stamp="$venv/.complete-torch_npu-2.13.0-1"
exec 9>"$root/.venv-npusim.lock"
flock -w 600 9
if [ ! -e "$stamp" ]; then
    rm -rf "$venv"
    "$python" -m venv "$venv"
    # Without dependencies: torch is the tests' own.
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check --no-deps \
        torch_npu==2.13.0 protobuf attrs decorator >&2
    "$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))' \
        >"$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/tests-own.pth"
    touch "$stamp"
fi
echo "$venv/bin/python"

#!/bin/bash
# Builds .venv-npu: the real torch_npu 2.13.0 beside a CPU build of torch 2.13.0, for tests that run it over the
# stand-in for CANN's libraries (tests/helpers/cann_standin). A venv of its own, because once torch_npu is installed a
# plain `import torch` tries to load CANN.
#
#   tests/helpers/make_npu_venv.sh        prints the interpreter's path; does nothing when the venv is complete
#
# Safe to run from several processes at once: the second waits for the first.
set -euo pipefail
root="$(cd "$(dirname "$0")/../.." && pwd)"
venv="$root/.venv-npu"
python="${PYTHON:-$root/.venv/bin/python}"
stamp="$venv/.complete-torch_npu-2.13.0-1"
exec 9>"$root/.venv-npu.lock"
flock -w 1200 9
if [ ! -e "$stamp" ]; then
    rm -rf "$venv"
    "$python" -m venv "$venv"
    pip=("$venv/bin/python" -m pip install --quiet --disable-pip-version-check)
    "${pip[@]}" torch==2.13.0 ${TORCH_CPU_INDEX:+--index-url "$TORCH_CPU_INDEX"} >&2
    "${pip[@]}" torch_npu==2.13.0 numpy pyyaml decorator attrs psutil scipy msgspec pyzmq pytest pytest-timeout hypothesis >&2
    "${pip[@]}" --no-deps -e "$root" >&2
    touch "$stamp"
fi
echo "$venv/bin/python"

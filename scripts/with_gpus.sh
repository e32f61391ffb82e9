#!/usr/bin/env bash
# with_gpus.sh COUNT NAME COMMAND...: run the command where this machine has at least COUNT NVIDIA GPUs, else say that NAME
# is skipped and why. Skipping is a success.
set -euo pipefail

wanted="$1"
name="$2"
shift 2
found=0
if command -v nvidia-smi >/dev/null; then
    found="$(nvidia-smi --list-gpus 2>/dev/null | grep -c '^GPU ' || true)"
fi
if [ "$found" -lt "$wanted" ]; then
    echo "$name: skipped: needs $wanted NVIDIA GPU(s), found $found"
    exit 0
fi
exec "$@"

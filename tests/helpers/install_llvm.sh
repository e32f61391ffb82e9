#!/bin/bash
# Installs Debian's LLVM 19 (mlir-opt, mlir-translate, clang), which executes lowered Ascend kernels on the CPU.
# Does nothing when it is there; fails with the reason where it cannot be installed. Safe to run several times at once.
set -euo pipefail
have() { command -v "$1-19" > /dev/null || [ -x "/usr/lib/llvm-19/bin/$1" ]; }
all() { have mlir-opt && have mlir-translate && have clang; }
exec 9> "${TMPDIR:-/tmp}/elasticmoe-install-llvm.$(id -u).lock"
flock -w 900 9
all && exit 0
install="apt-get install --yes --no-install-recommends mlir-19-tools llvm-19 clang-19"
if ! command -v apt-get > /dev/null; then
    echo "LLVM 19 is not installed and there is no apt-get here" >&2
    exit 1
fi
if [ "$(id -u)" != 0 ]; then
    echo "LLVM 19 is not installed; run as root: $install" >&2
    exit 1
fi
export DEBIAN_FRONTEND=noninteractive
{ $install || { apt-get update && $install; }; } >&2
all

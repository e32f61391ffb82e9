#!/usr/bin/env bash
# Make sure that this machine has what a virtual environment and SGLang's compiled helpers need: Python 3.10 or newer with
# venv, and a C and C++ compiler (torch.compile and Triton call them at run time). As root on Debian or Ubuntu, what is
# missing is installed; otherwise the command that would do it is printed. Where no test may be skipped
# (ELASTICMOE_REQUIRE=all), also Prometheus, which one of them runs, and a browser, which the tests of the operator's page use.
set -euo pipefail

python="${PYTHON:-python3}"
missing=()

if ! command -v "$python" >/dev/null; then
    missing+=(python3 python3-venv python3-dev)
elif ! "$python" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] < (3, 14))'; then
    echo "bootstrap: $("$python" --version) is not supported; Python 3.10 to 3.13 is. Run: make PYTHON=python3.12 ..." >&2
    exit 1
elif ! "$python" -c 'import ensurepip, venv' 2>/dev/null; then
    missing+=(python3-venv python3-dev)
fi
command -v gcc >/dev/null || missing+=(gcc libc6-dev)
command -v g++ >/dev/null || missing+=(g++)
if [ "${ELASTICMOE_REQUIRE:-}" = all ] && ! command -v prometheus >/dev/null; then
    missing+=(prometheus)
fi
if [ "${ELASTICMOE_REQUIRE:-}" = all ] && ! { command -v chromium && command -v chromedriver; } >/dev/null; then
    missing+=(chromium chromium-driver)
fi

if [ "${#missing[@]}" -eq 0 ]; then
    exit 0
fi
if [ "$(id -u)" -ne 0 ] || ! command -v apt-get >/dev/null; then
    echo "bootstrap: this machine lacks ${missing[*]}. Run: sudo apt-get install -y ${missing[*]}" >&2
    exit 1
fi
echo "bootstrap: installing ${missing[*]}"
export DEBIAN_FRONTEND=noninteractive
apt-get update -qq
# RUNLEVEL: packages do not start their daemons.
RUNLEVEL=1 apt-get install -y -qq --no-install-recommends "${missing[@]}" >/dev/null

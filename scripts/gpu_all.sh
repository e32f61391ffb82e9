#!/usr/bin/env bash
# gpu_all.sh [FOLDER]: what needs one NVIDIA GPU, under MPS: the memory contract, the collectives, a served change, the
# benchmark.
#
# Starts MPS unless CUDA_MPS_PIPE_DIRECTORY names one (it changes no setting of the card), and ends what it started.
# FOLDER gets the logs and the benchmark's JSON. PYTHON names the interpreter; ONLY="tests" or ONLY="benchmark" leaves the
# other out; ARGS and BENCHMARK_ARGS are passed on.
set -uo pipefail

out="${1:-gpu-out}"
python="${PYTHON:-python3}"
only="${ONLY:-tests benchmark}"
mkdir -p "$out"
export OMP_NUM_THREADS=1 PYTHONUNBUFFERED=1
export PYTHONPATH="$PWD:$PWD/kernels:$PWD/patches${PYTHONPATH:+:$PYTHONPATH}"

if ! command -v nvidia-cuda-mps-control >/dev/null && [ -x /usr/local/nvidia/bin/nvidia-cuda-mps-control ]; then
    PATH="$PATH:/usr/local/nvidia/bin"
fi
if ! command -v nvidia-cuda-mps-control >/dev/null; then
    echo "gpu_all: no nvidia-cuda-mps-control on the PATH; several ranks on one GPU take turns without it" >&2
elif [ -z "${CUDA_MPS_PIPE_DIRECTORY:-}" ]; then
    # A folder of its own: a control file that some earlier daemon left behind would pass for a running one.
    mps="$(mktemp -d /tmp/mps.XXXXXX)"
    export CUDA_MPS_PIPE_DIRECTORY="$mps" CUDA_MPS_LOG_DIRECTORY="$mps"
    nvidia-cuda-mps-control -d
    trap 'echo quit | timeout 20 nvidia-cuda-mps-control >/dev/null 2>&1; rm -rf "$mps"' EXIT
fi

status=0
if [[ " $only " == *" tests "* ]]; then
    # shellcheck disable=SC2086
    "$python" -m pytest -v -p no:cacheprovider -m "gpu and not nvlink" ${ARGS:-} \
        tests/contract/test_vmm.py tests/gpu/test_cuda_vmm.py tests/gpu/test_cuda_collectives.py \
        tests/gpu/test_cuda_loads.py tests/gpu/test_cuda_biased_experts.py tests/gpu/test_cuda_served.py \
        tests/gpu/test_cuda_rounding.py \
        2>&1 | tee "$out/gpu-tests.log" || status=1
fi
if [[ " $only " == *" benchmark "* ]]; then
    # shellcheck disable=SC2086
    "$python" -m benchmarks.cuda_collectives --json "$out/cuda-h200.json" ${BENCHMARK_ARGS:-} 2>&1 |
        tee "$out/gpu-benchmark.log" || status=1
fi
exit "$status"

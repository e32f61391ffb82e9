"""Ascend kernels without an NPU: lowered by triton-ascend in its own venv, their Linalg executed on the CPU by LLVM."""

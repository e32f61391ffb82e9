"""The MoE layer in Triton, one op a file: route, quantize, gemm_swiglu, gemm_down, combine; `moe` puts them together.

Nothing here synchronises with the host and no grid depends on device data, so a call can be captured in a CUDA graph.
"""

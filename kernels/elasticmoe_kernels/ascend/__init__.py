"""The MoE layer for Ascend NPUs, in Triton-Ascend, with CANN's own grouped matmul as the alternative.

Rules of the hardware that every kernel here keeps: the grid is at most the number of cores, with a loop inside; rows of
one expert lie together; an index is clamped before it is loaded through; no store whose mask has holes (it would become
a read-modify-write and race with other cores); local buffers fit (`tiles.py`).

Kernel files import Triton only, so that they lower in triton-ascend's own environment. Nothing here was run on an NPU:
see docs/hardware.md for what was.
"""

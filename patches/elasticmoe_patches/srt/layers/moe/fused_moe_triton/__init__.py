"""Mirrors sglang/srt/layers/moe/fused_moe_triton."""

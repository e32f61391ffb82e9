"""Mirrors sglang/srt/eplb."""

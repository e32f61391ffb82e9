"""Mirrors sglang/srt/entrypoints."""

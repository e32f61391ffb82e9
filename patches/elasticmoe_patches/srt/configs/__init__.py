"""Mirrors sglang/srt/configs."""

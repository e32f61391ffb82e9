"""Mirrors sglang/srt/sampling."""

"""Mirrors sglang/srt/sampling/penaltylib."""

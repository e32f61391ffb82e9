"""Mirrors sglang/srt/arg_groups."""

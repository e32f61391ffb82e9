"""Mirrors sglang/srt/model_loader."""

"""Mirrors the SGLang package of the same name."""

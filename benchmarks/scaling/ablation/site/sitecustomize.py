"""Runs at the start of every Python process of an ablated server; see benchmarks/scaling/ablation."""

from benchmarks.scaling.ablation.wrapping import install

install()

"""ElasticMoE: change the expert-parallel size of a running SGLang server between two batches.

Nothing in this package imports sglang; `elasticmoe_patches` is where the two meet.
"""

__version__ = "0.1.0"
SUPPORTED_SGLANG = "0.5.23"
"""The version that is installed where none is asked for."""
SUPPORTED_SGLANGS = ("0.5.21", SUPPORTED_SGLANG)
"""Versions whose source was read for every hook, oldest first."""

"""ElasticMoE: change the expert-parallel size of a running SGLang server between two batches.

Nothing in this package imports sglang; `elasticmoe_patches` is where the two meet.
"""

__version__ = "0.1.0"
SUPPORTED_SGLANG = "0.5.21"

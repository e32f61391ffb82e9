"""The MoE layer on CPU: oneDNN and MKL matrix products over rows grouped by expert."""

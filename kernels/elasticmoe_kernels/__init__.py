"""Device code of ElasticMoE on raw tensors: the MoE layer on expert columns, for CPU, CUDA (Triton) and Ascend."""

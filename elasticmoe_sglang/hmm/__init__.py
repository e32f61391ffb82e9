"""HMM: the sidecar that owns device memory, and what its clients need."""

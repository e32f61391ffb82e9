"""The demo: a small MoE is served and changes its EP size while streams decode (`python -m benchmarks.demo`)."""

"""The demo (`python -m benchmarks.demo`) and the benchmarks."""

"""Programs that show and measure: `python -m benchmarks.demo`."""

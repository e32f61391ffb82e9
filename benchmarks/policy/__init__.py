"""Benchmarks of the policy: its decisions against fixed sizes and an oracle, and what measuring costs."""

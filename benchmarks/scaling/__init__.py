"""Throughput while a server changes its size: this project against the methods a user has today.

A run: `workload` (which requests, when) -> client (sends them and records the arrival of every token) against an entry
of `methods` (how the size is changed), driven by `runner`. The result is a `records.RunLog`. The `analyser` is a pure
function from a log to figures, as docs/benchmarks.md defines them; `report` and `plots` only show them.
"""

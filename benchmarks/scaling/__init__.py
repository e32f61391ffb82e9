"""Throughput while a server changes its size: this project against the ways a user has today.

The way of a run: `workload` (what is asked when) -> `client` (asks, and records every token's arrival) against a
`methods` entry (how the size is changed), driven by `runner`; what comes out is a `records.RunLog`. The `analyser` is
a pure function from a log to figures, as docs/benchmarks.md defines them; `report` and `plots` only show them.
"""

"""Metrics on SGLang's own /metrics, declared in `table` and fed by the coordinator's reports (`exporter`)."""

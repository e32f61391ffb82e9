"""The only code that imports sglang: both entry points, the hooks (as data) and their preflight check."""

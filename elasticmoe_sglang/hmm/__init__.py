"""[4] HMM: the sidecar that owns device memory.

From the coordinator it receives transactions (begin, commit, rollback), from ranks allocations, seals and requests for
handles; it hands out memory, never bytes. `client` and `space` are what other processes use, `server` is the sidecar.
"""

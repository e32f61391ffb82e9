"""[8] The policy: decides how many ranks the load needs, and asks the coordinator [2] for that size.

`estimator` receives what happened to requests (`patches` measures it in SGLang's main process) and makes snapshots;
`capacity` knows what a rank can do, `forecast` what load is to be expected; `decision` is a pure function of a
snapshot, the settings and its own last state; `controller` drives them in the coordinator's event loop.
"""

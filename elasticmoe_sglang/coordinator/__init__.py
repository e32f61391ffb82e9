"""[2] The coordinator: one engine for every change of the view, planned or not.

Receives targets from the api [1] and reports of deaths from the IMM [5], has the planner [3] turn them into plans, and
drives the HMM [4] and the workers [5, 6] through prepare, commit and finish. `engine` is the state machine, without
I/O; `steps` is what it hears and asks for; `driver` makes the calls of the protocols in `ports`; `workers` and `memory`
implement these. A failure before the commit is rolled back, each step exactly once. After a failure behind the commit
the new view stays and the operation ends as failed.
"""

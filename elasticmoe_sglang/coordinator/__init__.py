"""[2] The coordinator: one change at a time, as a transaction.

Receives a target from the api [1], has the planner [3] turn it into a plan, and drives the HMM [4] and the workers
[5, 6] through prepare, commit and finish, by way of the protocols in `ports`. A failure before the commit is rolled
back, each step exactly once. After a failure behind the commit the new membership stays and the operation ends as
failed.
"""

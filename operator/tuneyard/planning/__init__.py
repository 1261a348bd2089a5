"""The planner: it turns a job into a Plan.

`plan` plans both kinds of jobs, `finetuning` and `alignment` list their stages from the parts in
`drafts`, `defaults` holds the rules behind `auto`, `limits` names what this version cannot run, and
`fingerprint` identifies a stage. `memory`, `hardware` and `fit` calculate what a plan takes, and
change nothing in it. The planner is pure: no clock, environment, randomness or I/O. The same
manifest gives the same plan everywhere, so tests need neither a cluster nor mocks.
"""

"""Turn the observed state of a job into its status.

The package holds the observed state, the next status, the reasons of failures with their advice,
and the events of a transition. It is pure: the clock is an argument.
"""

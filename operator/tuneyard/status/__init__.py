"""From what was observed to a job's status.

What lives here: the observed state, the next status, the reasons of failures with their advice, and
the events of a transition. The law of this room is purity: the clock is an argument.
"""

"""Running a plan: in one process, under torchrun, in processes of this machine, or under Ray Train.

It holds the runner, which skips every stage whose record matches and runs the others; the worker
group and the channel for its events; and the reasons of failures. It may not hold a stage's own
work. Only `distributed` imports Ray.
"""

"""Random input for everything that reads what others wrote: manifests and progress posts.

`make fuzz RUNS=10000 SEED=1` runs both kinds; `corpus/` keeps the cases that failed.
"""

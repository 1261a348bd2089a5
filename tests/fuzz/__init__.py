"""Random input for everything that reads what others wrote: manifests, progress posts and data.

`make fuzz RUNS=10000 SEED=1` runs the first two kinds, and `make fuzz-readers` the third; `corpus/`
keeps the cases that failed.
"""

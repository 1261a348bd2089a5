"""One file per stage, readable top to bottom: no registry, no base class.

Each has `run(stage, inputs, workdir, worker) -> Outcome`: `inputs` maps a role to a local path,
`workdir` is the stage's own folder and may hold what a killed run left behind. `prepare`,
`evaluate` and `export` run on rank 0 alone; `train` runs on every rank.
"""

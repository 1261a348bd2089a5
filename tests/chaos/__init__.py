"""Random faults against running jobs, with invariants that hold after each run.

    make chaos LEVEL=apiserver RUNS=20 SEED=7

`machine` runs the driver and the worker of an attempt as real processes, `kubelet` acts as KubeRay
and the kubelet, `faults` draws and carries out the faults, `run` plays one job under them, and
`invariants` checks what it left behind. `node` does the same with real pods. `results` holds what
the runs of both levels found.
"""

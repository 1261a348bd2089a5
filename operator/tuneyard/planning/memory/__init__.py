"""The memory plan: what each stage of a job takes on each GPU and in each pod, before it is run.

`parameters` counts what is trained and what the weights take, `activations` what a micro-batch
takes, `training` the moments of a training step, `inference` sampling and measuring, `host` the
memory of the pod, and `stages` puts them together for a plan. All of it is arithmetic on
`api.ModelFacts`. The numbers follow what the native trainer does; docs/performance.md compares them
with torch's memory tracker. Nothing here changes a plan: what a job makes of it is runtime.
"""

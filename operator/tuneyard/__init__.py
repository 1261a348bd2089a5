"""Tuneyard: managed fine-tuning of language models, on Kubernetes and on one machine.

This package holds the contract (`api`), manifests (`manifests`), the planner (`planning`), the
rendering of Kubernetes objects (`rendering`), the status of jobs (`status`), the operator
(`controller`) and the command line (`cli`). It never imports torch, transformers or Ray. The data
plane is the sibling package `tuneyard_trainer`, which reads a Plan and imports only `api` and
`errors`.
"""

__version__ = "0.3.0"

"""Tuneyard: managed fine-tuning of language models, on Kubernetes and on one machine.

What lives here: the contract (`api`), the pure planner (`planning`), the thin operator
(`controller`) and the command line (`cli`). What may not enter: torch, transformers or Ray. The
data plane is the sibling package `tuneyard_trainer`, which reads a Plan and knows only `api`.
"""

__version__ = "0.2.0"

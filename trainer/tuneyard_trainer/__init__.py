"""The data plane: it reads a Plan and runs its stages with torch, transformers and PEFT.

Importing this package does not import torch: modules that need torch import it themselves. Every
stage also runs without Ray, under a plain launcher; only `running` imports Ray. The
trainer imports the operator's API (`tuneyard.api`) and nothing of its planner or controller.
"""

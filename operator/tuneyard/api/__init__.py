"""The contract: what users write, what the operator reports, what planner and trainer exchange.

What lives here: pydantic models whose field docs give units and what None means, the manifest
reader and the CRD generator. What may not enter: anything but pydantic, PyYAML and `errors`: no
clock, no environment, no network. Both the operator and the trainer import this package; it
imports neither.
"""

"""The API: manifests of jobs, their status, and the data that operator and trainer exchange.

This package holds pydantic models; the docstrings of their fields become the descriptions of the
CRDs and give units and the meaning of None. `model_config` reads one of them from a foreign format.
The package imports nothing but the standard library and pydantic, and has no clock, environment or
network. Operator and trainer both import it.
"""

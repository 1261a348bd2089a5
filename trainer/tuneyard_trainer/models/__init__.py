"""Base models and what is trained on top of them.

The package loads and saves models, probes what their architectures support, and holds adapters,
reward models and policies (a base with the adapter trained on it). It does not use data sets,
losses or generation.
"""

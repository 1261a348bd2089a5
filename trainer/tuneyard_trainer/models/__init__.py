"""Base models and what is trained on top of them.

It holds the loading and saving of models, probes of what their architectures support, adapters,
reward models and policies (a base with the adapter trained on it). It may not use data sets, losses
or generation.
"""

"""Base models and what is trained on top of them.

What lives here: loading and saving a model, probing what its architecture can do, adapters, reward
models, and the policy that a base and an adapter make together. What may not enter: data sets,
losses, generation.
"""

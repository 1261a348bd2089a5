"""The stage `evaluate`: what training gained and what it cost.

It holds the parts of an evaluation (held-out rows and preferences, sampled completions, rewards,
win rates, sycophancy), the gates, and the result that the stage writes. It may not change a model.
"""

"""The stages `evaluate` and `assess`: what training gained and what it cost.

What lives here: metrics on held-out rows, win rates, signs of reward hacking, and the gates. What
may not enter: anything that changes a model.
"""

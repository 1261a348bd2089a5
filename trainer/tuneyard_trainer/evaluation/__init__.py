"""Measuring what training gained and what it cost: the stages `evaluate` and `assess`.

What lives here: metrics on held-out rows, win rates, signs of reward hacking, and the gates. What
may not enter: anything that changes a model.
"""

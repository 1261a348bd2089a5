"""The stages `evaluate` and `assess`: what training gained and what it cost.

It holds metrics on held-out rows, win rates, signs of reward hacking, the gates, and the result
that both stages write. It may not change a model.
"""

"""Training on preferences: the stages `pairs`, `reward` and `dpo` (KTO too).

It holds preference rows, their data set, losses, metrics and reference log-probabilities.
It may not use the rewards of sampled completions, judges or evaluation.
"""

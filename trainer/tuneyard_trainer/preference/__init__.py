"""Learning from preferences: the stages `pairs`, `reward` and `dpo` (KTO too).

What lives here: preference rows, their data set, losses, metrics and reference log-probabilities.
What may not enter: rewards of generated completions, judges, evaluation.
"""

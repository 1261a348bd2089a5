"""The stages `feedback` and `critique`, and the judges that they and `assess` use.

What lives here: prompts for judges, parsing of their verdicts, and the judge itself: a local model
or an endpoint. What may not enter: training and evaluation.
"""

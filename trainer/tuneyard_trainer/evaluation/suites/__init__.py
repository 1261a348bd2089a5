"""Suites: what a model can do beside the task that it was tuned for, measured before and after.

`choices` asks by log-probability, `refusals` and `questions` by completions, and `harness` runs the
tasks of lm-evaluation-harness. Each measures one loaded model; the stage compares the models.
"""

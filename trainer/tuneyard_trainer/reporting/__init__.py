"""The stage `export` and what people read about a job: tables, plots, the report, the model card.

What lives here: the summary of a run, its report, plots and model card, and the files that a user
loads. What may not enter: measuring; every number comes from stage records.
"""

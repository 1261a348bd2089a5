"""Results as words, tables and curves: the stage `export`.

What lives here: the summary of a run, its report, plots and model card, and the files that a user
takes home. What may not enter: measuring; everything is read from stage records.
"""

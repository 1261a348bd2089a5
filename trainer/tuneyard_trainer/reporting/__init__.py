"""The stage `export` and what people read about a job: tables, plots, the report, the model card.

It holds the results and the summary of a run, its report, plots and model card, and the export of
the files that a user loads. It may not measure a model's quality: these metrics come from the stage
records. The export only compares the written files with the trained model.
"""

"""Data sets: from files to prepared token rows (the stage `prepare`) and to prompts.

Holds the reading of files as rows (`rows`), the formats of rows (`formats`), the reading of rows as
checked examples (`reading`, `stream`), chat templates, tokenization and held-out splits. Models and
training do not belong here. Reading rows needs neither torch nor a tokenizer.
"""

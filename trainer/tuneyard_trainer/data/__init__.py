"""From files to prepared token rows: the stage `prepare`.

What lives here: files to rows (`rows`), the formats of rows (`formats`), rows to checked examples
(`reading`, `stream`), chat templates, tokenization and held-out splits. What may not enter: models
and training. Reading rows needs neither torch nor a tokenizer.
"""

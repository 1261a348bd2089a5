"""Data sets: from files to prepared token rows (the stage `prepare`) and to prompts.

It holds the reading of files as rows (`rows`), the layouts of rows (`layouts`), the reading of rows
as checked examples (`example`, `reading`, `stream`), chat templates, tokenization, the policies for
invalid and overlong rows (`preprocessing`), held-out splits, the arrays on disk (`prepared`), and
the sharing of rows among workers (`sharing`).
It may not hold models or training. Reading rows needs neither torch nor a tokenizer.
"""

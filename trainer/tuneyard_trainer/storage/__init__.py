"""Sources, content digests, stage records, append-only journals and atomic writes.

The package imports neither torch nor a tokenizer, and does not interpret the files it stores.
"""

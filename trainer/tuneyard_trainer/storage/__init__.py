"""Sources, content digests, stage records, append-only journals and atomic writes.

It may not import torch or a tokenizer, and does not interpret the files that it stores.
"""

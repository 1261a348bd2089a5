"""Where bytes come from and where results are left.

What lives here: fetching a source by its URI, content digests, stage records, append-only journals
and atomic writes. What may not enter: torch, tokenizers, and any knowledge of what a file means.
"""

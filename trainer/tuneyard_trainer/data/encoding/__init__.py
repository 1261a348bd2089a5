"""Examples as token ids with the mask of their targets: chat templates, tokenization, gaps.

It may not read files, and holds no policy of a job.
"""

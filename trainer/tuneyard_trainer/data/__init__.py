"""Data sets: from files to prepared token rows (the stage `prepare`) and to prompts.

It holds the reading of files as checked examples (`reading`), the rules that clean them
(`cleaning`), their encoding as token ids (`encoding`), the batches of these steps in several
processes (`batches`, `parallel`), the policies for invalid and overlong rows (`preprocessing`),
held-out splits, the arrays on disk (`prepared`), and the sharing of rows among workers (`sharing`).
It may not hold models or training. Reading rows needs neither torch nor a tokenizer.
"""

"""Rules that remove or change rows between reading and tokenization, one module for each family.

A rule acts on the text of one example and knows no other row; `duplicates` compares rows. No module
here needs torch or a tokenizer, so that `tuneyard data check` runs the same rules without a model.
"""

"""The stages `feedback`, `critique` and `augment`, and the judges that they and `evaluate` use.

It holds the prompts for judges, the parsing of their verdicts, the judges (a local model or an
endpoint), and the session that keeps their replies in a journal.
It may not use training or evaluation.
"""

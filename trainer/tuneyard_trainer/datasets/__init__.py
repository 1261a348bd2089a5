"""Data sets as streams of checked examples.

What lives here: files to rows (`rows`), the formats of rows (`formats`), rows to examples
(`reading`, `example`), counting and the policy for invalid rows (`stream`). What may not enter:
tokenizers and torch; `prepare` turns examples into tokens.
"""

from tuneyard_trainer.datasets.example import Example, Message
from tuneyard_trainer.datasets.formats import detect
from tuneyard_trainer.datasets.rows import BrokenRow, Row, data_files, read_rows
from tuneyard_trainer.datasets.stream import Examples, RowFault, Summary, examples

__all__ = [
    "BrokenRow",
    "Example",
    "Examples",
    "Message",
    "Row",
    "RowFault",
    "Summary",
    "data_files",
    "detect",
    "examples",
    "read_rows",
]

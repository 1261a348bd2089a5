"""Rules for the number of words of a row."""

from __future__ import annotations

from tuneyard_trainer.data.cleaning.findings import Cleaned, Finding
from tuneyard_trainer.data.cleaning.text import conversation
from tuneyard_trainer.data.cleaning.words import words
from tuneyard_trainer.data.reading.example import Example


class Length:
    """Removes rows with fewer or more words than the limits. System turns do not count."""

    def __init__(self, fewest: int | None, most: int | None) -> None:
        """None: no limit."""
        self._fewest, self._most = fewest, most

    def __call__(self, example: Example) -> Cleaned:
        text = conversation(example)
        count = len(words(text))
        if self._fewest is not None and count < self._fewest:
            return _removed(example, "length.minWords", text, count)
        if self._most is not None and count > self._most:
            return _removed(example, "length.maxWords", text, count)
        return Cleaned(example)


def _removed(example: Example, rule: str, text: str, count: int) -> Cleaned:
    return Cleaned(example, (Finding(rule, "removed", text, note=f"{count} words"),))

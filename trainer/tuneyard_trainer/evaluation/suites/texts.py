"""The texts of items: what training rows must not have."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from tuneyard.api.stage_settings import SuiteSettings
from tuneyard_trainer.evaluation.suites import answers, choices, refusals
from tuneyard_trainer.evaluation.suites.rows import read_items

KINDS: dict[str, tuple[Callable[..., Any], Callable[[Any], str], str]] = {
    "choices": (choices.parse, choices.asked, choices.EXPECTED),
    "answers": (partial(answers.parse, needs_target=False), answers.asked, answers.EXPECTED),
    "refusals": (refusals.parse, refusals.asked, refusals.EXPECTED),
}
"""Of each kind with a file: what makes a row an item, the item's text, and the columns."""


def item_texts(suite: SuiteSettings, path: Path, field: str) -> Iterator[tuple[str, str]]:
    """Yield the place and the text of each item of a suite with a file. `field`: of the file in the
    manifest. Raises StageError as `read_items` does."""
    parse, text, expected = KINDS[suite.kind]
    for where, item in read_items(path, parse, suite.limit, field, expected).items():
        yield where, text(item)

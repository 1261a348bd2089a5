"""The process that renders the templates of a task file, over one row at a time.

Templates run in Jinja's sandbox, without access to attributes and modules of Python. What a field
of a row or a template gives is what lm-evaluation-harness makes of it.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping
from functools import cache
from typing import Any

from jinja2 import StrictUndefined
from jinja2.environment import Template
from jinja2.sandbox import ImmutableSandboxedEnvironment

from tuneyard_trainer.evaluation.bounded_child import serve

MAX_CHARACTERS = 200_000
"""The longest rendered text."""

Row = Mapping[str, Any]


def _regex_replace(text: str, pattern: str, replacement: str, count: int = 0) -> str:
    """Return a text with matches replaced: the filter that the harness adds to Jinja's."""
    return re.sub(pattern, replacement, text, count=count)


_SANDBOX = ImmutableSandboxedEnvironment(undefined=StrictUndefined, keep_trailing_newline=True)
_SANDBOX.filters["regex_replace"] = _regex_replace


@cache
def _template(source: str) -> Template:
    return _SANDBOX.from_string(source)


def _given(field: str, row: Row) -> Any:
    """Return a column of a row, or else the rendering of a template."""
    if field in row:
        return row[field]
    text = _template(field).render(**row)
    if len(text) > MAX_CHARACTERS:
        raise ValueError(f"a text of {len(text)} characters, and {MAX_CHARACTERS} are the most")
    return text


def _choices(field: Any, row: Row) -> Any:
    """Return the options: a list, the values of a mapping, a column, or the Python literal that a
    template renders."""
    if not isinstance(field, str):
        return list(field.values()) if isinstance(field, dict) else field
    return row[field] if field in row else ast.literal_eval(_given(field, row))


def _target(field: Any, row: Row, has_choices: bool) -> Any:
    """Return the target: an index, a column, or what a template renders, whose digits are the index
    of an option and whose brackets are a list."""
    if not isinstance(field, str) or field in row:
        return row[field] if isinstance(field, str) else field
    text = _given(field, row)
    if has_choices and text.isdigit():
        return int(text)
    if text.startswith("[") and text.endswith("]") and len(text) > 1:
        try:
            return ast.literal_eval(text)
        except (SyntaxError, ValueError):
            return text
    return text


def render(fields: Row, row: Row) -> dict[str, Any]:
    """Return the text, the target, the options and the description of a row, by a task file's
    fields."""
    choices, question = fields["doc_to_choice"], fields["doc_to_text"]
    text = _given(question, row)
    if choices is not None and question not in row and text.isdigit():
        raise ValueError(f"doc_to_text renders {text}, which the harness takes for an option")
    return {
        "text": text,
        "target": _target(fields["doc_to_target"], row, choices is not None),
        "choices": None if choices is None else _choices(choices, row),
        "description": _given(fields["description"], row) if fields["description"] else "",
    }


if __name__ == "__main__":
    serve(lambda request: render(**request))

"""Docstrings say on their first line what a thing does or is."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.house.test_prose import BRITISH

ROOT = Path(__file__).resolve().parents[2]
FILES = sorted([*ROOT.glob("operator/tuneyard/**/*.py"), *ROOT.glob("trainer/**/*.py")])
RIDDLES = ("What ", "Whatever ", "Whoever ", "Where ", "Wherever ")
"""Openings whose subject the reader has to guess."""


def docstrings(path: Path) -> Iterator[tuple[int, str]]:
    """Yield the line and the docstring of each module, class and function."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        if text := ast.get_docstring(node):
            yield node.body[0].lineno, text


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_a_docstring_names_its_subject_in_american_spelling(path: Path) -> None:
    wrong = [
        f"{line}: {text.splitlines()[0]}"
        for line, text in docstrings(path)
        if text.startswith(RIDDLES) or BRITISH.search(text)
    ]
    assert wrong == []

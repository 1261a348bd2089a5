"""The Markdown pages: one sentence a line, short lines and paragraphs, American spelling.

Code blocks are not checked, and inline code counts as one word. A sentence that is longer than a
line may continue on the next one.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("docs", "examples", "charts", "operator", "trainer", "tests", "benchmarks")
PAGES = sorted(
    path
    for path in (*ROOT.glob("*.md"), *(page for f in FOLDERS for page in ROOT.glob(f"{f}/**/*.md")))
    if "out" not in path.relative_to(ROOT).parts  # results of the examples hold a model card
)

MAX_LINE = 120
MAX_CELL_WORDS = 40
MAX_PARAGRAPH_SENTENCES = 5

NEXT_SENTENCE = re.compile(r"([\w.]*[a-z0-9%])([)\"']?[.?!][)\"']?) +[(\"']?[A-Z]")
"""The end of one sentence and the start of the next: group 1 is the last word of the first."""
ABBREVIATIONS = frozenset({"al", "e.g", "eq", "etc", "fig", "i.e", "no", "sec", "vs"})
MARKER = re.compile(r"^ *(?:#+ +)?(?:(?:[-*+]|\d+\.) +)?")
"""What stands before the text of a heading or a list item."""
CELL_BORDER = re.compile(r"(?<!\\)\|")

BRITISH = re.compile(
    r"\b(?:(?:categor|central|critic|custom|emphas|final|general|initial|maxim|minim|normal|optim|organ"
    r"|parallel|penal|random|recogn|serial|special|standard|summar|synchron|token|util|visual)"
    r"is(?:e|ed|es|er|ers|ing|ation)"
    r"|analys(?:e|ed|ing)|artefacts?|behaviours?|centred?|colours?|defence|favour(?:s|ed)?"
    r"|grey|judgements?|labell(?:ed|ing)|learnt|licences?|modell(?:ed|ing)|neighbours?|whilst)\b",
    re.IGNORECASE,
)


class Line(NamedTuple):
    """One line outside of code blocks."""

    number: int
    text: str

    @property
    def is_table(self) -> bool:
        return self.text.lstrip().startswith("|")

    @property
    def words(self) -> str:
        """The text as it is read: no markers, emphasis or link targets, code as one word."""
        text = re.sub(r"`[^`]+`", "Code", MARKER.sub("", self.text))
        return re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", text).replace("*", "")


def lines(page: Path) -> list[Line]:
    """The page's lines outside of fenced code blocks."""
    found, in_code = [], False
    for number, text in enumerate(page.read_text(encoding="utf-8").splitlines(), start=1):
        if text.lstrip().startswith("```"):
            in_code = not in_code
        elif not in_code:
            found.append(Line(number, text))
    return found


def second_sentence(words: str) -> bool:
    """Whether a sentence ends before the end of the line and another one begins."""
    ends = NEXT_SENTENCE.finditer(words)
    return any(end[1].lower() not in ABBREVIATIONS for end in ends)


def paragraphs(page: Path) -> Iterator[list[Line]]:
    """The paragraphs that are no headings, tables or list items."""
    paragraph: list[Line] = []
    for line in [*lines(page), Line(0, "")]:
        if line.text and not line.is_table and not re.match(r"#| |[-*+] |\d+\. ", line.text):
            paragraph.append(line)
        elif paragraph:
            yield paragraph
            paragraph = []


def named(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_no_line_is_longer_than_120_characters(page: Path) -> None:
    found = [line for line in lines(page) if not line.is_table and len(line.text) > MAX_LINE]
    assert not found


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_no_line_holds_two_sentences(page: Path) -> None:
    found = [line for line in lines(page) if not line.is_table and second_sentence(line.words)]
    assert not found


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_no_paragraph_holds_more_than_five_sentences(page: Path) -> None:
    """A list is easier to read."""
    found = [
        paragraph[0]
        for paragraph in paragraphs(page)
        if sum(line.text.endswith((".", "?", "!", ":")) for line in paragraph)
        > MAX_PARAGRAPH_SENTENCES
    ]
    assert not found


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_no_table_cell_holds_more_than_40_words(page: Path) -> None:
    cells = [
        (line.number, cell.strip())
        for line in lines(page)
        if line.is_table
        for cell in CELL_BORDER.split(line.text)
    ]
    assert not [cell for cell in cells if len(cell[1].split()) > MAX_CELL_WORDS]


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_the_spelling_is_american(page: Path) -> None:
    found = [(line.number, word) for line in lines(page) for word in BRITISH.findall(line.words)]
    assert not found


@pytest.mark.parametrize(
    "text",
    [
        "The job ends. Its pods are deleted.",
        "Set `a`. `b` follows.",
        "It costs 2.0 %. The rest is free.",
        "Is it up? Then go on.",
        '- It says "done." Then it ends.',
        "It waits (at most a week). Then it fails.",
    ],
)
def test_two_sentences_are_recognized(text: str) -> None:
    assert second_sentence(Line(1, text).words)


@pytest.mark.parametrize(
    "text",
    [
        "1. Sample one completion.",
        "## 2. Install the chart",
        "The paper is by Lee et al. (2023), see eq. 3.",
        "The rule is that of Schulman et al. 2017.",
        "Other engines, e.g. `vllm`, i.e. The One, differ.",
        "Debian's packages (containerd, runc, ...) are installed.",
        "Version 1.16 of TRL is used, not v1.12 or U.S. English.",
        "- **Graceful stop.**",
        "It writes `a. B` to [this page](docs/a.B. C).",
    ],
)
def test_one_sentence_is_not_taken_for_two(text: str) -> None:
    assert not second_sentence(Line(1, text).words)

"""Augmented rows: how they are made from a row, which replies of a model are used, and their marks.

An augmented row is a chat row, or a prompt and its completion for a model without a chat template.
Its field `augmented` says what made it and from which row:

    {"by": "paraphrase", "model": "...", "of": {"dataset": 0, "file": "a.jsonl", "row": 7,
     "example": 6}}
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from tuneyard_trainer.data.reading.conversations import template_turns
from tuneyard_trainer.data.reading.example import Example, Message, Origin, RowError
from tuneyard_trainer.data.texts import text_hash

By = Literal["paraphrase", "inversion", "template"]
MARK = "augmented"
"""The column with the mark of an augmented row."""
DOCUMENT = "document"
"""The column with the id of the document that answers a row."""
PROMPT = "{prompt}"
"""The place of the question in a template."""
MAX_GROWTH, GROWTH_CHARACTERS = 3, 80
"""A new question is too long if it has more than 3 times the characters of the old one and 80 more.
Requests for a paraphrase ask for the same content; an explanation or an answer takes more."""


# ---- rows -------------------------------------------------------------------------------------


def has_question(example: Example) -> bool:
    """Return whether a row has a question to rewrite: documents have none."""
    return any(turn.role == "user" for turn in example.messages)


def question(example: Example) -> str:
    """Return the text of the last user turn, which an answer follows."""
    return next(turn.content for turn in reversed(example.messages) if turn.role == "user")


def answer(example: Example) -> str:
    """Return the text of the last turn without its reasoning."""
    content: str = template_turns(example.messages[-1:], reasoning=False)[0]["content"]
    return content


def is_one_question(example: Example) -> bool:
    """Return whether a row is one question and one answer without calls of tools, so that the
    answer depends on nothing else. A system turn may precede them."""
    turns = [turn for turn in example.messages if turn.role != "system"]
    is_pair = [turn.role for turn in turns] == ["user", "assistant"]
    return is_pair and not turns[1].calls


def with_question(example: Example, text: str) -> Example:
    """Return a row whose last user turn has another text."""
    turns = list(example.messages)
    last = max(index for index, turn in enumerate(turns) if turn.role == "user")
    turns[last] = replace(turns[last], content=text)
    return replace(example, messages=tuple(turns), prompt=text if example.prompt else "")


def content_hash(example: Example) -> int:
    """Return a 64-bit hash of what a row says, apart from white space around its turns."""
    turns = [[turn.role, turn.text.strip(), turn.reasoning.strip()] for turn in example.messages]
    value = [turns, example.text.strip(), list(example.tools)]
    return text_hash(json.dumps(value, ensure_ascii=False, sort_keys=True))


def chosen(
    contents: Sequence[int], eligible: NDArray[np.bool_], share: float, key: str
) -> NDArray[np.bool_]:
    """Return (R,) True for the rows to rewrite: `share` of the eligible ones, at least one.

    `contents`: hashes of the rows, which decide with `key`, so that other rows change few choices.
    """
    indices = np.flatnonzero(eligible)
    found = np.zeros(len(contents), dtype=np.bool_)
    if share >= 1 or not len(indices):
        found[indices] = True
        return found
    ranks = np.array([text_hash(f"{key}/{contents[i]}") for i in indices.tolist()], dtype=np.uint64)
    wanted = max(1, round(share * len(indices)))
    found[indices[np.argsort(ranks, kind="stable")[:wanted]]] = True
    return found


# ---- replies ----------------------------------------------------------------------------------

_THOUGHTS = re.compile(r"<think>.*?(</think>|\Z)", re.DOTALL)
_MARKUP = r"[\s*_#>]*"
_NOUN = r"(?:question|message|paraphrase|prompt|request|instruction|query|version|rewording)"
_LABEL = re.compile(
    rf"{_MARKUP}(?:the\s+)?(?:(?:rewritten|rephrased|paraphrased|reworded|new|original)\s+)*"
    rf"(?:{_NOUN}|rewritten|rephrased|user){_MARKUP}:{_MARKUP}",
    re.IGNORECASE,
)
_PREAMBLE = re.compile(
    rf"{_MARKUP}(?:(?:sure|certainly|of course|okay|ok)\b[,.!]?\s*)?"
    rf"here(?:['\u2019]s|\s+is)\b[^:\n]{{0,80}}:\s*",
    re.IGNORECASE,
)
_QUOTES = (
    ('"', '"'),
    ("\u201c", "\u201d"),
    ("\u201e", "\u201c"),
    ("«", "»"),
    ("'", "'"),
    ("`", "`"),
    ("**", "**"),
)
_MARKS = ("?", "\uff1f", "\u061f")
"""Question marks: of most scripts, of East Asia, and of Arabic."""
_WORD = re.compile(r"\w+")
_NUMBER = re.compile(r"\d+(?:[.,:]\d+)*")


def bare_reply(text: str) -> str:
    """Return the question in a reply: without reasoning, a sentence that announces it, a label such
    as "Question:", and quotes around all of it."""
    text = _THOUGHTS.sub("", text).rpartition("</think>")[2].strip()
    while True:
        before = text
        for pattern in (_PREAMBLE, _LABEL):
            found = pattern.match(text)
            text = text[found.end() :].strip() if found else text
        for opening, closing in _QUOTES:
            inner = text[len(opening) : -len(closing)]
            is_quoted = len(text) > len(opening) and text.startswith(opening)
            if is_quoted and text.endswith(closing) and opening not in inner:
                text = inner.strip()
        if text == before:
            return text


def fault(new: str, example: Example, by: By) -> str:
    """Return the reason why a text is not used as the row's new question. "": it is used."""
    old = question(example)
    if not new:
        return "empty"
    if _words(new) == _words(old):
        return "unchanged"
    if len(new) > MAX_GROWTH * len(old) + GROWTH_CHARACTERS:
        return "tooLong"
    if "\n" in new and "\n" not in old.strip():
        return "severalLines"
    said = f" {_words(answer(example))} "
    if said.strip() and said in f" {_words(new)} " and said not in f" {_words(old)} ":
        return "containsAnswer"
    if old.rstrip().endswith(_MARKS) and not any(mark in new for mark in _MARKS):
        return "noQuestionMark"
    if by == "paraphrase" and not set(_NUMBER.findall(old)) <= set(_NUMBER.findall(new)):
        return "lostNumber"
    return ""


def _words(text: str) -> str:
    """Return the words of a text without case and punctuation."""
    return " ".join(_WORD.findall(text.casefold()))


# ---- rows on disk -----------------------------------------------------------------------------


def as_row(example: Example, origin: Origin, *, as_messages: bool) -> dict[str, Any]:
    """Return an augmented row as `augmented.jsonl` holds it. `as_messages`: as a list of turns; or
    else as a prompt and its completion."""
    row: dict[str, Any] = {}
    if as_messages:
        turns = template_turns(example.messages)
        row["messages"] = [
            _with_weight(*pair) for pair in zip(turns, example.messages, strict=True)
        ]
        if example.tools:
            row["tools"] = list(example.tools)
    else:
        row |= {"prompt": example.prompt, "completion": example.completion}
    if example.document:
        row[DOCUMENT] = example.document
    return row | {MARK: _as_json(origin)}


def _with_weight(turn: dict[str, Any], message: Message) -> dict[str, Any]:
    return turn if message.train is None else turn | {"train": message.train}


def _as_json(origin: Origin) -> dict[str, Any]:
    of = {name: getattr(origin, name) for name in ("dataset", "file", "row", "example")}
    model = {"model": origin.model} if origin.model else {}
    return {"by": origin.by, **model, "of": of}


def origin_of(row: Mapping[str, Any]) -> Origin:
    """Return the mark of an augmented row. Raises RowError if it has none."""
    try:
        mark = row[MARK]
        of = mark["of"]
        return Origin(
            str(mark["by"]),
            int(of["dataset"]),
            str(of["file"]),
            int(of["row"]),
            int(of["example"]),
            str(mark.get("model", "")),
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise RowError(f"the field {MARK} does not say from which row it was made") from error

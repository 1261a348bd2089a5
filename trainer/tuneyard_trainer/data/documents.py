"""Documents and the passages that they are cut into, for `retrieval`."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from tuneyard.api.sources import DocumentFields
from tuneyard.errors import StageError
from tuneyard_trainer.data.reading.rows import BrokenRow, Row, is_text, read_data
from tuneyard_trainer.data.reading.stream import FAULTS_SHOWN, RowFault

_UNSPACED = (
    "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff"  # Thai, Lao, Burmese, Khmer
    "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"  # kana, Han
)
_WORD = re.compile(rf"[{_UNSPACED}]|(?:(?![{_UNSPACED}])\w)+")


def words(text: str) -> list[str]:
    """Return the words that a search compares, without case and punctuation. In scripts without
    spaces each character is a word."""
    return _WORD.findall(text.casefold())


@dataclass(frozen=True)
class Documents:
    """The passages of a collection of documents, in the order of the documents."""

    passages: tuple[str, ...]
    owners: tuple[str, ...]
    """The id of each passage's document."""
    spans: dict[str, range]
    """The passages of each document, by its id."""

    @classmethod
    def read(cls, path: Path, fields: DocumentFields, passage_words: int, name: str) -> Documents:
        """Read text files, each of them a document, or rows with an id and a text.

        `passage_words`: the longest passage. `name`: the documents' field in the manifest, for
        messages. Raises StageError as `read_data` does, InvalidData for documents without an id or
        a text and for repeated ids, and EmptyData for a file without rows.
        """
        passages: list[str] = []
        owners: list[str] = []
        spans: dict[str, range] = {}
        first: dict[str, Row] = {}
        faults: list[RowFault] = []
        num_rows = 0
        for row in read_data(path):
            num_rows += 1
            try:
                key, text = _document(row, fields)
                if earlier := first.get(key):
                    where = f"{earlier.file} row {earlier.number}"
                    raise ValueError(f"the id {key!r:.60} is also that of {where}")
            except ValueError as error:
                faults.append(RowFault(row.file, row.number, str(error)))
                continue
            first[key] = Row(row.number, {}, row.file)
            found = [*cut(text, passage_words)]
            spans[key] = range(len(passages), len(passages) + len(found))
            passages += found
            owners += [key] * len(found)
        if faults:
            raise _invalid(faults, num_rows, name)
        if not num_rows:
            raise StageError(
                "EmptyData", f"{name} holds no rows.", advice="Put documents into the file."
            )
        return cls(tuple(passages), tuple(owners), spans)


def _document(row: Row, fields: DocumentFields) -> tuple[str, str]:
    """Return the id and the text of a document. Raises ValueError with what is wrong."""
    if isinstance(row.value, BrokenRow):
        raise ValueError(row.value.reason)
    is_file = is_text(row.file)
    key = row.file if is_file else row.value.get(fields.id)
    text = row.value.get("text" if is_file else fields.text)
    if not document_id(key):
        raise ValueError(f"{fields.id} must be a text or a whole number, and it is {key!r:.60}")
    if not isinstance(text, str) or not words(text):
        raise ValueError(f"{fields.text} must be a text with words, and it is {text!r:.60}")
    return document_id(key), text


def document_id(given: object) -> str:
    """Return an id as text. "": it is neither a text nor a whole number, or it is empty."""
    is_id = isinstance(given, str | int) and not isinstance(given, bool)
    return str(given).strip() if is_id else ""


def _invalid(faults: list[RowFault], num_rows: int, name: str) -> StageError:
    shown = "; ".join(map(str, faults[:FAULTS_SHOWN]))
    first = "" if len(faults) <= FAULTS_SHOWN else f"The first {FAULTS_SHOWN}: "
    return StageError(
        "InvalidData",
        f"{name}: {len(faults)} of {num_rows} documents are invalid. {first}{shown}.",
        advice=f"Repair these documents, or name their columns in {name}.fields.",
    )


def cut(text: str, passage_words: int) -> Iterator[str]:
    """Yield the parts of a text, each of at most `passage_words` words between white space.

    Their numbers of words differ by one at most, so that no part is a short remainder.
    """
    spans = [match.span() for match in re.finditer(r"\S+", text)]
    count = -(-len(spans) // passage_words)
    bounds = [index * len(spans) // count for index in range(count + 1)]
    for start, end in pairwise(bounds):
        yield text[spans[start][0] : spans[end - 1][1]]

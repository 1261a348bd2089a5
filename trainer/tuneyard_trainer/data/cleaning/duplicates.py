"""Duplicates: rows that repeat an earlier row of the same split, whichever data set it is from.

Rows are compared by their content alone. Of rows that repeat each other, the first one stays.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from tuneyard_trainer.data.cleaning.signatures import (
    BANDS,
    SIMILARITY,
    Bands,
    bands,
    similarity,
    word_rows,
)
from tuneyard_trainer.data.cleaning.text import said, written
from tuneyard_trainer.data.cleaning.words import WordHashes
from tuneyard_trainer.data.scratch import ScratchArray
from tuneyard_trainer.data.texts import text_hash

Kind = Literal["exact", "near"]


class Duplicate(NamedTuple):
    """A row that repeats an earlier one."""

    row: int
    """Its number among the rows that were added, from 0."""
    of: int
    """The number of the earlier row, which stays."""
    kind: Kind
    similarity: float
    """The Jaccard index of their word sequences; 1 of exact duplicates."""


class RowKeys(NamedTuple):
    """The keys that rows are compared by."""

    contents: NDArray[np.uint64]
    """(R,) a hash of all that each row says."""
    bands: Bands | None
    """None: near duplicates are not searched."""

    @classmethod
    def of(cls, texts: Sequence[Mapping[str, Any]], known: WordHashes | None) -> RowKeys:
        """Return the keys of rows as `validation.jsonl` holds them. `known`: None: near duplicates
        are not searched."""
        contents = np.fromiter(map(_content, texts), np.uint64, len(texts))
        if known is None:
            return cls(contents, None)
        rows = [written(text) for text in texts]
        systems = [system for system, _ in rows]
        return cls(contents, bands(word_rows((text for _, text in rows), known), systems))


class Duplicates:
    """Collects what rows are compared by, in scratch files: 8 bytes a row, and 112 more with near
    duplicates. `found` holds 30 bytes a row in memory."""

    def __init__(self, kind: Kind, similarity: float | None, folder: Path | None = None) -> None:
        """`similarity`: the least Jaccard index of near duplicates. None: SIMILARITY. `folder`: of
        the scratch files. None: the system's for temporary files."""
        self._near = kind == "near"
        self._least = SIMILARITY if similarity is None else similarity
        self._contents = ScratchArray(folder, np.uint64)
        self._bands = ScratchArray(folder, np.dtype((np.uint32, BANDS))) if self._near else None
        self._folder = folder
        self._known = WordHashes()

    def add(self, texts: Sequence[Mapping[str, Any]]) -> None:
        """Add rows as `validation.jsonl` holds them."""
        self.add_keys(RowKeys.of(texts, self._known if self._near else None))

    def add_keys(self, keys: RowKeys) -> None:
        """Add rows by their keys."""
        self._contents.extend(keys.contents)
        if self._bands is not None and keys.bands is not None:
            self._bands.extend(keys.bands)

    def found(self, text: Callable[[int], Mapping[str, Any]]) -> Iterator[Duplicate]:
        """Yield the rows that repeat an earlier one, in order. To be called once. `text`: returns a
        row by its number; it is called for candidates only."""
        numbers = np.arange(len(self._contents), dtype=np.uint32)
        earlier, meets = _first_equal(self._contents.close()), self._meetings()
        repeats = earlier < numbers
        if meets is not None:
            repeats |= meets.min(axis=1) < numbers
        stays = numbers.copy()
        for row in np.flatnonzero(repeats).tolist():
            duplicate = None
            if earlier[row] < row:
                duplicate = Duplicate(row, int(stays[earlier[row]]), "exact", 1.0)
            elif meets is not None:
                candidates = dict.fromkeys(stays[meets[row]].tolist())
                duplicate = self._nearest(row, [each for each in candidates if each < row], text)
            if duplicate is not None:
                stays[row] = duplicate.of
                yield duplicate

    def _meetings(self) -> Bands | None:
        """Return (R, BANDS) the number of the first row that shares each band. None: near
        duplicates are not searched."""
        if self._bands is None:
            return None
        found = ScratchArray(self._folder, np.uint32)
        for column in self._bands.close().T:
            found.extend(_first_equal(column))
        return found.close().reshape(BANDS, -1).T

    def _nearest(
        self, row: int, candidates: Sequence[int], text: Callable[[int], Mapping[str, Any]]
    ) -> Duplicate | None:
        """Return the row as a duplicate of the first candidate that is similar enough. None: of
        none of them."""
        mine = written(text(row))
        for candidate in candidates:
            systems, texts = zip(mine, written(text(candidate)), strict=True)
            index = similarity(word_rows(texts, self._known), systems)
            if index >= self._least:
                return Duplicate(row, candidate, "near", index)
        return None


def _content(text: Mapping[str, Any]) -> int:
    """Return a 64-bit hash of all that a row says. White space at the ends of turns is ignored, and
    so are the ids of calls."""
    parts = {name: _stripped(value) for name, value in text.items() if name != "expected"}
    if "messages" in text:
        parts["messages"] = [[turn["role"], said(turn).strip()] for turn in text["messages"]]
    return text_hash(json.dumps(parts, ensure_ascii=False, sort_keys=True))


def _stripped(value: Any) -> Any:
    return value.strip() if isinstance(value, str) else value


def _first_equal(keys: NDArray[Any]) -> NDArray[np.uint32]:
    """Return (R,) the number of the first row with the same key."""
    _, first, group = np.unique(keys, return_index=True, return_inverse=True)
    return np.asarray(first[group], np.uint32)

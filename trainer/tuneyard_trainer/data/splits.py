"""Held-out splits: the choice of rows, and the files of each split.

Equal rows go to one split, so that no held-out row is also trained on.
"""

from __future__ import annotations

import hashlib
import json
from array import array
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from tuneyard.errors import StageError
from tuneyard_trainer.data.prepared import Rows, RowWriter
from tuneyard_trainer.data.tokenization import Encoded

Hashes = NDArray[np.uint64]
"""(R,) one hash for each row. Equal token ids have equal hashes; the seed decides their order."""


class SplitWriter:
    """Writes the rows of a split. A row is one sequence, or several pieces if it was split."""

    def __init__(self, folder: Path, split: str, seed: int, *, texts: bool) -> None:
        """`texts`: write each row's text too, as a line of `SPLIT.jsonl`."""
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.split = folder, split
        self.texts = folder / f"{split}.jsonl" if texts else None
        self._key = str(seed).encode()
        self._writer = RowWriter(folder, split)
        self._lines = self.texts.open("w", encoding="utf-8") if self.texts else None
        self._hashes, self._num_pieces = array("Q"), array("l")

    def add(self, pieces: Sequence[Encoded], source: int, text: Mapping[str, Any]) -> None:
        """Write a row. `source`: the index of the row's data set."""
        content = hashlib.blake2b(digest_size=8, key=self._key)
        for piece in pieces:
            content.update(piece.ids.tobytes())
            self._writer.append(piece.ids, piece.mask, source)
        self._hashes.append(int.from_bytes(content.digest(), "little"))
        self._num_pieces.append(len(pieces))
        if self._lines:
            self._lines.write(json.dumps(text, ensure_ascii=False) + "\n")

    def __len__(self) -> int:
        return len(self._hashes)

    @property
    def hashes(self) -> Hashes:
        """(R,) the rows' hashes."""
        return np.array(self._hashes, dtype=np.uint64)

    @property
    def num_pieces(self) -> Sequence[int]:
        """The number of pieces of each row."""
        return self._num_pieces

    def __enter__(self) -> Self:
        self._writer.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._writer.__exit__(kind, error, trace)
        if self._lines:
            self._lines.close()
        if self.texts and not len(self):
            self.texts.unlink()


def held_out(hashes: Hashes, fraction: float) -> NDArray[np.bool_]:
    """Return (R,) True for the rows to hold out: `fraction` of them, at least one and never all.

    Equal rows are held out together or not at all, so repeated rows can make the count smaller.

    Raises StageError TooFewRows if all rows are equal.
    """
    _, group, sizes = np.unique(hashes, return_inverse=True, return_counts=True)
    if len(sizes) < 2:
        raise StageError(
            "TooFewRows",
            f"no row can be held out: all {len(hashes)} training rows are equal."
            if len(hashes) > 1
            else "no row can be held out: there is one training row (a text file is one row).",
            advice="Add training rows, name held-out data in spec.data.validation.data, or remove "
            "spec.data.validation.",
        )
    wanted = max(1, round(fraction * len(hashes)))
    # At least one group of equal rows stays in training.
    wanted = min(wanted, len(hashes) - int(np.min(sizes)))
    chosen = np.zeros(len(sizes), dtype=np.bool_)
    count = 0
    for index, size in enumerate(sizes):
        if count + size <= wanted:
            chosen[index] = True
            count += int(size)
        if count == wanted:
            break
    if not count:
        chosen[np.argmin(sizes)] = True
    return np.asarray(chosen[group])


def assign_splits(
    spool: SplitWriter, held: NDArray[np.bool_], folder: Path, seed: int
) -> SplitWriter:
    """Copy the rows of a closed writer into the splits train and validation in `folder`.

    `held`: (R,) True for the rows of validation. Returns the closed writer of validation.
    """
    rows = Rows.open(spool.folder, spool.split)
    if rows is None or spool.texts is None:
        raise TypeError("assign_splits needs a writer with rows and their texts")
    piece = 0
    with (
        spool.texts.open(encoding="utf-8") as lines,
        SplitWriter(folder, "train", seed, texts=False) as train,
        SplitWriter(folder, "validation", seed, texts=True) as validation,
    ):
        for line, count, hold in zip(lines, spool.num_pieces, held, strict=True):
            pieces = [Encoded(rows.ids(i), rows.mask(i)) for i in range(piece, piece + count)]
            text = json.loads(line) if hold else {}
            (validation if hold else train).add(pieces, int(rows.source[piece]), text)
            piece += count
    return validation


def num_contaminated(train: Hashes, validation: Hashes) -> int:
    """Return the number of held-out rows that are also in training."""
    return int(np.isin(validation, train).sum())

"""Held-out splits: the choice of rows, and the files of each split.

Equal rows and rows with one prompt go to one split, so that no held-out prompt is also trained on.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from tuneyard.errors import StageError
from tuneyard_trainer.data.encoding.tokenization import Encoded
from tuneyard_trainer.data.prepared import Rows, RowWriter
from tuneyard_trainer.data.scratch import ScratchArray
from tuneyard_trainer.data.texts import Texts, text_hash

Hashes = NDArray[np.uint64]
"""(R,) one hash for each row. Equal token ids have equal hashes; the seed decides their order."""
Codes = NDArray[np.int8]
"""(R,) the outcome of each row: TRAIN or HELD_OUT; or REPEATED or LEFT_OUT, which are in no
split."""
TRAIN, HELD_OUT, REPEATED, LEFT_OUT = 0, 1, 2, 3

BLOCK_ROWS = 512
"""Rows that are copied at a time."""
_ROW = np.dtype(
    [
        ("hash", np.uint64),
        ("prompt", np.uint64),
        ("number", np.int64),
        ("pieces", np.int32),
        ("file", np.int32),
        ("source", np.int16),
    ]
)
"""What a writer keeps of each row, 34 bytes."""


class Place(NamedTuple):
    """The location of a row."""

    source: int
    """The index of its data set."""
    file: str
    """The file's name relative to the data set's folder."""
    row: int
    """The row's number in its file, from 1."""

    def __str__(self) -> str:
        return f"{self.file} row {self.row}".strip()


class RowBlock:
    """Rows for `SplitWriter.extend`, made in any process. They pickle as a few arrays."""

    def __init__(self, seed: int, *, keeps_texts: bool) -> None:
        """`seed`: of the rows' hashes. `keeps_texts`: whether `lines` has the rows' texts."""
        self._key, self._keeps_texts = str(seed).encode(), keeps_texts
        self.ids, self.masks = bytearray(), bytearray()
        """Flat, int32 token ids and uint8 masks of all pieces."""
        self.lengths = array("q")
        """Tokens of each piece."""
        self.num_pieces, self.sources = array("i"), array("h")
        self.hashes, self.prompts = array("Q"), array("Q")
        self.files: dict[str, int] = {}
        self.file_numbers, self.numbers = array("i"), array("q")
        self.lines: list[bytes] = []

    def add(
        self, pieces: Sequence[Encoded], place: Place, line: bytes | None, prompt: str = ""
    ) -> None:
        """Add a row. `line`: its text, if the block keeps it. `prompt`: rows with the same one go
        to one split. "": the row has none."""
        content = hashlib.blake2b(digest_size=8, key=self._key)
        for piece in pieces:
            ids = piece.ids.tobytes()
            content.update(ids)
            self.ids += ids
            self.masks += piece.mask.tobytes()
            self.lengths.append(len(piece.ids))
        self.hashes.append(int.from_bytes(content.digest(), "little"))
        self.prompts.append(text_hash(prompt) if prompt else self.hashes[-1])
        self.num_pieces.append(len(pieces))
        self.sources.append(place.source)
        self.file_numbers.append(self.files.setdefault(place.file, len(self.files)))
        self.numbers.append(place.row)
        if self._keeps_texts and line is not None:
            self.lines.append(line)

    def __len__(self) -> int:
        return len(self.hashes)


class SplitWriter:
    """Writes the rows of a split. A row is one sequence, or several pieces if it was split.

    A scratch file has 34 bytes a row. They are read after the end of the context.
    """

    def __init__(self, folder: Path, split: str, seed: int, *, texts: Path | None) -> None:
        """`texts`: the file of the rows' texts, one JSON object a line. None: they are not kept."""
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.split = folder, split
        self.texts = None if texts is None else Texts(texts)
        """The rows' texts. None: they are not kept."""
        self._seed = seed
        self._writer = RowWriter(folder, split)
        self._written = ScratchArray(folder, _ROW)
        self._files: dict[str, int] = {}
        """The number of each file."""
        self._rows: NDArray[Any] | None = None
        """(R,) what is kept of each row. None: rows are still written."""

    def extend(self, block: RowBlock) -> None:
        """Write rows."""
        sources = np.repeat(np.asarray(block.sources), np.asarray(block.num_pieces))
        self._writer.extend(block.ids, block.masks, block.lengths, sources)
        known = [self._files.setdefault(name, len(self._files)) for name in block.files]
        rows = np.empty(len(block), _ROW)
        rows["hash"], rows["prompt"] = block.hashes, block.prompts
        rows["number"], rows["pieces"] = block.numbers, block.num_pieces
        rows["file"] = np.asarray(known, np.int32)[np.asarray(block.file_numbers)]
        rows["source"] = block.sources
        self._written.extend(rows)
        if self.texts is not None:
            self.texts.extend(block.lines)

    def __len__(self) -> int:
        return len(self._written)

    @property
    def hashes(self) -> Hashes:
        """(R,) the rows' hashes."""
        return self._column("hash")

    @property
    def prompts(self) -> Hashes:
        """(R,) hashes of the rows' prompts. A row without a prompt has its own hash."""
        return self._column("prompt")

    @property
    def sources(self) -> NDArray[np.int16]:
        """(R,) the index of each row's data set."""
        return self._column("source")

    @property
    def num_pieces(self) -> NDArray[np.int32]:
        """(R,) the number of pieces of each row."""
        return self._column("pieces")

    def _column(self, name: str) -> NDArray[Any]:
        if self._rows is None:
            raise ValueError(f"the rows of {self.split} are still written")
        return self._rows[name]

    @cached_property
    def _names(self) -> list[str]:
        """The files, of a closed writer."""
        return list(self._files)

    def block(self) -> RowBlock:
        """Return an empty block for `extend`."""
        return RowBlock(self._seed, keeps_texts=self.texts is not None)

    def place(self, row: int) -> Place:
        """Return the location of a row."""
        source, file, number = (self._column(name)[row] for name in ("source", "file", "number"))
        return Place(int(source), self._names[file], int(number))

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
        self._rows = self._written.close()
        if self.texts is not None:
            self.texts.__exit__(kind, error, trace)
            if not len(self):
                self.texts.path.unlink()


def grouped(hashes: Hashes, prompts: Hashes) -> Hashes:
    """Return (R,) the least hash of the rows that each row must share a split with: rows with the
    same hash or the same prompt, directly or through other rows."""
    groups = [np.unique(keys, return_inverse=True) for keys in (prompts, hashes)]
    labels = hashes
    while True:
        before = labels
        for unique, group in groups:
            least = np.full(len(unique), np.iinfo(np.uint64).max, dtype=np.uint64)
            np.minimum.at(least, group, labels)
            labels = least[group]
        if np.array_equal(labels, before):
            return labels


def held_out(groups: Hashes, fraction: float) -> NDArray[np.bool_]:
    """Return (R,) True for the rows to hold out: `fraction` of them, at least one and never all.

    `groups`: rows of one group are held out together or not at all, so repeated rows can make the
    count smaller. The least groups are held out.

    Raises StageError TooFewRows if there is one group only.
    """
    _, group, sizes = np.unique(groups, return_inverse=True, return_counts=True)
    if len(sizes) < 2:
        raise StageError(
            "TooFewRows",
            f"no row can be held out: all {len(groups)} training rows are equal, or have the same "
            "prompt."
            if len(groups) > 1
            else "no row can be held out: there is one training row (a text file is one row).",
            advice="Add training rows with other prompts, name held-out data in "
            "spec.data.validation.data, or remove spec.data.validation.",
        )
    wanted = max(1, round(fraction * len(groups)))
    # At least one group stays in training.
    wanted = min(wanted, len(groups) - int(np.min(sizes)))
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


Change = Callable[[Mapping[str, Any], list[Encoded], Place], list[Encoded]]
"""Returns the sequences to train on for a row with its text, its sequences and its location."""


def assign_splits(
    spool: SplitWriter,
    codes: Codes,
    writers: Mapping[int, SplitWriter],
    change: Change | None = None,
) -> None:
    """Copy the rows of a closed writer with texts to the open writers of their codes. Rows whose
    code has no writer are left out. `change`: applied to the rows to train on."""
    piece = 0
    for start in range(0, len(spool), BLOCK_ROWS):
        # Mapped anew for each block: pages that were read leave the process with it.
        rows = Rows.open(spool.folder, spool.split)
        if rows is None or spool.texts is None:
            raise TypeError("assign_splits needs a writer with rows and their texts")
        blocks = {code: writer.block() for code, writer in writers.items()}
        copied = slice(start, start + BLOCK_ROWS)
        counts = spool.num_pieces[copied].tolist()
        for row, (code, count) in enumerate(
            zip(codes[copied].tolist(), counts, strict=True), start
        ):
            writer = writers.get(code)
            if writer is not None:
                pieces = [Encoded(rows.ids(i), rows.mask(i)) for i in range(piece, piece + count)]
                place, line = spool.place(row), None
                if writer.texts is not None:
                    line = spool.texts.line(row)
                if change and code == TRAIN:
                    pieces = change(spool.texts[row], pieces, place)
                blocks[code].add(pieces, place, line)
            piece += count
        for code, block in blocks.items():
            writers[code].extend(block)


def num_contaminated(train: Hashes, validation: Hashes) -> int:
    """Return the number of held-out rows that are also in training."""
    return int(np.isin(validation, train).sum())

"""Preferences on disk: rows as in `data.prepared`, one per completion, and their groups.

A group holds the rows that one preference compares: a pair, a ranking or a single completion.
Besides the files of `data.prepared`, a split has `SPLIT.groups.npy` (int64, G+1: group g is the
rows groups[g]:groups[g+1], best first) and `SPLIT.labels.npy` (float32, G). A row is a prompt with
a completion up to its stop token, and its mask is the completion: a reward model reads the last
token, and a policy's log-probability is the sum over the mask.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tuneyard.errors import StageError
from tuneyard_trainer.data.prepared import Prepared, Rows, remove_split
from tuneyard_trainer.training.batches import Indices

GROUPS, LABELS = "groups", "labels"


@dataclass(frozen=True)
class Comparisons:
    """The groups of one split."""

    rows: Rows
    groups: NDArray[np.int64]
    """(G+1,) group g is rows groups[g]:groups[g+1], best first."""
    labels: NDArray[np.float32]
    """(G,) of a pair: the probability that its first row is the better one; of a single
    completion: 1 for good and 0 for bad; of a ranking: 1."""

    def __len__(self) -> int:
        return len(self.labels)

    @cached_property
    def sizes(self) -> NDArray[np.int64]:
        """(G,) rows of each group."""
        return np.diff(self.groups)

    @cached_property
    def source(self) -> NDArray[np.int16]:
        """(G,) index of the data set each group came from."""
        return np.asarray(self.rows.source[self.groups[:-1]])

    @cached_property
    def tokens(self) -> NDArray[np.int64]:
        """(G,) tokens of each group."""
        return np.add.reduceat(self.rows.lengths, self.groups[:-1])

    @cached_property
    def longest(self) -> NDArray[np.int64]:
        """(G,) tokens of each group's longest row."""
        return np.maximum.reduceat(self.rows.lengths, self.groups[:-1])

    def members(self, groups: Indices) -> Indices:
        """Return the rows of the groups, group by group (R,)."""
        return np.concatenate(
            [np.arange(self.groups[g], self.groups[g + 1]) for g in groups] or [np.empty(0, int)]
        )


@dataclass(frozen=True)
class Preferences:
    """The output of a pairs stage."""

    train: Comparisons
    validation: Comparisons | None
    """None: nothing is held out."""
    summary: dict[str, Any]
    """`data.json`."""

    @classmethod
    def open(cls, folder: Path) -> Preferences:
        """Open a folder. Raises StageError NotPrepared if no pairs stage has finished in it."""
        prepared = Prepared.open(folder)
        held_out = prepared.validation
        return cls(
            _comparisons(folder, "train", prepared.train),
            _comparisons(folder, "validation", held_out) if held_out else None,
            prepared.summary,
        )

    @property
    def weights(self) -> list[float]:
        """How often an epoch holds each group, by data set."""
        return list(self.summary["weights"])

    @property
    def max_length(self) -> int:
        """The limit of a row, in tokens."""
        return int(self.summary["maxLength"])

    @property
    def labeled(self) -> bool:
        """Whether the groups are single completions labeled good or bad."""
        return bool(self.summary["labeled"])


def _comparisons(folder: Path, split: str, rows: Rows) -> Comparisons:
    try:
        groups, labels = (
            np.asarray(np.load(folder / f"{split}.{name}.npy", mmap_mode="r"))
            for name in (GROUPS, LABELS)
        )
    except (OSError, ValueError) as error:
        raise StageError("NotPrepared", f"{folder} holds no preferences: {error}.") from error
    return Comparisons(rows, groups, labels)


def write_groups(folder: Path, split: str, sizes: Indices, labels: NDArray[np.float32]) -> None:
    """Write a split's groups, if there are any. `sizes`: (G,) rows of each group."""
    if not len(sizes):
        return
    np.save(folder / f"{split}.{GROUPS}.npy", np.concatenate(([0], np.cumsum(sizes))))
    np.save(folder / f"{split}.{LABELS}.npy", labels.astype(np.float32))


def remove_groups(folder: Path, split: str) -> None:
    """Remove a split's files, if there are any."""
    remove_split(folder, split)
    for name in (GROUPS, LABELS):
        (folder / f"{split}.{name}.npy").unlink(missing_ok=True)

"""The originals of augmented rows: an augmented row stays only if its original is trained on.

Memory holds 8 bytes for a row that was read, and 10 more for an augmented one.
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from tuneyard_trainer.data.cleaning.excerpts import excerpt
from tuneyard_trainer.data.prepared import Rows
from tuneyard_trainer.data.reading.conversations import turn_text
from tuneyard_trainer.data.reading.example import Origin
from tuneyard_trainer.data.splits import HELD_OUT, LEFT_OUT, TRAIN, Codes, Hashes, SplitWriter
from tuneyard_trainer.data.texts import WITHOUT_CONTEXT

LEFT_OUT_WITH, HELD_OUT_WITH, PROMPT_HELD_OUT = (
    "originalLeftOut",
    "originalHeldOut",
    "promptHeldOut",
)
"""The rules that leave an augmented row out: its original is in no split, its original is held out,
or a held-out row has the same prompt."""
SAMPLES = 2
"""The rows of each kind that the record shows."""


class LeftOut(NamedTuple):
    """The augmented rows that a rule leaves out."""

    rule: str
    rows: int
    tokens: int


@dataclass
class Originals:
    """Which of the rows that were read are originals, and of which augmented rows."""

    _places: list[array[int]] = field(default_factory=list)
    """For each data set: the row of the writer of each example. -1: it was not written."""
    _of: array[int] = field(default_factory=lambda: array("q"))
    """For each augmented row, in order: the row of its original. -1: it was not written."""
    _kinds: array[int] = field(default_factory=lambda: array("H"))
    """For each augmented row: what made it, an index of `_names`."""
    _names: list[tuple[str, str]] = field(default_factory=list)
    """What made augmented rows, each with its model."""

    def add(self, dataset: int, number: int, row: int) -> None:
        """Note that an example was written as a row. `number`: of the example in its data set."""
        while len(self._places) <= dataset:
            self._places.append(array("q"))
        places = self._places[dataset]
        places.extend([-1] * (number + 1 - len(places)))
        places[number] = row

    def add_augmented(self, origin: Origin) -> None:
        """Note that an augmented row was written. They are the last rows of their writer."""
        self._of.append(self._row(origin))
        name = (origin.by, origin.model)
        if name not in self._names:
            self._names.append(name)
        self._kinds.append(self._names.index(name))

    def _row(self, origin: Origin) -> int:
        places = self._places[origin.dataset] if origin.dataset < len(self._places) else ()
        return places[origin.example] if origin.example < len(places) else -1

    def leave_out(self, codes: Codes, read: SplitWriter, held_prompts: Hashes) -> Iterator[LeftOut]:
        """Set the codes of the augmented rows that do not stay. `read`: the closed writer of all
        training rows. `held_prompts`: of the rows that are held out apart from `codes`."""
        rows = Rows.open(read.folder, read.split)
        if rows is None or not self._of:
            return
        first = len(codes) - len(self._of)
        mine, of = codes[first:], np.asarray(self._of)
        outcomes = np.where(of < 0, LEFT_OUT, codes[of])
        prompts = np.concatenate((read.prompts[codes == HELD_OUT], held_prompts))
        by_rule = {
            HELD_OUT_WITH: outcomes == HELD_OUT,
            LEFT_OUT_WITH: (outcomes != HELD_OUT) & (outcomes != TRAIN),
            PROMPT_HELD_OUT: (outcomes == TRAIN) & np.isin(read.prompts[first:], prompts),
        }
        ends = np.cumsum(read.num_pieces)
        starts = rows.offsets[ends - np.asarray(read.num_pieces)]
        tokens = (rows.offsets[ends] - starts)[first:]
        for rule, found in by_rule.items():
            mine[found] = LEFT_OUT
            if found.any():
                yield LeftOut(rule, int(found.sum()), int(tokens[found].sum()))

    def details(self, codes: Codes, read: SplitWriter) -> list[dict[str, Any]]:
        """Return the augmented rows that are trained on as JSON: what made them, how many there
        are, and the first ones with their originals. []: the job does not augment its data."""
        first = len(codes) - len(self._of)
        trained = np.flatnonzero(codes[first:] == TRAIN)
        kinds: NDArray[np.uint16] = np.asarray(self._kinds, dtype=np.uint16)
        counts = Counter(kinds[trained].tolist())
        found = []
        for kind, (by, model) in enumerate(self._names):
            shown = trained[kinds[trained] == kind][:SAMPLES].tolist()
            found.append(
                {
                    "by": by,
                    **({"model": model} if model else {}),
                    "rows": counts[kind],
                    "samples": [self._sample(first + row, self._of[row], read) for row in shown],
                }
            )
        return found

    def _sample(self, row: int, original: int, read: SplitWriter) -> dict[str, str]:
        if read.texts is None:
            raise TypeError("the texts of the rows are needed")
        question, answer = _question_and_answer(read.texts[row])
        instead, _ = _question_and_answer(read.texts[original])
        return {
            "where": str(read.place(original)),
            "original": excerpt(instead),
            "question": excerpt(question),
            "answer": excerpt(answer),
        }


def _question_and_answer(text: Mapping[str, Any]) -> tuple[str, str]:
    """Return the last question of a row as it is on disk, and the last answer."""
    text = text.get(WITHOUT_CONTEXT, text)
    if "messages" not in text:
        return text["prompt"], text["completion"]
    asked = [turn for turn in text["messages"] if turn["role"] == "user"]
    return asked[-1]["content"], turn_text(text["messages"][-1])

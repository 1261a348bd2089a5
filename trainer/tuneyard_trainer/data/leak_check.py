"""The leak check of a prepare stage: what it records, reports and refuses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tuneyard.errors import StageError
from tuneyard_trainer.data.leaks import Leak, Leaks, find_leaks
from tuneyard_trainer.data.reading.stream import FAULTS_SHOWN
from tuneyard_trainer.data.splits import SplitWriter
from tuneyard_trainer.worker import Report


def check_leaks(
    validation: SplitWriter,
    read: SplitWriter,
    trained: NDArray[np.bool_],
    names: Mapping[str, str],
    *,
    fails: bool,
    report: Report,
) -> dict[str, Any]:
    """Return the leaks as JSON, and report them if there are any.

    `validation`, `read`: closed writers with texts. `trained`: (R,) True for the rows of `read`
    that are trained on. `names`: the field path of each data set by its role. Raises StageError
    DataLeak if there are leaks and the job `fails` on them.
    """
    if validation.texts is None or read.texts is None:
        raise TypeError("the texts of both splits are needed")
    found = find_leaks(validation.texts, read.texts, trained)
    origin = "validation" if "validation.0" in names else "train"
    shown = [_shown(leak, validation, read, origin, names) for leak in found.shown]
    if found.rows:
        message = _message(found, shown)
        if fails:
            raise StageError(
                "DataLeak",
                message,
                advice="Remove these rows from one of the two, or set spec.data.leaks: warn.",
            )
        report(message=message)
    return {
        "checked": found.checked,
        "rows": found.rows,
        "overlap": found.overlap,
        "near": found.near,
        "examples": shown,
    }


def _shown(
    leak: Leak, validation: SplitWriter, read: SplitWriter, origin: str, names: Mapping[str, str]
) -> dict[str, Any]:
    return {
        "heldOut": _where(validation, leak.held_out, origin, names),
        "training": _where(read, leak.training, "train", names),
        "kind": leak.kind,
        "span": leak.span,
        "spanWords": leak.span_words,
        "rowWords": leak.row_words,
    }


def _where(writer: SplitWriter, row: int, split: str, names: Mapping[str, str]) -> str:
    place = writer.place(row)
    return f"{names[f'{split}.{place.source}']} {place}"


def _message(found: Leaks, shown: Sequence[Mapping[str, Any]]) -> str:
    first = "; ".join(
        f"{leak['heldOut']} is in {leak['training']} with {leak['spanWords']} of its "
        f"{leak['rowWords']} words in sequence: {leak['span']}"
        for leak in shown[:FAULTS_SHOWN]
    )
    count = f"{found.rows} of {found.checked} held-out rows"
    return f"{count} have text that is also in the training data. {first}"

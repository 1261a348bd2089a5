"""The report of a job, for people: the curve, an HTML page and the model card."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any


def write(
    folder: Path,
    inputs: Mapping[str, Path],
    *,
    manifest: Mapping[str, Any],
    compared: Mapping[str, float],
    licence: str | None,
) -> None:
    """Writes `loss.png`, `report.html` and `README.md` into `folder`.

    `inputs`: the export stage's, of which `data`, `tuned` and, where there is one, `evaluation` are
    read. `manifest`: the job as the user wrote it. `compared`: the largest logit differences that
    the export measured. `licence`: the base model's, None where unknown.
    """
    del folder, inputs, manifest, compared, licence

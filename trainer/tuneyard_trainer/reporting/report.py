"""The report of a job: a plot of the curves, an HTML page and the model card."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tuneyard.api.report import REPORT
from tuneyard_trainer.data.encoding.masks import Run, runs
from tuneyard_trainer.data.encoding.tokenization import Encoded
from tuneyard_trainer.data.prepared import Rows
from tuneyard_trainer.models.base import load_tokenizer
from tuneyard_trainer.reporting import plots
from tuneyard_trainer.reporting.card import usage, write_card
from tuneyard_trainer.reporting.document import document
from tuneyard_trainer.reporting.formatting import ABSENT
from tuneyard_trainer.reporting.page import Pictures, render
from tuneyard_trainer.reporting.summary import RunSummary

ROWS_SHOWN = 3
"""Training rows in the report."""
ROW_TOKENS = 1024
"""Tokens of a training row in the report."""


def write(
    folder: Path,
    inputs: Mapping[str, Path],
    *,
    manifest: Mapping[str, Any],
    measured: Mapping[str, float],
    base_license: str | None,
) -> None:
    """Write `loss.png`, `report.json`, `report.html` and `README.md` into the export folder.

    `inputs`: the export stage's inputs; those of `data`, `leaks`, `tuned` and `evaluation` that
    exist are read. `manifest`: the job's manifest with its defaults. `measured`: what the checks of
    the written files measured, by metric. `base_license`: the base model's; None: unknown.

    The same inputs give the same bytes: all times come from the records.
    """
    summary = RunSummary.of(folder, inputs, manifest, measured, base_license)
    light = plots.draw(summary.curves, _title(summary))
    (folder / "loss.png").write_bytes(light)
    dark = plots.draw(summary.curves, _title(summary), "dark")
    found = document(summary, inputs, _rows(inputs.get("data")), _files(summary))
    (folder / REPORT).write_text(found.to_json(), encoding="utf-8")
    page = render(found, summary, Pictures(light, dark), usage(summary))
    (folder / "report.html").write_text(page, encoding="utf-8")
    (folder / "README.md").write_text(write_card(summary), encoding="utf-8")


def _title(summary: RunSummary) -> str:
    """Return the title of the plot: the job's name and the first row of its comparisons."""
    row = next(iter(summary.results.comparisons), None)
    if row is None:
        return summary.name
    before = "" if row.base == ABSENT else f"{row.base} → "
    metric = row.label.partition(" (")[0]
    return f"{summary.name}: {metric[0].lower()}{metric[1:]} {before}{row.tuned}"


def _rows(folder: Path | None) -> list[list[Run]]:
    """Return the first training rows, in parts that are targets and parts that are not; []: the job
    has no prepared data. `folder`: the output of a prepare or pairs stage."""
    prepared = Rows.open(folder, "train") if folder else None
    if folder is None or prepared is None:
        return []
    tokenizer = load_tokenizer(folder / "tokenizer")
    shown = range(min(ROWS_SHOWN, len(prepared)))
    starts = (Encoded(prepared.ids(i)[:ROW_TOKENS], prepared.mask(i)[:ROW_TOKENS]) for i in shown)
    return [runs(tokenizer, row) for row in starts]


def _files(summary: RunSummary) -> list[tuple[str, str]]:
    files = [("adapter/", "the adapter, with its tokenizer")] if summary.has_adapter else []
    if summary.has_model:
        merged = "the base model with the adapter merged into it"
        files.append(("model/", merged if summary.has_adapter else "the tuned model"))
    return [
        *files,
        ("README.md", "the model card"),
        ("job.yaml", "the manifest with all defaults filled in"),
        ("loss.png", "the training curves"),
        (REPORT, "this report as JSON"),
    ]

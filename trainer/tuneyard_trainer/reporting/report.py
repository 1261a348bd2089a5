"""The report of a job, for people: the curve, an HTML page and the model card."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2
import yaml

from tuneyard.api.plan import StageRecord
from tuneyard_trainer.reporting import plots
from tuneyard_trainer.reporting.card import usage, write_card
from tuneyard_trainer.reporting.formatting import ABSENT, count, duration, harmless
from tuneyard_trainer.reporting.results import seconds_of
from tuneyard_trainer.reporting.summary import RunSummary


def write(
    folder: Path,
    inputs: Mapping[str, Path],
    *,
    manifest: Mapping[str, Any],
    compared: Mapping[str, float],
    licence: str | None,
) -> None:
    """Writes `loss.png`, `report.html` and `README.md` into `folder`, beside what is exported.

    `inputs`: the export stage's, of which `data`, `tuned` and, where there is one, `evaluation` are
    read. `manifest`: the job as the user wrote it. `compared`: the largest logit differences that
    the export measured. `licence`: the base model's, None where unknown.

    The same inputs give the same bytes: every moment named comes from a record.
    """
    account = RunSummary.of(folder, inputs, manifest, compared, licence)
    light = plots.draw(account.curves, _title(account))
    (folder / "loss.png").write_bytes(light)
    dark = plots.draw(account.curves, _title(account), "dark")
    (folder / "report.html").write_text(_page(account, light, dark), encoding="utf-8")
    (folder / "README.md").write_text(write_card(account), encoding="utf-8")


def _title(account: RunSummary) -> str:
    """The curves': the job, and what the first figure of its evaluation came to."""
    line = next(iter(account.figures.comparisons), None)
    if line is None:
        return account.name
    before = "" if line.base == ABSENT else f"{line.base} → "
    what = line.label.partition(" (")[0]
    return f"{account.name}: {what[0].lower()}{what[1:]} {before}{line.tuned}"


def _page(account: RunSummary, light: bytes, dark: bytes) -> str:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("tuneyard_trainer.reporting"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(harmless=harmless, count=count, took=_took)
    return environment.get_template("report.html.jinja").render(
        account=account,
        curve_light=_data_uri(light),
        curve_dark=_data_uri(dark),
        manifest=yaml.safe_dump(account.manifest, sort_keys=False, allow_unicode=True),
        files=_files(account),
        usage=usage(account),
    )


def _files(account: RunSummary) -> list[tuple[str, str]]:
    files = [("adapter/", "the adapter, with its tokenizer")] if account.has_adapter else []
    if account.has_model:
        what = "the adapter merged into its base" if account.has_adapter else "the tuned model"
        files.append(("model/", f"{what}, as one plain model"))
    return [
        *files,
        ("README.md", "the model card"),
        ("job.yaml", "the manifest, defaults filled in"),
        ("loss.png", "the curves"),
    ]


def _data_uri(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode("ascii")


def _took(record: StageRecord) -> str:
    return duration(seconds_of(record))

"""`tuneyard data check` and `tuneyard data stats`: the faults and the statistics of rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
from rich.text import Text

from tuneyard.cli.errors import needs_extra
from tuneyard.cli.row_options import PATH, console, of_rows, rendered

FOUND = 1
"""The exit code if rows have faults."""


@click.command()
@of_rows
@click.option("--held-out", type=PATH, help="Also search the rows of this file in those of FILE.")
@rendered
@click.option(
    "--max-length",
    type=click.IntRange(min=8),
    metavar="TOKENS",
    help="With --model: longest row. Default: 1024, or the model's context if that is shorter.",
)
def check(
    file: Path,
    layout: Any,
    fields: Any,
    held_out: Path | None,
    model: str | None,
    train_on: Any,
    reasoning: str,
    max_length: int | None,
) -> int:
    """Search the rows of FILE for faults, and name the first of each kind.

    Faults are rows that cannot be read, exact and near duplicates, personal data and keys, text of
    a wrong character encoding, and, with --held-out, held-out rows that are also in FILE. Of
    preferences, the prompt and all answers are searched.

    With --model, rows are also tokenized. Faults are then rows that the chat template refuses, rows
    without a trained token, rows that are too long, and a stop token that no row trains.

    Nothing is changed. The exit code is 1 if there are faults.
    """
    if max_length is not None and model is None:
        raise click.UsageError("--max-length counts the tokens of a model: add --model")
    with needs_extra("trainer", "read rows"):
        from tuneyard_trainer.local.check import check_rows, is_rated
    proof = None
    if model is not None:
        with needs_extra("trainer", "tokenize rows"):
            from tuneyard_trainer.local.token_check import TokenCheck
        proof = TokenCheck.of(
            model,
            max_length=max_length or "auto",
            train_on=train_on,
            reasoning=reasoning == "keep",
            rated=is_rated(file, layout, fields),
        )
    out = console()
    report = check_rows(file, layout, fields, held_out, proof)
    out.print(Text(report.title))
    for fault in report.faults:
        out.print(Text(f"{fault.name}: {fault.rows:,} of {fault.of:,} rows", style="bold"))
        for example in fault.examples:
            out.print(Text(f"  {example}"))
    for note in report.notes:
        out.print(Text(note))
    if not report.faults:
        out.print(Text("No faults were found."))
    return FOUND if report.faults else 0


@click.command()
@of_rows
def stats(file: Path, layout: Any, fields: Any) -> None:
    """Show the numbers of rows, turns and words of FILE, and its languages."""
    with needs_extra("trainer", "read rows"):
        from tuneyard_trainer.local.check import row_statistics
    out = console()
    for label, value in row_statistics(file, layout, fields):
        out.print(Text(f"{label}: {value}"))

"""`tuneyard data check` and `tuneyard data stats`: the faults and the statistics of rows."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar, get_args

import click
from rich.console import Console
from rich.text import Text

from tuneyard.api.sources import DataFormat
from tuneyard.cli.errors import needs_extra

_PATH = click.Path(exists=True, path_type=Path)
_Command = TypeVar("_Command", bound=Callable[..., Any])
FOUND = 1
"""The exit code if rows have faults."""


def _of_rows(command: _Command) -> _Command:
    layout = click.option(
        "--format",
        "layout",
        type=click.Choice(get_args(DataFormat)),
        default="auto",
        show_default=True,
        help="Layout of a row.",
    )
    return click.argument("file", type=_PATH)(layout(command))


@click.command()
@_of_rows
@click.option("--held-out", type=_PATH, help="Also search the rows of this file in those of FILE.")
def check(file: Path, layout: Any, held_out: Path | None) -> int:
    """Search the rows of FILE for faults, and name the first of each kind.

    Faults are rows that cannot be read, exact and near duplicates, personal data and keys, text of
    a wrong character encoding, and, with --held-out, held-out rows that are also in FILE. Nothing
    is changed. The exit code is 1 if there are faults.
    """
    with needs_extra("trainer", "read rows"):
        from tuneyard_trainer.local.check import check_rows
    console = _console()
    report = check_rows(file, layout, held_out)
    console.print(Text(report.title))
    for fault in report.faults:
        console.print(Text(f"{fault.name}: {fault.rows:,} of {fault.of:,} rows", style="bold"))
        for example in fault.examples:
            console.print(Text(f"  {example}"))
    for note in report.notes:
        console.print(Text(note))
    if not report.faults:
        console.print(Text("No faults were found."))
    return FOUND if report.faults else 0


@click.command()
@_of_rows
def stats(file: Path, layout: Any) -> None:
    """Show the numbers of rows, turns and words of FILE, and its languages."""
    with needs_extra("trainer", "read rows"):
        from tuneyard_trainer.local.check import row_statistics
    console = _console()
    for label, value in row_statistics(file, layout):
        console.print(Text(f"{label}: {value}"))


def _console() -> Console:
    return Console(highlight=False, markup=False, emoji=False, soft_wrap=True)

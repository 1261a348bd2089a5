"""`tuneyard data`: commands for files of rows, without a manifest."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
from rich.text import Text

from tuneyard.cli.data_check import check, stats
from tuneyard.cli.errors import needs_extra
from tuneyard.cli.row_options import console, of_rows, rendered


@click.group()
def data() -> None:
    """Look at files of training rows, without a manifest."""


@data.command()
@of_rows
@click.option(
    "-n", "count", type=click.IntRange(min=1), default=3, show_default=True, help="Number of rows."
)
@rendered
def show(
    file: Path,
    layout: Any,
    fields: Any,
    count: int,
    model: str | None,
    train_on: Any,
    reasoning: str,
) -> None:
    """Show the first rows of FILE, with what is trained on marked.

    Targets are green, and between « and » where there are no colors. With --model, rows are
    rendered by the model's chat template and tokenized; without it, their turns are shown.
    """
    with needs_extra("trainer", "read rows"):
        from tuneyard_trainer.local.show import View, samples
    out = console()
    view = View(layout, fields, train_on, reasoning=reasoning == "keep")
    for sample in samples(file, count, model, view):
        out.print(Text(sample.title, style="bold"))
        out.print(_marked(sample.parts, colors=out.is_terminal and not out.no_color))


def _marked(parts: Any, *, colors: bool) -> Text:
    text = Text()
    for part in parts:
        if part.trained and not colors:
            text.append(f"«{part.text}»")
        else:
            text.append(part.text, style="green" if part.trained else "dim")
    return text


for command in (check, stats):
    data.add_command(command)

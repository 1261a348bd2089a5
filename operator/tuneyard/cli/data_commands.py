"""`tuneyard data`: commands for files of rows, without a manifest."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import click
from rich.console import Console
from rich.text import Text

from tuneyard.api.sources import DataFormat
from tuneyard.cli.data_check import check, stats
from tuneyard.cli.errors import needs_extra

_PATH = click.Path(exists=True, path_type=Path)


@click.group()
def data() -> None:
    """Look at files of training rows, without a manifest."""


@data.command()
@click.argument("file", type=_PATH)
@click.option(
    "-n", "count", type=click.IntRange(min=1), default=3, show_default=True, help="Number of rows."
)
@click.option(
    "--model",
    metavar="MODEL",
    help="Render the rows as this model reads them: a folder or a URI such as hf://ORG/NAME.",
)
@click.option(
    "--format",
    "layout",
    type=click.Choice(get_args(DataFormat)),
    default="auto",
    show_default=True,
    help="Layout of a row.",
)
@click.option(
    "--train-on",
    type=click.Choice(["assistant", "last-assistant", "all"]),
    default="assistant",
    show_default=True,
    help="Tokens of chat data with loss.",
)
def show(file: Path, count: int, model: str | None, layout: Any, train_on: Any) -> None:
    """Show the first rows of FILE, with what is trained on marked.

    Targets are green, and between « and » where there are no colors. With --model, rows are
    rendered by the model's chat template and tokenized; without it, their turns are shown.
    """
    with needs_extra("trainer", "read rows"):
        from tuneyard_trainer.local.show import samples
    console = Console(highlight=False, markup=False, emoji=False, soft_wrap=True)
    for sample in samples(file, count, model, layout, train_on):
        console.print(Text(sample.title, style="bold"))
        console.print(_marked(sample.parts, colors=console.is_terminal and not console.no_color))


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

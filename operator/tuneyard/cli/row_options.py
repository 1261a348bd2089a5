"""The argument and the options that the commands for files of rows share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar, get_args

import click
from pydantic import ValidationError
from rich.console import Console

from tuneyard.api.meta import yaml_fields
from tuneyard.api.sources import DataFormat, FieldMap

PATH = click.Path(exists=True, path_type=Path)
_Command = TypeVar("_Command", bound=Callable[..., Any])


def of_rows(command: _Command) -> _Command:
    """Give a command the argument `file` and the options `layout` and `fields`."""
    fields = click.option(
        "--fields",
        metavar="FIELD=COLUMN,...",
        callback=_fields,
        help="Columns of the fields, as in a manifest's fields: prompt=question,completion=answer.",
    )
    layout = click.option(
        "--format",
        "layout",
        type=click.Choice(get_args(DataFormat)),
        default="auto",
        show_default=True,
        help="Layout of a row.",
    )
    return click.argument("file", type=PATH)(layout(fields(command)))


def rendered(command: _Command) -> _Command:
    """Give a command the options `model`, `train_on` and `reasoning`: how a model reads rows."""
    model = click.option(
        "--model",
        metavar="MODEL",
        help="Read the rows as this model does: a folder or a URI such as hf://ORG/NAME.",
    )
    train_on = click.option(
        "--train-on",
        type=click.Choice(["assistant", "last-assistant", "all"]),
        default="assistant",
        show_default=True,
        help="Tokens of chat data with loss.",
    )
    reasoning = click.option(
        "--reasoning",
        type=click.Choice(["keep", "drop"]),
        default="keep",
        show_default=True,
        help="Treatment of the assistant's reasoning.",
    )
    return model(train_on(reasoning(command)))


def console() -> Console:
    """Return a console that prints rows as they are, without markup."""
    return Console(highlight=False, markup=False, emoji=False, soft_wrap=True)


def _fields(_context: click.Context, _option: click.Parameter, given: str | None) -> FieldMap:
    if given is None:
        return FieldMap()
    known = yaml_fields(FieldMap)
    found: dict[str, str] = {}
    for part in given.split(","):
        name, equals, column = part.partition("=")
        if not equals or name not in known or name in found:
            raise click.BadParameter(
                f"{part!r} is not FIELD=COLUMN with another field each; the fields are "
                f"{', '.join(known)}"
            )
        found[name] = column
    try:
        return FieldMap.model_validate(found)
    except ValidationError as error:
        name = ".".join(map(str, error.errors()[0]["loc"]))
        raise click.BadParameter(f"{name}: {error.errors()[0]['msg']}") from error

"""Errors of commands that talk to a cluster, and of missing packages."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import click


class RemoteError(click.ClickException):
    """A message for the user; the command ends with exit code 2."""


class UnreachableError(RemoteError):
    """The API server did not answer or is not available; a retry can help."""


class NotFoundError(RemoteError):
    """The job or the pod does not exist."""


@contextmanager
def needs_extra(extra: str, purpose: str) -> Iterator[None]:
    """Turn the import error of an optional package into a message that names Tuneyard's extra."""
    try:
        yield
    except ModuleNotFoundError as error:
        if error.name is None or error.name.startswith("tuneyard"):
            raise
        raise click.ClickException(
            f"{error.name} is not installed: install tuneyard[{extra}] to {purpose}"
        ) from error

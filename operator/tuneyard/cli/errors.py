"""What goes wrong between the command line and a cluster."""

from __future__ import annotations

import click


class RemoteError(click.ClickException):
    """A message for the user; the command ends with exit code 2."""


class UnreachableError(RemoteError):
    """The API server did not answer, or said that it cannot now: worth another try."""


class NotFoundError(RemoteError):
    """There is no such job, or no such pod any more."""

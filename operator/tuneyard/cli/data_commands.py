"""`tuneyard data`: commands for files of rows, without a manifest."""

from __future__ import annotations

import click

from tuneyard.cli.data_check import check, stats


@click.group()
def data() -> None:
    """Look at files of training rows, without a manifest."""


for command in (check, stats):
    data.add_command(command)

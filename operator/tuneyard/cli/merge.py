"""`tuneyard merge`: a model made from others, without a manifest."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import get_args

import click
from rich.console import Console
from rich.progress import Progress

from tuneyard.api.merging import THINNING, MergeMethod, MergePart, MergeRecipe
from tuneyard.cli.errors import needs_extra


@click.command()
@click.argument("models", metavar="MODEL...", nargs=-1, required=True)
@click.option("--base", required=True, metavar="MODEL", help="The model that all were tuned from.")
@click.option(
    "-o", "--output", "folder", required=True, type=click.Path(path_type=Path), help="A new folder."
)
@click.option(
    "--method",
    type=click.Choice(get_args(MergeMethod)),
    default="linear",
    show_default=True,
    help="The arithmetic of the merge.",
)
@click.option(
    "--weight",
    "weights",
    type=click.FloatRange(-10, 10),
    multiple=True,
    help="Weight of each model, in their order: one for each. Default: 1.",
)
@click.option(
    "--density",
    type=click.FloatRange(0, 1, min_open=True),
    default=None,
    help="Share of each model's changes that is kept, of ties and DARE. Default: 0.5.",
)
@click.option(
    "--scale",
    type=click.FloatRange(0, 10, min_open=True),
    default=1.0,
    show_default=True,
    help="Factor of the merged change, of the methods that merge changes.",
)
@click.option(
    "--seed", type=click.IntRange(0), default=0, show_default=True, help="Of what DARE draws."
)
@click.option(
    "--tokenizer",
    type=click.Choice(["base", "union"]),
    default="base",
    show_default=True,
    help="Tokens of the result: those of the base, or also those that models have added.",
)
def merge(
    models: Sequence[str],
    base: str,
    folder: Path,
    method: MergeMethod,
    weights: Sequence[float],
    density: float | None,
    scale: float,
    seed: int,
    tokenizer: str,
) -> None:
    """Merge MODELs, which were tuned from one base, into a new folder.

    A MODEL is a folder or a URI: a whole model, or an adapter of the base. Their files are read and
    written tensor by tensor, so that no model has to fit into memory.
    """
    if weights and len(weights) != len(models):
        raise click.UsageError(f"--weight is given {len(weights)} times for {len(models)} models")
    if density is not None and method not in THINNING:
        raise click.UsageError(f"--density is of {', '.join(THINNING)}, and --method is {method}")
    recipe = MergeRecipe.model_validate(
        {"method": method, "scale": scale, "seed": seed, "tokenizer": tokenizer}
        | ({} if density is None else {"density": density})
    )
    parts = [MergePart(weight=weight) for weight in weights or (1.0,) * len(models)]
    with needs_extra("trainer", "merge models"):
        from tuneyard_trainer.local.merge import merge as merge_models
    out = Console(stderr=True)
    with Progress(console=out, transient=True) as progress:
        task = progress.add_task("merging", total=None)
        try:
            merge_models(
                base,
                list(zip(models, parts, strict=True)),
                recipe,
                folder,
                report=lambda done, total: progress.update(task, completed=done, total=total),
            )
        except FileExistsError as error:
            raise click.UsageError(str(error)) from error
    click.echo(f"{folder}: {len(models)} models merged by {method}")

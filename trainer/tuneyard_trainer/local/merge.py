"""`tuneyard merge`: a model made from others, in a folder."""

from __future__ import annotations

import importlib.metadata
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from tuneyard.api.merging import MergePart, MergeRecipe
from tuneyard_trainer.local.models import model_folder
from tuneyard_trainer.local.run import cache_folder
from tuneyard_trainer.merging.opening import Named
from tuneyard_trainer.merging.write import write_merged
from tuneyard_trainer.storage.sources import decisive_digest

RECORD = "merge.yaml"
"""The file in the result that names what it was made from."""


def merge(
    base: str,
    models: Sequence[tuple[str, MergePart]],
    recipe: MergeRecipe,
    folder: Path,
    *,
    report: Callable[[int, int], None],
) -> None:
    """Merge models into a new folder. It appears once it is complete.

    `base`, `models`: folders or URIs. `report`: called before each tensor with its number from 1
    and the number of all. Raises StageError, FileExistsError.
    """
    if folder.exists():
        raise FileExistsError(f"{folder} exists: name a new folder")
    base_folder = model_folder(base, "--base")
    named = [
        Named(f"model {number} ({uri})", uri, model_folder(uri, "MODEL"), part)
        for number, (uri, part) in enumerate(models, start=1)
    ]
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        write_merged(base_folder, named, recipe, partial, report=report)
        record = _record(base, base_folder, named, recipe)
        (partial / RECORD).write_text(yaml.safe_dump(record, sort_keys=False))
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _record(
    base: str, base_folder: Path, models: Sequence[Named], recipe: MergeRecipe
) -> Mapping[str, Any]:
    return {
        "base": {"uri": base, "digest": _digest(base_folder)},
        "models": [
            {"uri": each.key, "digest": _digest(each.folder)}
            | each.part.model_dump(mode="json", by_alias=True, exclude_defaults=True)
            for each in models
        ],
        "recipe": recipe.model_dump(mode="json", by_alias=True),
        "versions": {
            name: importlib.metadata.version(name) for name in ("tuneyard", "torch", "safetensors")
        },
    }


def _digest(folder: Path) -> str:
    return decisive_digest(folder, "model", cache_folder())

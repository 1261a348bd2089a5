"""Write a merged model as a folder that transformers loads: weights, configs and tokenizer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from tuneyard.api.merging import MergeRecipe
from tuneyard.errors import StageError
from tuneyard_trainer.merging.merge import Merge
from tuneyard_trainer.merging.opening import Named, open_models
from tuneyard_trainer.models import base
from tuneyard_trainer.models.files import stored_dtype


def write_merged(
    base_folder: Path,
    models: Sequence[Named],
    recipe: MergeRecipe,
    folder: Path,
    *,
    report: Callable[[int, int], None],
) -> int:
    """Write the models' merge into a folder and return the number of its tensors.

    `report`: called before each tensor with its number from 1 and the number of all; what it raises
    ends the merge. The written files are read back and compared. Raises StageError NotMergeable,
    WeightsNotFinite, ExportMismatch, or an error of a model.
    """
    if recipe.method == "slerp" and len(models) != 2:
        raise StageError(
            "NotMergeable",
            f"slerp merges two models, and there are {len(models)}.",
            advice="Name two models, or merge more with method linear.",
        )
    opened = open_models(base_folder, models, with_union=recipe.tokenizer == "union")
    merge = Merge(recipe, opened.models, opened.base, opened.specs)
    done = 0

    def before_tensor(_: str) -> None:
        nonlocal done
        done += 1
        report(done, len(opened.specs))

    merge.write(folder, before_tensor)
    base.save_configs(opened.skeleton, folder)
    opened.tokenizer.save_pretrained(folder)
    base.load_base(folder, dtype=stored_dtype(base_folder), device=base.META)
    return done

"""export: write the files that a user loads, read them back and compare them bit for bit.

Writes `adapter/` (if an adapter was trained), `model/` (the merged or fully tuned model, or the
reward model, which is a sequence classifier), `README.md` (the model card), `job.yaml`, `loss.png`,
`report.html` and `report.json`. Models are in safetensors, with tokenizer, chat template and
generation config.

No whole model is ever in memory: tensors are read, merged or cast, written and compared one at a
time. Then transformers and PEFT load the written files without memory, which checks that no tensor
is missing and that every shape is right.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
import yaml
from torch import Tensor
from transformers import PreTrainedModel

from tuneyard.api.stage_settings import ExportSettings
from tuneyard_trainer.models import adapters, base, files, merging, reward_models
from tuneyard_trainer.models.base import read_back_mismatch
from tuneyard_trainer.models.weight_files import (
    require_finite,
    stored_tensors,
    tensors_in,
    write_checked,
)
from tuneyard_trainer.reporting import report
from tuneyard_trainer.reporting.summary import shareable
from tuneyard_trainer.storage.digests import files_under, sha256_of
from tuneyard_trainer.worker import StageContext, StageOutcome

ADAPTER, MODEL = "adapter", "model"


def run(context: StageContext) -> StageOutcome:
    """Write all files anew. Raises StageError ExportMismatch if a written tensor differs, and
    WeightsNotFinite for trained weights with NaN or infinite values."""
    settings = context.settings(ExportSettings)
    _clear(context.workdir)
    measured = _export(context, merge=settings.merge)
    report.write(
        context.workdir,
        context.inputs,
        manifest=context.worker.manifest,
        measured=measured,
        base_license=files.license_of(context.inputs["model"]),
    )
    (context.workdir / "job.yaml").write_text(
        yaml.safe_dump(shareable(context.worker.manifest), sort_keys=False)
    )
    written = tuple(name for name in (ADAPTER, MODEL) if (context.workdir / name).exists())
    size = sum(
        path.stat().st_size
        for name in written
        for path in (context.workdir / name).rglob("*")
        if path.is_file()
    )
    return StageOutcome(metrics={**measured, "bytes": float(size)}, contents=written)


def _export(context: StageContext, *, merge: bool) -> dict[str, float]:
    """Write the adapter and the model, and return what the checks measured."""
    inputs, workdir, report_progress = context.inputs, context.workdir, context.worker.report
    weights = inputs["tuned"] / "weights"
    if not adapters.is_adapter(weights):
        report_progress(message="writing the model and reading it back")
        return {"modelTensors": _export_whole(inputs, workdir / MODEL)}
    report_progress(message="writing the adapter and reading it back")
    measured = {"adapterTensors": _export_adapter(inputs, workdir / ADAPTER)}
    if merge:
        report_progress(message="merging the adapter, writing the model and reading it back")
        difference = merging.write_merged(inputs["model"], weights, workdir / MODEL)
        _add_tokenizer(inputs, workdir / MODEL)
        measured["modelTensors"] = float(len(stored_tensors(workdir / MODEL)))
        measured["mergedWeightDifference"] = difference
    return measured


def _clear(workdir: Path) -> None:
    for leftover in workdir.iterdir():
        if leftover.is_dir():
            shutil.rmtree(leftover)
        else:
            leftover.unlink()


def _export_adapter(inputs: Mapping[str, Path], target: Path) -> float:
    """Copy the adapter and return the number of its tensors. The copy must have the same bytes and
    fit the base, whose weights are not read."""
    source = inputs["tuned"] / "weights"
    shutil.copytree(source, target)
    for name, file in files_under(source):
        if not (target / name).is_file() or sha256_of(target / name) != sha256_of(file):
            raise read_back_mismatch(
                "ExportMismatch", f"adapter/{name} differs from the trained adapter's."
            )
    tensors = tensors_in(target / adapters.WEIGHTS)
    for tensor in tensors:
        require_finite(tensor.name, tensor.read())
    dtype = files.stored_dtype(inputs["model"])
    adapters.load(base.load_base(inputs["model"], dtype=dtype, device=base.META), target)
    _add_tokenizer(inputs, target)
    return float(len(tensors))


def _export_whole(inputs: Mapping[str, Path], target: Path) -> float:
    """Write a fully tuned model or a reward model in the base model's precision, and return the
    number of its tensors. Full tuning trains in float32."""
    source = inputs["tuned"] / "weights"
    load = reward_models.load if reward_models.is_reward_model(source) else base.load_base
    num_tensors = write_cast(source, target, files.stored_dtype(inputs["model"]), load)
    _add_tokenizer(inputs, target)
    return float(num_tensors)


def write_cast(
    source: Path, target: Path, dtype: torch.dtype, load: Callable[..., PreTrainedModel]
) -> int:
    """Write the model in `source` with its floating-point tensors in `dtype`, and its configs.
    Return the number of its tensors.

    `load`: the function that loads a model of this kind. Raises StageError ExportMismatch or
    WeightsNotFinite.
    """
    base.save_configs(load(source, dtype=dtype, device=base.META), target)
    tensors = stored_tensors(source)
    specs = {name: tensor.spec.cast(dtype) for name, tensor in tensors.items()}

    def tensor_of(name: str) -> Tensor:
        tensor = tensors[name].read(specs[name].dtype)
        require_finite(name, tensor)
        return tensor

    write_checked(target, specs, tensor_of)
    load(target, dtype=dtype, device=base.META)
    return len(tensors)


def _add_tokenizer(inputs: Mapping[str, Path], target: Path) -> None:
    """Write the tokenizer that the model was tuned with: the prepared data's, or without prepared
    data the base model's."""
    source = inputs["data"] / "tokenizer" if "data" in inputs else inputs["model"]
    base.load_tokenizer(source).save_pretrained(target)

"""export: write the files that a user loads, reload them and compare them with the trained model.

Writes `adapter/` (if an adapter was trained), `model/` (the merged or fully tuned model, or the
reward model, which is a sequence classifier), `README.md` (the model card), `job.yaml`, `loss.png`
and `report.html`. Models are in safetensors, with tokenizer, chat template and generation config.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
import yaml
from torch import Tensor, nn
from transformers import PreTrainedModel

from tuneyard.api.stage_settings import ExportSettings
from tuneyard_trainer.data.prepared import Prepared
from tuneyard_trainer.models import adapters, base, files, reward_models
from tuneyard_trainer.models.base import read_back_mismatch
from tuneyard_trainer.reporting import report
from tuneyard_trainer.reporting.summary import shareable
from tuneyard_trainer.worker import StageContext, StageOutcome

PROBE_TOKENS = 64
PROBE_TEXT = "The quick brown fox jumps over the lazy dog, 12 times a day."
MERGE_TOLERANCE = 1e-3
"""Largest allowed difference of a logit between a merged float32 model and base plus adapter: the
merge adds the update in another order."""
SAME_WEIGHTS_TOLERANCE = 1e-5
"""Largest allowed difference of a logit or score between float32 models with equal weights: the
order of a sum depends on the memory layout."""

ADAPTER, MODEL = "adapter", "model"


def run(context: StageContext) -> StageOutcome:
    """Write all files anew. Raises StageError ExportMismatch if a written model differs."""
    settings = context.settings(ExportSettings)
    _clear(context.workdir)
    compared = _export(context, merge=settings.merge)
    report.write(
        context.workdir,
        context.inputs,
        manifest=context.worker.manifest,
        compared=compared,
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
    return StageOutcome(metrics={**compared, "bytes": float(size)}, contents=written)


def _export(context: StageContext, *, merge: bool) -> dict[str, float]:
    """Write the adapter and the model, and return the largest difference of a logit for each."""
    inputs, workdir, report_progress = context.inputs, context.workdir, context.worker.report
    weights = inputs["tuned"] / "weights"
    probe_1L = _probe(inputs)
    if reward_models.is_reward_model(weights):
        report_progress(message="writing and reloading the reward model")
        return {"rewardDifference": _export_reward_model(inputs, workdir, probe_1L)}
    if not (weights / "adapter_config.json").exists():
        report_progress(message="writing and reloading the model")
        return {"modelLogitDifference": _export_full(inputs, workdir, probe_1L)}
    report_progress(message="writing and reloading the adapter")
    compared = {"adapterLogitDifference": _export_adapter(inputs, workdir, probe_1L)}
    if merge:
        report_progress(message="merging the adapter, writing and reloading the model")
        compared["mergedLogitDifference"] = _export_merged(inputs, workdir, probe_1L)
    return compared


def _clear(workdir: Path) -> None:
    for leftover in workdir.iterdir():
        if leftover.is_dir():
            shutil.rmtree(leftover)
        else:
            leftover.unlink()


def _export_adapter(inputs: Mapping[str, Path], workdir: Path, probe_1L: Tensor) -> float:
    """Copy the adapter. The loaded copy must give the logits of the trained model."""
    target = workdir / ADAPTER
    shutil.copytree(inputs["tuned"] / "weights", target)
    _add_tokenizer(inputs, target)
    trained_1LV = _logits(adapters.load(_base(inputs), inputs["tuned"] / "weights"), probe_1L)
    written_1LV = _logits(adapters.load(_base(inputs), target), probe_1L)
    return _compare("the adapter read back", trained_1LV, written_1LV, SAME_WEIGHTS_TOLERANCE)


def _export_merged(inputs: Mapping[str, Path], workdir: Path, probe_1L: Tensor) -> float:
    """Merge in float32 and compare with the model with its adapter, then write in the base model's
    precision: that copy must load with exactly equal weights."""
    tuned_1LV = _logits(adapters.load(_base(inputs), inputs["tuned"] / "weights"), probe_1L)
    merged = adapters.merge(_base(inputs), inputs["tuned"] / "weights")
    difference = _compare("the merged model", tuned_1LV, _logits(merged, probe_1L), MERGE_TOLERANCE)
    _write_model(merged, inputs, workdir, probe_1L)
    return difference


def _export_full(inputs: Mapping[str, Path], workdir: Path, probe_1L: Tensor) -> float:
    """Write a fully tuned model, which was trained in float32, in the base model's precision."""
    trained = base.load_base(
        inputs["tuned"] / "weights", dtype=torch.float32, device=torch.device("cpu")
    )
    return _write_model(trained, inputs, workdir, probe_1L)


def _write_model(
    model: PreTrainedModel, inputs: Mapping[str, Path], workdir: Path, probe_1L: Tensor
) -> float:
    """Cast the model to the base model's precision, write it, reload it and compare all weights.
    Return the largest difference of a logit."""
    target = workdir / MODEL
    nn.Module.to(model, files.stored_dtype(inputs["model"]))  # in place
    in_memory_1LV = _logits(model, probe_1L)
    base.save_model(model, target)
    _add_tokenizer(inputs, target)
    written = base.load_base(target, dtype=model.dtype, device=torch.device("cpu"))
    if name := base.differing_weight(model, written):
        raise read_back_mismatch(
            "ExportMismatch", f"the model read back differs from the one in memory in {name}."
        )
    return float((in_memory_1LV - _logits(written, probe_1L)).abs().max())


def _base(inputs: Mapping[str, Path]) -> PreTrainedModel:
    """Return the base model in float32 on the CPU, precise enough for the comparison."""
    return base.load_base(inputs["model"], dtype=torch.float32, device=torch.device("cpu"))


def _export_reward_model(inputs: Mapping[str, Path], workdir: Path, probe_1L: Tensor) -> float:
    """Copy the reward model. The loaded copy must give the scores of the trained one."""
    source, target = inputs["tuned"] / "weights", workdir / MODEL
    shutil.copytree(source, target)
    _add_tokenizer(inputs, target)
    scored = []
    for folder in (source, target):
        model = reward_models.load(folder, dtype=torch.float32, device=torch.device("cpu"))
        scored.append(_logits(model, probe_1L))
    return _compare("the reward model read back", scored[0], scored[1], SAME_WEIGHTS_TOLERANCE)


def _add_tokenizer(inputs: Mapping[str, Path], target: Path) -> None:
    base.load_tokenizer(_tokenizer(inputs)).save_pretrained(target)


def _tokenizer(inputs: Mapping[str, Path]) -> Path:
    """Return the folder of the tokenizer that the model was tuned with: the prepared data's, or
    without prepared data the base model's."""
    return inputs["data"] / "tokenizer" if "data" in inputs else inputs["model"]


def _probe(inputs: Mapping[str, Path]) -> Tensor:
    """Return (1, L) token ids for the comparison: the first training tokens, or without prepared
    data a sentence."""
    if "data" in inputs:
        tokens = Prepared.open(inputs["data"]).train.tokens[:PROBE_TOKENS]
        return torch.from_numpy(np.array(tokens, dtype=np.int64))[None]
    ids = base.load_tokenizer(inputs["model"])(PROBE_TEXT)["input_ids"]
    return torch.tensor([ids])


def _logits(model: nn.Module, ids_1L: Tensor) -> Tensor:
    model.eval()
    with torch.no_grad():
        return model(input_ids=ids_1L).logits.float()


def _compare(name: str, expected: Tensor, found: Tensor, tolerance: float) -> float:
    """Return the largest difference of a logit. Raises StageError ExportMismatch above the
    tolerance."""
    difference = float((expected - found).abs().max())
    if not difference <= tolerance:
        raise read_back_mismatch(
            "ExportMismatch",
            f"{name} differs from the model in memory: a logit differs by {difference:.3g}, and at "
            f"most {tolerance:g} is allowed.",
        )
    return difference

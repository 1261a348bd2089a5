"""export: what a user loads. Safetensors with tokenizer, chat template and generation config, a
model card, the manifest, the curves; reloaded and compared before the stage is done.

Leaves `adapter/` (where an adapter was trained), `model/` (a plain model: merged, fully tuned, or a
reward model, which is a sequence classifier), `README.md` (the card), `job.yaml`, `loss.png` and
`report.html`.
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
from tuneyard_trainer.worker import StageContext, StageOutcome

PROBE_TOKENS = 64
PROBE_TEXT = "The quick brown fox jumps over the lazy dog, 12 times a day."
TOLERANCE = 1e-3
"""Largest difference of a logit between a merged float32 model and base plus adapter: merging adds
the update in another order."""
SAME = 1e-5
"""Largest difference of a logit or score between float32 models of the same weights, which need not
be zero: sums depend on where weights lie in memory."""

ADAPTER, MODEL = "adapter", "model"


def run(context: StageContext) -> StageOutcome:
    """Writes everything anew; raises StageError ExportMismatch if what was written differs."""
    settings = context.settings(ExportSettings)
    _clear(context.workdir)
    probe_1L = _probe(context.inputs)
    compared: dict[str, float] = {}
    if reward_models.is_reward_model(context.inputs["tuned"] / "weights"):
        context.worker.report(message="writing the reward model and loading it again")
        compared["rewardDifference"] = _export_scorer(context.inputs, context.workdir, probe_1L)
    elif (context.inputs["tuned"] / "weights" / "adapter_config.json").exists():
        context.worker.report(message="writing the adapter and loading it again")
        compared["adapterLogitDifference"] = _export_adapter(
            context.inputs, context.workdir, probe_1L
        )
        if settings.merge:
            context.worker.report(message="merging the adapter and loading the model again")
            compared["mergedLogitDifference"] = _export_merged(
                context.inputs, context.workdir, probe_1L
            )
    else:
        context.worker.report(message="writing the model and loading it again")
        compared["modelLogitDifference"] = _export_full(context.inputs, context.workdir, probe_1L)
    licence = files.license_of(context.inputs["model"])
    report.write(
        context.workdir,
        context.inputs,
        manifest=context.worker.manifest,
        compared=compared,
        licence=licence,
    )
    (context.workdir / "job.yaml").write_text(
        yaml.safe_dump(dict(context.worker.manifest), sort_keys=False)
    )
    written = tuple(name for name in (ADAPTER, MODEL) if (context.workdir / name).exists())
    size = sum(
        path.stat().st_size
        for name in written
        for path in (context.workdir / name).rglob("*")
        if path.is_file()
    )
    return StageOutcome(metrics={**compared, "bytes": float(size)}, contents=written)


def _clear(workdir: Path) -> None:
    for leftover in workdir.iterdir():
        if leftover.is_dir():
            shutil.rmtree(leftover)
        else:
            leftover.unlink()


def _export_adapter(inputs: Mapping[str, Path], workdir: Path, probe_1L: Tensor) -> float:
    """Copies the adapter; the copy must load to the model that was trained."""
    target = workdir / ADAPTER
    shutil.copytree(inputs["tuned"] / "weights", target)
    _add_tokenizer(inputs, target)
    trained_1LV = _logits(adapters.load(_base(inputs), inputs["tuned"] / "weights"), probe_1L)
    written_1LV = _logits(adapters.load(_base(inputs), target), probe_1L)
    return _compared("the adapter read back", trained_1LV, written_1LV, SAME)


def _export_merged(inputs: Mapping[str, Path], workdir: Path, probe_1L: Tensor) -> float:
    """Merges in float32, where the model with its adapter must be matched; then writes in the
    base's own precision, where what was written must load back bit for bit."""
    tuned_1LV = _logits(adapters.load(_base(inputs), inputs["tuned"] / "weights"), probe_1L)
    merged = adapters.merge(_base(inputs), inputs["tuned"] / "weights")
    difference = _compared("the merged model", tuned_1LV, _logits(merged, probe_1L), TOLERANCE)
    _write_model(merged, inputs, workdir, probe_1L)
    return difference


def _export_full(inputs: Mapping[str, Path], workdir: Path, probe_1L: Tensor) -> float:
    """Full fine-tuning trains in float32 and is written in the base's own precision."""
    trained = base.load_base(
        inputs["tuned"] / "weights", dtype=torch.float32, device=torch.device("cpu")
    )
    return _write_model(trained, inputs, workdir, probe_1L)


def _write_model(
    model: PreTrainedModel, inputs: Mapping[str, Path], workdir: Path, probe_1L: Tensor
) -> float:
    """Casts to the base's own precision, writes, and loads it again."""
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
    """The base in float32 on the CPU, where arithmetic is exact enough to compare by."""
    return base.load_base(inputs["model"], dtype=torch.float32, device=torch.device("cpu"))


def _export_scorer(inputs: Mapping[str, Path], workdir: Path, probe_1L: Tensor) -> float:
    """Copies the reward model; the copy must score as the one that was trained."""
    source, target = inputs["tuned"] / "weights", workdir / MODEL
    shutil.copytree(source, target)
    _add_tokenizer(inputs, target)
    scored = []
    for folder in (source, target):
        model = reward_models.load(folder, dtype=torch.float32, device=torch.device("cpu"))
        scored.append(_logits(model, probe_1L))
    return _compared("the reward model read back", scored[0], scored[1], SAME)


def _add_tokenizer(inputs: Mapping[str, Path], target: Path) -> None:
    base.load_tokenizer(_tokenizer(inputs)).save_pretrained(target)


def _tokenizer(inputs: Mapping[str, Path]) -> Path:
    """Where the tokenizer lies that the model was tuned with: with its data, if there are any."""
    return inputs["data"] / "tokenizer" if "data" in inputs else inputs["model"]


def _probe(inputs: Mapping[str, Path]) -> Tensor:
    """(1, L) the first training tokens: real input for the comparison; without prepared data, a
    sentence."""
    if "data" in inputs:
        tokens = Prepared.open(inputs["data"]).train.tokens[:PROBE_TOKENS]
        return torch.from_numpy(np.array(tokens, dtype=np.int64))[None]
    ids = base.load_tokenizer(inputs["model"])(PROBE_TEXT)["input_ids"]
    return torch.tensor([ids])


def _logits(model: nn.Module, ids_1L: Tensor) -> Tensor:
    model.eval()
    with torch.no_grad():
        return model(input_ids=ids_1L).logits.float()


def _compared(what: str, expected: Tensor, found: Tensor, tolerance: float) -> float:
    """The largest difference of a logit; raises StageError ExportMismatch above the tolerance."""
    difference = float((expected - found).abs().max())
    if not difference <= tolerance:
        raise read_back_mismatch(
            "ExportMismatch",
            f"{what} differs from the model in memory: a logit by {difference:.3g}, where "
            f"{tolerance:g} is allowed.",
        )
    return difference

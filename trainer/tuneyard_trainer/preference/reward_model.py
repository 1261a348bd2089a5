"""The model of a reward stage: loaded before training, written and evaluated after it.

Shapes: R rows.
"""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from tuneyard.api.stage_settings import RewardSettings
from tuneyard_trainer.models import adapters, reward_models
from tuneyard_trainer.models.base import (
    differing_weight,
    precision_of,
    read_back_mismatch,
    save_model,
)
from tuneyard_trainer.models.files import stored_dtype
from tuneyard_trainer.models.policies import WEIGHTS
from tuneyard_trainer.preference.dataset import Comparisons, Preferences
from tuneyard_trainer.preference.metrics import accuracy, correlation, pair_metrics, pairs_of
from tuneyard_trainer.preference.micro_batches import evaluate_rows, scores
from tuneyard_trainer.training.losses import Forward, default_max_tokens
from tuneyard_trainer.worker import StageContext, Worker

START = "start"
PROBED = 64
"""Training rows whose scores are compared after writing."""
TOLERANCE = 1e-3
"""Largest difference of a score between the adapter and the merged layers, as a fraction of the
scores' standard deviation: merging adds the update in another order. The written model must reload
bit for bit."""


def start(context: StageContext) -> Path:
    """Return the folder of the causal model to start from. An adapter of an earlier stage is merged
    in the work folder, once for each worker, since workers may share it: `remove_start` removes
    that."""
    context.worker.report(message="loading the model")
    return reward_models.base_weights(context.inputs, _merged(context))


def remove_start(context: StageContext) -> None:
    """Remove what `start` wrote, if anything."""
    shutil.rmtree(_merged(context), ignore_errors=True)


def _merged(context: StageContext) -> Path:
    return context.workdir / START / str(context.worker.rank)


def load(
    context: StageContext,
    settings: RewardSettings,
    folder: Path,
    data: Preferences,
    tokenizer: PreTrainedTokenizerBase,
) -> tuple[nn.Module, Forward]:
    """Return a new reward model over the causal model in `folder`, and its forward passes."""
    worker, runtime = context.worker, context.stage.runtime
    precision = precision_of(settings.training, worker)
    model = reward_models.create(
        folder,
        settings.adapter,
        settings.training,
        device=worker.device,
        precision=precision,
        tokenizer=tokenizer,
    )
    if runtime.gradient_checkpointing:
        adapters.enable_gradient_checkpointing(model)
    most = runtime.micro_batch_tokens
    forward = Forward(
        device=worker.device,
        precision=precision,
        pad=reward_models.padding_id(tokenizer),
        pack=False,  # the head reads one position of each row
        capacity=data.max_length,
        max_tokens=default_max_tokens(worker.device) if most == "auto" else most,
    )
    return model, forward


def write(
    context: StageContext,
    settings: RewardSettings,
    folder: Path,
    data: Preferences,
    model: nn.Module,
    forward: Forward,
) -> dict[str, float]:
    """Write the trained reward model, load it again, compare both, and return the metrics of its
    evaluation, on this worker alone. `folder`: the causal model's. Raises StageError
    RewardMismatch."""
    context.worker.report(message="writing the reward model, loading it again and evaluating it")
    device = context.worker.device
    exact = replace(forward, precision=torch.float32)
    probe = np.arange(min(PROBED, len(data.train.rows)), dtype=np.int64)

    def probed(model: nn.Module, forward: Forward) -> Tensor:
        with torch.no_grad():
            return scores(model.eval(), data.train.rows, probe, forward).cpu()

    trained_R = probed(model, forward)
    whole: Any = reward_models.save(model, folder, context.workdir / WEIGHTS, torch.float32)
    merged_R = probed(whole.to(device), exact)
    four_bit = settings.adapter is not None and settings.adapter.qlora is not None
    if forward.precision is torch.float32 and not four_bit:
        _compare(trained_R, merged_R, TOLERANCE * max(1.0, float(trained_R.std())))
    dtype = stored_dtype(context.inputs["model"])
    if dtype is not torch.float32:
        save_model(whole.to(dtype), context.workdir / WEIGHTS)
    in_memory_R = probed(whole, exact)
    loaded = reward_models.load(context.workdir / WEIGHTS, dtype=dtype, device=device)
    if name := differing_weight(whole, loaded):
        raise read_back_mismatch(
            "RewardMismatch", f"the reward model read back differs from the written one in {name}."
        )
    difference = float((trained_R - in_memory_R).abs().max())
    return {
        "reloadedScoreDifference": difference,
        **_evaluate(loaded, data, exact, context.worker.alone),
    }


def _compare(trained_R: Tensor, merged_R: Tensor, tolerance: float) -> None:
    difference = float((trained_R - merged_R).abs().max())
    if not difference <= tolerance:
        raise read_back_mismatch(
            "RewardMismatch",
            f"the scores of the merged reward model differ from those of the trained one by "
            f"{difference:.3g}, more than {tolerance:.3g}.",
        )


def _evaluate(
    model: nn.Module, data: Preferences, forward: Forward, worker: Worker
) -> dict[str, float]:
    """Return the accuracy with its interval, the calibration and the influence of length, on the
    held-out preferences; {} if there are none."""
    if data.validation is None:
        return {}
    scores_R = evaluate_rows(scores, model, data.validation.rows, forward, worker)
    return {
        **pair_metrics("reward", scores_R, data.validation),
        **_score_metrics(scores_R, data.validation),
    }


def _score_metrics(scores_R: NDArray[np.float64], held_out: Comparisons) -> dict[str, float]:
    """Return the mean and the standard deviation of the scores, their correlation with length, and
    the share of pairs whose better completion is the longer one."""
    lengths = held_out.rows.targets.astype(np.float64)
    pairs = pairs_of(held_out)
    metrics = {
        "rewardMean": float(np.mean(scores_R)),
        "rewardDeviation": float(np.std(scores_R)),
        "lengthCorrelation": correlation(scores_R, lengths),
    }
    if len(pairs.better):
        metrics["longerIsBetter"] = accuracy(lengths[pairs.better] - lengths[pairs.worse])
    return metrics

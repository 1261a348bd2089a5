"""reward: a reward model, by the Bradley-Terry and Plackett-Luce likelihood of preferences.

The written model is loaded again, compared with the trained one, and evaluated on the held-out
preferences.

Shapes: G groups, K places of the longest group, R rows.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from tuneyard.api.plan import TrainRuntime
from tuneyard.api.stage_settings import RewardSettings
from tuneyard_trainer.models import adapters, reward_models
from tuneyard_trainer.models.base import (
    differing_weight,
    load_tokenizer,
    precision_of,
    read_back_mismatch,
    save_model,
)
from tuneyard_trainer.models.files import stored_dtype
from tuneyard_trainer.models.policies import WEIGHTS
from tuneyard_trainer.preference.dataset import Comparisons, Preferences
from tuneyard_trainer.preference.losses import reward_loss
from tuneyard_trainer.preference.metrics import accuracy, correlation, pair_metrics, pairs_of
from tuneyard_trainer.preference.micro_batches import evaluate_rows, scores
from tuneyard_trainer.preference.objective import GroupObjective
from tuneyard_trainer.training.batches import Indices, Order
from tuneyard_trainer.training.loop import Loop
from tuneyard_trainer.training.losses import Forward, default_max_tokens
from tuneyard_trainer.worker import StageContext, StageOutcome, Worker

START = "start"
PROBED = 64
"""Training rows whose scores are compared after writing."""
TOLERANCE = 1e-3
"""Largest difference of a score between the adapter and the merged layers, as a fraction of the
scores' standard deviation: merging adds the update in another order. The written model must reload
bit for bit."""


def run(context: StageContext) -> StageOutcome:
    """Train, and write `weights/` (a whole sequence classifier), `tokenizer/` and `metrics.jsonl`.

    Raises StageError RewardMismatch if the written model differs from the trained one.
    """
    settings = context.settings(RewardSettings)
    data = Preferences.open(context.inputs["data"])
    tokenizer = load_tokenizer(context.inputs["data"] / "tokenizer")
    context.worker.report(message="loading the model")
    merged = context.workdir / START / str(context.worker.rank)  # workers may share the folder
    start = reward_models.base_weights(context.inputs, merged)
    loop = build(context, settings, start, data, tokenizer)
    state = loop.train()
    metrics, details = loop.summary(state), loop.details(state)
    if context.worker.is_main:
        context.worker.report(
            message="writing the reward model, loading it again and evaluating it"
        )
        metrics |= _written(context, loop, settings, start, data)
        tokenizer.save_pretrained(context.workdir / "tokenizer")
    shutil.rmtree(merged, ignore_errors=True)
    return StageOutcome(metrics, details, contents=(WEIGHTS, "tokenizer"))


def build(
    context: StageContext,
    settings: RewardSettings,
    start: Path,
    data: Preferences,
    tokenizer: PreTrainedTokenizerBase,
) -> Loop:
    """Return the training loop before its first step. `start`: the causal model's folder."""
    training = settings.training
    precision = precision_of(training, context.worker)
    model = reward_models.create(
        start,
        settings.adapter,
        training,
        device=context.worker.device,
        precision=precision,
        tokenizer=tokenizer,
    )
    if context.stage.runtime.gradient_checkpointing:
        adapters.enable_gradient_checkpointing(model)
    forward = _forward(tokenizer, data, context.stage.runtime, precision, context.worker)
    order = Order.of(data.train.source, data.weights, training.batch_size, training.seed)
    objective = Ranked(model, data, forward, context.worker, training.seed, settings)
    return Loop(context, training, objective, order, model)


def _forward(
    tokenizer: PreTrainedTokenizerBase,
    data: Preferences,
    runtime: TrainRuntime,
    precision: torch.dtype,
    worker: Worker,
) -> Forward:
    """Return the forward passes of a classifier: its head reads one position of each row."""
    max_tokens = runtime.micro_batch_tokens
    return Forward(
        device=worker.device,
        precision=precision,
        pad=reward_models.padding_id(tokenizer),
        pack=False,
        capacity=data.max_length,
        max_tokens=default_max_tokens(worker.device) if max_tokens == "auto" else max_tokens,
    )


@dataclass(frozen=True)
class Ranked(GroupObjective):
    """The mean loss of a batch of pairs and rankings."""

    settings: RewardSettings
    metrics: tuple[str, ...] = ("loss", "accuracy")

    def backward(self, groups: Indices, step: int) -> Tensor:
        """Add the gradient. `accuracy`: the share of groups whose best row beats the second."""
        train = self.data.train

        def sums_of(chosen: Indices) -> Tensor:
            scores_R = scores(self.model, train.rows, train.members(chosen), self.forward)
            scores_GK, sizes_G = _grid(scores_R, train.sizes[chosen])
            loss_G = self._loss(scores_GK, sizes_G, train.labels[chosen])
            in_order_G = (scores_GK[:, 0] > scores_GK[:, 1]).float()
            return torch.stack([loss_G.sum(), in_order_G.sum()])

        return self.accumulate(sums_of, groups, step, len(self.metrics))

    def _loss(self, scores_GK: Tensor, sizes_G: Tensor, labels: NDArray[np.float32]) -> Tensor:
        """Return the loss of each group (G,)."""
        return reward_loss(
            scores_GK,
            sizes_G,
            torch.from_numpy(np.array(labels)).to(scores_GK.device),
            margin=self.settings.margin,
            centering=self.settings.centering,
        )

    def held_out(self) -> dict[str, float]:
        groups = self.held_out_groups
        scores_R = evaluate_rows(scores, self.model, groups.rows, self.forward, self.worker)
        scores_GK, sizes_G = _grid(torch.from_numpy(scores_R), groups.sizes)
        loss = float(self._loss(scores_GK, sizes_G, groups.labels).mean())
        agreement = pair_metrics("reward", scores_R, groups)
        kept = ("rewardAccuracy", "rewardMargin")
        return {"validationLoss": loss, **{k: v for k, v in agreement.items() if k in kept}}

    def baseline(self) -> dict[str, float]:
        """Return the held-out metrics of the untrained head: training has not begun."""
        return self.held_out()


def _grid(scores_R: Tensor, sizes: Indices) -> tuple[Tensor, Tensor]:
    """Return the scores of consecutive groups, a group per row and padded with 0 (G, K), and the
    sizes of the groups (G,)."""
    filled_GK = torch.from_numpy(np.arange(np.max(sizes))[None, :] < sizes[:, None])
    filled_GK = filled_GK.to(scores_R.device)
    grid_GK = torch.zeros(filled_GK.shape, dtype=scores_R.dtype, device=scores_R.device)
    return grid_GK.masked_scatter(filled_GK, scores_R), torch.from_numpy(sizes).to(scores_R.device)


# ---- the written model ------------------------------------------------------------------------


def _written(
    context: StageContext, loop: Loop, settings: RewardSettings, start: Path, data: Preferences
) -> dict[str, float]:
    """Write the reward model, load it again, compare both and evaluate, on this worker alone."""
    if not isinstance(loop.objective, Ranked):
        raise TypeError("the loop trains no reward model")
    forward, device = loop.objective.forward, context.worker.device
    exact = replace(forward, precision=torch.float32)
    probe = np.arange(min(PROBED, len(data.train.rows)), dtype=np.int64)

    def probed(model: nn.Module, forward: Forward) -> Tensor:
        with torch.no_grad():
            return scores(model.eval(), data.train.rows, probe, forward).cpu()

    trained_R = probed(loop.model, forward)
    whole: Any = reward_models.save(loop.model, start, context.workdir / WEIGHTS, torch.float32)
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

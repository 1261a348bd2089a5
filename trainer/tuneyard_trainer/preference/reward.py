"""reward: a reward model by the Bradley-Terry and Plackett-Luce likelihood of preferences.

Leaves `weights/` (a whole sequence classifier), `tokenizer/` and `metrics.jsonl`. What is written
is loaded again, compared with what was trained, and measured on the held-out preferences.
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
    differing,
    load_tokenizer,
    precision_of,
    read_back_otherwise,
    save_model,
)
from tuneyard_trainer.models.files import stored_dtype
from tuneyard_trainer.models.policies import WEIGHTS
from tuneyard_trainer.preference.dataset import Comparisons, Preferences
from tuneyard_trainer.preference.losses import reward_loss
from tuneyard_trainer.preference.metrics import accuracy, correlation, pair_metrics, pairs_of
from tuneyard_trainer.preference.micro_batches import chunks, over_all, scores
from tuneyard_trainer.training.batches import Indices, Order, share
from tuneyard_trainer.training.loop import Loop
from tuneyard_trainer.training.losses import Forward
from tuneyard_trainer.training.seeds import derive_seed
from tuneyard_trainer.worker import StageContext, StageOutcome, Worker

START = "start"
PROBED = 64
"""Training rows whose scores are compared after writing."""
TOLERANCE = 1e-3
"""Largest difference of a score, as a share of the scores' spread, between adapter and merged
layers: merging adds the update in another order. What was written must reload to the bit."""
CPU_TOKENS, GPU_TOKENS = 2048, 16384
FIGURES = ("loss", "accuracy")


def run(context: StageContext) -> StageOutcome:
    """Trains, writes, loads again and measures. Raises StageError RewardMismatch where what was
    written scores otherwise."""
    settings = context.settings(RewardSettings)
    data = Preferences.open(context.inputs["data"])
    tokenizer = load_tokenizer(context.inputs["data"] / "tokenizer")
    context.worker.report(message="loading the model")
    spare = context.workdir / START / str(context.worker.rank)  # two workers may share the folder
    start = reward_models.start(context.inputs, spare)
    loop = build(context, settings, start, data, tokenizer)
    state = loop.train()
    metrics, details = loop.summary(state), loop.details(state)
    if context.worker.is_main:
        context.worker.report(message="writing the reward model, loading it again and measuring it")
        metrics |= _written(context, loop, settings, start, data)
        tokenizer.save_pretrained(context.workdir / "tokenizer")
    shutil.rmtree(spare, ignore_errors=True)
    return StageOutcome(metrics, details, contents=(WEIGHTS, "tokenizer"))


def build(
    context: StageContext,
    settings: RewardSettings,
    start: Path,
    data: Preferences,
    tokenizer: PreTrainedTokenizerBase,
) -> Loop:
    """The loop at its start."""
    training = settings.training
    precision = precision_of(training, context.worker)
    model = reward_models.fresh(
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
    objective = Ranked(model, data, forward, settings, context.worker)
    return Loop.of(context, training, objective, order, model)


def _forward(
    tokenizer: PreTrainedTokenizerBase,
    data: Preferences,
    runtime: TrainRuntime,
    precision: torch.dtype,
    worker: Worker,
) -> Forward:
    default = GPU_TOKENS if worker.device.type == "cuda" else CPU_TOKENS
    wanted = runtime.micro_batch_tokens
    return Forward(
        device=worker.device,
        precision=precision,
        pad=reward_models.padding(tokenizer),
        pack=False,
        capacity=data.max_length,
        max_tokens=default if wanted == "auto" else wanted,
    )


@dataclass(frozen=True)
class Ranked:
    """The mean loss of a batch of groups."""

    model: nn.Module
    data: Preferences
    forward: Forward
    settings: RewardSettings
    worker: Worker
    figures: tuple[str, ...] = FIGURES

    @property
    def holds_out(self) -> bool:
        return self.data.validation is not None

    def backward(self, groups: Indices, step: int) -> Tensor:
        """(2,) this worker's share of the loss and of the groups that are in order."""
        train, rank = self.data.train, self.worker.rank
        mine = share(groups, train.tokens, rank, self.worker.world_size)
        means_K = torch.zeros(len(FIGURES), device=self.worker.device)
        for index, chunk in enumerate(chunks(train, mine, self.forward.max_tokens)):
            torch.manual_seed(derive_seed(self.settings.training.seed, step, rank, index))
            found_R = scores(self.model, train.rows, train.members(chunk), self.forward)
            found_GK, sizes_G = _grid(found_R, train.sizes[chunk])
            loss_G = self._loss(found_GK, sizes_G, train.labels[chunk])
            loss = loss_G.sum() / len(groups)
            loss.backward()
            in_order = (found_GK[:, 0] > found_GK[:, 1]).float().sum() / len(groups)
            means_K += torch.stack([loss.detach(), in_order.detach()])
        return means_K

    def _loss(self, found_GK: Tensor, sizes_G: Tensor, labels: NDArray[np.float32]) -> Tensor:
        return reward_loss(
            found_GK,
            sizes_G,
            torch.from_numpy(np.array(labels)).to(found_GK.device),
            margin=self.settings.margin,
            centering=self.settings.centering,
        )

    def held_out(self) -> dict[str, float]:
        validation = self.data.validation
        if validation is None:
            raise ValueError("nothing is held out")
        found = over_all(scores, self.model, validation.rows, self.forward, self.worker)
        found_GK, sizes_G = _grid(torch.from_numpy(found), validation.sizes)
        loss = float(self._loss(found_GK, sizes_G, validation.labels).mean())
        agreed = pair_metrics("reward", found, validation)
        kept = ("rewardAccuracy", "rewardMargin")
        return {"validationLoss": loss, **{k: v for k, v in agreed.items() if k in kept}}

    def baseline(self) -> dict[str, float]:
        """Of a head that has learnt nothing."""
        return self.held_out()

    def num_tokens(self, groups: Indices) -> int:
        return int(self.data.train.tokens[groups].sum())


def _grid(found_R: Tensor, sizes: Indices) -> tuple[Tensor, Tensor]:
    """(G, K) and (G,): the scores of groups that lie end to end, one group a row."""
    places = torch.from_numpy(np.arange(np.max(sizes))[None, :] < sizes[:, None])
    places = places.to(found_R.device)
    grid_GK = torch.zeros(places.shape, dtype=found_R.dtype, device=found_R.device)
    return grid_GK.masked_scatter(places, found_R), torch.from_numpy(sizes).to(found_R.device)


# ---- the result -------------------------------------------------------------------------------


def _written(
    context: StageContext, loop: Loop, settings: RewardSettings, start: Path, data: Preferences
) -> dict[str, float]:
    """Writes, loads, compares and measures; on one worker, the device that trained."""
    if not isinstance(loop.objective, Ranked):
        raise TypeError("the loop trains no reward model")
    forward, alone = loop.objective.forward, Worker(0, 1, context.worker.device)
    probe = np.arange(min(PROBED, len(data.train.rows)), dtype=np.int64)

    def probed(model: nn.Module, precision: torch.dtype) -> Tensor:
        one_pass = replace(forward, precision=precision)
        with torch.no_grad():
            return scores(model.eval(), data.train.rows, probe, one_pass).cpu()

    trained_R = probed(loop.model, forward.precision)
    whole: Any = reward_models.save(loop.model, start, context.workdir / WEIGHTS, torch.float32)
    merged_R = probed(whole.to(context.worker.device), torch.float32)
    four_bit = settings.adapter is not None and settings.adapter.qlora is not None
    if forward.precision is torch.float32 and not four_bit:
        limit = TOLERANCE * max(1.0, float(trained_R.std()))
        _compare("the merged reward model", trained_R, merged_R, limit)
    dtype = stored_dtype(context.inputs["model"])
    if dtype is not torch.float32:
        save_model(whole.to(dtype), context.workdir / WEIGHTS)
    in_memory_R = probed(whole, torch.float32)
    read = reward_models.load(context.workdir / WEIGHTS, dtype=dtype, device=context.worker.device)
    if name := differing(whole, read):
        raise read_back_otherwise(
            "RewardMismatch", f"the reward model read back differs from what was written in {name}."
        )
    difference = float((trained_R - in_memory_R).abs().max())
    exact = replace(forward, precision=torch.float32)
    return {"reloadedScoreDifference": difference, **measured(read, data, exact, alone)}


def measured(
    model: nn.Module, data: Preferences, forward: Forward, worker: Worker
) -> dict[str, float]:
    """Accuracy with its interval, calibration and the pull of length, on the held-out preferences;
    {} without any."""
    if data.validation is None:
        return {}
    found = over_all(scores, model, data.validation.rows, forward, worker)
    return {
        **pair_metrics("reward", found, data.validation),
        **_spread(found, data.validation),
    }


def _spread(found: NDArray[np.float64], held_out: Comparisons) -> dict[str, float]:
    """The scores' place and spread, and how much of them is length: its correlation, and how often
    the longer answer is the better one anyway."""
    lengths = held_out.rows.targets.astype(np.float64)
    pairs = pairs_of(held_out)
    figures = {
        "rewardMean": float(np.mean(found)),
        "rewardDeviation": float(np.std(found)),
        "lengthCorrelation": correlation(found, lengths),
    }
    if len(pairs.better):
        figures["longerIsBetter"] = accuracy(lengths[pairs.better] - lengths[pairs.worse])
    return figures


def _compare(what: str, wanted_R: Tensor, found_R: Tensor, tolerance: float) -> None:
    difference = float((wanted_R - found_R).abs().max())
    if not difference <= tolerance:
        raise read_back_otherwise(
            "RewardMismatch",
            f"{what} scores otherwise than what was trained: by {difference:.3g}, more than "
            f"{tolerance:.3g}.",
        )

"""dpo: the policy learns from preferences directly, by DPO and its relatives or by KTO.

The losses are TRL's formulas (`preference_losses`) in our own loop, which resumes sample-exactly.
The reference is the model that the stage starts from. Leaves `weights/` and `metrics.jsonl`.

Shapes: G groups, R rows, P pairs, N single answers, K figures.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from tuneyard.api.stage_settings import DpoSettings
from tuneyard.errors import StageError
from tuneyard_trainer.models import base, policies, probes
from tuneyard_trainer.models.base import precision_of
from tuneyard_trainer.preference.dataset import Comparisons, Preferences
from tuneyard_trainer.preference.kto import UnpairedPreferences
from tuneyard_trainer.preference.losses import PairLoss, pair_loss
from tuneyard_trainer.preference.metrics import pair_metrics
from tuneyard_trainer.preference.micro_batches import chunks, logprobs, over_all
from tuneyard_trainer.preference.reference import (
    MISMATCHED,
    ReferencedPreferences,
    validation_of,
)
from tuneyard_trainer.training.batches import Indices, Order, share
from tuneyard_trainer.training.loop import Loop
from tuneyard_trainer.training.losses import Forward
from tuneyard_trainer.training.seeds import derive_seed
from tuneyard_trainer.worker import StageContext, StageOutcome, Worker


def run(context: StageContext) -> StageOutcome:
    """Trains and leaves `weights/` (an adapter or a whole model) and `metrics.jsonl`."""
    settings = context.settings(DpoSettings)
    loop = build(context, settings)
    state = loop.train()
    shutil.rmtree(context.workdir / MISMATCHED / str(context.worker.rank), ignore_errors=True)
    if context.worker.is_main:
        policies.save(loop.model, settings.adapter, context.workdir / policies.WEIGHTS)
    kept = state.best_step if settings.training.keep_best else state.step
    metrics = {**loop.summary(state), **loop.history.evaluated(kept)}
    details = {**loop.details(state), "loss": settings.loss, "beta": settings.beta}
    return StageOutcome(metrics=metrics, details=details, contents=(policies.WEIGHTS,))


def build(context: StageContext, settings: DpoSettings) -> Loop:
    """The loop at its start, the reference's log-probabilities at hand."""
    data, training = Preferences.open(context.inputs["data"]), settings.training
    _require_shape(settings, data)
    precision = precision_of(training, context.worker)
    tokenizer = base.load_tokenizer(context.inputs["data"] / "tokenizer")
    context.worker.report(message="loading the model")
    model = policies.load(
        context.inputs,
        settings.adapter,
        training,
        device=context.worker.device,
        precision=precision,
        tokenizer=tokenizer,
        gradient_checkpointing=context.stage.runtime.gradient_checkpointing,
    )
    forward = Forward.of(
        model,
        device=context.worker.device,
        precision=precision,
        pad=tokenizer.pad_token_id,
        pack=probes.isolates_documents(model),
        max_length=data.max_length,
        max_tokens=context.stage.runtime.micro_batch_tokens,
    )
    context.worker.report(message="measuring the reference")
    learnt = ReferencedPreferences.of(
        settings, data, model, forward, context.workdir, context.worker
    )
    kind = UnpairedPreferences if settings.loss == "kto" else Paired
    objective = kind(model, forward, settings, context.worker, learnt)
    order = Order.of(data.train.source, data.weights, training.batch_size, training.seed)
    return Loop.of(context, training, objective, order, model)


def _require_shape(settings: DpoSettings, data: Preferences) -> None:
    if data.labeled != (settings.loss == "kto"):
        found = "single answers with thumbs" if data.labeled else "pairs"
        raise StageError(
            "WrongPreferences",
            f"the preferences are {found}, and optimize.dpo.loss is {settings.loss}.",
            advice="Set optimize.dpo.loss: kto for single answers, another loss for pairs.",
        )


# ---- pairs ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Paired:
    """The mean loss of a batch of groups; a ranking's is the mean over its pairs."""

    model: nn.Module
    forward: Forward
    settings: DpoSettings
    worker: Worker
    learnt: ReferencedPreferences
    figures: tuple[str, ...] = ("loss", "accuracy", "chosenReward", "rejectedReward")

    @property
    def holds_out(self) -> bool:
        return self.learnt.validation is not None

    def backward(self, groups: Indices, step: int) -> Tensor:
        """(4,) this worker's share of the loss, of the pairs in order and of the implicit rewards
        (Rafailov et al. 2023, section 4) of both sides."""
        train, rank = self.learnt.train, self.worker.rank
        mine = share(groups, train.groups.tokens, rank, self.worker.world_size)
        means_K = torch.zeros(len(self.figures), device=self.worker.device)
        for index, chunk in enumerate(chunks(train.groups, mine, self.forward.max_tokens)):
            torch.manual_seed(derive_seed(self.settings.training.seed, step, rank, index))
            members = train.groups.members(chunk)
            found_R = logprobs(self.model, train.groups.rows, members, self.forward)
            reference_R = torch.from_numpy(train.reference[members]).to(found_R)
            sums_K = self._sums(found_R - reference_R, train.groups, chunk) / len(groups)
            sums_K[0].backward()
            means_K += sums_K.detach()
        return means_K

    def _sums(self, ratios_R: Tensor, groups: Comparisons, chunk: Indices) -> Tensor:
        """(4,) summed over the chunk's groups."""
        pairs = _pairs(groups, chunk, ratios_R.device)
        chosen_P, rejected_P = ratios_R[pairs.better], ratios_R[pairs.worse]
        loss_P = self._loss(ratios_R, groups, chunk, pairs)
        right_P = (chosen_P > rejected_P).to(loss_P) + 0.5 * (chosen_P == rejected_P)
        beta = self.settings.beta
        figures_KP = torch.stack([loss_P, right_P, beta * chosen_P, beta * rejected_P])
        return (figures_KP * pairs.weights).sum(dim=1)

    def _loss(self, ratios_R: Tensor, groups: Comparisons, chunk: Indices, pairs: _Pairs) -> Tensor:
        kind: PairLoss = self.settings.loss  # type: ignore[assignment]
        if kind == "ipo":  # of the mean over an answer's tokens, as TRL does
            targets = groups.rows.targets[groups.members(chunk)]
            ratios_R = ratios_R / torch.from_numpy(targets).to(ratios_R)
        return pair_loss(
            kind,
            ratios_R[pairs.better],
            ratios_R[pairs.worse],
            beta=self.settings.beta,
            label_smoothing=self.settings.label_smoothing,
            labels_P=pairs.labels if bool((pairs.labels < 1).any()) else None,
        )

    def held_out(self) -> dict[str, float]:
        groups, reference = validation_of(self.learnt)
        found = over_all(logprobs, self.model, groups.rows, self.forward, self.worker)
        ratios = found - reference
        sums = self._sums(torch.from_numpy(ratios), groups, np.arange(len(groups)))
        agreed = pair_metrics("preference", self.settings.beta * ratios, groups)
        kept = ("preferenceAccuracy", "preferenceMargin")
        return {
            "validationLoss": float(sums[0]) / len(groups),
            **{name: value for name, value in agreed.items() if name in kept},
        }

    def baseline(self) -> dict[str, float]:
        """Of the reference, which by its own measure prefers nothing: no pass is needed."""
        groups, reference = validation_of(self.learnt)
        zero = torch.zeros(len(reference), dtype=torch.float64)
        sums = self._sums(zero, groups, np.arange(len(groups)))
        return {"validationLoss": float(sums[0]) / len(groups), "preferenceAccuracy": 0.5}

    def num_tokens(self, groups: Indices) -> int:
        return int(self.learnt.train.groups.tokens[groups].sum())


class _Pairs(NamedTuple):
    """Every pair of a chunk's groups, as places in its rows; (P,) each."""

    better: Tensor
    worse: Tensor
    weights: Tensor
    """The pairs of a group weigh 1 together."""
    labels: Tensor


def _pairs(groups: Comparisons, chunk: Indices, device: torch.device) -> _Pairs:
    found: list[tuple[int, int, float, float]] = []
    start = 0
    for group in chunk:
        size, label = int(groups.sizes[group]), float(groups.labels[group])
        weight = 2 / (size * (size - 1))
        found += [
            (start + i, start + j, weight, label) for i in range(size) for j in range(i + 1, size)
        ]
        start += size
    better, worse, weights, labels = zip(*found, strict=True)
    return _Pairs(
        torch.tensor(better, device=device),
        torch.tensor(worse, device=device),
        torch.tensor(weights, device=device),
        torch.tensor(labels, device=device),
    )


# ---- single answers ---------------------------------------------------------------------------

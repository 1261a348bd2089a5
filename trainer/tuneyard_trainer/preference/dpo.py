"""dpo: the policy learns from preferences directly, by DPO and its relatives or by KTO.

The losses are TRL's formulas (`preference_losses`) in our own loop, which resumes sample-exactly.
The reference is the model that the stage starts from. Leaves `weights/` and `metrics.jsonl`.

Shapes: G groups, R rows, P pairs, N single answers, K figures.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor, nn

from tuneyard.api.plan import DpoSettings, PlannedStage, TrainRuntime
from tuneyard.errors import StageError
from tuneyard_trainer.data.prepared import Rows, RowWriter
from tuneyard_trainer.models import base, policies
from tuneyard_trainer.preference.dataset import Comparisons, Preferences
from tuneyard_trainer.preference.losses import PairLoss, kto_loss, pair_loss
from tuneyard_trainer.preference.metrics import pair_metrics
from tuneyard_trainer.preference.passes import chunks, logprobs, over_all
from tuneyard_trainer.preference.reference import model_digest, reference_logprobs
from tuneyard_trainer.training.batches import Indices, Order, share
from tuneyard_trainer.training.loop import Loop, mix, precision_of
from tuneyard_trainer.training.losses import Forward
from tuneyard_trainer.worker import Outcome, Worker

MISMATCHED = "mismatched"


def run(stage: PlannedStage, inputs: Mapping[str, Path], workdir: Path, worker: Worker) -> Outcome:
    """Trains and leaves `weights/` (an adapter or a whole model) and `metrics.jsonl`."""
    settings = stage.settings
    if not isinstance(settings, DpoSettings):
        raise TypeError(f"stage {stage.name} is a {stage.kind}, not dpo")
    loop = build(stage.name, settings, stage.runtime, inputs, workdir, worker)
    state = loop.train()
    shutil.rmtree(workdir / MISMATCHED / str(worker.rank), ignore_errors=True)
    if worker.is_main:
        policies.save(loop.model, settings.adapter, workdir / policies.WEIGHTS)
    kept = state.best_step if settings.training.keep_best else state.step
    metrics = {**loop.summary(state), **loop.history.evaluated(kept)}
    details = {**loop.details(state), "loss": settings.loss, "beta": settings.beta}
    return Outcome(metrics=metrics, details=details, contents=(policies.WEIGHTS,))


def build(
    stage: str,
    settings: DpoSettings,
    runtime: TrainRuntime,
    inputs: Mapping[str, Path],
    workdir: Path,
    worker: Worker,
) -> Loop:
    """The loop at its start, the reference's log-probabilities at hand."""
    data, training = Preferences.open(inputs["data"]), settings.training
    _require_shape(settings, data)
    precision = precision_of(training, worker)
    tokenizer = base.load_tokenizer(inputs["data"] / "tokenizer")
    worker.report(message="loading the model")
    model = policies.load(
        inputs,
        settings.adapter,
        training,
        device=worker.device,
        precision=precision,
        tokenizer=tokenizer,
        gradient_checkpointing=runtime.gradient_checkpointing,
    )
    forward = Forward.of(
        model,
        device=worker.device,
        precision=precision,
        pad=tokenizer.pad_token_id,
        pack=base.isolates_documents(model),
        max_length=data.max_length,
        max_tokens=runtime.micro_batch_tokens,
    )
    worker.report(message="measuring the reference")
    learnt = _Measured.of(settings, data, model, forward, workdir, worker)
    kind = Thumbs if settings.loss == "kto" else Paired
    objective = kind(model, forward, settings, worker, learnt)
    order = Order.of(data.train.source, data.weights, training.batch_size, training.seed)
    return Loop.of(stage, training, runtime, objective, order, model, workdir, worker)


def _require_shape(settings: DpoSettings, data: Preferences) -> None:
    if data.labelled != (settings.loss == "kto"):
        found = "single answers with thumbs" if data.labelled else "pairs"
        raise StageError(
            "WrongPreferences",
            f"the preferences are {found}, and optimize.dpo.loss is {settings.loss}.",
            advice="Set optimize.dpo.loss: kto for single answers, another loss for pairs.",
        )


class _Split(NamedTuple):
    """Groups, and what the reference gives to their rows."""

    groups: Comparisons
    reference: NDArray[np.float64]
    """(R,)"""


class _Measured(NamedTuple):
    """What is learnt from, measured by the reference."""

    train: _Split
    validation: _Split | None
    mismatched: Rows | None
    """For KTO: each training row's prompt with another row's answer."""
    mismatched_reference: NDArray[np.float64] | None

    @classmethod
    def of(
        cls,
        settings: DpoSettings,
        data: Preferences,
        model: nn.Module,
        forward: Forward,
        workdir: Path,
        worker: Worker,
    ) -> _Measured:
        key = model_digest(model)

        def measured(rows: Rows) -> NDArray[np.float64]:
            return reference_logprobs(model, key, rows, forward, workdir, worker)

        held_out = data.validation
        mismatched = _mismatched(data, workdir, worker) if settings.loss == "kto" else None
        return cls(
            _Split(data.train, measured(data.train.rows)),
            _Split(held_out, measured(held_out.rows)) if held_out else None,
            mismatched,
            measured(mismatched) if mismatched else None,
        )


# ---- pairs ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Paired:
    """The mean loss of a batch of groups; a ranking's is the mean over its pairs."""

    model: nn.Module
    forward: Forward
    settings: DpoSettings
    worker: Worker
    learnt: _Measured
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
            torch.manual_seed(mix(self.settings.training.seed, step, rank, index))
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
        groups, reference = _held_out(self.learnt)
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
        groups, reference = _held_out(self.learnt)
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


def _held_out(learnt: _Measured) -> _Split:
    if learnt.validation is None:
        raise ValueError("nothing is held out")
    return learnt.validation


# ---- single answers ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Thumbs:
    """KTO: the mean loss of a batch of single answers, both thumbs with equal weight in the data
    (the paper's section 4.2 balances them so)."""

    model: nn.Module
    forward: Forward
    settings: DpoSettings
    worker: Worker
    learnt: _Measured
    figures: tuple[str, ...] = ("loss", "accuracy", "kl")

    @property
    def holds_out(self) -> bool:
        return self.learnt.validation is not None

    def backward(self, groups: Indices, step: int) -> Tensor:
        """(3,) this worker's share of the loss, of the answers on their side of the reference point
        and of that point, the KL."""
        train, rank = self.learnt.train, self.worker.rank
        mine = share(groups, train.groups.tokens, rank, self.worker.world_size)
        kl = self._reference_point(mine, len(groups))
        means_K = torch.zeros(len(self.figures), device=self.worker.device)
        means_K[2] = kl / self.worker.world_size
        self.model.train()
        for index, chunk in enumerate(chunks(train.groups, mine, self.forward.max_tokens)):
            torch.manual_seed(mix(self.settings.training.seed, step, rank, index))
            members = train.groups.members(chunk)
            found_N = logprobs(self.model, train.groups.rows, members, self.forward)
            ratios_N = found_N - torch.from_numpy(train.reference[members]).to(found_N)
            sums_K = self._sums(ratios_N, train.groups.labels[chunk], kl) / len(groups)
            sums_K[0].backward()
            means_K[:2] += sums_K.detach()
        return means_K

    @torch.no_grad()
    def _reference_point(self, mine: Indices, count: int) -> Tensor:
        """The KL of the policy from the reference, on the prompts of a batch with other prompts'
        answers; the same on every worker."""
        rows, reference = self.learnt.mismatched, self.learnt.mismatched_reference
        if rows is None or reference is None:
            raise ValueError("KTO needs mismatched rows")
        self.model.eval()
        total = torch.zeros((), device=self.worker.device)
        for chunk in chunks(self.learnt.train.groups, mine, self.forward.max_tokens):
            found_N = logprobs(self.model, rows, chunk, self.forward)
            total += (found_N - torch.from_numpy(reference[chunk]).to(found_N)).sum() / count
        if self.worker.world_size > 1:
            dist.all_reduce(total)
        return total.clamp(min=0)

    def _sums(self, ratios_N: Tensor, labels: NDArray[np.float32], kl: Tensor) -> Tensor:
        """(2,) summed over the answers."""
        good_N = torch.from_numpy(labels > 0.5).to(ratios_N.device)
        up, down = self._weights
        weights_N = torch.where(good_N, up, down).to(ratios_N)
        loss_N = kto_loss(ratios_N, good_N, kl.to(ratios_N), beta=self.settings.beta) * weights_N
        right_N = ((ratios_N > kl) == good_N).to(ratios_N)
        return torch.stack([loss_N.sum(), right_N.sum()])

    @property
    def _weights(self) -> tuple[float, float]:
        """Of thumbs up and down: each kind weighs half of the training data."""
        labels = self.learnt.train.groups.labels
        share_up = float(np.mean(labels > 0.5))
        return 0.5 / share_up, 0.5 / (1 - share_up)

    def held_out(self) -> dict[str, float]:
        """At the reference point 0, so that evaluations compare."""
        groups, reference = _held_out(self.learnt)
        found = over_all(logprobs, self.model, groups.rows, self.forward, self.worker)
        return self._figures(found - reference, groups)

    def _figures(self, ratios: NDArray[np.float64], groups: Comparisons) -> dict[str, float]:
        sums = self._sums(torch.from_numpy(ratios), groups.labels, torch.zeros(()))
        good = groups.labels > 0.5
        figures = {
            "validationLoss": float(sums[0]) / len(groups),
            "preferenceAccuracy": float(sums[1]) / len(groups),
        }
        if good.any() and not good.all():
            apart = ratios[good].mean() - ratios[~good].mean()
            figures["preferenceMargin"] = float(self.settings.beta * apart)
        return figures

    def baseline(self) -> dict[str, float]:
        """Of the reference, by its own measure: no pass is needed."""
        groups, reference = _held_out(self.learnt)
        return self._figures(np.zeros(len(reference)), groups)

    def num_tokens(self, groups: Indices) -> int:
        return int(self.learnt.train.groups.tokens[groups].sum())


def _mismatched(data: Preferences, workdir: Path, worker: Worker) -> Rows:
    """Each training row's prompt with the next row's answer (cut to the longest row), as TRL pairs
    them: what the policy gives to answers that are not to the point."""
    rows = data.train.rows
    folder = workdir / MISMATCHED / str(worker.rank)
    folder.mkdir(parents=True, exist_ok=True)
    with RowWriter(folder, "train") as writer:
        for row in range(len(rows)):
            other = (row + 1) % len(rows)
            prompt = rows.ids(row)[: _answer_start(rows, row)]
            answer = rows.ids(other)[_answer_start(rows, other) :]
            answer = answer[: max(1, data.max_length - len(prompt))]
            mask = np.concatenate([np.zeros(len(prompt)), np.ones(len(answer))])
            writer.append(np.concatenate([prompt, answer]), mask.astype(np.uint8), 0)
    found = Rows.open(folder, "train")
    if found is None:
        raise TypeError("no rows to mismatch")
    return found


def _answer_start(rows: Rows, row: int) -> int:
    return int(np.argmax(rows.mask(row)))

"""The loss of sft and pretrain on prepared rows, and their held-out loss."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from functools import partial

from torch import Tensor, nn

from tuneyard.api.stage_settings import TrainSettings
from tuneyard_trainer.data.prepared import Prepared, Rows
from tuneyard_trainer.models import adapters
from tuneyard_trainer.models.sharding import is_shared
from tuneyard_trainer.training.batches import Indices, MicroBatch, Order, Packing, share
from tuneyard_trainer.training.losses import Forward, accumulate_gradients
from tuneyard_trainer.worker import Worker


@dataclass(frozen=True)
class CrossEntropy:
    """The mean negative log-likelihood of a batch's targets, in nats."""

    model: nn.Module
    data: Prepared
    forward: Forward
    settings: TrainSettings
    worker: Worker
    metrics: tuple[str, ...] = ("loss",)

    @property
    def holds_out(self) -> bool:
        return bool(self._measured)

    @property
    def _measured(self) -> dict[str, Rows]:
        """The rows that are measured at each evaluation, by the metric of their loss."""
        rows = {"validationLoss": self.data.validation}
        if self.settings.guard:
            rows["generalLoss"] = self.data.guard
        return {name: found for name, found in rows.items() if found is not None}

    def backward(self, rows: Indices, step: int) -> Tensor:
        train, worker = self.data.train, self.worker

        def losses(micro_batch: MicroBatch) -> Tensor:
            return self.forward.loss(self.model, train, micro_batch)[None]

        return accumulate_gradients(
            losses,
            self.forward.micro_batches(
                train, share(rows, train.lengths, worker.rank, worker.world_size)
            ),
            count=int(train.targets[rows].sum()),
            num_metrics=len(self.metrics),
            seed=(self.settings.seed, step),
            worker=worker,
        )

    def held_out(self) -> dict[str, float]:
        shared = is_shared(self.model)
        mean = self.forward.mean_loss_of_shards if shared else self.forward.mean_loss
        return {name: mean(self.model, rows, self.worker) for name, rows in self._measured.items()}

    def baseline(self) -> dict[str, float]:
        """Return the held-out metrics of the base: the adapter is disabled."""
        base = adapters.disabled(self.model) if self.settings.adapter else contextlib.nullcontext()
        with base:
            return self.held_out()

    def packing(self, order: Order, steps: int) -> Packing:
        """Return the packing of the first `steps` steps, of one epoch at most."""
        train = self.data.train
        return Packing.of(
            order.batches(0, min(steps, order.steps_per_epoch)),
            train.lengths,
            self.worker.world_size,
            partial(self.forward.micro_batches, train),
        )

    def num_tokens(self, rows: Indices) -> int:
        return int(self.data.train.lengths[rows].sum())

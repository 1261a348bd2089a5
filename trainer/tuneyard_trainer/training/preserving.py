"""Terms against forgetting, added to the loss of each step: L2-SP, EWC and KL to the start.

Each worker adds its share of each term's gradient: of L2-SP and EWC an equal part of the whole, of
KL the part of its rows. The sum over the workers is therefore the whole term, for any number of
workers and micro-batches. Nothing here is saved: the weights at the start are read again, the
Fisher information is in a file (`fisher`), and the general rows of a step are a function of the
seed and the step.

Shapes: N targets, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from tuneyard.api.preserving import Kl
from tuneyard.api.stage_settings import TrainSettings
from tuneyard.errors import StageError
from tuneyard_trainer.data.prepared import Rows
from tuneyard_trainer.models import layers
from tuneyard_trainer.models.policies import Reference
from tuneyard_trainer.training.batches import Indices, MicroBatch, Order, share
from tuneyard_trainer.training.cross_entropy import CrossEntropy
from tuneyard_trainer.training.fisher import stored_fisher
from tuneyard_trainer.training.losses import Forward, accumulate_gradients
from tuneyard_trainer.training.seeds import GENERAL_DROPOUT, derive_seed
from tuneyard_trainer.worker import Worker

L2SP, EWC, KL = "l2SpPenalty", "ewcPenalty", "klToStart"
"""The metrics of the terms. The penalties are multiplied by their strengths; the divergence is in
nats per token, without its strength and temperature factor."""


class Preserving:
    """An objective and the terms that are added to its loss. The metric `loss` stays the
    objective's own."""

    def __init__(self, inner: CrossEntropy, folder: Path) -> None:
        """Set up the terms at the model's present weights. `folder`: of the checkpoints, for the
        Fisher information. Raises Interrupted and StageError."""
        terms, settings, worker = inner.settings.preserve, inner.settings, inner.worker
        if terms is None:
            raise ValueError("the stage has no terms against forgetting")
        self.inner = inner
        self._world_size = worker.world_size
        reference = Reference(inner.model)
        start, parameters = reference.start, layers.trainable(inner.model)
        self._pulls: dict[str, Pull] = {}
        self._kl: KlToStart | None = None
        if terms.l2_sp:
            self._pulls[L2SP] = Pull(terms.l2_sp.strength, parameters, start, None)
        if terms.ewc:
            fisher = stored_fisher(
                folder,
                inner.model,
                _general(inner),
                inner.forward,
                samples=terms.ewc.samples,
                seed=settings.seed,
                worker=worker,
            )
            self._pulls[EWC] = Pull(terms.ewc.strength, parameters, start, fisher)
        if terms.kl:
            self._kl = KlToStart(
                inner.model, reference, _general(inner), inner.forward, terms.kl, settings, worker
            )
        names = [*self._pulls, *([KL] if self._kl else [])]
        self.metrics = (*inner.metrics, *names)

    @property
    def holds_out(self) -> bool:
        return self.inner.holds_out

    def backward(self, rows: Indices, step: int) -> Tensor:
        found = [self.inner.backward(rows, step)]
        for pull in self._pulls.values():
            found.append(pull.backward(self._world_size)[None])
        if self._kl:
            found.append(self._kl.backward(step))
        return torch.cat(found)

    def held_out(self) -> dict[str, float]:
        return self.inner.held_out()

    def baseline(self) -> dict[str, float]:
        return self.inner.baseline()

    def num_tokens(self, rows: Indices) -> int:
        return self.inner.num_tokens(rows)


def _general(inner: CrossEntropy) -> Rows:
    """Return the general rows. Raises StageError NotPrepared."""
    rows = inner.data.general
    if rows is None:
        raise StageError("NotPrepared", "the prepared data has no general rows.")
    return rows


class Pull:
    """A quadratic pull toward the weights at the start: strength / 2 sum_i F_i (w_i - start_i)^2.

    L2-SP (Li et al. 2018, equation 4) has F_i = 1, EWC (Kirkpatrick et al. 2017, equation 3) the
    diagonal of the Fisher information.
    """

    def __init__(
        self,
        strength: float,
        parameters: Mapping[str, nn.Parameter],
        start: Mapping[str, Tensor],
        importance: Mapping[str, Tensor] | None,
    ) -> None:
        """`importance`: F by the parameters' names. None: 1."""
        self._strength, self._parameters = strength, parameters
        self._start, self._importance = start, importance

    @torch.no_grad()
    def backward(self, world_size: int) -> Tensor:
        """Add one worker's equal part of the gradient. Returns its part of the term's value ()."""
        value = torch.zeros((), device=next(iter(self._start.values())).device)
        for name, parameter in self._parameters.items():
            distance = parameter - self._start[name]
            slope = distance if self._importance is None else distance * self._importance[name]
            slope = slope * (self._strength / world_size)
            value += (slope * distance).sum() / 2
            if parameter.grad is None:
                parameter.grad = slope
            else:
                parameter.grad += slope
        return value


class KlToStart:
    """KL(start || tuned) over the target tokens of general rows, some of them in each step.

    With temperature T the distributions are softmax(logits / T), and the term is multiplied by T^2.
    """

    def __init__(
        self,
        model: nn.Module,
        reference: Reference,
        rows: Rows,
        forward: Forward,
        term: Kl,
        settings: TrainSettings,
        worker: Worker,
    ) -> None:
        self._model, self._reference, self._rows = model, reference, rows
        self._forward, self._term, self._worker = forward, term, worker
        self._seed = settings.seed
        everything = np.arange(len(rows), dtype=np.int64)
        self._order = Order(everything, min(term.batch_size, len(rows)), settings.seed)

    def rows_of(self, step: int) -> Indices:
        """Return the general rows of a step, counted from 0."""
        return next(self._order.batches(step, step + 1))

    def backward(self, step: int) -> Tensor:
        """Add the gradient of this worker's rows. Returns their share of the mean divergence, in
        nats per token (1,)."""
        chosen, worker = self.rows_of(step), self._worker
        self._model.train()
        factor = self._term.strength * self._term.temperature**2
        shares_K = accumulate_gradients(
            lambda micro_batch: self._divergence(micro_batch) * factor,
            self._micro_batches(chosen),
            count=int(self._rows.targets[chosen].sum()),
            num_metrics=1,
            seed=(derive_seed(self._seed, GENERAL_DROPOUT), step),
            worker=worker,
        )
        return shares_K / factor

    def _micro_batches(self, chosen: Indices) -> Iterator[MicroBatch]:
        worker = self._worker
        own = share(chosen, self._rows.lengths, worker.rank, worker.world_size)
        yield from self._forward.micro_batches(self._rows, own)

    def _divergence(self, micro_batch: MicroBatch) -> Tensor:
        """Return the summed divergence of a micro-batch's targets (1,)."""
        temperature = self._term.temperature
        with torch.no_grad(), self._reference.active():
            self._model.eval()
            logits_NV, _ = self._forward.target_logits(self._model, self._rows, micro_batch)
            start_NV = (logits_NV / temperature).log_softmax(-1)
            del logits_NV
        self._model.train()
        logits_NV, _ = self._forward.target_logits(self._model, self._rows, micro_batch)
        tuned_NV = (logits_NV / temperature).log_softmax(-1)
        divergence = nn.functional.kl_div(tuned_NV, start_NV, reduction="sum", log_target=True)
        return divergence[None]

"""The teacher of a distillation, and the held-out divergence of the student from it.

The held-out rows are prompts that are not trained on, each with one completion that the teacher
sampled before the first step. They are kept in the work folder, so that all measurements of all
attempts are of the same rows. A student that writes only what is easy to predict would lower the
divergence of its own completions, and does not lower this one.

Shapes: N targets, V vocabulary, R rows.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from tuneyard.api.stage_settings import DistillSettings
from tuneyard.errors import StageError
from tuneyard_trainer.data.prepared import Rows
from tuneyard_trainer.data.prompts import TokenizedPrompt, completed_rows
from tuneyard_trainer.generation.sampling import Sampler
from tuneyard_trainer.models.base import autocast
from tuneyard_trainer.models.files import config_of, context_length
from tuneyard_trainer.models.layers import head_at, head_of
from tuneyard_trainer.preference.micro_batches import evaluate_rows
from tuneyard_trainer.reinforcement.rollouts import ProcessGroup
from tuneyard_trainer.storage.journal import Journal
from tuneyard_trainer.training.batches import IGNORE, Indices, MicroBatch
from tuneyard_trainer.training.losses import Batch, Forward, collate
from tuneyard_trainer.training.seeds import MEASUREMENT, derive_seed
from tuneyard_trainer.worker import StageContext, Worker

HELD_OUT = "held-out"
"""The folder of the held-out completions in the work folder."""
MAX_LOGITS = 1 << 27
"""Logits of each model in one pass, in elements: half a GiB, and about eight copies of it."""


def require_context(teacher: Path, longest: int) -> None:
    """Raise StageError TeacherContextTooShort unless the teacher reads prompts with completions of
    `longest` tokens."""
    context = context_length(config_of(teacher))
    if context is not None and longest > context:
        raise StageError(
            "TeacherContextTooShort",
            f"the longest prompt with a completion may have {longest} tokens, and the context of "
            f"the teacher has {context}.",
            advice="Lower optimize.distill.sampling.maxNewTokens, leave out long prompts, or "
            "choose another optimize.distill.teacher.",
        )


def divergence(
    student_NV: Tensor, teacher_NV: Tensor, *, beta: float, temperature: float
) -> Tensor:
    """Return the generalized Jensen-Shannon divergence of logits (N,), in nats: beta times the
    teacher's KL from the mixture, in which beta weighs the teacher, and (1 - beta) times the
    student's (Agarwal et al. 2024, arXiv:2306.13649, section 2).

    At 0 and 1, where that is 0, it is the KL that the quotient by the smaller weight tends to: the
    teacher's from the student (forward), and the student's from the teacher (reverse).
    """
    log_s = (student_NV.float() / temperature).log_softmax(-1)
    log_t = (teacher_NV.float() / temperature).log_softmax(-1)
    if beta == 0:
        return _kl(log_t, log_s)
    if beta == 1:
        return _kl(log_s, log_t)
    log_m = torch.logaddexp(log_s + math.log(1 - beta), log_t + math.log(beta))
    return beta * _kl(log_t, log_m) + (1 - beta) * _kl(log_s, log_m)


def _kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    return (log_p.exp() * (log_p - log_q)).sum(-1)


@dataclass
class HeldOutDivergence:
    """The mean divergence of the student from the teacher at the tokens of held-out completions."""

    student: nn.Module
    teacher: nn.Module
    rows: Rows
    forward: Forward
    worker: Worker
    settings: DistillSettings
    sampled_tokens: int = 0
    """The tokens of the newest step's completions, which the trainer reports."""

    @property
    def holds_out(self) -> bool:
        return True

    def held_out(self) -> dict[str, float]:
        most = MAX_LOGITS // head_of(self.student).out_features
        forward = replace(self.forward, max_tokens=min(self.forward.max_tokens, max(1, most)))
        sums_R = evaluate_rows(self._sums, self.student, self.rows, forward, self.worker)
        return {"validationLoss": float(sums_R.sum()) / int(self.rows.targets.sum())}

    def baseline(self) -> dict[str, float]:
        """Return the divergence of the model that the stage starts from: no step was taken yet."""
        return self.held_out()

    def num_tokens(self, rows: Indices) -> int:  # noqa: ARG002  prompts are not trained on
        return self.sampled_tokens

    def _sums(self, model: nn.Module, rows: Rows, chosen: Indices, forward: Forward) -> Tensor:
        """Return each row's divergence, summed over its targets (R,)."""
        bins = tuple((row,) for row in chosen.tolist())
        micro_batch = MicroBatch(bins, int(rows.lengths[chosen].max()))
        batch = collate(rows, micro_batch, pad=forward.pad, packed=False, device=forward.device)
        rows_N, columns_N = torch.nonzero(batch.labels_BL != IGNORE, as_tuple=True)
        with autocast(forward.device, forward.precision):
            student_NV = _logits(model, batch, rows_N, columns_N)
            teacher_NV = _logits(self.teacher, batch, rows_N, columns_N)
        beta, temperature = self.settings.beta, self.settings.sampling.temperature
        values_N = divergence(student_NV, teacher_NV, beta=beta, temperature=temperature)
        return torch.zeros(len(chosen), device=forward.device).index_add(0, rows_N, values_N)


def _logits(model: nn.Module, batch: Batch, rows_N: Tensor, columns_N: Tensor) -> Tensor:
    """Return the logits at N positions (N, V)."""
    ids_BL = batch.ids_BL
    with head_at(model, rows_N, columns_N, ids_BL.shape[1]):
        output = model(input_ids=ids_BL, attention_mask=batch.attention_BL, use_cache=False)
    logits: Tensor = output.logits[0]
    return logits


def held_out_rows(
    context: StageContext, prompts: Sequence[TokenizedPrompt], sampler: Sampler, seed: int
) -> Rows:
    """Return the prompts with the teacher's completions, whose tokens are the targets; the same
    rows on all workers, and in all attempts of the stage. `sampler`: samples from the teacher.
    Raises Interrupted and StageError on all workers."""
    worker = context.worker
    group = ProcessGroup(worker.rank, worker.world_size, worker.device)
    if not worker.is_main:
        return completed_rows(prompts, _completions(group, prompts, sampler, seed, worker, None))
    folder = context.workdir / HELD_OUT
    with Journal(folder, worker.identity, worker.persist, worker.owned) as journal:
        known = journal.entries[0]["completions"] if journal.entries else None
        completions = _completions(group, prompts, sampler, seed, worker, known)
        if known is None:
            journal.append([{"completions": completions}])
    return completed_rows(prompts, completions)


def _completions(
    group: ProcessGroup,
    prompts: Sequence[TokenizedPrompt],
    sampler: Sampler,
    seed: int,
    worker: Worker,
    known: list[list[int]] | None,
) -> list[list[int]]:
    """Return the tokens of each prompt's completion. `known`: rank 0's, of an earlier attempt."""
    (known,) = _from_all(known, group)[:1]
    if known is not None:
        return known
    worker.report(message="sampling the teacher's held-out completions")
    own = group.share(len(prompts))
    keys = [derive_seed(seed, MEASUREMENT, i) for i in own]
    sampled = group.run(
        lambda: sampler([prompts[i].ids for i in own], keys, worker.check_stop) if own else []
    )
    shares = _from_all(dict(zip(own, (list(each.tokens) for each in sampled), strict=True)), group)
    found = {i: tokens for share in shares for i, tokens in share.items()}
    return [found[i] for i in range(len(prompts))]


def _from_all(value: Any, group: ProcessGroup) -> list[Any]:
    """Return the value of each rank, on every rank."""
    values: list[Any] = [value] * group.world_size
    if group.world_size > 1:
        dist.all_gather_object(values, value)
    return values

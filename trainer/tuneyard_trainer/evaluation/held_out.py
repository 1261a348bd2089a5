"""Held-out rows of fine-tuning data: the loss and the answers to questions of both models.

Rows with a retrieved context are also measured without it. Shapes: R rows, N questions.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from tuneyard.api.evaluation import prefixed
from tuneyard.api.stage_settings import EvaluateSettings
from tuneyard_trainer.data.prepared import Prepared
from tuneyard_trainer.evaluation.few_shot import FewShot, few_shot
from tuneyard_trainer.evaluation.items import Items
from tuneyard_trainer.evaluation.part import Answered, Found, Loaded, Rater
from tuneyard_trainer.evaluation.questions import (
    GIVEN,
    MAX_QUESTIONS,
    HeldOutRows,
    Question,
    held_out_rows,
)
from tuneyard_trainer.evaluation.result import spread
from tuneyard_trainer.evaluation.task_metrics import (
    Compared,
    References,
    Scores,
    TaskMetric,
    task_metrics,
    token_f1,
)
from tuneyard_trainer.models.base import load_tokenizer
from tuneyard_trainer.models.files import config_of, context_length
from tuneyard_trainer.reporting.answers import is_right
from tuneyard_trainer.reporting.results import Sample
from tuneyard_trainer.training.losses import Forward
from tuneyard_trainer.worker import StageContext

RATED_QUESTIONS = 128
"""Questions that a rater compares the answers to, if so many rows are held out."""


@dataclass(frozen=True)
class Measured:
    """One model's measurement of some held-out rows."""

    losses_R: NDArray[np.float64]
    """Of each row, summed over its targets, in nats."""
    answers: tuple[str, ...]
    few_shot: tuple[str, ...] = ()
    """The answers of the model before to the questions with worked examples."""


@dataclass(frozen=True)
class HeldOut:
    """The part of an evaluation."""

    tokenizer: Any
    max_length: int
    rows: Mapping[str, HeldOutRows]
    """By the suffix of their metrics."""
    max_new_tokens: int
    samples: int
    metrics: Sequence[TaskMetric]
    few_shot: FewShot | None
    """The questions with worked examples, which the model before is asked too. None: it is not."""
    raters: Sequence[Rater]

    @classmethod
    def of(cls, context: StageContext, raters: Sequence[Rater]) -> HeldOut:
        """Read the rows of the input `data`. Raises StageError NoHeldOutRows and BadSchema."""
        settings, folder = context.settings(EvaluateSettings), context.inputs["data"]
        data, tokenizer = Prepared.open(folder), load_tokenizer(folder / "tokenizer")
        metrics = task_metrics(
            settings.metrics or (), settings.answer_schema, settings.answer_pattern
        )
        count = max(settings.samples, RATED_QUESTIONS if raters else 0)
        if metrics or settings.few_shot:
            count = MAX_QUESTIONS
        rows = held_out_rows(folder, data, tokenizer, count)
        asked = rows[GIVEN].questions
        examples = None
        if settings.few_shot:
            context_size = context_length(config_of(context.inputs["model"]))
            room = None if context_size is None else context_size - settings.max_new_tokens
            examples = few_shot(folder, asked, tokenizer, settings.few_shot, room)
            if not metrics and not any(question.expected for question in asked):
                metrics = [token_f1]  # something must be compared
        return cls(
            tokenizer=tokenizer,
            max_length=data.max_length,
            rows=rows,
            max_new_tokens=settings.max_new_tokens,
            samples=settings.samples,
            metrics=metrics,
            few_shot=examples,
            raters=raters,
        )

    def measure(self, loaded: Loaded, tuned: dict[str, Measured] | None, /) -> dict[str, Measured]:
        """Return the measurement of each set of rows. The answers are greedy."""
        forward = Forward.of(
            loaded.model,
            device=loaded.worker.device,
            precision=torch.float32,
            pad=self.tokenizer.pad_token_id,
            pack=loaded.packs,
            max_length=self.max_length,
            max_tokens="auto",
        )
        found = {
            suffix: Measured(
                -loaded.row_logprobs(held_out.rows, forward),
                self._answers(loaded, held_out.questions),
            )
            for suffix, held_out in self.rows.items()
        }
        if self.few_shot and tuned is not None:
            answers = self.few_shot.answers(self._answers(loaded, self.few_shot.questions))
            found[GIVEN] = replace(found[GIVEN], few_shot=answers)
        return found

    def _answers(self, loaded: Loaded, questions: Sequence[Question]) -> tuple[str, ...]:
        return loaded.answers(
            self.tokenizer,
            [q.text for q in questions],
            max_new_tokens=self.max_new_tokens,
            templated=any(q.templated for q in questions),
        )

    def compare(
        self, tuned: dict[str, Measured] | None, before: dict[str, Measured] | None
    ) -> Found:
        """Return losses, accuracies and samples, and what the raters find."""
        if tuned is None:
            return Found()
        parts = [
            _compared(suffix, rows, tuned[suffix], before[suffix] if before else None)
            for suffix, rows in self.rows.items()
        ]
        questions = self.rows[GIVEN].questions
        answers = tuned[GIVEN].answers, before[GIVEN].answers if before else None
        few_shot = before[GIVEN].few_shot if before else ()
        found = _samples(questions, *answers, few_shot)
        shown = [found[i] for i in spread(len(found), self.samples)]
        parts.append(Found(samples=shown, answers=found))
        if questions:
            parts += [_scored(metric, questions, *answers) for metric in self.metrics]
        if self.few_shot and before:
            parts.append(self._against_examples(tuned[GIVEN].answers, before[GIVEN].few_shot))
        if answers[1] is not None:
            answered = Answered(
                [q.prompt for q in questions],
                answers[0],
                answers[1],
                np.array([float(len(answer)) for answer in answers[0]]),
            )
            parts += [rater.rate(answered) for rater in self.raters]
        return Found.merged(parts)

    def _against_examples(self, tuned: Sequence[str], few_shot: Sequence[str]) -> Found:
        """Return metrics of the answers of the model before to questions with examples, and how
        much better the tuned model answers without them."""
        if self.few_shot is None:
            return Found()
        questions = self.rows[GIVEN].questions
        metrics, items = self.few_shot.metrics, {}
        for metric in (_answer_accuracy(questions), *self.metrics):
            accepted = [q.accepted for q in questions]
            own, examples = metric(tuned, accepted), metric(few_shot, accepted)
            for name, value in examples.whole.items():
                metrics[prefixed("baseFewShot", name)] = value
            for name, values_N in examples.means.items():
                gains_N = own.means[name] - values_N
                prompted = prefixed("baseFewShot", name)
                checked = [q for q in questions if q.expected or name != "answerAccuracy"]
                ids = tuple(question.prompt.where for question in checked)
                items[prompted] = Items(ids, values_N, None, higher_is_better=True)
                metrics |= {
                    prompted: float(np.mean(values_N)),
                    f"{name}FewShotGain": float(np.mean(gains_N)),
                    f"{name}FewShotGainError": float(np.std(gains_N) / math.sqrt(len(gains_N))),
                }
        return Found(metrics, items=items)


def _answer_accuracy(questions: Sequence[Question]) -> TaskMetric:
    """Return the metric answerAccuracy of the questions with expected texts, if there are any."""
    checked = [number for number, q in enumerate(questions) if q.expected]

    def metric(answers: Sequence[str], _accepted: References) -> Scores:
        if not checked:
            return Scores()
        return Scores({"answerAccuracy": _right(questions, checked, answers)})

    return metric


def _compared(
    suffix: str, held_out: HeldOutRows, tuned: Measured, before: Measured | None
) -> Found:
    """Return the metrics of some rows, and their values for each row and question."""
    targets_R = held_out.rows.targets
    total = int(targets_R.sum())
    loss = math.fsum(tuned.losses_R) / total
    metrics = {
        "validationLoss": loss,
        "validationPerplexity": _perplexity(loss),
    }
    items = {
        "validationLoss": Items(
            tuple(f"row {row + 1}" for row in range(len(targets_R))),
            tuned.losses_R / targets_R,
            before.losses_R / targets_R if before else None,
            higher_is_better=False,
            weights_N=targets_R.astype(np.float64),
        )
    }
    checked = [number for number, q in enumerate(held_out.questions) if q.expected]
    if checked:
        right = _right(held_out.questions, checked, tuned.answers)
        before_right = _right(held_out.questions, checked, before.answers) if before else None
        ids = tuple(held_out.questions[number].prompt.where for number in checked)
        items["answerAccuracy"] = Items(ids, right, before_right, higher_is_better=True)
        metrics["questions"] = float(len(checked))
        metrics["answerAccuracy"] = float(np.mean(right))
        if before_right is not None:
            metrics["baseAnswerAccuracy"] = float(np.mean(before_right))
            metrics["answerAccuracyGain"] = (
                metrics["answerAccuracy"] - metrics["baseAnswerAccuracy"]
            )
    if before is not None:
        before_loss = math.fsum(before.losses_R) / total
        metrics["baseValidationLoss"] = before_loss
        metrics["baseValidationPerplexity"] = _perplexity(before_loss)
        metrics["lossReduction"] = 1 - loss / before_loss if before_loss else 0.0
    return Found(
        metrics={f"{name}{suffix}": value for name, value in metrics.items()},
        items={f"{name}{suffix}": value for name, value in items.items()},
    )


def _scored(
    metric: TaskMetric,
    questions: Sequence[Question],
    tuned: Sequence[str],
    before: Sequence[str] | None,
) -> Found:
    """Return a metric of both models' answers, and its values for each question."""
    found = Compared.of(metric, [q.accepted for q in questions], tuned, before)
    metrics = found.tuned.metrics
    if found.base is not None:
        for name, value in found.base.metrics.items():
            metrics[f"{name}Gain"] = metrics[name] - value
            metrics[prefixed("base", name)] = value
    items = found.items(tuple(q.prompt.where for q in questions))
    return Found(metrics, items=items, details=found.details)


def _perplexity(loss: float) -> float:
    return math.exp(min(loss, 700.0))


def _right(
    questions: Sequence[Question], checked: Sequence[int], answers: Sequence[str]
) -> NDArray[np.float64]:
    """Return (N,) whether each checked answer is right, as 1 or 0."""
    return np.array([float(is_right(answers[n], questions[n].expected)) for n in checked])


def _samples(
    questions: Sequence[Question],
    tuned: Sequence[str],
    before: Sequence[str] | None,
    few_shot: Sequence[str],
) -> list[Sample]:
    """Return each question with each model's answer. `few_shot`: those with worked examples; empty:
    there are none."""
    return [
        Sample(
            prompt=question.prompt.question,
            reference=question.reference,
            base=before[i] if before else None,
            tuned=tuned[i],
            expected=question.expected,
            where=question.prompt.where,
            few_shot=few_shot[i] if few_shot else None,
        )
        for i, question in enumerate(questions)
    ]

"""evaluate: what the tuned model can do that the base cannot, on rows that training never saw.

Held-out loss and perplexity of both, answers side by side, and the gates. Leaves `evaluation.json`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from tuneyard.api.stage_settings import EvaluateSettings
from tuneyard.errors import StageError
from tuneyard_trainer.data.prepared import Prepared
from tuneyard_trainer.evaluation.gates import check_gates
from tuneyard_trainer.generation.greedy import continuations
from tuneyard_trainer.models import adapters
from tuneyard_trainer.models.base import load_base, load_tokenizer
from tuneyard_trainer.models.probes import isolates_documents
from tuneyard_trainer.training.losses import Forward
from tuneyard_trainer.worker import StageContext, StageOutcome, Worker

MAX_QUESTIONS = 256
"""Held-out rows with `expected` that are answered, from the start of the file."""
PROMPT_SHARE = 0.5
"""How much of a plain text is given before the model continues it."""


@dataclass(frozen=True)
class Question:
    """A held-out row that is answered. `expected`: any of these in the answer makes it right."""

    prompt: str
    shown: str
    """The prompt without the chat template's markup."""
    reference: str
    expected: tuple[str, ...]
    templated: bool = False
    """Whether the prompt holds a chat template's markup, special tokens included."""


def run(context: StageContext) -> StageOutcome:
    """Measures, writes `evaluation.json`, then checks the gates (StageError GateFailed)."""
    settings = context.settings(EvaluateSettings)
    data = Prepared.open(context.inputs["data"])
    questions = _questions(context.inputs["data"], settings.samples)
    measured = {}
    with _tuned(context.inputs, context.worker) as (model, base):
        context.worker.report(total_steps=2, message="measuring the tuned model")
        measured["tuned"] = _measure(
            model, data, questions, settings, context.inputs, context.worker
        )
        if settings.compare_with_base:
            with base as base_model:
                context.worker.report(step=1, total_steps=2, message="measuring the base model")
                measured["base"] = _measure(
                    base_model, data, questions, settings, context.inputs, context.worker
                )
    metrics = _metrics(measured, questions)
    result = {"metrics": metrics, "samples": _samples(questions, measured, settings.samples)}
    (context.workdir / "evaluation.json").write_text(
        json.dumps(result, indent=2, ensure_ascii=False)
    )
    context.worker.report(step=2, total_steps=2, metrics=metrics)
    check_gates(settings.gates, metrics)
    return StageOutcome(metrics=metrics, details={"samples": result["samples"]})


@contextmanager
def _tuned(inputs: Mapping[str, Path], worker: Worker) -> Iterator[tuple[nn.Module, Any]]:
    """The tuned model, and a context in which there is the base: the same weights with the adapter
    off, or, after full fine-tuning, the base loaded in its turn."""
    weights = inputs["tuned"] / "weights"
    dtype = torch.bfloat16 if worker.device.type == "cuda" else torch.float32

    def load(path: Path) -> PreTrainedModel:
        return load_base(path, dtype=dtype, device=worker.device)

    @contextmanager
    def switched_off(model: nn.Module) -> Iterator[nn.Module]:
        with adapters.disabled(model):
            yield model

    if (weights / "adapter_config.json").exists():
        model = adapters.load(load(inputs["model"]), weights)
        yield model, switched_off(model)
    else:
        yield load(weights), _deferred(lambda: load(inputs["model"]))


@contextmanager
def _deferred(load: Any) -> Iterator[nn.Module]:
    yield load()


@dataclass(frozen=True)
class Measured:
    """One model's figures. `loss`: nats per target."""

    loss: float
    answers: tuple[str, ...]


def _measure(
    model: nn.Module,
    data: Prepared,
    questions: Sequence[Question],
    settings: EvaluateSettings,
    inputs: Mapping[str, Path],
    worker: Worker,
) -> Measured:
    tokenizer = load_tokenizer(inputs["data"] / "tokenizer")
    forward = Forward.of(
        model,
        device=worker.device,
        precision=torch.float32,
        pad=tokenizer.pad_token_id,
        pack=isolates_documents(model),
        max_length=data.max_length,
        max_tokens="auto",
    )
    rows = data.validation
    if rows is None:
        raise StageError(
            "NoHeldOutRows",
            "there are no held-out rows to measure on.",
            advice="Set data.validation.",
        )
    return Measured(
        loss=forward.mean_loss(model, rows, 0, 1),
        answers=continuations(
            model,
            tokenizer,
            [q.prompt for q in questions],
            max_new_tokens=settings.max_new_tokens,
            add_special_tokens=not any(q.templated for q in questions),
        ),
    )


# ---- questions ----------------------------------------------------------------------------


def _questions(folder: Path, samples: int) -> list[Question]:
    """Held-out rows to answer: those with `expected`, then others until there are `samples`."""
    tokenizer = load_tokenizer(folder / "tokenizer")
    with (folder / "validation.jsonl").open() as file:
        questions = [_question(json.loads(line), tokenizer) for line in file]
    checked = [q for q in questions if q.expected][:MAX_QUESTIONS]
    others = [q for q in questions if not q.expected]
    return checked + others[: max(0, samples - len(checked))]


def _question(row: Mapping[str, Any], tokenizer: Any) -> Question:
    expected = tuple(row.get("expected", ()))
    if "messages" in row:
        *turns, answer = row["messages"]
        prompt = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        shown = turns[-1]["content"]
        return Question(prompt, shown, answer["content"], expected, templated=True)
    if "prompt" in row:
        return Question(row["prompt"], row["prompt"], row["completion"], expected)
    words = row["text"].split(" ")
    given = " ".join(words[: max(1, min(32, int(len(words) * PROMPT_SHARE)))])
    return Question(given, given, row["text"][len(given) :].strip()[:500], expected)


# ---- figures ------------------------------------------------------------------------------


def _metrics(measured: Mapping[str, Measured], questions: Sequence[Question]) -> dict[str, float]:
    tuned, base = measured["tuned"], measured.get("base")
    checked = any(q.expected for q in questions)
    metrics = {
        "validationLoss": tuned.loss,
        "validationPerplexity": math.exp(min(tuned.loss, 700.0)),
    }
    if checked:
        metrics["questions"] = float(sum(bool(q.expected) for q in questions))
        metrics["answerAccuracy"] = accuracy(questions, tuned.answers)
    if base is not None:
        metrics["baseValidationLoss"] = base.loss
        metrics["baseValidationPerplexity"] = math.exp(min(base.loss, 700.0))
        metrics["lossReduction"] = 1 - tuned.loss / base.loss if base.loss else 0.0
        if checked:
            metrics["baseAnswerAccuracy"] = accuracy(questions, base.answers)
            metrics["answerAccuracyGain"] = (
                metrics["answerAccuracy"] - metrics["baseAnswerAccuracy"]
            )
    return metrics


def accuracy(questions: Sequence[Question], answers: Sequence[str]) -> float:
    """The share of questions with `expected` whose answer contains one of it, case aside."""
    judged = [
        any(text.casefold() in answer.casefold() for text in question.expected)
        for question, answer in zip(questions, answers, strict=True)
        if question.expected
    ]
    return sum(judged) / len(judged)


def _samples(
    questions: Sequence[Question], measured: Mapping[str, Measured], count: int
) -> list[dict[str, Any]]:
    """`count` questions spread evenly, with what each model answered."""
    if not questions or not count:
        return []
    every = max(1, len(questions) // count)
    return [
        {
            "prompt": questions[i].shown,
            "reference": questions[i].reference,
            "expected": list(questions[i].expected),
            **{name: model.answers[i] for name, model in measured.items()},
        }
        for i in list(range(0, len(questions), every))[:count]
    ]

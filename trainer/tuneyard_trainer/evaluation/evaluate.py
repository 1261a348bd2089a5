"""evaluate: compare the tuned model with its base model on held-out rows.

Measures the loss and the perplexity of both models and their answers to questions, writes
`evaluation.json` and checks the gates. Rows with a retrieved context are also measured without it.
"""

from __future__ import annotations

import gc
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from tuneyard.api.stage_settings import EvaluateSettings
from tuneyard.errors import StageError
from tuneyard_trainer.data.encoding.chat import rendered
from tuneyard_trainer.data.prepared import Prepared, Rows
from tuneyard_trainer.data.reading.conversations import turn_text
from tuneyard_trainer.data.sharing import InStep, SharedStage
from tuneyard_trainer.evaluation.items import Items
from tuneyard_trainer.evaluation.result import finish, spread
from tuneyard_trainer.evaluation.without_context import texts_without_context, tokenized
from tuneyard_trainer.generation.greedy import continuations
from tuneyard_trainer.models import adapters, policies
from tuneyard_trainer.models.base import load_base, load_tokenizer
from tuneyard_trainer.models.probes import isolates_documents
from tuneyard_trainer.reporting.answers import is_right
from tuneyard_trainer.reporting.results import Sample
from tuneyard_trainer.training.losses import Forward
from tuneyard_trainer.worker import StageContext, StageOutcome

STEPS = 2
"""One step for each model, even if the base model is not measured."""
MAX_QUESTIONS = 256
"""Held-out rows with `expected` that the models answer, from the start of the file."""
PROMPT_SHARE = 0.5
"""The share of a plain text that is the prompt; the model continues it."""


@dataclass(frozen=True)
class Question:
    """A held-out row that the models answer."""

    prompt: str
    shown: str
    """The prompt without the chat template's markup."""
    reference: str
    expected: tuple[str, ...]
    """Any of these texts in an answer makes it right, by the rule of `reporting.answers`; empty:
    the answer is not checked."""
    templated: bool = False
    """Whether a chat template rendered the prompt, special tokens included."""


@dataclass(frozen=True)
class HeldOut:
    """Held-out rows, and those of them that the models answer."""

    rows: Rows
    questions: Sequence[Question]


GIVEN = ""
"""The suffix of the metrics of the rows as they are."""
WITHOUT_CONTEXT = "WithoutContext"
"""The suffix of the metrics of rows without their retrieved contexts."""
OF_GAPS = "OfGaps"
"""The suffix of the metrics of held-out documents with a gap, which is their only target."""


def run(context: StageContext) -> StageOutcome:
    """Measure both models, write `evaluation.json` and check the gates.

    The workers share a sharded model, or each of them has the whole model and they share the rows.
    Raises StageError NoHeldOutRows and GateFailed.
    """
    with SharedStage(context.worker) as shared:
        return _run(context, shared)


def _run(context: StageContext, shared: SharedStage) -> StageOutcome:
    settings, worker = context.settings(EvaluateSettings), context.worker
    data = Prepared.open(context.inputs["data"])
    held_out = _held_out(context.inputs["data"], data, settings.samples)
    shards = policies.shards(context, policies.inference_type(worker.device).itemsize)
    models = _models(context, shards, with_base=settings.compare_with_base)
    measured: dict[str, dict[str, Measured]] = {}
    with shared.in_step() if shards > 1 else nullcontext(shared) as sharing:
        for name, model in models:  # enumerate would hold a model while the next one is loaded
            message = f"measuring the {name} model"
            worker.report(step=len(measured), total_steps=STEPS, message=message)
            measured[name] = {
                suffix: _measure(context, model, data.max_length, each, sharing)
                for suffix, each in held_out.items()
            }
            del model
            gc.collect()  # modules are in cycles
    if not worker.is_main:
        return StageOutcome()
    metrics: dict[str, float] = {}
    for suffix, each in held_out.items():
        found = _metrics({name: model[suffix] for name, model in measured.items()}, each.questions)
        metrics |= {f"{name}{suffix}": value for name, value in found.items()}
    items = _items(measured, held_out)
    given = {name: model[GIVEN] for name, model in measured.items()}
    samples = _samples(held_out[GIVEN].questions, given, settings.samples)
    return finish(context, settings.gates, metrics, samples, steps=STEPS, items=items)


def _models(
    context: StageContext, shards: int, *, with_base: bool
) -> Iterator[tuple[str, nn.Module]]:
    """Yield "tuned" and its model, then "base" and its model: the same model with its adapter off,
    or, after full fine-tuning, the loaded base model. `shards`: the workers that share it."""
    device, inputs = context.worker.device, context.inputs
    weights = inputs["tuned"] / "weights"
    dtype = policies.inference_type(device)
    load = partial(load_base, dtype=dtype, device=device, shards=shards)
    if (weights / "adapter_config.json").exists():
        model = adapters.load(load(inputs["model"]), weights)
        yield "tuned", model
        if with_base:
            with adapters.disabled(model):
                yield "base", model
    else:
        yield "tuned", load(weights)
        if with_base:
            yield "base", load(inputs["model"])


@dataclass(frozen=True)
class Measured:
    """The measurements of one model."""

    loss: float
    """Nats per target token."""
    answers: tuple[str, ...]


def _measure(
    context: StageContext,
    model: nn.Module,
    max_length: int,
    held_out: HeldOut,
    sharing: SharedStage | InStep,
) -> Measured:
    rows, questions, worker = held_out.rows, held_out.questions, context.worker
    settings = context.settings(EvaluateSettings)
    tokenizer = load_tokenizer(context.inputs["data"] / "tokenizer")
    forward = Forward.of(
        model,
        device=worker.device,
        precision=torch.float32,
        pad=tokenizer.pad_token_id,
        # The workers of a sharded model must agree, and the probe measures.
        pack=isinstance(sharing, SharedStage) and isolates_documents(model),
        max_length=max_length,
        max_tokens="auto",
    )
    answer = partial(
        continuations,
        model,
        tokenizer,
        max_new_tokens=settings.max_new_tokens,
        add_special_tokens=not any(q.templated for q in questions),
    )
    if isinstance(sharing, InStep):
        loss = forward.mean_loss_of_shards(model, rows, worker)
    else:
        losses = sharing.gather(_share_loss(forward, model, rows, sharing))
        loss = math.fsum(losses) / int(rows.targets.sum())
    prompts = [q.prompt for q in questions]
    answers = sharing.results(
        [len(prompt) for prompt in prompts],
        lambda own: answer([prompts[i] for i in own], before_batch=sharing.check_stop),
    )
    return Measured(loss, tuple(answers))


def _share_loss(forward: Forward, model: nn.Module, rows: Rows, shared: SharedStage) -> float:
    """Return the summed loss of this worker's share of the rows, in nats."""
    total = 0.0
    shared.check_stop()
    for loss in forward.share_losses(model, rows, shared.worker):
        total += loss
        shared.check_stop()
    return total


# ---- questions ----------------------------------------------------------------------------


def _held_out(folder: Path, data: Prepared, samples: int) -> dict[str, HeldOut]:
    """Return the held-out rows by the suffix of their metrics. Raises StageError NoHeldOutRows."""
    if data.validation is None:
        raise StageError(
            "NoHeldOutRows",
            "there are no held-out rows to evaluate on.",
            advice="Set data.validation.",
        )
    tokenizer = load_tokenizer(folder / "tokenizer")
    with (folder / "validation.jsonl").open(encoding="utf-8") as file:
        texts = [json.loads(line) for line in file]
    found = {GIVEN: HeldOut(data.validation, _questions(texts, tokenizer, samples))}
    if bare := texts_without_context(texts):
        rows = tokenized(bare, tokenizer, data.summary["trainOn"], data.max_length)
        found[WITHOUT_CONTEXT] = HeldOut(rows, _questions(bare, tokenizer, 0))
    if data.gaps is not None:
        found[OF_GAPS] = HeldOut(data.gaps, ())
    return found


def _questions(texts: Sequence[Mapping[str, Any]], tokenizer: Any, samples: int) -> list[Question]:
    """Return the rows to answer: those with `expected`, then others up to `samples` in total."""
    questions = [_question(text, tokenizer) for text in texts]
    checked = [q for q in questions if q.expected][:MAX_QUESTIONS]
    others = [q for q in questions if not q.expected]
    return checked + others[: max(0, samples - len(checked))]


def _question(row: Mapping[str, Any], tokenizer: Any) -> Question:
    expected = tuple(row.get("expected", ()))
    if "messages" in row:
        *turns, answer = row["messages"]
        prompt = rendered(tokenizer, turns, tools=row.get("tools", ()))
        shown = turns[-1]["content"]
        return Question(prompt, shown, turn_text(answer), expected, templated=True)
    if "prompt" in row:
        return Question(row["prompt"], row["prompt"], row["completion"], expected)
    words = row["text"].split(" ")
    prompt = " ".join(words[: max(1, min(32, int(len(words) * PROMPT_SHARE)))])
    return Question(prompt, prompt, row["text"][len(prompt) :].strip()[:500], expected)


# ---- metrics ------------------------------------------------------------------------------


def _metrics(measured: Mapping[str, Measured], questions: Sequence[Question]) -> dict[str, float]:
    tuned, base = measured["tuned"], measured.get("base")
    checked = any(q.expected for q in questions)
    metrics = {
        "validationLoss": tuned.loss,
        "validationPerplexity": math.exp(min(tuned.loss, 700.0)),
    }
    if checked:
        metrics["questions"] = float(sum(bool(q.expected) for q in questions))
        metrics["answerAccuracy"] = _accuracy(questions, tuned.answers)
    if base is not None:
        metrics["baseValidationLoss"] = base.loss
        metrics["baseValidationPerplexity"] = math.exp(min(base.loss, 700.0))
        metrics["lossReduction"] = 1 - tuned.loss / base.loss if base.loss else 0.0
        if checked:
            metrics["baseAnswerAccuracy"] = _accuracy(questions, base.answers)
            metrics["answerAccuracyGain"] = (
                metrics["answerAccuracy"] - metrics["baseAnswerAccuracy"]
            )
    return metrics


def _items(
    measured: Mapping[str, Mapping[str, Measured]], held_out: Mapping[str, HeldOut]
) -> dict[str, Items]:
    """Return whether each question was answered right, by metric."""
    found = {}
    for suffix, each in held_out.items():
        ids = tuple(f"question {i + 1}" for i, q in enumerate(each.questions) if q.expected)
        right = {
            name: np.array(_right(each.questions, model[suffix].answers), dtype=np.float64)
            for name, model in measured.items()
        }
        if ids:
            found[f"answerAccuracy{suffix}"] = Items(ids, right["tuned"], right.get("base"), True)
    return found


def _accuracy(questions: Sequence[Question], answers: Sequence[str]) -> float:
    """Return the share of right answers to the questions with `expected`."""
    right = _right(questions, answers)
    return sum(right) / len(right)


def _right(questions: Sequence[Question], answers: Sequence[str]) -> list[bool]:
    """Return whether each answer to a question with `expected` is right."""
    return [
        is_right(answer, question.expected)
        for question, answer in zip(questions, answers, strict=True)
        if question.expected
    ]


def _samples(
    questions: Sequence[Question], measured: Mapping[str, Measured], count: int
) -> list[Sample]:
    """Return `count` questions, evenly spaced, with each model's answer."""
    tuned, base = measured["tuned"], measured.get("base")
    return [
        Sample(
            prompt=questions[i].shown,
            reference=questions[i].reference,
            base=base.answers[i] if base else None,
            tuned=tuned.answers[i],
            expected=questions[i].expected,
        )
        for i in spread(len(questions), count)
    ]

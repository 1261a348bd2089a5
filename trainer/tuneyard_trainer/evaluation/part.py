"""The parts of an evaluation, and what the stage hands to each of them.

A part measures one loaded model after the other, and compares its two measurements once no model is
loaded. A rater compares the completions that a part let both models write.

Shapes: R rows, N items.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from tuneyard_trainer.data.prepared import Rows
from tuneyard_trainer.data.prompts import Prompt
from tuneyard_trainer.data.sharing import InStep, SharedStage
from tuneyard_trainer.evaluation.evidence import Estimate
from tuneyard_trainer.evaluation.items import Items
from tuneyard_trainer.generation.engines import Engine
from tuneyard_trainer.generation.greedy import continuations, token_ids
from tuneyard_trainer.models import probes
from tuneyard_trainer.preference.micro_batches import evaluate_rows, logprobs, row_values
from tuneyard_trainer.reporting.results import Sample
from tuneyard_trainer.training.losses import Forward
from tuneyard_trainer.worker import Worker

M = TypeVar("M")

CAPACITY = 512
"""Bin width of packed prompts with completions, in tokens."""


@dataclass(frozen=True)
class Loaded:
    """A model in evaluation mode."""

    model: Any
    name: str
    """The model's name in messages."""
    worker: Worker
    sharing: SharedStage | InStep
    """How the workers share the rows: each of them has the whole model, or they share it."""
    engine: Engine
    """Completes prompts with the model."""

    @cached_property
    def packs(self) -> bool:
        """Whether several rows may share a bin. The workers of a sharded model must agree, and the
        probe measures: they do not pack."""
        return isinstance(self.sharing, SharedStage) and probes.isolates_documents(self.model)

    def forward(self, pad: int) -> Forward:
        """Return forward passes over prompts with completions. `pad`: the token that fills
        batches."""
        found = Forward.of(
            self.model,
            device=self.worker.device,
            precision=torch.float32,
            pad=pad,
            pack=self.packs,
            max_length=CAPACITY,
            max_tokens="auto",  # a large vocabulary bounds them: of suites, all tokens are targets
        )
        return replace(found, capacity=CAPACITY)

    def row_logprobs(self, rows: Rows, forward: Forward) -> NDArray[np.float64]:
        """Return (R,) the log-probability of each row's targets, summed over the row, in nats. All
        workers call it and share the rows."""
        model, sharing = self.model, self.sharing
        if isinstance(sharing, InStep):
            return evaluate_rows(logprobs, model, rows, forward, self.worker)

        def of(own: list[int]) -> list[float]:
            chosen = np.array(own, dtype=np.int64)
            return row_values(logprobs, model, rows, chosen, forward, sharing.check_stop).tolist()

        return np.array(sharing.results(rows.lengths.tolist(), of))

    def answers(
        self, tokenizer: Any, texts: Sequence[str], *, max_new_tokens: int, templated: bool
    ) -> tuple[str, ...]:
        """Return the greedy continuation of each text. All workers call it and share the texts.
        `templated`: whether a chat template rendered them, special tokens included."""
        encoded = token_ids(tokenizer, texts, add_special_tokens=not templated)
        lengths = [len(ids) for ids in encoded]
        if lengths:
            self.engine.prepare(max(lengths) + max_new_tokens)
        answer = partial(
            continuations,
            self.engine,
            tokenizer,
            max_new_tokens=max_new_tokens,
            add_special_tokens=not templated,
            before_batch=self.sharing.check_stop,
        )
        return tuple(self.sharing.results(lengths, lambda own: answer([texts[i] for i in own])))


@dataclass(frozen=True)
class Found:
    """The findings of a part, or of several."""

    metrics: Mapping[str, float] = field(default_factory=dict)
    samples: Sequence[Sample] = ()
    items: Mapping[str, Items] = field(default_factory=dict)
    """The values of a metric for each item, by the metric's name."""
    details: Mapping[str, Any] = field(default_factory=dict)
    """Recorded beside the samples."""
    answers: Sequence[Sample] = ()
    """All answers of both models to the job's own prompts; `samples` are a few of them."""
    suites: Mapping[str, Any] = field(default_factory=dict)
    """Facts of each suite by its name, such as its items. Recorded apart: names are free."""
    estimates: Mapping[str, Estimate] = field(default_factory=dict)
    """The evidence for metrics that are no mean over items, by the metric's name."""
    suite_answers: Mapping[str, Any] = field(default_factory=dict)
    """What both models answered to the prompts of each suite, by its name."""

    @classmethod
    def merged(cls, parts: Iterable[Found]) -> Found:
        """Return what all parts found together."""
        every = [*parts]
        return cls(
            metrics={name: value for each in every for name, value in each.metrics.items()},
            samples=[sample for each in every for sample in each.samples],
            items={name: value for each in every for name, value in each.items.items()},
            estimates={name: found for each in every for name, found in each.estimates.items()},
            details={name: value for each in every for name, value in each.details.items()},
            answers=[answer for each in every for answer in each.answers],
            suites={name: value for each in every for name, value in each.suites.items()},
            suite_answers={
                name: value for each in every for name, value in each.suite_answers.items()
            },
        )


class Part(Protocol[M]):
    """Something that is measured of each model. All workers call its methods together."""

    def measure(self, loaded: Loaded, tuned: M | None, /) -> M:
        """Measure a loaded model. `tuned`: the measurement of the tuned model, which is measured
        first. None: this is the tuned model. Keep no reference to the model: the next one takes its
        place in memory."""
        ...

    def compare(self, tuned: M | None, before: M | None, /) -> Found:
        """Return what the measurements say, once no model is loaded. None: the model was not
        measured; without a tuned model, a reward model alone is evaluated."""
        ...


@dataclass(frozen=True)
class Answered:
    """The completions of both models of N prompts."""

    prompts: Sequence[Prompt]
    tuned: Sequence[str]
    before: Sequence[str]
    lengths_N: NDArray[np.float64]
    """Length of each completion of the tuned model: in tokens if it was sampled, else in
    characters."""


class Rater(Protocol):
    """Something that compares the completions of both models, once no model is loaded."""

    def rate(self, answered: Answered) -> Found:
        """Return what the completions say. All workers call it together."""
        ...

"""Suites that are measured during training, on the model that is being trained.

They are the parts of an evaluation, on fewer items. A measurement draws no random number and leaves
the weights as they are, so that training goes on as it would without it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from tuneyard.api.stage_settings import ChatSettings, LoopSettings
from tuneyard_trainer.data.sharing import InStep, SharedStage
from tuneyard_trainer.evaluation.part import Loaded
from tuneyard_trainer.evaluation.suites.parts import (
    MAX_LENGTH,
    ChoiceSuite,
    RefusalSuite,
    row_suite,
)
from tuneyard_trainer.generation.engines import TransformersEngine
from tuneyard_trainer.models.base import autocast, load_tokenizer, precision_of
from tuneyard_trainer.models.probes import base_of
from tuneyard_trainer.models.sharding import is_shared, reshard
from tuneyard_trainer.training.losses import Forward
from tuneyard_trainer.worker import StageContext


def suites_of(
    context: StageContext, loop: LoopSettings, model: nn.Module
) -> Callable[[], dict[str, float]]:
    """Return the measurement of a stage's suites on the model that it trains, whose metrics are
    SUITE/METRIC. All workers call it and the measurement together. Raises StageError for rows that
    are no items; the measurement raises Interrupted on all workers if any is asked to stop."""
    data = context.inputs.get("data")
    tokenizer = load_tokenizer(data / "tokenizer" if data else context.inputs["model"])
    suites = []
    for number, suite in enumerate(loop.suites or ()):
        role = f"suite.{number}"
        chat = suite.chat or ChatSettings(system_prompt=None, chat_template=None)
        field = context.stage.inputs[role].path or role
        suites.append(row_suite(context, suite, context.inputs[role], field, tokenizer, chat))
    worker = context.worker
    passes = Forward.of(
        model,
        device=worker.device,
        precision=precision_of(loop, worker),
        pad=int(tokenizer.pad_token_id),
        pack=False,
        max_length=MAX_LENGTH,
        max_tokens=context.stage.runtime.micro_batch_tokens,
    )
    sharing = InStep(worker) if is_shared(model) else SharedStage(worker)
    settings = copy.deepcopy(base_of(model).generation_config)
    engine = TransformersEngine(model, int(tokenizer.pad_token_id))
    trained = _InTraining(model, "the model", worker, sharing, engine, passes, settings)
    return _Measurement(trained, suites)


@dataclass(frozen=True)
class _Measurement:
    """The measurement of suites on a model."""

    model: _InTraining
    suites: Sequence[ChoiceSuite | RefusalSuite]

    def __call__(self) -> dict[str, float]:
        """Return the metrics of all suites."""
        metrics: dict[str, float] = {}
        sharing = self.model.sharing
        with sharing if isinstance(sharing, SharedStage) else nullcontext():
            for suite in self.suites:
                metrics |= suite.compare(suite.measure(self.model, None), None).metrics
        return metrics


@dataclass(frozen=True)
class _InTraining(Loaded):
    """A model that is being trained, in evaluation mode while it is measured."""

    passes: Forward
    """Forward passes in the precision of training and with as many tokens, a row in each bin."""
    generation: Any
    """The model's generation settings at the start. A trainer may change its stop tokens."""

    def forward(self, pad: int) -> Forward:
        return replace(self.passes, pad=pad)

    def answers(
        self, tokenizer: Any, texts: Sequence[str], *, max_new_tokens: int, templated: bool
    ) -> tuple[str, ...]:
        with self._generating(), autocast(self.worker.device, self.passes.precision):
            return super().answers(
                tokenizer, texts, max_new_tokens=max_new_tokens, templated=templated
            )

    @contextmanager
    def _generating(self) -> Iterator[None]:
        base = base_of(self.model)
        now, base.generation_config = base.generation_config, self.generation
        try:
            yield
        finally:
            base.generation_config = now
            reshard(self.model)

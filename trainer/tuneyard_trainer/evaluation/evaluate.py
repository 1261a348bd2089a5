"""evaluate: measure the tuned model and the model before, and compare them.

Each part of the evaluation is a module of its own: held-out rows, held-out preferences, sampled
completions with their reward and win rate, sycophancy. The stage lets every part measure the tuned
model, then the model before, writes what they found to `evaluation.json`, and checks the gates.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import closing, nullcontext
from dataclasses import replace
from typing import Any

from tuneyard.api.earlier import current, current_role
from tuneyard.api.stage_settings import EvaluateSettings
from tuneyard.errors import StageError
from tuneyard_trainer.data.sharing import InStep, SharedStage
from tuneyard_trainer.evaluation.findings import findings
from tuneyard_trainer.evaluation.part import Found, Loaded, Part
from tuneyard_trainer.evaluation.parts import parts_of
from tuneyard_trainer.evaluation.result import finish
from tuneyard_trainer.generation.engines import Engine, TransformersEngine
from tuneyard_trainer.models import adapters, policies
from tuneyard_trainer.models.base import load_tokenizer
from tuneyard_trainer.worker import StageContext, StageOutcome

STEPS = 2
"""One step for each model, even if the model before is not measured."""


def run(context: StageContext) -> StageOutcome:
    """Measure both models, write `evaluation.json` and check the gates.

    The workers share a sharded model, or each of them has the whole model and they share the rows.
    Rank 0 writes. Raises StageError NoHeldOutRows, GateFailed and the errors of a judge or a
    reward.
    """
    stage = context.stage
    inputs = {current_role(stage, role): path for role, path in context.inputs.items()}
    digests = {current_role(stage, role): digest for role, digest in context.digests.items()}
    context = replace(context, stage=current(stage), inputs=inputs, digests=digests)
    with SharedStage(context.worker) as shared:
        return _run(context, shared)


def _run(context: StageContext, shared: SharedStage) -> StageOutcome:
    settings, worker = context.settings(EvaluateSettings), context.worker
    parts = parts_of(context, shared)
    measured: list[list[Any]] = []
    shards = 1
    if "tuned" in context.inputs:
        shards = policies.shards(context, policies.inference_type(worker.device).itemsize)
    with shared.in_step() if shards > 1 else nullcontext(shared) as sharing:
        for loaded in _models(context, sharing, shards):
            message = f"measuring {loaded.name}"
            worker.report(step=len(measured), total_steps=STEPS, message=message)
            tuned = measured[0] if measured else [None] * len(parts)
            measured.append(
                [part.measure(loaded, own) for part, own in zip(parts, tuned, strict=True)]
            )
            del loaded
            gc.collect()  # modules are in cycles
    found = Found.merged(_compared(parts, measured))
    if not worker.is_main:
        return StageOutcome()
    warnings = findings(found)
    for warning in warnings:
        worker.report(step=STEPS, total_steps=STEPS, message=f"warning: {warning}")
    return finish(
        context,
        settings.gates,
        found.metrics,
        found.samples,
        {
            **found.details,
            **({"engine": settings.engine} if settings.engine else {}),
            **({"suites": found.suites} if found.suites else {}),
            **({"findings": warnings} if warnings else {}),
        },
        answers=found.answers,
        steps=STEPS,
        items=found.items,
        estimates=found.estimates,
        suite_answers=found.suite_answers,
    )


def _models(context: StageContext, sharing: SharedStage | InStep, shards: int) -> Iterator[Loaded]:
    """Yield the tuned model, then the model before; nothing without tuned weights. Only one of them
    is in memory: the model before an adapter on the base is the same model with its adapter off.

    `shards`: the workers that share a model.
    """
    worker, inputs = context.worker, context.inputs
    if "tuned" not in inputs:
        return
    start = {"model": inputs["model"]} | ({"tuned": inputs["start"]} if "start" in inputs else {})
    name = "the model before" if "start" in inputs else "the base model"
    compared = context.settings(EvaluateSettings).compare_with_base
    sharing.check_stop()
    model = policies.load_for_inference(inputs, worker.device, shards)
    with closing(_engine(context, model, sharing)) as engine:
        yield Loaded(model, "the tuned model", worker, sharing, engine)
        if not compared:
            return
        sharing.check_stop()
        if "start" not in inputs and adapters.attached(model):
            with adapters.disabled(model):
                yield Loaded(model, name, worker, sharing, engine)
            return
    del model, engine
    gc.collect()
    model = policies.load_for_inference(start, worker.device, shards)
    with closing(_engine(context, model, sharing)) as engine:
        yield Loaded(model, name, worker, sharing, engine)


def _engine(context: StageContext, model: Any, sharing: SharedStage | InStep) -> Engine:
    """Return the stage's engine for a loaded model. Raises StageError EngineUnsupported for vLLM
    and a model that the workers share, which the planner refuses."""
    if context.settings(EvaluateSettings).engine is None:
        tokenizer = load_tokenizer(context.inputs["model"])
        return TransformersEngine(model, int(tokenizer.pad_token_id))
    if isinstance(sharing, InStep):
        raise StageError(
            "EngineUnsupported",
            "evaluate.engine is vllm, which needs the whole model on each worker, and the workers "
            "share the model.",
            advice="Set compute.sharding to none, or remove evaluate.engine.",
        )
    from tuneyard_trainer.generation.vllm import VllmEngine  # an extra

    return VllmEngine(model, sharing)


def _compared(parts: list[Part[Any]], measured: list[list[Any]]) -> Iterator[Found]:
    """Yield what each part found. `measured`: of the tuned model, and of the model before."""
    for index, part in enumerate(parts):
        tuned, before = (measured[m][index] if m < len(measured) else None for m in (0, 1))
        yield part.compare(tuned, before)

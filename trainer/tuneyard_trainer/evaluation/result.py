"""The result of an evaluation stage: `evaluation.json`, with the verdicts on its gates."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from tuneyard.api.evaluation import Gate
from tuneyard.api.plan import StageInput
from tuneyard.api.pods import stage_folder
from tuneyard_trainer.evaluation.evidence import Estimate
from tuneyard_trainer.evaluation.gates import check_gates, judge_gates
from tuneyard_trainer.evaluation.items import MAX_ITEMS, Items
from tuneyard_trainer.reporting.results import Sample
from tuneyard_trainer.worker import StageContext, StageOutcome

EVALUATION = "evaluation.json"


def finish(
    context: StageContext,
    gates: Sequence[Gate],
    metrics: Mapping[str, float],
    samples: Sequence[Sample],
    details: Mapping[str, Any] | None = None,
    *,
    answers: Sequence[Sample] = (),
    steps: int = 1,
    items: Mapping[str, Items] | None = None,
    estimates: Mapping[str, Estimate] | None = None,
    suite_answers: Mapping[str, Any] | None = None,
) -> StageOutcome:
    """Write `evaluation.json`, check the gates and return the stage's outcome.

    `details`: recorded beside the samples. `answers`: all answers, of which `samples` are a few;
    only the file holds them. `steps`: the number of the stage's steps. `items`: the values of each
    item by the metric that is their mean; the gates' evidence. `estimates`: that of other metrics.
    `suite_answers`: to the prompts of suites, in the file alone. Raises StageError GateFailed after
    the file is written and the verdicts are reported.
    """
    items, estimates = items or {}, estimates or {}
    results = judge_gates(gates, metrics, items, estimates)
    shown = {
        "samples": [sample.to_json() for sample in samples],
        "gates": [result.model_dump(mode="json", by_alias=True) for result in results],
        "evidence": {
            **{metric: found.summary() for metric, found in items.items()},
            **{name: found.summary(metrics[name]) for name, found in estimates.items()},
        },
    }
    values = {metric: found.values() for metric, found in items.items()}
    file = context.workdir / EVALUATION
    result = {"metrics": metrics, "inputDigests": context.digests, **shown, "items": values}
    result["answers"] = [answer.to_json() for answer in answers[:MAX_ITEMS]]
    result |= {"suiteAnswers": suite_answers} if suite_answers else {}
    file.write_text(json.dumps(result, indent=2, ensure_ascii=False))
    context.worker.persist(file)  # before the gates: a missed one ends the stage without a record
    context.worker.report(step=steps, total_steps=steps, metrics=metrics, gates=results)
    check_gates(results, _kept(context))
    return StageOutcome(metrics, details={**shown, **(details or {})}, contents=(EVALUATION,))


def _kept(context: StageContext) -> str:
    """Return a clause on where the measured model is."""
    inputs = context.stage.inputs
    trained = inputs.get("tuned") or inputs.get("reward")
    if not isinstance(trained, StageInput):
        return "the model is not of this job"
    return f"the model is kept in {stage_folder(trained.stage)}/weights of the output"


def spread(total: int, count: int) -> list[int]:
    """Return at most `count` indices below `total`, evenly spaced from 0."""
    return list(range(0, total, max(1, total // count)))[:count] if count else []

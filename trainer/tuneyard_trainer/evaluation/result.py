"""The result of an evaluation: `evaluation.json`, whose metrics the gates check."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from tuneyard.api.evaluation import Gate
from tuneyard_trainer.evaluation.gates import check_gates
from tuneyard_trainer.evaluation.items import Items
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
    steps: int = 1,
    items: Mapping[str, Items] | None = None,  # noqa: ARG001  for gates
) -> StageOutcome:
    """Write `evaluation.json`, check the gates and return the stage's outcome.

    `details`: recorded beside the samples. `steps`: the number of the stage's steps. `items`: the
    values of a metric for each item, by the metric's name. Raises StageError GateFailed after the
    file is written.
    """
    shown = [asdict(sample) for sample in samples]
    result = {"metrics": metrics, "samples": shown}
    file = context.workdir / EVALUATION
    file.write_text(json.dumps(result, indent=2, ensure_ascii=False))
    context.worker.persist(file)  # before the gates: a missed one ends the stage without a record
    context.worker.report(step=steps, total_steps=steps, metrics=metrics)
    check_gates(gates, metrics)
    return StageOutcome(
        metrics, details={"samples": shown, **(details or {})}, contents=(EVALUATION,)
    )


def spread(total: int, count: int) -> list[int]:
    """Return at most `count` indices below `total`, evenly spaced from 0."""
    return list(range(0, total, max(1, total // count)))[:count] if count else []

"""The measurements of a model as `model-index`, the metadata of model cards on the hub."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from huggingface_hub import EvalResult
from huggingface_hub.repocard_data import eval_results_to_model_index

HELD_OUT = "held-out rows"
"""The name of the data set of metrics that are of no suite."""
TYPES = {
    "validationLoss": "loss",
    "validationPerplexity": "perplexity",
    "answerAccuracy": "accuracy",
    "exactMatch": "exact_match",
    "tokenF1": "f1",
    "rouge1": "rouge",
    "rouge2": "rouge",
    "rougeL": "rouge",
    "bleu": "bleu",
    "chrf": "chrf",
    "jsonValid": "json_valid",
    "schemaValid": "schema_valid",
    "patternMatch": "pattern_match",
    "classAccuracy": "accuracy",
    "macroF1": "f1",
    "numericMatch": "accuracy",
    "preferenceAccuracy": "preference_accuracy",
    "rewardAccuracy": "reward_accuracy",
    "winRate": "win_rate",
    "lengthControlledWinRate": "length_controlled_win_rate",
}
"""The types of metrics, as the hub's `evaluate` names them where it has them."""


def model_index(name: str, task: str, metrics: Mapping[str, float]) -> list[dict[str, Any]]:
    """Return the value of `model-index`; []: nothing was measured.

    `task`: the hub's task, such as text-generation. `metrics`: of the evaluation. Those of the
    model before and differences are left out: the metadata is about this model.
    """
    found = list(_results(task, metrics))
    if not found:
        return []
    index: list[dict[str, Any]] = eval_results_to_model_index(name, found)
    return index


def _results(task: str, metrics: Mapping[str, float]) -> Iterator[EvalResult]:
    for metric, value in metrics.items():
        suite, _, name = metric.rpartition("/")
        kind = TYPES.get(name)
        if suite:
            kind = None if name.startswith("base") or name.endswith("Change") else kind or name
        if kind is None or not math.isfinite(value):
            continue
        yield EvalResult(
            task_type=task,
            dataset_name=suite or HELD_OUT,
            dataset_type=suite or "held-out",
            metric_type=kind,
            metric_name=name,
            metric_value=round(value, 6),
        )

"""Metrics that compare the answers of a model with reference texts."""

from __future__ import annotations

from typing import Literal

AnswerMetric = Literal[
    "exactMatch", "tokenF1", "rouge", "bleu", "chrf", "json", "classification", "numeric"
]
"""The metrics of answers that a manifest can name (docs/task-metrics.md).

- exactMatch: whether an answer equals its reference, apart from case, punctuation and articles.
- tokenF1: F1 of the words of answer and reference.
- rouge: ROUGE-1, ROUGE-2 and ROUGE-L. bleu, chrf: BLEU and chrF, 0 to 100.
- json: whether an answer is JSON.
- classification: accuracy and macro F1, where the reference names the class.
- numeric: whether the final answer is equal to the reference, as a number or an expression.
"""

MEASURES: dict[AnswerMetric, tuple[str, ...]] = {
    "exactMatch": ("exactMatch",),
    "tokenF1": ("tokenF1",),
    "rouge": ("rouge1", "rouge2", "rougeL"),
    "bleu": ("bleu", "sentenceBleu"),
    "chrf": ("chrf", "sentenceChrf"),
    "json": ("jsonValid",),
    "classification": ("classAccuracy", "macroF1"),
    "numeric": ("numericMatch",),
}
"""The metrics that each of them measures."""
MEASURED_BY: dict[str, AnswerMetric] = {
    metric: name for name, metrics in MEASURES.items() for metric in metrics
}
"""The name in the manifest that measures a metric, by the metric's name."""
OF_ALL_ANSWERS = frozenset({"bleu", "chrf", "macroF1"})
"""Metrics of all answers together, which are no mean of values of single answers."""
WITHOUT_REFERENCE: frozenset[AnswerMetric] = frozenset({"json"})
"""The metrics that need no reference."""
